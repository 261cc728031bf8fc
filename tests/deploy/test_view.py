from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedtune.deploy.view import RunState, View, render
from fedtune.results.round_record import RoundRecord

RUN = RunState("7", "running", 187.4, "2026-11-21 02:20:33Z", output_dir=Path("/srv/run"))
OLD = RunState("5", "finished:failed", 4000, "2026-11-20 02:20:33Z", details="no site joined")


def line(number, **more):
    plain = {
        "round": number,
        "train_loss": None if number == 0 else 2.5 - number / 10,
        "eval_loss": 3.0 - number / 10,
        "bytes_up": 0 if number == 0 else 5_000_000,
        "bytes_down": 5_100_000,
        "wall_s": 12.0,
        "replies": [{"client": "a"}, {"client": "b"}],
        "refused": [],
        **more,
    }
    return RoundRecord.from_json(plain)


VIEW = View(
    superlink="fed.example.org:8000",
    nodes={"online": 2, "offline": 1},
    runs=[RUN, OLD],
    shown=RUN,
    federation={
        "state": "running",
        "round": 3,
        "num_rounds": 5,
        "clients": [
            {"client": "a", "state": "ready", "problem": None},
            {"client": "hospital-c", "state": "refused", "problem": "another adapter"},
        ],
    },
    rounds=[line(0, replies=[]), line(1), line(2, refused=[{"client": "b", "reason": "NaN"}])],
)

EXPECTED = """\
superlink fed.example.org:8000   sites: 2 online, 1 offline

   run  state               time  submitted             output
>  7    running             3:07  2026-11-21 02:20:33Z  /srv/run
   5    finished:failed  1:06:40  2026-11-20 02:20:33Z  \N{EN DASH}

run 7: running
server: running
[########............] 2/5 rounds done, in round 3, about 36 s to go
sent up 10.0 MB, down 15.3 MB

client      last update  state
a           round 2      ready
hospital-c  \N{EN DASH}            refused
hospital-c: another adapter

round  train loss  eval loss        replies  MB up  MB down     s
    0           \N{EN DASH}      3.000              \N{EN DASH}   0.00     5.10  12.0
    1       2.400      2.900              2   5.00     5.10  12.0
   *2       2.300      2.800  2 (1 refused)   5.00     5.10  12.0
* lowest eval loss"""


def test_a_run_in_full():
    assert render(VIEW) == EXPECTED


def test_an_ended_run_says_why_it_ended():
    ended = replace(RUN, status="finished:failed", details="ServerApp failed")
    federation = {**VIEW.federation, "error": "round 3 failed 3 times"}
    text = render(replace(VIEW, shown=ended, federation=federation))
    assert "run 7: finished:failed - ServerApp failed\nended: round 3 failed 3 times\n" in text
    assert "to go" not in text
    assert "in round" not in text


def test_nothing_yet():
    assert render(View("h:1", {}, [])) == "superlink h:1   sites: none\n\nno runs yet"
    text = render(View("h:1", {"registered": 3}, [RUN], RUN))
    assert "sites: 3 registered" in text
    assert "no round has ended yet" in text


def test_a_run_of_another_machine():
    text = render(View("h:1", {}, [OLD], OLD))
    assert "run 5: finished:failed - no site joined" in text
    assert "by who submitted it" in text


def test_long_lists_are_cut():
    runs = [replace(OLD, id=str(n)) for n in range(30)]
    clients = [{"client": f"site-{n}", "state": "done", "round": 1} for n in range(40)]
    text = render(
        View(
            "h:1",
            {},
            [RUN, *runs],
            RUN,
            {"num_rounds": 100, "clients": clients},
            [line(n) for n in range(60)],
        )
    )
    assert "and 23 older" in text
    assert "and 28 more" in text
    assert len(text.splitlines()) < 50
    assert "*59" in text


def test_half_a_record_is_shown_as_far_as_it_goes():
    federation = {
        "round": "x",
        "num_rounds": None,
        "clients": [{"client": None}, 7],
    }
    half = {"round": 1, "eval_loss": float("nan"), "train_loss": None, "replies": None}
    rounds = [RoundRecord.from_json(plain) for plain in ({}, half)]
    text = render(replace(VIEW, federation=federation, rounds=rounds))
    assert "run 7: running" in text
    assert "nan" not in text


def test_lines_fit_the_terminal_and_do_not_steer_it():
    evil = replace(RUN, details="\x1b[2J" + "x" * 500)
    text = render(replace(VIEW, shown=evil), width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "\x1b" not in text


def test_a_sentence_is_wrapped_not_cut():
    clock = "site clinic at 127.0.0.1: its clock is 2 h ahead; not let in until it is set"
    text = render(replace(VIEW, shown=RUN, clocks=[clock]), width=40)
    assert " ".join(text.split()).count(clock) == 1
    assert max(map(len, text.splitlines())) <= 40
