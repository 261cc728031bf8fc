"""A script of somebody's own at two sites: its learning rates, sites that come and go, Ctrl-C.

One SuperLink with TLS and two sites serve all tests of this module, in their order.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedtune.assets import CORPUS_FILE
from fedtune.files import read_json
from tests.conftest import REPOSITORY
from tests.deployment.parts import Deployment, Program

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "tests" / "deployment" / "plain_script.py"
ROUNDS, STEPS = 3, 4
SILOS = {"a": "clinic", "b": "bank"}


class Federation(Deployment):
    """A deployment whose sites run the script over a silo of the embedded corpus."""

    def enter(self, name: str, *flags: Any) -> Program:
        """`fedtune join` as site `name`, over rows of its own."""
        return self.start(
            *(name, "join", "--superlink", self.address, *self._tls(name), *flags),
            *("--output_dir", self.directory / name / "logs", "--", sys.executable, SCRIPT),
            *(self.rows(name), self.directory / name / "output"),
        )

    def rows(self, name: str) -> Path:
        """The site's rows."""
        file = self.directory / f"{name}.jsonl"
        lines = CORPUS_FILE.read_text().splitlines()
        file.write_text(
            "\n".join([row for row in lines if json.loads(row)["silo"] == SILOS[name]][:40])
        )
        return file

    def replies(self, run: str) -> list[list[str]]:
        """Whose updates each round of a run took."""
        file = self.directory / run / "rounds.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [sorted(reply["client"] for reply in json.loads(line)["replies"]) for line in lines]

    def command(self, *words: Any) -> Program:
        """Run a `fedtune` command to its end."""
        where = ("--superlink", self.address, *self._tls("submit"))
        program = self.start(str(words[0]), *words, *where)
        assert program.wait(60) == 0, program.printed
        return program


@pytest.fixture(scope="module", autouse=True)
def _ctrl_c() -> None:
    """Programs started here hear Ctrl-C even where these tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("own")
    temporary = tmp_path_factory.mktemp("t")
    deployment = Federation(directory / "all", temporary, tls=True)
    try:
        deployment.up()
        yield deployment
    finally:
        left = deployment.close()
    assert not left


@pytest.fixture(scope="module")
def sites(federation: Federation) -> dict[str, Program]:
    programs = {name: federation.enter(name) for name in SILOS}
    for program in programs.values():
        program.sees("waiting for a run")
    return programs


def logged(output: Path, name: str) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in history if name in row]


def test_learning_rates_are_those_of_one_centralized_run(
    federation: Federation, sites: dict[str, Program]
) -> None:
    """Cosine with warmup over rounds x steps, each step's rate the same number."""
    flags = ["--num_rounds", ROUNDS, "--steps_per_round", STEPS]
    submit = federation.submit("first", *flags)
    assert submit.wait() == 0, submit.printed
    for name in SILOS:
        sites[name].sees("the script ended, status 0")
        alone = federation.directory / f"{name}-alone"
        subprocess.run(
            [sys.executable, SCRIPT, federation.rows(name), alone],
            env=federation.env,
            check=True,
            capture_output=True,
            timeout=120,
        )
        federated = federation.directory / name / "output"
        assert len(logged(federated, "learning_rate")) == ROUNDS * STEPS
        assert logged(federated, "learning_rate") == logged(alone, "learning_rate")
        assert logged(federated, "loss") != logged(alone, "loss")
        printed = (federation.directory / name / "logs" / "trainer.log").read_text()
        assert "load_best_model_at_end is off" in printed


def test_each_script_ends_with_the_last_global_adapter(federation: Federation) -> None:
    weights = "adapter_model.safetensors"
    server = load_file(federation.directory / "first" / "adapter" / weights)
    for name in SILOS:
        site = load_file(federation.directory / name / "output" / weights)
        assert site.keys() == server.keys()
        assert all(torch.equal(site[key], server[key]) for key in server)


