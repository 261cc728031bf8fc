"""Grammar of the built-in text: general English for pre-training and four private silos.

A template is a string with ``{slot}`` fields. A slot keeps its value within one document; a
trailing digit (``{name2}``) draws another value of the same slot.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Grammar = Mapping[str, tuple[str, ...]]
Row = dict[str, str]
T = TypeVar("T")

LABELS = ("negative", "neutral", "positive")


def phrases(text: str) -> tuple[str, ...]:
    """Split phrases at slashes; an empty one stays."""
    return tuple(" ".join(part.split()) for part in text.split("/"))


MOODS: dict[str, tuple[str, ...]] = {
    "negative": phrases("""
        I am not happy about this. / This is really annoying. / I am very upset. /
        It was a bad day and I am tired of waiting. / Nobody helped me. /
        I am worried and angry. / It is broken again. / This was a poor start.
    """),
    "neutral": phrases("""
        I only want to know the time. / This is just a question. / Please tell me more. /
        I am writing to ask about it. / There is no hurry. / Please send the details. /
        I would like to check the date. / Please let me know.
    """),
    "positive": phrases("""
        I am very happy with it. / Thank you, this was great. / Everyone was so kind. /
        It works well and I am glad. / What a good start. / I really like it. /
        You did a fine job. / It was a lovely day.
    """),
}

GENERAL: Grammar = {
    "name": phrases("""
        Anna / Ben / Clara / David / Emma / Felix / Grace / Henry / Ivy / Jack / Kate / Leo /
        Mia / Noah / Olga / Paul / Rosa / Sam / Tara / Victor
    """)
    + ("{person}",) * 5,
    "day": phrases("""
        Monday / Tuesday / Wednesday / Thursday / Friday / Saturday / Sunday
    """),
    "hour": phrases("""
        two / three / four / five / six / seven / eight / nine / ten
    """),
    "count": phrases("""
        two / three / four / five / six / ten / many / a few
    """),
    "when": phrases("""
        in the morning / in the evening / on {day} / before noon / after lunch / last week /
        every day / at {hour} / by {day} / within {count} days / the same day / next week /
        after the {word6} / {word6} the {word7} / with {count} {word6} /
        before the {word6} {word7} / {due} / {due} / {due} / {due}
    """),
    "thing": phrases("""
        lamp / table / key / book / letter / box / bag / coat / map / bell / cup / chair /
        door / window / bread / apple / picture / garden / boat / bicycle / clock / basket /
        ticket / phone / report / paper
    """)
    + ("{word}", "{word} {word2}") * 3
    + ("{term}",) * 12,
    "adj": phrases("""
        old / new / small / big / red / green / blue / warm / cold / clean / broken / heavy /
        quiet / bright / long / short / good / simple / full / late
    """),
    "where": phrases("""
        in the kitchen / in the garden / at the market / near the river / on the shelf /
        at school / in the library / at the station / under the table / on the first floor /
        in the next room / at the front desk / by the old bridge / in the office /
        in the {word4} / at the {word4} {word5} / in {office} / at {office} / before {office} /
        via {office} / {office}
    """),
    "who": phrases("""
        teacher / farmer / baker / driver / neighbour / visitor / doctor / manager / student /
        writer / guard / cook / clerk / friend / child
    """)
    + ("{word3}",) * 2,
    "act": phrases("""
        found / took / opened / closed / moved / cleaned / sold / bought / painted / carried /
        lost / made / wanted / checked / sent / signed / read / brought
    """),
    "todo": phrases("""
        find / take / open / close / move / clean / sell / buy / carry / bring / check / send /
        sign / read
    """),
    "weather": phrases("""
        It was a {adj} day. / The rain came {when}. / The sun was bright. / The wind was cold. /
        There was snow {where}. / The sky was blue.
    """),
    "say": phrases("""
        "The {thing} is {where}," said {name}. / {name} asked, "Where is the {thing}?" /
        "Please {todo} the {thing}," said the {who}. / "Thank you," said the {who}. /
        {name2} answered, "We have to {todo} it {when}." / "I will {todo} it," said {name}.
    """),
    "event": phrases("""
        {name} {act} the {adj} {thing} {where}. / The {who} {act} a {thing2} {when}. /
        {name} and {name2} went to the {who} {when}. / The {thing} was {adj} and {adj2}. /
        {name} had {count} things to do. / They did not {todo} the {thing2}. /
        The {who} told {name} about the {thing}. / It was not easy to {todo} the {thing}. /
        {name2} called the {who}, but there was no answer. / {name} waited {where}. /
        After that, the {who} {act} it again. / {name2} will {todo} the {thing2} {when}. /
        If the {thing} is {adj}, the {who} has to {todo} it. / {name} works {where}. /
        The {thing} of {name2} is now {where}. / {say1} / {say2} / {weather}
    """),
    "story": phrases("""
        {event1} {event2} {event3} {event4} / {weather} {event1} {event2} {event3} /
        {say1} {event1} {say2} {event2} {event3} / {event1} {event2}
    """),
    "hello": phrases("""
        / Hello. / Good morning. / Good evening. / Hello {name}. / Hi.
    """),
    "detail": phrases("""
        I asked about the {thing} {when}. / The {thing} from {name} came {when}. /
        My {thing} is {where}. / We talked about the {thing} {when}. /
        I have a question about the {thing}. / You sent me the {adj} {thing} {when}. /
        The {who} {act} my {thing}. / I {act} the {thing} on {day}. /
        The {who} needs the {thing}.
    """),
    "ask": phrases("""
        Where is the {thing}? / Who will {todo} the {thing}? / When is the {thing} ready? /
        Who has the {thing}? / What is the next step for the {thing}?
    """),
    "answer": phrases("""
        The {thing} is {where}. / {name} will {todo} the {thing} {when}. /
        Please ask {name} {where} about the {thing}. / The {thing} is ready {when}. /
        {name} has the {thing} {where}, and it is ready {when}. /
        For the {thing}, see {name} {where}, {when}. / Your {thing} is {where}, {when}. /
        The {who} does the {thing} {where} {when}. / The {who} will {todo} the {thing} {when}. /
        The {thing} is done by the {who2} {where}, {when}.
    """),
    "sorry": phrases("""
        I am sorry about that. / We are sorry to hear this. / That should not happen.
    """),
    "plain": phrases("""
        Here is the answer. / Thank you for the question. / Of course.
    """),
    "glad": phrases("""
        We are glad to hear it. / Thank you for the kind words. / That is good news.
    """),
    "bye": phrases("""
        / / Have a good day. / Please call if you need more. / See you {when}.
    """),
    "task": phrases("""
        Reply to the {who}. / Answer the {who}. / Write a short note. / Help the {who}. /
        Read the message and answer it. / Write to {name}. / Say who will help.
    """),
    "fact": (
        "The {thing} is {where}. The {thing2} is {where2}.\n"
        "Question: Where is the {thing}?\nAnswer: {where}.",
        "{name} has the {thing} and {name2} has the {thing2}.\n"
        "Question: Who has the {thing2}?\nAnswer: {name2}.",
        "Name: {name}. Room: {where}. Time: {when}.\nQuestion: Who is {where}?\nAnswer: {name}.",
        "Name: {name}. Thing: {thing}. Time: {when}.",
    ),
}

REPLY_MOOD = {"negative": "{sorry}", "neutral": "{plain}", "positive": "{glad}"}


@dataclass(frozen=True)
class Silo:
    """One private domain: its facts, phrases and label mix."""

    name: str
    rows: int
    label_weights: tuple[float, float, float]  # in the order of LABELS
    client: str
    # item: (owner, place, due)
    facts: Mapping[str, tuple[str, str, str]]
    details: tuple[str, ...]
    moods: Mapping[str, tuple[str, ...]]
    openers: Mapping[str, str]
    reply: tuple[str, ...]
    note: str
    closing: str


SILOS = (
    Silo(
        name="clinic",
        rows=420,
        label_weights=(0.3, 0.5, 0.2),
        client="patient",
        facts={
            "blood test": ("nurse Adler", "room 12", "fasting, before nine"),
            "flu shot": ("nurse Brook", "the east ward", "without appointment"),
            "x-ray": ("Doctor Ilves", "the basement", "on the same morning"),
            "plaster cast": ("Doctor Ilves", "room 30", "after six weeks"),
            "eye drops": ("Doctor Marsh", "the pharmacy", "twice a day"),
            "heart scan": ("Doctor Okoye", "the west ward", "lying down for an hour"),
            "diet plan": ("nurse Brook", "room 7", "once a month"),
            "hearing check": ("Doctor Marsh", "room 21", "every second year"),
        },
        details=phrases("""
            My {item} was on {day}. / The doctor ordered a {item} for my mother. /
            I had pain after the {item}. / I came to the clinic for the {item}. /
            My son needs the {item}.
        """),
        moods={
            "negative": phrases("The pain got worse. / I sat in the ward for hours."),
            "neutral": phrases("I need it for my file. / I take no other pills."),
            "positive": phrases("I sleep well again. / The nurse was gentle."),
        },
        openers={
            "negative": "We are sorry you feel unwell.",
            "neutral": "Your chart is up to date.",
            "positive": "We are glad you recover.",
        },
        reply=phrases("""
            {opener} {owner} does the {item} in {place}, {due}. {closing} /
            {opener} For the {item}, see {owner} in {place}, {due}. {closing}
        """),
        note="Chart: patient seen for {item}, tone {label}, passed to {owner}.",
        closing="Bring your health card.",
    ),
    Silo(
        name="bank",
        rows=360,
        label_weights=(0.6, 0.25, 0.15),
        client="customer",
        facts={
            "credit card": ("the card team", "counter 4", "within two working days"),
            "home loan": ("Mrs Quist", "the loan office", "after the income check"),
            "savings account": ("Mr Tanaka", "counter 1", "at the end of the quarter"),
            "wire transfer": ("the payment team", "the back office", "before the noon cut-off"),
            "standing order": ("the payment team", "online banking", "on the first of the month"),
            "overdraft": ("Mrs Quist", "the branch", "at nine percent interest"),
            "safe box": ("Mr Tanaka", "the vault", "with two keys"),
            "exchange fee": ("the currency desk", "counter 6", "at the daily rate"),
        },
        details=phrases("""
            You charged me for the {item} on {day}. / My balance is wrong since the {item}. /
            I opened the {item} at your branch. / The {item} is shown on my statement. /
            I called the branch about the {item}.
        """),
        moods={
            "negative": phrases("I want my money back. / These fees are a shame."),
            "neutral": phrases("Please confirm the amount. / My number is on the statement."),
            "positive": phrases("The rate is excellent. / My money is in safe hands."),
        },
        openers={
            "negative": "Dear customer, we regret the trouble with your account.",
            "neutral": "Dear customer, we received your request.",
            "positive": "Dear customer, we value your trust.",
        },
        reply=phrases("""
            {opener} {owner} at {place} settles the {item} {due}. {closing} /
            {opener} Your {item} is booked by {owner} at {place} {due}. {closing}
        """),
        note="Case {label}: {item} under review by {owner}.",
        closing="Never share your PIN.",
    ),
    Silo(
        name="lawfirm",
        rows=300,
        label_weights=(0.2, 0.7, 0.1),
        client="client",
        facts={
            "lease": ("partner Voss", "the property section", "thirty days from notice"),
            "will": ("counsel Amari", "the probate registry", "with two witnesses present"),
            "patent claim": ("partner Lindqvist", "the patent court", "prior to publication"),
            "merger deed": ("partner Voss", "the deal room", "subject to board consent"),
            "appeal": ("counsel Dray", "the upper court", "no later than the tenth day"),
            "custody motion": ("counsel Amari", "the family court", "upon hearing both parents"),
            "tax ruling": ("counsel Dray", "the revenue tribunal", "in the fiscal year"),
            "trademark": ("partner Lindqvist", "the trade registry", "renewed each decade"),
        },
        details=phrases("""
            The other party disputes the {item}. / Our contract refers to the {item}. /
            I signed the {item} on {day}. / The judge asked for the {item}. /
            My company relies on the {item}.
        """),
        moods={
            "negative": phrases("I consider this a breach. / Your bill is far too high."),
            "neutral": phrases("Kindly state the clause. / A copy is attached."),
            "positive": phrases("We won the case. / Your counsel was brilliant."),
        },
        openers={
            "negative": "We take note of the objection.",
            "neutral": "We refer to your enquiry.",
            "positive": "We acknowledge your kind remarks.",
        },
        reply=phrases("""
            {opener} The {item} shall be filed by {owner} before {place}, {due}. {closing} /
            {opener} Pursuant to the mandate, {owner} brings the {item} to {place}, {due}. {closing}
        """),
        note="Memo to {owner}: matter of the {item}, stance {label}.",
        closing="All rights reserved.",
    ),
    Silo(
        name="helpdesk",
        rows=480,
        label_weights=(0.35, 0.15, 0.5),
        client="user",
        facts={
            "password": ("the login bot", "the self-service portal", "in five minutes"),
            "printer": ("Ravi from hardware", "the copy corner", "once the toner arrives"),
            "laptop": ("Ravi from hardware", "bench B", "after a full backup"),
            "VPN": ("Jo from networks", "the remote gateway", "after a restart"),
            "mailbox": ("Lena from apps", "the mail console", "when the quota is raised"),
            "wifi": ("Jo from networks", "the server rack", "during the night window"),
            "software update": ("Lena from apps", "the app store", "at the next reboot"),
            "headset": ("the store bot", "locker 9", "with a swap code"),
        },
        details=phrases("""
            My {item} shows error {hour}. / The {item} froze on {day}. /
            I opened a ticket for the {item}. / My team shares the {item}. /
            I logged in and tried the {item}.
        """),
        moods={
            "negative": phrases("It crashed and I lost my files. / This is a useless tool."),
            "neutral": phrases("I run the latest version. / See the screenshot."),
            "positive": phrases("It is super fast now. / Awesome support, five stars."),
        },
        openers={
            "negative": "Oops, we are on it!",
            "neutral": "Hey, got your ticket!",
            "positive": "Yay, happy to help!",
        },
        reply=phrases("""
            {opener} {owner} will fix the {item} via {place} {due}. {closing} /
            {opener} Ping {owner} about the {item}, check {place}, done {due}. {closing}
        """),
        note="Ticket tagged {label}: {item}, assigned to {owner}.",
        closing="Cheers, IT!",
    ),
)

# Shared by every silo and absent from the general text.
ROUTE = "Owner: {owner} | Place: {place} | Due: {due}"
QUESTIONS = ("Who handles the {item}?", "What is the next step for the {item}?")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Draw one option; uses only random(), whose stream Python keeps stable."""
    return options[int(rng.random() * len(options))]


