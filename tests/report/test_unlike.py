"""What `compare` and `plot` say of runs whose losses do not mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedtune.report import draw_compare, load_summary
from fedtune.report.curves import compare_curves
from fedtune.report.unlike import Note, differing, notes
from tests.report.made_up import write_run


def a_run(rows: str = "ab", **changes: Any) -> dict[str, Any]:
    groups = {
        "model": {"model_name_or_path": changes.pop("model", "models/small")},
        "data": {"train_file": changes.pop("train_file", "a.jsonl")},
        "federation": {"strategy": changes.get("strategy", "fedavg"), "strategy_args": None},
        "transport": {"codec": "none", "codec_on": "delta"},
        "training": {"max_length": 64, "learning_rate": 0.1, "data_seed": 1, "run_name": "x"},
    }
    samples = changes.pop("samples", [0, 40])
    for group in groups.values():
        group |= {name: changes.pop(name) for name in list(changes) if name in group}
    return {
        "strategy": groups["federation"]["strategy"],
        "seeds": [1],
        "arms": {"federated": {"eval_loss": [4.0, *[3.0] * (len(samples) - 1)],
                               "samples": samples}},
        "config": groups,
        "data": {"held_out": {"rows": 20, "sha256": rows * 32}},
        "model": {
            "base_sha256": changes.pop("base", "b") * 64,
            "tokenizer_sha256": changes.pop("tokenizer", "c") * 64,
        },
        **changes,
    }  # fmt: skip


def told(directory: Path, *runs: dict[str, Any]) -> list[Note]:
    return notes([load_summary(p) for p in places(directory, *runs)])


def places(directory: Path, *runs: dict[str, Any]) -> list[Path]:
    return [
        write_run(directory / name, run, []) for name, run in zip("abcdefgh", runs, strict=False)
    ]


def test_runs_of_two_methods_are_alike(tmp_path: Path):
    assert told(tmp_path, a_run(), a_run(strategy="fedadam", strategy_args="lr=0.1")) == []


def test_one_setting_is_what_is_compared(tmp_path: Path):
    runs = a_run(), a_run(learning_rate=0.2)
    assert told(tmp_path, *runs) == []
    summaries = [load_summary(place) for place in places(tmp_path, *runs)]
    assert differing(summaries) == {"learning_rate": ["0.1", "0.2"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": "cd"}, "held-out rows differ: a 20 (abababab), b 20 (cdcdcdcd)"),
        ({"tokenizer": "e"}, "tokenizers differ: a cccccccc, b eeeeeeee"),
        ({"max_length": 128}, "max_length differs: a 64, b 128"),
    ],
)
def test_losses_that_cannot_be_compared(tmp_path: Path, change: dict[str, Any], words: str):
    note = Note(f"{words}; losses are not comparable", True)
    assert told(tmp_path, a_run(), a_run(**change)) == [note]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "d"}, "base models differ: a small (bbbbbbbb), b small (dddddddd)"),
        ({"samples": [0, 40, 80]}, "rounds differ: a 1, b 2"),
        ({"seeds": [2]}, "seeds differ: a 1, b 2"),
        ({"strategy": "fedadam", "data_seed": 2}, "settings differ too: data_seed (1, 2)"),
        ({"learning_rate": 0.2, "data_seed": 2},
         "several settings differ: learning_rate (0.1, 0.2), data_seed (1, 2)"),
        ({"status": "failed"}, "not all completed: a completed, b failed"),
    ],
)  # fmt: skip
def test_what_else_differs(tmp_path: Path, change: dict[str, Any], words: str):
    assert told(tmp_path, a_run(), a_run(**change)) == [Note(words)]


@pytest.mark.parametrize("change", [{"model": "elsewhere/small"}, {"train_file": "moved.jsonl"}])
def test_files_that_moved_are_the_same(tmp_path: Path, change: dict[str, Any]):
    same = {"data": {name: {"rows": 9, "sha256": "a" * 64} for name in ("held_out", "train")}}
    assert told(tmp_path, a_run(**same), a_run(**same, strategy="fedadam", **change)) == []


def test_many_runs_are_told_in_groups(tmp_path: Path):
    runs = [a_run(), a_run(), a_run(), a_run(), a_run(rows="cd")]
    (note,) = told(tmp_path, *runs)
    assert note.words.startswith("held-out rows differ: a and 3 more 20 (abababab), e 20 (cdcdcd")


def test_a_codec_left_alone_is_no_setting(tmp_path: Path):
    assert told(tmp_path, a_run(), a_run(codec_on="weights")) == []


def test_rounds_and_samples_are_in_the_legend(tmp_path: Path):
    runs = a_run(), a_run(samples=[0, 40, 1200])
    curves = compare_curves([load_summary(place) for place in places(tmp_path, *runs)])
    assert [curve.label for curve in curves] == [
        "a (1 round, 40 samples)",
        "b (2 rounds, 1.2k samples)",
    ]


def test_the_picture_says_it_too(tmp_path: Path):
    summaries = [load_summary(place) for place in places(tmp_path, a_run(), a_run(rows="cd"))]
    written: list[str] = []
    from matplotlib.figure import Figure

    real = Figure.text

    def text(self: Figure, x: float, y: float, s: str, **others: Any) -> Any:
        written.append(s)
        return real(self, x, y, s, **others)

    with mock.patch.object(Figure, "text", text):
        draw_compare(summaries, tmp_path / "c.png", notes(summaries))
    assert "losses are not comparable" in " ".join(written)
