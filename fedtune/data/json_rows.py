"""JSON as rows: an object a line, an array of objects, or one object that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fedtune.data.text import BadText, say_once

__all__ = ["read_json"]

ROW_KEYS = ("data", "rows", "train", "examples", "instances")
LARGEST = 2**63

Row = dict[str, Any]
Lines = list[int] | None


def read_json(text: str, name: str) -> tuple[list[Row], Lines]:
    """Rows and the line on which each begins; no lines where they have none of their own.

    One object is read as its rows where a key such as `data` holds them, or as columns where all
    of its values are lists of equal length; that is said in one line. NaN is null.

    Raises:
        BadText: the first line (or entry) that is no JSON object.
    """
    begin = text.lstrip()[:1]
    if begin == "[":
        return _array(text)
    first_two = [line for line in text.split("\n", 40) if line.strip()][:2]
    if begin != "{" or (len(first_two) > 1 and any(map(_is_object, first_two))):
        return _lines(text)
    entries = list(_entries(text, 0))
    if len(entries) == 1:
        return _one_object(entries[0][1], name)
    return [row for _, row in entries], [line for line, _ in entries]


def _lines(text: str) -> tuple[list[Row], Lines]:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise BadText(f"line {number} is no JSON ({error.msg})") from None
            rows.append(_object(value, f"line {number}"))
            lines.append(number)
    return rows, lines


def _array(text: str) -> tuple[list[Row], Lines]:
    rows: list[Row] = []
    lines: list[int] = []
    for line, value in _entries(text, text.index("[") + 1, end="]"):
        rows.append(_object(value, f"entry {len(rows) + 1} (line {line})"))
        lines.append(line)
    return rows, lines if len(set(lines)) > 1 else None


def _entries(text: str, at: int, end: str = "") -> Iterator[tuple[int, Any]]:
    """Values that follow each other in `text`, in an array up to its `end`, with their lines."""
    line, counted, wanted = 1, 0, True
    while True:
        at = _skip(text, at)
        if at >= len(text) and not end:
            return
        if end and text[at : at + 1] == end:
            rest = _skip(text, at + 1)
            if rest < len(text):
                line += text.count("\n", counted, rest)
                raise BadText(f"line {line} is no JSON (Extra data)")
            return
        if end and not wanted:
            if text[at : at + 1] != ",":
                line += text.count("\n", counted, at)
                raise BadText(f"line {line} is no JSON (Expecting ',' delimiter)")
            at = _skip(text, at + 1)
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise BadText(f"line {error.lineno} is no JSON ({error.msg})") from None
        yield line, value
        wanted = False


def _one_object(value: Any, name: str) -> tuple[list[Row], Lines]:
    """Rows of a file that holds one object."""
    for key in ROW_KEYS:
        held = value.get(key)
        if isinstance(held, list) and held and all(isinstance(row, dict) for row in held):
            say_once(f"{name} is read as the rows that its key {key!r} holds.")
            return held, None
    cells = list(value.values())
    if all(isinstance(column, dict) and "0" in column for column in cells):  # as pandas writes it
        cells = [list(column.values()) for column in cells]
    if not cells or not all(isinstance(column, list) for column in cells):
        return [value], [1]
    if len({len(column) for column in cells}) > 1 or any(
        isinstance(cell, (list, dict)) for column in cells for cell in column
    ):
        return [value], [1]
    say_once(f"{name} is read as an object of columns.")
    return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)], None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise BadText(f"{where} is a JSON {type(value).__name__}, not an object")
    return value


def _is_object(line: str) -> bool:
    try:
        return isinstance(DECODER.decode(line), dict)
    except json.JSONDecodeError:
        return False


def _skip(text: str, at: int) -> int:
    """Index of the next character that is no white space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _whole_number(digits: str) -> int | str:
    """An int where 64 bits hold it, else its digits."""
    number = int(digits) if len(digits) < 20 else None
    return digits if number is None or not -LARGEST <= number < LARGEST else number


def _constant(word: str) -> float | None:
    return None if word == "NaN" else float(word)


DECODER = json.JSONDecoder(parse_int=_whole_number, parse_constant=_constant)