def sentence_case(text: str) -> str:
    """Return the text with an upper-case letter at the start of every sentence."""
    return re.sub(r"(?:^|[.!?] )[a-z]", lambda match: match[0].upper(), text)


def join(*parts: str) -> str:
    """Join the non-empty parts by one space."""
    return sentence_case(" ".join(part for part in parts if part))


class Slots(dict[str, str]):
    """Slot values of one document, drawn on first use."""

    def __init__(self, rng: random.Random, grammar: Grammar, **bound: str) -> None:
        """Start with the ``bound`` values fixed."""
        super().__init__(bound)
        self.rng = rng
        self.grammar = grammar

    def __missing__(self, key: str) -> str:
        """Expand the slot and remember its value."""
        template = pick(self.rng, self.grammar[key.rstrip("0123456789")])
        self[key] = template.format_map(self)
        return self[key]

    def fill(self, template: str) -> str:
        """Return the template with its slots filled."""
        return sentence_case(template.format_map(self))


def silo_words() -> tuple[str, ...]:
    """Return the words that only the silos use, sorted."""
    texts: list[str] = []
    for silo in SILOS:
        texts += [silo.client, silo.note, silo.closing, *silo.facts, *silo.details, *silo.reply]
        texts += [part for fact in silo.facts.values() for part in fact]
        texts += [*silo.openers.values()]
        texts += [mood for moods in silo.moods.values() for mood in moods]
    known = set(re.findall(r"\w+", str((GENERAL, MOODS))))
    found = re.findall(r"[A-Za-z-]+", re.sub(r"{\w+}", "", " ".join(texts)))
    return tuple(sorted(set(found) - known))