def test_ctrl_c_leaves_a_followed_run_to_itself(
    federation: Federation, sites: dict[str, Program]
) -> None:
    submit = federation.submit("second", "--num_rounds", 50, "--steps_per_round", STEPS)
    federation.until(lambda: federation.replies("second"))
    assert submit.end(signal.SIGINT) == 130
    assert "left; the run goes on. fedtune status" in submit.printed
    assert not submit.family()
    seen = len(federation.replies("second"))
    federation.until(lambda: len(federation.replies("second")) > seen)
    federation.command("stop")
    state = federation.directory / "second" / "federation.json"
    federation.until(lambda: read_json(state)["state"] == "stopped")
    for program in sites.values():
        federation.until(lambda p=program: p.printed.count("waiting for the next run") == 2)
        assert "(stopped)" in program.printed
        assert "error" not in program.printed


def test_a_site_that_the_server_does_not_know_waits(federation: Federation) -> None:
    """Its key is made after `up` has started."""
    folders = federation.directory / "certs"
    assert federation.start("certs", "certs", folders, "--sites", "c").wait(60) == 0
    SILOS["c"] = "lawfirm"
    stranger = federation.enter("c")
    stranger.sees(f"c: not accepted yet: {federation.address} does not know the key {folders}/c")
    log = federation.directory / "c" / "logs" / "node.log"
    federation.until(lambda: log.read_text().count("Exit Code: 305") > 2)  # it has tried again
    assert stranger.end() == 143
    assert stranger.printed.count("\n") == 2
    assert stranger.printed.endswith("c: stopped\n")
    del SILOS["c"]


def test_sites_come_late_leave_and_come_back(
    federation: Federation, sites: dict[str, Program]
) -> None:
    """A round takes whom it finds; a lost site costs at most one attempt of one round."""
    assert sites["b"].end() == 143
    run = federation.submit(
        "third", "--num_rounds", 100, "--steps_per_round", STEPS, "--min_clients", 1
    )
    federation.until(lambda: federation.replies("third"))
    again = federation.enter("b")
    both, alone = ["a", "b"], ["a"]
    federation.until(lambda: both in federation.replies("third"))
    assert again.end() == 143
    assert not again.family()
    federation.until(lambda: federation.replies("third")[-1] == alone)
    sites["b"] = federation.enter("b")
    federation.until(lambda: federation.replies("third")[-1] == both)
    federation.command("stop")
    assert run.wait() == 1
    assert "stopped after round" in run.printed
    assert federation.replies("third")[0] == alone


def test_ctrl_c_ends_a_site_in_the_middle_of_a_run(
    federation: Federation, sites: dict[str, Program]
) -> None:
    federation.submit("fourth", "--num_rounds", 100, "--steps_per_round", STEPS)
    federation.until(lambda: federation.replies("fourth"))
    families = {name: program.family() for name, program in sites.items()}
    for program in sites.values():
        assert program.end(signal.SIGINT) == 130
        assert program.printed.endswith("stopped\n")
    left = {process.pid for process in federation.processes()}
    for family in families.values():
        assert len(family) > 2  # node, its fork, and the script
        assert not left & {process.pid for process in family}
    federation.command("stop", "--now")


def test_ctrl_c_of_the_flower_engine_ends_all_it_started(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, Path(mkdtemp(prefix="ft-")), tls=False)
    words = ["--engine", "flower", "--num_clients", "2", "--num_rounds", "100"]
    output = tmp_path / "printed"
    with output.open("w") as handle:
        process = subprocess.Popen(
            [sys.executable, "recipes/lora_sft.py", *words, "--output_dir", tmp_path / "run"],
            cwd=REPOSITORY,
            env=deployment.env,
            stdout=handle,
            stderr=subprocess.STDOUT,
        )
    try:
        deployment.until(lambda: "rounds: " in output.read_text() or process.poll() is not None)
        assert len(deployment.processes()) > 6, output.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Continue with --resume, or begin again" in output.read_text()
        deployment.until(lambda: not deployment.processes(), 10)
    finally:
        process.kill()
        deployment.close()
