"""Each benchmark at its smallest size: it runs, prints a table and writes its numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))
ONE_RUN = "--num_rounds 1 --steps_per_round 1 --max_rows 120 --num_clients 2"

# Flags of the smallest run of each, with the least that its table has to name.
SMALLEST = {
    "aggregate": (["--layers", "1", "--peers"], ["flora", "flower"]),
    "base_weights": (["--gb", "0.01"], ["bf16", "nf4", "int8"]),
    "codec_loss": (["--extra", ONE_RUN], ["nf4"]),
    "codecs": (["--mb", "1", "--peers"], ["int8", "nf4", "bitsandbytes"]),
    "lossless": (["--mb", "1", "--rounds", "1", "--rates", "1e-4"], ["0.0001"]),
    "methods": (["--extra", "--num_rounds 1 --max_rows 400"], ["fedavg", "median"]),
    "overhead": (
        ["--steps", "4", "--rounds", "2", "--pairs", "1", "--short", "2", "--clients", "2,3"],
        ["trainer", "round", "fold"],
    ),
    "real_input": (["--extra", ONE_RUN], ["iid-lora"]),
    "round_latency": (["--rounds", "3", "--clients", "1"], ["fedtune, tiny model"]),
}
READS_SHARED = {"codec_loss", "lossless", "methods", "real_input"}


def test_every_benchmark_is_run_here():
    assert {path.stem for path in BENCHMARKS} == SMALLEST.keys()


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_smallest_size(script, tmp_path, request):
    flags, said = SMALLEST[script.stem]
    if script.stem in READS_SHARED:
        flags = [*flags, "--shared", str(request.getfixturevalue("shared"))]
    done = subprocess.run(
        [sys.executable, script, *flags, "--json", tmp_path / "numbers.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stdout
    assert json.loads((tmp_path / "numbers.json").read_text())