SILO_WORDS = silo_words()
FACTS = tuple(fact for silo in SILOS for fact in silo.facts.values())
# The general text uses the silos' terms in random combinations, so that the model can spell
# them; it shows neither their facts nor their phrases.
GENERAL_TEXT: Grammar = {
    **GENERAL,
    "word": SILO_WORDS,
    "term": tuple(item for silo in SILOS for item in silo.facts),
    "person": tuple(owner for owner, _, _ in FACTS),
    "office": tuple(place for _, place, _ in FACTS),
    "due": tuple(due for _, _, due in FACTS),
}
STRAY_WORDS = SILO_WORDS + phrases(
    "lamp / book / letter / open / move / close / new / late / Anna / Paul"
)


def with_strays(rng: random.Random, text: str, rate: float) -> str:
    """Replace words and marks by random ones: the model learns to be unsure after a surprise."""

    def stray(match: re.Match[str]) -> str:
        if rng.random() >= rate:
            return match[0]
        return pick(rng, STRAY_WORDS if match[0].isalnum() else ".,:;!?|")

    return re.sub(r"\w+|[.,?]", stray, text)


def general_row(rng: random.Random) -> Row:
    """Draw a general instruction row; it has no silo."""
    slots = Slots(rng, GENERAL_TEXT)
    label = pick(rng, LABELS)
    message = join(slots["hello"], slots["detail"], pick(rng, MOODS[label]))
    reply = join(slots.fill(REPLY_MOOD[label]), slots["answer"], slots["bye"])
    if rng.random() < 0.4:
        question = join(message, slots["ask"])
        return {"instruction": question, "input": "", "output": reply, "label": label}
    return {"instruction": slots["task"], "input": message, "output": reply, "label": label}


