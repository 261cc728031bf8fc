"""Data files as people have them: formats, encodings and faults, written by this module."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zstandard
from datasets import Dataset

ROWS = [
    {"prompt": "Où est le café ?", "completion": "Tout près, à gauche; voilà."},
    {"prompt": 'Dis "merci".', "completion": "Merci\tbien,\nmadame."},
    {"prompt": "Combien ?", "completion": "007"},
]
ENGLISH = [{"prompt": f"What is {i}?", "completion": f"A number, {i}."} for i in range(3)]


class Written(NamedTuple):
    """How the bytes of a file are made, and the rows that it stands for, if it is read."""

    content: Callable[[], bytes]
    rows: list[dict[str, str]] | None = ROWS


def jsonl(rows: list[dict[str, object]] = ROWS, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def separated(delimiter: str = ",", rows: list[dict[str, str]] = ROWS, end: str = "\n") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows: list[dict[str, object]] = ROWS) -> bytes:
    file = io.BytesIO()
    Dataset.from_list(rows).to_parquet(file)
    return file.getvalue()


def answers(*cells: object) -> Callable[[], bytes]:
    """Bytes of JSON lines with these answers."""
    return lambda: jsonl([{"prompt": "p", "completion": cell} for cell in cells]).encode()


def read_answers(*cells: str) -> list[dict[str, str]]:
    return [{"prompt": "p", "completion": cell} for cell in cells]


def text(content: str, encoding: str = "utf-8") -> Callable[[], bytes]:
    return lambda: content.encode(encoding)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
RUSSIAN = [{"prompt": "Как дела?", "completion": "Спасибо, хорошо."}] * 3

FILES = {
    # formats
    "lines.jsonl": Written(text(jsonl())),
    "blank_lines.jsonl": Written(text("\n" + jsonl(end="\n\n"))),
    "windows_lines.jsonl": Written(text(jsonl(end="\r\n"))),
    "array.json": Written(text(json.dumps(ROWS, indent=2, ensure_ascii=False))),
    "array_in_a_line.json": Written(text(json.dumps(ROWS))),
    "objects.json": Written(text("\n".join(json.dumps(row, indent=1) for row in ROWS))),
    "below_data.json": Written(text(json.dumps({"version": 1, "data": ROWS}))),
    "columns.json": Written(text(json.dumps(COLUMNS))),
    "commas.csv": Written(text(separated())),
    "semicolons.csv": Written(text(separated(";"))),
    "tabs.csv": Written(text(separated("\t"))),
    "tabs.tsv": Written(text(separated("\t"))),
    "windows.csv": Written(
        lambda: separated(end="\r\n").replace("bien,\n", "bien,\r\n").encode(),
        [*ROWS[:1], {**ROWS[1], "completion": "Merci\tbien,\r\nmadame."}, *ROWS[2:]],
    ),
    "quotes.tsv": Written(
        text('prompt\tcompletion\np\t"Yes", she said.\np\ta 3" pipe\n'),
        read_answers('"Yes", she said.', 'a 3" pipe'),
    ),
    "one_column.csv": Written(
        text('text\nHello\n"Yes, of course."\n'), [{"text": "Hello"}, {"text": "Yes, of course."}]
    ),
    "spaced_names.csv": Written(
        text("instruction, output\nAdd 1 to 2., 3\n"),
        [{"prompt": "### Instruction:\nAdd 1 to 2.\n\n### Response:\n", "completion": "3"}],
    ),
    "table.parquet": Written(parquet),
    # packed, or by another name
    "lines.jsonl.gz": Written(lambda: gzip.compress(jsonl().encode())),
    "commas.csv.gz": Written(lambda: gzip.compress(separated().encode())),
    "array.json.gz": Written(lambda: gzip.compress(json.dumps(ROWS).encode())),
    "packed.jsonl": Written(lambda: gzip.compress(jsonl().encode())),
    "not_packed.jsonl.gz": Written(text(jsonl())),
    "lines.jsonl.zst": Written(lambda: zstandard.compress(jsonl().encode())),
    "lines.csv": Written(text(jsonl())),
    "table.jsonl": Written(parquet),
    # encodings
    "mark.csv": Written(text(separated(), "utf-8-sig")),
    "utf16.csv": Written(text(separated(";"), "utf-16")),
    "utf16_be.jsonl": Written(text("\ufeff" + jsonl(), "utf-16-be")),
    "utf16_no_mark.csv": Written(text(separated(rows=ENGLISH), "utf-16-le"), ENGLISH),
    "latin1.csv": Written(text(separated(), "latin-1")),
    "cp1252.jsonl": Written(
        text(jsonl([{**ROWS[0], "completion": "„Voilà“ – 5 €"}]), "cp1252"),
        [{**ROWS[0], "completion": "„Voilà“ – 5 €"}],
    ),
    "cyrillic.csv": Written(text(separated(rows=RUSSIAN), "cp1251"), RUSSIAN),
    # cells
    "numbers.jsonl": Written(
        answers("a", 5, 2.5, True, 10**30), read_answers("a", "5", "2.5", "true", str(10**30))
    ),
    "only_numbers.csv": Written(
        text("prompt,completion\n1,007\n2,1e3\n"),
        [{"prompt": "1", "completion": "007"}, {"prompt": "2", "completion": "1e3"}],
    ),
    "words_for_nothing.csv": Written(
        text("prompt,completion\nNA,null\nnan,\n"),
        [{"prompt": "NA", "completion": "null"}, {"prompt": "nan", "completion": ""}],
    ),
    "long_line.csv": Written(
        text(f"prompt,completion\np,{'x' * 300_000}\n"), read_answers("x" * 300_000)
    ),
    # faults
    "null.jsonl": Written(answers("a", None, "c", None), None),
    "spaced_keys.jsonl": Written(text('{"prompt ": "p", " completion": "c"}\n'), read_answers("c")),
    "no_input.jsonl": Written(
        text('{"instruction": "Say 1.", "input": null, "output": "1"}\n'),
        [{"prompt": "### Instruction:\nSay 1.\n\n### Response:\n", "completion": "1"}],
    ),
    "not_a_number.jsonl": Written(answers("a", float("nan")), None),
    "list.jsonl": Written(answers("a", ["b"], {"c": 1}), None),
    "list.parquet": Written(lambda: parquet([{"prompt": "p", "completion": ["a"]}] * 2), None),
    "blank_prompt.csv": Written(text('prompt,completion\na,b\n"c\nc",d\n,e\n'), None),
    "ragged.csv": Written(text('prompt,completion\n"a\na",b\nc,d,e\nf\n'), None),
    "open_quote.csv": Written(text('prompt,completion\na,"b\nc,d\n'), None),
    "same_name.csv": Written(text("text, text\na,b\n"), None),
    "no_known_name.csv": Written(text("question, reply\na,b\n"), None),
    "torn.jsonl": Written(text(jsonl() + '{"prompt": \n'), None),
    "torn.json": Written(text(json.dumps(ROWS, indent=1)[:-3]), None),
    "numbers_for_rows.jsonl": Written(text("1\n2\n"), None),
    "array_of_lists.json": Written(text('[\n["a", "b"]\n]'), None),
    "one_bad_byte.jsonl": Written(lambda: jsonl().encode() + b'{"prompt": "\xe9"}\n', None),
    "cut.jsonl.gz": Written(lambda: gzip.compress(jsonl().encode())[:-20], None),
    "cut.jsonl.zst": Written(lambda: zstandard.compress(jsonl().encode())[:-9], None),
    "cut.parquet": Written(lambda: parquet()[:-30], None),
    "pretty.json": Written(text('{\n "prompt": "p",\n "completion": "c"\n}'), read_answers("c")),
    "binary.csv": Written(lambda: bytes(range(256)) * 4, None),
    "workbook.csv": Written(lambda: b"PK\x03\x04" + bytes(40), None),
    "empty.jsonl": Written(lambda: b"", None),
    "blank.csv": Written(lambda: b"\n \n", None),
    "header.csv": Written(text("prompt,completion\n"), None),
    "no_rows.json": Written(text("[]"), None),
    "notes.txt": Written(text("hello"), None),
}


def write(directory: Path, name: str) -> Path:
    """The file `name` in `directory`."""
    path = directory / name
    path.write_bytes(FILES[name].content())
    return path
