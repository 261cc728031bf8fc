"""What a round of a deployment costs beyond training: SuperLink, sites and trainers on loopback.

python benchmarks/round_latency.py                       # about 40 s
python benchmarks/round_latency.py --large               # and with a model of 0.11 B parameters
python benchmarks/round_latency.py --large --peers ../shared/peers --nvflare_python PYTHON

A patched Trainer makes one tiny step a round; there is no evaluation. A round lasts from a client's
first step to its first step of the next round, files of the run included; the steps of the slowest
client are subtracted. Peers: stock Flower and NVFlare, whose clients add 1 to what they receive,
and Flower with a model that each message loads again. Round 1 comes with start-up and is set apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

TRAINER = Path(__file__).parent / "trainers" / "random_llama.py"
TARGET_S, LARGE_TARGET_S = 1.0, 1.5
SAMPLE_S = 0.2  # a relay lives longer
FAST = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.05"  # what stock Flower lets one tune
NVFLARE_JOB = "job of 5.1 MB"
# First match wins: join carries the trainer's command line too. A node forks an executor, and that
# a relay for each message.
ROLES = (
    (r"fedtune\.deploy\.gate", "superlink"),
    (r"fedtune\.deploy\.node", "supernode"),
    (r"fedtune\.cli join", "join"),
    (r"flwr-serverapp", "serverapp"),
    (re.escape(TRAINER.name), "trainer"),
)
BELOW = {"supernode": "executor", "executor": "relay", "relay": "relay"}
NVFLARE_ROLES = (
    ("simulator_worker", "client job"),
    ("simulator.simulator ", "server"),
    ("runner_process", "server job"),
    ("worker_process", "client job"),
    ("server_train", "server parent"),
    ("client_train", "client parent"),
)


@dataclass
class Case:
    """One measured system.

    Attributes:
        seconds: of a round beyond training, from round 2 on.
        first_s: from the start of the run until round 2 begins.
        train_s: of the slowest client, subtracted.
        server_s: of a round at the server, without its files, training subtracted.
        load: the machine's load average before and after.
        others: share of all processors that other programs had meanwhile.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    train_s: list[float] = field(default_factory=list)
    server_s: list[float] = field(default_factory=list)
    peak_mb: dict[str, int] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)
    others: float = 0.0
    note: str = ""

    @property
    def median(self) -> float:
        """Of `seconds`."""
        return statistics.median(self.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--mb", type=float, default=5.0, help="MiB of the fp32 adapter")
    parser.add_argument("--large", action="store_true", help="also 0.11 B parameters, LoRA rank 16")
    parser.add_argument("--only_large", action="store_true", help="nothing but the large model")
    parser.add_argument(
        "--peers",
        type=Path,
        nargs="?",
        const=Path(__file__).parents[2] / "shared" / "peers",
        help="also the peers; directory of their scripts (../shared/peers)",
    )
    parser.add_argument("--flower_python", default=sys.executable, help="with stock Flower 1.41")
    parser.add_argument("--nvflare_python", help="of an environment with nvflare and torch")
    parser.add_argument("--repeats", type=int, default=1, help="how often all is measured")
    parser.add_argument(
        "--patience_s",
        type=float,
        default=0.0,
        help="before each: wait so long for a quiet machine",
    )
    parser.add_argument("--keep", type=Path, help="keep logs and run directories here")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error("--rounds: expected at least 3, the first and the last give no value.")
    results = []
    with workspace(args.keep) as scratch:
        for number in range(1, args.repeats + 1):
            for measure, *arguments in plan(args):
                case = attempt(measure, args, scratch / f"{number}-{len(results)}", *arguments)
                results.append(case)
                print(line(case), flush=True)
    print(table(results))
    if args.json:
        rows = [
            {**asdict(case), "median": round(case.median, 3)} for case in results if case.seconds
        ]
        args.json.write_text(json.dumps(rows, indent=1))


def plan(args: argparse.Namespace) -> Iterator[tuple]:
    """What is measured, in this order."""
    if not args.only_large:
        yield measure_fedtune, False
        if args.peers:
            yield (measure_flower,)
            yield measure_flower, FAST
            yield measure_nvflare, "sim"
            yield measure_nvflare, "poc"
    if args.large or args.only_large:
        yield measure_fedtune, True
        if args.peers:
            yield (measure_reload,)


def attempt(measure, args: argparse.Namespace, scratch: Path, *arguments) -> Case:
    """The case, or one with a note why it could not be measured."""
    scratch.mkdir(parents=True)
    await_quiet(args.patience_s)
    load, (used, idle), own = os.getloadavg()[0], processor_times(), own_time()
    try:
        case = measure(args, scratch, *arguments)
    except Exception as problem:
        if measure is measure_fedtune:
            raise
        name = " ".join([measure.__name__.removeprefix("measure_"), *arguments])
        return Case(name, note=f"not measured: {' '.join(str(problem).split())[-300:]}")
    case.load = (round(load, 2), round(os.getloadavg()[0], 2))
    used_then, idle_then = processor_times()
    others = used_then - used - (own_time() - own) * os.sysconf("SC_CLK_TCK")
    case.others = round(max(0.0, others) / (used_then - used + idle_then - idle), 2)
    return case


def await_quiet(patience_s: float) -> None:
    """Return when others use less than a fifth of the processors, or after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        used, idle = processor_times()
        time.sleep(3.0)
        used_then, idle_then = processor_times()
        if used_then - used < 0.2 * (used_then - used + idle_then - idle):
            return


def own_time() -> float:
    """Processor seconds of this process and of all its descendants that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def processor_times() -> tuple[int, int]:
    """Clock ticks of all processors: used and idle."""
    user, nice, system, idle, waiting, *others = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return user + nice + system + sum(others), idle + waiting


@contextlib.contextmanager
def workspace(keep: Path | None) -> Iterator[Path]:
    """A short path: Unix sockets lie below it."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="run-", dir=keep.absolute()))
        return
    with tempfile.TemporaryDirectory(prefix="latency-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


# fedtune


def measure_fedtune(args: argparse.Namespace, scratch: Path, large: bool) -> Case:
    """Run the flower engine as `--engine flower` and the deployment commands do."""
    from fedtune.config import FederationArguments
    from fedtune.engines.flower import run_flower
    from fedtune.server.submission import Submission

    marks, out = scratch / "marks", scratch / "out"
    for directory in (marks, out):
        directory.mkdir()
    submission = Submission(
        run=secrets.token_hex(6),
        directory=str(out),
        federation=FederationArguments(
            engine="flower", num_rounds=args.rounds, steps_per_round=1, weight_by="examples"
        ),
        seed=42,
        min_clients=args.clients,
        join_timeout_s=300.0,
        sites_evaluate=False,
    )
    command = [sys.executable, str(TRAINER), "--marks", str(marks)]
    command += ["--large"] if large else ["--adapter_mb", str(args.mb)]
    names = [f"site-{number + 1}" for number in range(args.clients)]
    started = time.time()
    with (
        Memory() as memory,
        (scratch / "console").open("w") as console,
        contextlib.redirect_stdout(console),
        contextlib.redirect_stderr(console),
    ):
        run_flower(submission, clients=names, command=command, logs=scratch / "logs")
    begins, ends = read_marks(marks, args.clients)
    records = [json.loads(text) for text in (out / "rounds.jsonl").read_text().splitlines()]
    train_s = [
        max(end - begin for begin, end in zip(begins[r], ends[r], strict=True)) for r in begins
    ]
    # A client's own gap, so that a site which hears of a round later is not charged to the others.
    gaps = [
        statistics.median(b - a for a, b in zip(begins[r], begins[r + 1], strict=True))
        for r in range(1, args.rounds)
    ]
    megabytes = records[-1]["bytes_down"] / args.clients / 1e6
    return Case(
        name=f"fedtune, {'0.11 B model' if large else 'tiny model'}, {megabytes:.2f} MB",
        seconds=[round(gap - step, 3) for gap, step in zip(gaps, train_s, strict=False)][1:],
        first_s=round(min(begins[2]) - started, 2),
        train_s=[round(value, 3) for value in train_s],
        server_s=[
            round(record["wall_s"] - max(reply["train_s"] for reply in record["replies"]), 3)
            for record in records[1:]
        ],
        peak_mb=memory.peak_mb,
    )


def read_marks(directory: Path, clients: int) -> tuple[dict[int, list[float]], ...]:
    """Round -> times at which each client began and ended its one step."""
    begins: dict[int, list[float]] = {}
    ends: dict[int, list[float]] = {}
    files = sorted(directory.iterdir())
    if len(files) != clients:
        raise SystemExit(f"expected marks of {clients} trainers, found {len(files)}: a restart?")
    for file in files:
        for text in file.read_text().splitlines():
            mark = json.loads(text)
            times = begins if mark["what"] == "begin" else ends
            times.setdefault(mark["step"], []).append(mark["time"])
    return begins, ends


class Memory:
    """Peak resident memory (VmHWM) of all descendants of this process, by role."""

    def __init__(self) -> None:
        self.peak_mb: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            parents = {pid: parent for pid in all_pids() if (parent := parent_of(pid))}
            roles = {os.getpid(): ""}
            for pid in sorted(parents):
                self._look(pid, parents, roles)

    def _look(self, pid: int, parents: dict[int, int], roles: dict[int, str]) -> str | None:
        """Role of a process, None when it is not ours."""
        if pid in roles:
            return roles[pid]
        if pid not in parents:
            return None
        above = self._look(parents[pid], parents, roles)
        if above is None:
            return None
        with contextlib.suppress(OSError, IndexError):
            roles[pid] = role = role_of(pid, above)
            if role:
                self.peak_mb[role] = max(self.peak_mb.get(role, 0), peak_mb(pid))
        return roles.setdefault(pid, "")


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def role_of(pid: int, above: str) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    for pattern, role in ROLES:
        if re.search(pattern, words):
            return BELOW.get(above, role) if role == "supernode" else role
    return ""


def peak_mb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


# Peers


def measure_flower(args: argparse.Namespace, scratch: Path, tuned: str = "") -> Case:
    """Stock Flower, and once more with a grid of one's own and what its environment allows."""
    poll = 0.05 if tuned else 0.0
    config = [f"rounds={args.rounds}", f"poll={poll}", f"tensor-mb={args.mb}"]
    report = run_harness(args, scratch, [*(["--env", tuned] if tuned else []), "--cfg", *config])
    rounds = report["result"]["rounds"]
    seconds = [round(item["s"], 3) for item in rounds]
    return Case(
        name=f"Flower {'tuned polling' if tuned else 'stock'}, {args.mb * 2**20 / 1e6:.2f} MB",
        seconds=seconds[1:],
        first_s=round(report["submit_to_main_s"] + seconds[0], 2),
        peak_mb=report["peak_rss_mb"],
    )


def measure_reload(args: argparse.Namespace, scratch: Path) -> Case:
    """Flower whose ClientApp imports torch, loads the model and trains a step for each message."""
    rounds = min(args.rounds, 4)  # half a minute each
    seed = scratch / "seed"
    home = copied(args.peers / "flower", scratch / "flower")
    settings = {"BENCH_WORK": str(seed), "SEED_DIR": str(seed), "OMP_NUM_THREADS": "1"}
    run_program([args.flower_python, "trainer.py", "seed", str(seed)], home, settings, scratch)
    config = ['mode="adapter"', 'handler="reload"', f"rounds={rounds}", "poll=0.05"]
    flags = ["--limit", "400", "--env", FAST, "--cfg", *config]
    report = run_harness(args, scratch, flags, settings)
    found = report["result"]["rounds"]
    steps = [max(client["work_s"] for client in item["clients"]) for item in found]
    seconds = [round(item["s"] - step, 3) for item, step in zip(found, steps, strict=True)]
    return Case(
        name="Flower, 0.11 B model loaded for each message",
        seconds=seconds[1:],
        first_s=round(report["submit_to_main_s"] + found[0]["s"], 2),
        train_s=[round(step, 3) for step in steps],
        peak_mb=report["peak_rss_mb"],
    )


def measure_nvflare(args: argparse.Namespace, scratch: Path, environment: str) -> Case:
    """NVFlare's FedAvg recipe; the gaps between what a client receives, as its users see them."""
    if not args.nvflare_python:
        raise RuntimeError("give --nvflare_python an interpreter with nvflare and torch")
    home = copied(args.peers / "nvflare", scratch / "nvflare")
    words = ["bash", "run_fedavg.sh", "latency", "--kind", "lora", "--mode", "pytorch"]
    words += ["--rounds", str(args.rounds), "--clients", str(args.clients), "--env", environment]
    python = os.path.abspath(args.nvflare_python)  # not resolved: it is a link in its environment
    settings = {"PEER_PYTHON": python, "PEER_WORK": str(scratch / "work"), "LIMIT": "280"}
    settings["HOME"] = str(scratch)  # it keeps settings there
    run_program(words, home, settings, scratch)
    received: dict[str, list[float]] = {}
    for text in (home / "out" / "latency.log").read_text().splitlines():
        moment, site, event, *_ = text.split()
        if event == "recv":
            received.setdefault(site, []).append(float(moment))
    watched = json.loads((home / "out" / "latency.json").read_text())
    if not received or any(len(times) != args.rounds for times in received.values()):
        raise RuntimeError((home / "out" / "latency.out").read_text()[-300:])
    gaps = [
        statistics.median(times[r + 1] - times[r] for times in received.values())
        for r in range(args.rounds - 1)
    ]
    return Case(
        name=f"NVFlare {environment}, {NVFLARE_JOB}",
        seconds=[round(gap, 3) for gap in gaps[1:]],
        first_s=round(min(times[1] for times in received.values()) - watched["start"], 2),
        peak_mb=nvflare_peaks(watched["procs"]),
    )


def nvflare_peaks(processes: Sequence[dict]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for process in processes:
        role = next((name for key, name in NVFLARE_ROLES if key in process["cmd"]), None)
        if role:
            peaks[role] = max(peaks.get(role, 0), round(process["hwm"]))
    return peaks


def run_harness(
    args: argparse.Namespace,
    scratch: Path,
    flags: Sequence[str],
    settings: dict[str, str] | None = None,
) -> dict:
    """Stock Flower's SuperLink, SuperNodes and apps, by the peer's own harness."""
    home = copied(args.peers / "flower", scratch / "flower")
    command = [args.flower_python, "harness.py", "latency", "--nodes", str(args.clients)]
    command += ["--port", str(free_ports(11 + args.clients)), *flags]
    settings = {"PEER_WORK": str(scratch / "work"), **(settings or {})}
    run_program(command, home, settings, scratch)
    report = json.loads((home / "out" / "latency.json").read_text())
    if report["result"] == "TIMEOUT" or not report["result"]["rounds"]:
        raise RuntimeError(f"no rounds within the harness's limit; see {scratch}/peer.log")
    return report


def copied(source: Path, target: Path) -> Path:
    """A writable copy of the peer's scripts, which write beside themselves."""
    if not source.is_dir():
        raise RuntimeError(f"there is no directory {source}; give --peers the peers' scripts")
    if not target.exists():
        ignore = shutil.ignore_patterns("results", "out", "work", ".venv")
        shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copyfile)
        for directory in (target, *(path for path in target.rglob("*") if path.is_dir())):
            directory.chmod(0o755)
    return target


def run_program(
    command: Sequence[str], home: Path, settings: dict[str, str], scratch: Path
) -> None:
    """Run a peer to its end; nothing it starts is left, whatever happens."""
    from fedtune.processes.supervisor import Supervisor

    if shutil.which(command[0]) is None:
        raise RuntimeError(f"there is no program {command[0]}")
    with Supervisor(scratch, env={**os.environ, **settings}) as parts:
        part = parts.start("peer", command, cwd=home)
        while part.status is None:
            time.sleep(0.2)
        if part.status:
            raise part.ended()


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for first in range(18000, 32000, 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports from 18000 on")


# Tables


def line(case: Case) -> str:
    if not case.seconds:
        return f"{case.name}: {case.note}"
    words = [f"{case.name}: {case.median:.2f} s a round beyond training {case.seconds}"]
    words.append(
        f"until round 2 {case.first_s} s, load {case.load[0]} -> {case.load[1]}, "
        f"others had {case.others:.0%} of the processors"
    )
    if case.train_s:
        words.append(f"training subtracted {statistics.median(case.train_s):.2f} s")
    if case.server_s:
        words.append(f"at the server, without files {statistics.median(case.server_s):.2f} s")
    return "; ".join(words)


def table(cases: Sequence[Case]) -> str:
    """Seconds of all runs of a case, and the ratio to fedtune's."""
    rows = ["", "seconds a round beyond training", "| case | median | min - max | times fedtune |"]
    rows.append("|---|---|---|---|")
    ours = {large: merged(cases, "fedtune", large) for large in (False, True)}
    for name in dict.fromkeys(case.name for case in cases if case.seconds):
        values = [value for case in cases if case.name == name for value in case.seconds]
        base = ours["0.11 B" in name]
        median = statistics.median(values)
        ratio = f"{median / statistics.median(base):.1f}" if base else ""
        rows.append(f"| {name} | {median:.2f} | {min(values):.2f} - {max(values):.2f} | {ratio} |")
    rows += ["", "peak resident memory, MB"]
    for name in dict.fromkeys(case.name for case in cases if case.peak_mb):
        peaks: dict[str, int] = {}
        for case in cases:
            for role, peak in case.peak_mb.items() if case.name == name else ():
                peaks[role] = max(peaks.get(role, 0), peak)
        rows.append(f"  {name}: " + ", ".join(f"{role} {peak}" for role, peak in peaks.items()))
    for large, limit in ((False, TARGET_S), (True, LARGE_TARGET_S)):
        if ours[large]:
            median = statistics.median(ours[large])
            verdict = "held" if median <= limit else "missed"
            rows.append(
                f"{'0.11 B' if large else 'tiny'} model: {median:.2f} s, target {limit} s {verdict}"
            )
    return "\n".join(rows)


def merged(cases: Sequence[Case], start: str, large: bool) -> list[float]:
    chosen = [c for c in cases if c.name.startswith(start) and ("0.11 B" in c.name) == large]
    return [value for case in chosen for value in case.seconds]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
