"""Files and directories that are whole or absent, whatever interrupts the write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fedtune.files import (
    append_line,
    read_json,
    replace_directory,
    to_json,
    write_json,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fill(directory: Path, text: str) -> None:
    with replace_directory(directory) as fresh:
        (fresh / "a").write_text(text)


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "d", "old")
    (tmp_path / "d" / "b").write_text("of the old one")
    with replace_directory(tmp_path / "d") as fresh:
        (fresh / "a").write_text("new")
        assert (tmp_path / "d" / "a").read_text() == "old"
    assert (tmp_path / "d" / "a").read_text() == "new"
    assert names(tmp_path / "d") == ["a"]
    assert names(tmp_path) == ["d"]


def test_a_write_that_fails_leaves_the_old_directory(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replace_directory(tmp_path / "d") as fresh:
            (fresh / "a").write_text("half")
            raise KeyboardInterrupt

    fill(tmp_path / "d", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "d" / "a").read_text() == "old"
    assert names(tmp_path) == ["d"]


def test_what_a_killed_process_left_is_put_right(tmp_path: Path) -> None:
    """Killed between the two renames: the old directory is back before the next write begins."""
    fill(tmp_path / ".d.old", "old")
    fill(tmp_path / ".d.new", "whole, but not in place")
    with pytest.raises(OSError, match="full"), replace_directory(tmp_path / "d"):
        raise OSError("disk full")
    assert (tmp_path / "d" / "a").read_text() == "old"
    assert names(tmp_path) == ["d"]


def test_text_is_replaced_and_lines_are_appended(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "one\n")
    append_line(tmp_path / "t", "two")
    assert (tmp_path / "t").read_text() == "one\ntwo\n"
    write_text(tmp_path / "t", "three")
    assert names(tmp_path) == ["t"]
    assert (tmp_path / "t").read_text() == "three"


def test_json_without_a_standard_form_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "j", {"a": [1, None]})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "j", {"a": float("nan")})
    assert read_json(tmp_path / "j") == {"a": [1, None]}
    assert names(tmp_path) == ["j"]


def test_a_measured_value_that_is_not_finite_is_null() -> None:
    nan, inf = float("nan"), float("inf")
    found = to_json({"a": [nan, 1.5, (inf, -inf)], "b": {"c": nan}, "d": "nan", "e": True})
    assert json.loads(found) == {
        "a": [None, 1.5, [None, None]],
        "b": {"c": None},
        "d": "nan",
        "e": True,
    }


def test_a_full_disk_is_told_by_path_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_text(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"
