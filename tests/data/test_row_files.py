"""Files as people have them: each is read as its rows, or refused in one line (docs/data.md)."""

from __future__ import annotations

import re

import pytest

from fedtune.config import DataArguments
from fedtune.data import as_language_rows, load_rows
from fedtune.data.text import say_once
from fedtune.errors import DataError
from tests.conftest import REPOSITORY
from tests.data.written import FILES, write

DOCS = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
TOLD = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", DOCS, re.MULTILINE))


def read(path):
    """Rows and the error, of which there is one, as a trainer would meet them."""
    try:
        rows = load_rows(DataArguments(train_file=str(path)))
        return as_language_rows(rows, DataArguments(), None).to_list(), None
    except DataError as error:
        return None, str(error)


def cell(rows, error, said):
    """What the table in the docs says of a file."""
    if error:
        told = error.replace("--train_file: ", "")
    else:
        told = f"{len(rows)} row{'' if len(rows) == 1 else 's'}."
    text = " ".join([told, *said])
    return text.replace("|", "\\|").replace("\n", " ")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_or_refused_as_the_docs_say(name, tmp_path, caplog):
    say_once.cache_clear()
    path = write(tmp_path, name)
    rows, error = read(path)
    assert rows == FILES[name].rows
    if error:
        assert "\n" not in error
        assert "Fix: " in error
        assert name in error or "column" in error
    assert all("\n" not in line for line in caplog.messages)
    told = cell(rows, error, caplog.messages).replace(f"{tmp_path}/", "")
    assert told == TOLD[name]


def test_the_docs_tell_of_every_file():
    assert list(TOLD) == list(FILES)
    assert len(FILES) >= 25
