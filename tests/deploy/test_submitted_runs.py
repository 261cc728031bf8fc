"""Where runs are remembered must be writable before one begins."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fedtune.deploy import submit
from fedtune.deploy.submitted_runs import check_register, known_runs, remember_run
from fedtune.errors import ConfigError


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that cannot be made, whoever tries: it lies below a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "file" / "home"))
    return tmp_path


def test_a_check_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    check_register()
    assert known_runs() == {}
    remember_run("7", tmp_path)
    check_register()
    assert known_runs() == {"7": tmp_path}


def test_a_home_that_cannot_be_written_is_one_line(no_home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"runs\.json: cannot be written \(Not a directory\)"
    ) as e:
        check_register()
    assert "Set FLWR_HOME" in str(e.value)
    assert "\n" not in str(e.value)


def test_no_run_begins_that_could_not_be_remembered(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Link(submit.Connection):
        def probe(self) -> None:
            """There is a SuperLink."""

        def flwr(self, *words: str | Path) -> dict[str, object]:
            asked.append(str(words[0]))
            return {"success": True, "runs": [], "nodes": []}

    monkeypatch.setattr(submit, "Connection", Link)
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    output = no_home / "run"
    words = ["--output_dir", str(output), "--num_rounds", "1", "--steps_per_round", "1"]
    with pytest.raises(ConfigError, match="Set FLWR_HOME"):
        submit.run(parser.parse_args(words))
    assert asked == ["list"]
    assert not output.exists()
