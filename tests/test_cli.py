import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune import doctor
from fedtune.cli import main

HEAVY = ("torch", "transformers", "peft", "flwr", "datasets", "trl", "matplotlib", "numpy")


def run(*argv):
    return subprocess.run(
        [sys.executable, "-m", "fedtune.cli", *argv], capture_output=True, text=True, check=False
    )


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from fedtune.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "plot" in done.stdout
    assert "doctor" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("argv", [["--help"], ["plot", "--help"], ["export", "-h"], ["--version"]])
def test_help_and_version(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert "fedtune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required"),
        (["plo"], "invalid choice"),
        (["plot"], "required"),
        (["plot", "nowhere"], "nowhere"),
        (["export", "nowhere"], "has no adapter/"),
        (["export", "nowhere", "--best"], "has no best/"),
        (["doctor", "--fast"], "unrecognized"),
    ],
)
def test_an_error_is_one_line(argv, expected, capsys):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert expected in shown.err


def test_the_exit_status_reaches_the_shell():
    done = run("plot", "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def adapter(directory, value=1.0):
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"w": torch.full((2, 3), value)}, directory / "adapter_model.safetensors")
    return directory


def test_export_copies_the_last_or_the_best_round(tmp_path, capsys):
    adapter(tmp_path / "run" / "adapter", 1.0)
    adapter(tmp_path / "run" / "best", 2.0)
    assert main(["export", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run-adapter")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--best", "--output_dir", str(out)]) == 0
    for directory, value in ((tmp_path / "run-adapter", 1.0), (out, 2.0)):
        weights = load_file(directory / "adapter_model.safetensors")
        assert torch.equal(weights["w"], torch.full((2, 3), value))


def test_export_takes_an_adapter_directory(tmp_path):
    adapter(tmp_path / "mine")
    assert main(["export", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine-adapter" / "adapter_config.json").is_file()


def test_export_never_overwrites(tmp_path, capsys):
    adapter(tmp_path / "run" / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    argv = ["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 2
    assert main([*argv, "--merge"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_export_refuses_damaged_weights(tmp_path, capsys):
    file = adapter(tmp_path / "run" / "adapter") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert main(["export", str(tmp_path / "run")]) == 2
    file.unlink()
    assert main(["export", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "is damaged" in shown
    assert "has no weights" in shown
    assert not (tmp_path / "run-adapter").exists()


def test_export_base_model_without_merge(tmp_path, capsys):
    adapter(tmp_path / "run" / "adapter")
    assert main(["export", str(tmp_path / "run"), "--model_name_or_path", "x"]) == 2
    assert "needs --merge" in capsys.readouterr().err


def test_export_merge_hands_over(tmp_path, monkeypatch):
    import fedtune.adapters

    adapter(tmp_path / "run" / "adapter")
    calls = []

    def merge(*args, **named):
        calls.append((args, named))

    monkeypatch.setattr(fedtune.adapters, "merge", merge)
    assert main(["export", str(tmp_path / "run"), "--merge", "--model_name_or_path", "base"]) == 0
    args = (tmp_path / "run" / "adapter", tmp_path / "run-merged")
    assert calls == [(args, {"model_name_or_path": "base"})]


def test_doctor_passes_here(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("python", "torch", "flwr", "ray", "device", "memory", "disk", "built-in model"):
        assert f"  {name}  " in shown
    assert "0 faults" in shown


def test_doctor_fails_on_a_version_out_of_range(monkeypatch, capsys):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "flwr" else real(name))
    monkeypatch.setattr(doctor, "CHECKS", (doctor._packages,))
    assert main(["doctor"]) == 1
    assert "FAIL  flwr" in capsys.readouterr().out


def test_doctor_survives_a_check_that_crashes(monkeypatch):
    def _broken_thing():
        raise RuntimeError("no\nluck")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (_broken_thing,))
    rows = doctor.examine()
    assert rows == [doctor.Row("FAIL", "broken thing", "", "RuntimeError: no luck")]


def test_doctor_warns_of_bad_settings(monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    warned = {row.name for row in doctor._environment() if row.status == "warn"}
    assert {"FLWR_TELEMETRY_ENABLED", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"} <= warned
