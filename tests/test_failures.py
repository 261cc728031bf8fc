"""Why a script failed: the type and an id for everybody, the text for the site alone."""

import pickle
import subprocess
import sys

import pytest

from fedtune.errors import ConfigError, DataError, RoundError, private
from fedtune.failures import failure_of, how_ended, printed_failure

ROW = "{'patient': 'Jane Roe'}"


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("raise ValueError('cannot read Jane Roe')", "ValueError"),
        ("raise KeyError", "KeyError"),
        ("class Jane(Exception): pass\nraise Jane('Roe: 3')", "Jane"),
        ("import json; json.loads('{Roe')", "JSONDecodeError"),
        ("raise ValueError('a row\\nJane: Roe\\nOSError: not this one')", "ValueError"),
        (
            "try: 1/0\nexcept ZeroDivisionError as e: raise RuntimeError('Roe') from e",
            "RuntimeError",
        ),
        ("def Roe(:", "SyntaxError"),
        ("assert not 'Jane', 'Roe'", "AssertionError"),
    ],
)
def test_the_type_of_what_python_prints_is_found_and_nothing_else_leaves(code, kind):
    found = printed_failure(["before: nothing", *printed(code), "atexit: bye"])
    assert found.outside == f"{kind} (id {found.id})"
    assert found.text.partition(":")[0].rpartition(".")[2] == kind
    assert found.line == f"[id {found.id}] {found.text}"


def test_of_a_launcher_the_process_that_failed_counts():
    rank = [f"[rank1]: {line}" for line in printed("raise OSError('Jane Roe')")]
    launcher = printed("class ChildFailedError(Exception): pass\nraise ChildFailedError('x')")
    assert printed_failure([*rank, *launcher]).outside.startswith("OSError (id ")
    killed = ["  exitcode  : -9 (pid: 5)", "  traceback : Signal 9 (SIGKILL) received by PID 5"]
    words = "a process of the script was killed by SIGKILL"
    assert printed_failure([*launcher, *killed]).outside == words


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["usage: train.py", "train.py: error: no such file Jane"],
        ["Jane: Roe"],
        ["Traceback (most recent call last):", '  File "x", line 1', "Jane Roe was here: 3"],
    ],
)
def test_without_a_traceback_nothing_is_made_up(lines):
    assert printed_failure(lines) is None


def test_an_exception_keeps_its_id_and_its_text():
    error = ValueError(f"cannot tokenize\n{ROW}")
    first = failure_of(error)
    assert first == failure_of(error)
    assert first != failure_of(ValueError(f"cannot tokenize\n{ROW}"))
    assert first.text == f"ValueError: cannot tokenize {ROW}"
    assert first.outside == f"ValueError (id {first.id})"


def test_an_error_of_fedtune_travels_in_full_but_for_what_is_private():
    whole = ConfigError("patch: expected a, received b.")
    assert failure_of(whole).outside == str(whole)
    error = DataError(f"label: expected x, received {private(ROW)} in row 38. Fix: it.")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert str(copy) == f"label: expected x, received {ROW} in row 38. Fix: it."
        assert copy.outside == "label: expected x, received … in row 38. Fix: it."
    failure = failure_of(error)
    assert failure.outside == f"{error.outside} (id {failure.id})"


def test_what_is_private_cannot_end_early():
    row = f"{private('a')[1:]} Jane Roe"  # a value that holds the mark itself
    assert "Roe" not in RoundError(f"received {private(row)}.").outside
    cut = f"received {private('Jane Roe')}"[:-1]
    assert RoundError(cut).outside == "received …"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (3, "ended with status 3"),
        (-9, "was killed by SIGKILL"),
        (-40, "was killed by signal 40"),
    ],
)
def test_how_a_process_ended(status, words):
    assert how_ended(status) == words
