"""What cannot work is refused in one line with status 2, before anything starts or is written."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli import main
from fedtune.deploy.certs import make_certs
from fedtune.processes.supervisor import free_port
from tests.recipes.runs import tree


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("folders") / "certs"
    make_certs(directory, ["clinic"], hosts=["fed.example.org"])
    return directory


@pytest.fixture
def here(tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with certificates and a finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    (tmp_path / "certs").symlink_to(certs)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "rounds.jsonl").write_text("{}\n")
    return tmp_path


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port on which something listens that is no SuperLink."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refused(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    """`fedtune LINE` ends with status 2 and one line that has the words."""
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err, captured.err


SITE = "--superlink 127.0.0.1:1"
JOIN = {
    f"{SITE}": "expected a training script, received none",
    "-- python train.py": "required: --superlink",
    f"{SITE} -- pyhton train.py": "there is no program pyhton",
    "--superlink 127.0.0.1 -- python train.py": "expected HOST:PORT, received 127.0.0.1",
    "--superlink http://a:1 -- python train.py": "expected HOST:PORT, received http://a:1",
    f"{SITE} --name a/b -- python train.py": "received a/b",
    f"{SITE} --max_rounds -1 -- python train.py": "--max_rounds: expected at least 0",
    f"{SITE} --max_steps x -- python train.py": "--max_steps: invalid int value",
    f"{SITE} --max_restarts -1 -- python train.py": "--max_restarts: expected at least 0",
    f"{SITE} --start_timeout_s 0 -- python train.py": "--start_timeout_s: expected seconds",
    f"{SITE} --tls absent -- python train.py": "is no directory. Make it with fedtune certs",
    f"{SITE} --tls certs -- python train.py": "certs/<site>.",
    f"{SITE} --tls certs/server -- python train.py": "is the server's folder. Give the site's",
    f"{SITE} --tls certs/submit -- python train.py": "has only ca.crt. Give the site's folder",
    f"{SITE} --output_dir used/rounds.jsonl -- python train.py": "used/rounds.jsonl",
}
SUBMIT = {
    f"{SITE} --num_rounds 0": "--num_rounds: expected a whole number >= 1",
    f"{SITE} --num_r 3": "unrecognized arguments: --num_r",
    f"{SITE} --min_clients 0": "--min_clients: expected at least 1",
    f"{SITE} --join_timeout_s nan": "--join_timeout_s: expected seconds",
    f"{SITE} --strategy fedavgg": "fedavgg",
    f"{SITE} --steps_per_round 5 --epochs_per_round 1": "epochs_per_round",
    f"{SITE} --weight_by token": "invalid choice: 'token'",
    f"{SITE} --codec nf5": "invalid choice: 'nf5'",
    f"{SITE} --codec_on weights": "no effect with --codec none",
    f"{SITE} --codec nf4 --codec_args size=1": "--codec_args: expected include=GLOB",
    f"{SITE} --codec nf4 --error_feedback maybe": "expected true or false, received 'maybe'",
    f"{SITE} --codec nf4 --error_feedback --strategy flora": "--strategy flora: its factors",
    f"{SITE} --init_adapter absent": "--init_adapter: expected a directory",
    f"{SITE} --track stdout": "stdout",
    f"{SITE} --resume --overwrite": "--resume",
    f"{SITE} --output_dir used": "used",
    f"{SITE} --output_dir new --resume": "new",
    f"{SITE} --tls certs/clinics": "is no directory",
    f"{SITE}": "nothing listens there. Start it with fedtune up",
    "--superlink nowhere.invalid:8000": "the name nowhere.invalid is unknown",
    "--superlink fed": "expected HOST:PORT, received fed",
}
UP = {
    "--port 0": "--port: expected 1 to 65535, received 0",
    "--port 65536": "--port: expected 1 to 65535, received 65536",
    "--port TAKEN": "is in use by another program",
    "--host 0.0.0.0 --port FREE": "without --tls only this machine may connect",
    "--tls certs/server --insecure": "--insecure and --tls exclude each other",
    "--tls certs/clinic --port FREE": "is a site's folder. Give the server's",
    "--tls certs --port FREE": "Give certs/server",
    "--tls certs/server --host 127.0.0.7 --port FREE": "Run fedtune certs with --host 127.0.0.7",
    "--host nowhere.invalid --insecure --port FREE": "the name nowhere.invalid is unknown",
    "--output_dir used/rounds.jsonl --port FREE": "used/rounds.jsonl",
}
LOOKS = {
    f"status {SITE}": "nothing listens there",
    f"stop {SITE}": "nothing listens there",
    f"logs {SITE}": "nothing listens there",
    f"status {SITE} --watch 0": "--watch: expected seconds above 0",
}


@pytest.mark.parametrize("flags", JOIN)
def test_join(here: Path, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    before = tree(here)
    refused(capsys, f"join {flags}", JOIN[flags])
    assert tree(here) == before


@pytest.mark.parametrize("flags", SUBMIT)
def test_submit(here: Path, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    before = tree(here)
    refused(capsys, f"submit {flags}", SUBMIT[flags])
    assert tree(here) == before


@pytest.mark.parametrize("flags", UP)
def test_up(here: Path, capsys: pytest.CaptureFixture[str], flags: str, taken: int) -> None:
    line = flags.replace("TAKEN", str(taken)).replace("FREE", str(free_port()))
    before = tree(here / "used")
    refused(capsys, f"up {line}", UP[flags])
    assert tree(here / "used") == before


@pytest.mark.parametrize("line", LOOKS)
def test_status_stop_and_logs(here: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    before = tree(here)
    refused(capsys, line, LOOKS[line])
    assert tree(here) == before