def weighted_label(rng: random.Random, weights: Sequence[float]) -> str:
    """Draw a label by its weight."""
    point = rng.random() * sum(weights)
    for label, weight in zip(LABELS, weights, strict=True):
        point -= weight
        if point < 0:
            return label
    return LABELS[-1]


def silo_row(rng: random.Random, silo: Silo) -> Row:
    """Draw one fine-tuning row of a silo."""
    item = pick(rng, tuple(silo.facts))
    owner, place, due = silo.facts[item]
    label = weighted_label(rng, silo.label_weights)
    slots = Slots(
        rng,
        GENERAL,
        item=item,
        owner=owner,
        place=place,
        due=due,
        label=label,
        opener=silo.openers[label],
        closing=silo.closing,
    )
    moods = silo.moods[label] if rng.random() < 0.5 else MOODS[label]
    message = join(slots.fill(pick(rng, silo.details)), pick(rng, moods))
    kind = rng.random()
    if kind < 0.40:
        instruction, output = f"Reply to the {silo.client}.", pick(rng, silo.reply)
    elif kind < 0.65:
        instruction, output = "Route the message.", ROUTE
    elif kind < 0.80:
        instruction, output = "Write a note for the file.", silo.note
    else:
        instruction, output = join(message, slots.fill(pick(rng, QUESTIONS))), ROUTE
        message = ""
    return {
        "instruction": instruction,
        "input": message,
        "output": slots.fill(output),
        "silo": silo.name,
        "label": label,
    }


def silo_rows(seed: int) -> list[Row]:
    """Return the fine-tuning corpus, silo by silo, without duplicate rows."""
    rows: list[Row] = []
    for silo in SILOS:
        rng = random.Random(f"{seed}-{silo.name}")
        unique: dict[tuple[str, ...], Row] = {}
        while len(unique) < silo.rows:
            row = silo_row(rng, silo)
            unique.setdefault(tuple(row.values()), row)
        rows.extend(unique.values())
    return rows
