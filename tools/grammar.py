"""Grammar of the built-in text: general English for pre-training and four private silos.

A template is a string with ``{slot}`` fields. A slot keeps its value within one document; a
trailing digit (``{name2}``) draws another value of the same slot.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Grammar = Mapping[str, tuple[str, ...]]
Row = dict[str, str]
T = TypeVar("T")

LABELS = ("negative", "neutral", "positive")


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of slot values."""
    return tuple(part.strip() for part in text.split(","))


MOODS: dict[str, tuple[str, ...]] = {
    "negative": (
        "I am not happy about this.", "This is really annoying.", "I am very upset.",
        "It was a bad day and I am tired of waiting.", "Nobody helped me.",
        "I am worried and angry.", "It is broken again.", "This was a poor start.",
    ),
    "neutral": (
        "I only want to know the time.", "This is just a question.", "Please tell me more.",
        "I am writing to ask about it.", "There is no hurry.", "Please send the details.",
        "I would like to check the date.", "Please let me know.",
    ),
    "positive": (
        "I am very happy with it.", "Thank you, this was great.", "Everyone was so kind.",
        "It works well and I am glad.", "What a good start.", "I really like it.",
        "You did a fine job.", "It was a lovely day.",
    ),
}

GENERAL: Grammar = {
    "name": words(
        "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ivy, Jack, Kate, Leo, Mia, Noah, "
        "Olga, Paul, Rosa, Sam, Tara, Victor"
    ),
    "day": words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "hour": words("two, three, four, five, six, seven, eight, nine, ten"),
    "count": words("two, three, four, five, six, ten, many, a few"),
    "when": (
        "in the morning", "in the evening", "on {day}", "before noon", "after lunch", "last week",
        "every day", "at {hour}", "by {day}", "within {count} days", "the same day", "next week",
    ),
    "thing": words(
        "lamp, table, key, book, letter, box, bag, coat, map, bell, cup, chair, door, window, "
        "bread, apple, picture, garden, boat, bicycle, clock, basket, ticket, phone, report, paper"
    ),
    "adj": words(
        "old, new, small, big, red, green, blue, warm, cold, clean, broken, heavy, quiet, bright, "
        "long, short, good, simple, full, late"
    ),
    "where": (
        "in the kitchen", "in the garden", "at the market", "near the river", "on the shelf",
        "at school", "in the library", "at the station", "under the table", "on the first floor",
        "in the next room", "at the front desk", "by the old bridge", "in the office",
    ),
    "who": words(
        "teacher, farmer, baker, driver, neighbour, visitor, doctor, manager, student, writer, "
        "guard, cook, clerk, friend, child"
    ),
    "act": words(
        "found, took, opened, closed, moved, cleaned, sold, bought, painted, carried, lost, made, "
        "wanted, checked, sent, signed, read, brought"
    ),
    "todo": words(
        "find, take, open, close, move, clean, sell, buy, carry, bring, check, send, sign, read"
    ),
    "weather": (
        "It was a {adj} day.", "The rain came {when}.", "The sun was bright.",
        "The wind was cold.", "There was snow {where}.", "The sky was blue.",
    ),
    "say": (
        '"The {thing} is {where}," said {name}.', '{name} asked, "Where is the {thing}?"',
        '"Please {todo} the {thing}," said the {who}.', '"Thank you," said the {who}.',
        '{name2} answered, "We have to {todo} it {when}."', '"I will {todo} it," said {name}.',
    ),
    "event": (
        "{name} {act} the {adj} {thing} {where}.", "The {who} {act} a {thing2} {when}.",
        "{name} and {name2} went to the {who} {when}.", "The {thing} was {adj} and {adj2}.",
        "{name} had {count} things to do.", "They did not {todo} the {thing2}.",
        "The {who} told {name} about the {thing}.", "It was not easy to {todo} the {thing}.",
        "{name2} called the {who}, but there was no answer.", "{name} waited {where}.",
        "After that, the {who} {act} it again.", "{name2} will {todo} the {thing2} {when}.",
        "If the {thing} is {adj}, the {who} has to {todo} it.", "{name} works {where}.",
        "The {thing} of {name2} is now {where}.", "{say1}", "{say2}", "{weather}",
    ),
    "story": (
        "{event1} {event2} {event3} {event4}", "{weather} {event1} {event2} {event3}",
        "{say1} {event1} {say2} {event2} {event3}", "{event1} {event2}",
    ),
    "hello": ("Hello.", "Good morning.", "Good evening.", "Hello {name}.", "Hi.", ""),
    "detail": (
        "I asked about the {thing} {when}.", "The {thing} from {name} came {when}.",
        "My {thing} is {where}.", "We talked about the {thing} {when}.",
        "I have a question about the {thing}.", "You sent me the {adj} {thing} {when}.",
    ),
    "ask": (
        "Where is the {thing}?", "Who will {todo} the {thing}?", "When is the {thing} ready?",
        "Who has the {thing}?", "What is the next step for the {thing}?",
    ),
    "answer": (
        "The {thing} is {where}.", "{name} will {todo} the {thing} {when}.",
        "Please ask {name} {where} about the {thing}.", "The {thing} is ready {when}.",
        "{name} has the {thing} {where}, and it is ready {when}.",
    ),
    "sorry": ("I am sorry about that.", "We are sorry to hear this.", "That should not happen."),
    "plain": ("Here is the answer.", "Thank you for the question.", "Of course."),
    "glad": ("We are glad to hear it.", "Thank you for the kind words.", "That is good news."),
    "bye": ("Have a good day.", "Please call if you need more.", "See you {when}.", "", ""),
    "task": (
        "Reply to the {who}.", "Answer the {who}.", "Write a short note.", "Help the {who}.",
        "Read the message and answer it.", "Write to {name}.", "Say who will help.",
    ),
    "fact": (
        "The {thing} is {where}. The {thing2} is {where2}.\nQuestion: Where is the {thing}?\n"
        "Answer: {where}.",
        "{name} has the {thing} and {name2} has the {thing2}.\nQuestion: Who has the {thing2}?\n"
        "Answer: {name2}.",
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
        name="clinic", rows=420, label_weights=(0.30, 0.50, 0.20), client="patient",
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
        details=(
            "My {item} was on {day}.", "The doctor ordered a {item} for my mother.",
            "I had pain after the {item}.", "I came to the clinic for the {item}.",
            "My son needs the {item}.",
        ),
        moods={
            "negative": ("The pain got worse.", "I sat in the ward for hours."),
            "neutral": ("I need it for my file.", "I take no other pills."),
            "positive": ("I sleep well again.", "The nurse was gentle."),
        },
        openers={
            "negative": "We are sorry you feel unwell.",
            "neutral": "Your chart is up to date.",
            "positive": "We are glad you recover.",
        },
        reply=(
            "{opener} {Owner} does the {item} in {place}, {due}. {closing}",
            "{opener} For the {item}, see {owner} in {place}, {due}. {closing}",
        ),
        note="Chart: patient seen for {item}, tone {label}, passed to {owner}.",
        closing="Bring your health card.",
    ),
    Silo(
        name="bank", rows=360, label_weights=(0.60, 0.25, 0.15), client="customer",
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
        details=(
            "You charged me for the {item} on {day}.", "My balance is wrong since the {item}.",
            "I opened the {item} at your branch.", "The {item} is shown on my statement.",
            "I called the branch about the {item}.",
        ),
        moods={
            "negative": ("I want my money back.", "These fees are a shame."),
            "neutral": ("Please confirm the amount.", "My number is on the statement."),
            "positive": ("The rate is excellent.", "My money is in safe hands."),
        },
        openers={
            "negative": "Dear customer, we regret the trouble with your account.",
            "neutral": "Dear customer, we received your request.",
            "positive": "Dear customer, we value your trust.",
        },
        reply=(
            "{opener} {Owner} at {place} settles the {item} {due}. {closing}",
            "{opener} Your {item} is booked by {owner} at {place} {due}. {closing}",
        ),
        note="Case {label}: {item} under review by {owner}.",
        closing="Never share your PIN.",
    ),
    Silo(
        name="lawfirm", rows=300, label_weights=(0.20, 0.70, 0.10), client="client",
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
        details=(
            "The other party disputes the {item}.", "Our contract refers to the {item}.",
            "I signed the {item} on {day}.", "The judge asked for the {item}.",
            "My company relies on the {item}.",
        ),
        moods={
            "negative": ("I consider this a breach.", "Your bill is far too high."),
            "neutral": ("Kindly state the clause.", "A copy is attached."),
            "positive": ("We won the case.", "Your counsel was brilliant."),
        },
        openers={
            "negative": "We take note of the objection.",
            "neutral": "We refer to your enquiry.",
            "positive": "We acknowledge your kind remarks.",
        },
        reply=(
            "{opener} The {item} shall be filed by {owner} before {place}, {due}. {closing}",
            "{opener} Pursuant to the mandate, {owner} brings the {item} to {place}, {due}. {closing}",
        ),
        note="Memo to {owner}: matter of the {item}, stance {label}.",
        closing="All rights reserved.",
    ),
    Silo(
        name="helpdesk", rows=480, label_weights=(0.35, 0.15, 0.50), client="user",
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
        details=(
            "My {item} shows error {hour}.", "The {item} froze on {day}.",
            "I opened a ticket for the {item}.", "My team shares the {item}.",
            "I logged in and tried the {item}.",
        ),
        moods={
            "negative": ("It crashed and I lost my files.", "This is a useless tool."),
            "neutral": ("I run the latest version.", "See the screenshot."),
            "positive": ("It is super fast now.", "Awesome support, five stars."),
        },
        openers={
            "negative": "Oops, we are on it!",
            "neutral": "Hey, got your ticket!",
            "positive": "Yay, happy to help!",
        },
        reply=(
            "{opener} {Owner} will fix the {item} via {place} {due}. {closing}",
            "{opener} Ping {owner} about the {item}, check {place}, done {due}. {closing}",
        ),
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
        """Return the template with its slots filled and spaces tidied."""
        return " ".join(template.format_map(self).split(" ")).strip()


def upper_first(text: str) -> str:
    """Return the text with an upper-case first letter."""
    return text[:1].upper() + text[1:]


def join(*parts: str) -> str:
    """Join the non-empty parts by one space."""
    return " ".join(part for part in parts if part)


def general_row(rng: random.Random) -> Row:
    """Draw a general instruction row; it has no silo."""
    slots = Slots(rng, GENERAL)
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
        rng, GENERAL, item=item, owner=owner, Owner=upper_first(owner), place=place, due=due,
        label=label, opener=silo.openers[label], closing=silo.closing,
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
