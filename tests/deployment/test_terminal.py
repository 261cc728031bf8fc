"""What a person reads: the script's lines without bars, and who takes part."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deploy.follow import _show_sites
from fedtune.deploy.script import LogLines, without_bars

BAR = "Map: 100%|\N{FULL BLOCK}\N{FULL BLOCK}| 420/420 [00:00<00:00, 5130.29 examples/s]"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (BAR, ""),
        ("  0%|          | 0/60 [00:00<?, ?it/s]", ""),
        (" 50%|#####     | 3/6 [00:00<00:00, 20.69it/s]\x1b[A", ""),
        (
            "  0%|          | 0/60 [00:00<?, ?it/s]train.py:5: UserWarning",
            "train.py:5: UserWarning",
        ),
        ("\x1b[A{'eval_loss': '4.753'}", "{'eval_loss': '4.753'}"),
        ("{'loss': '1.5', 'epoch': '50%|a|[b]'}", "{'loss': '1.5', 'epoch': '50%|a|[b]'}"),
        ("  indented 50% | table | [x]", "  indented 50% | table | [x]"),
        ("\x1b[32mok\x1b[0m ", "ok"),
        ("", ""),
    ],
)
def test_bars_are_not_shown(line: str, shown: str) -> None:
    assert without_bars(line) == shown


def test_tqdm_itself_is_not_shown(tmp_path: Path) -> None:
    from tqdm import tqdm

    with (tmp_path / "log").open("w") as file:
        for number in tqdm(range(3), desc="Tokenizing train dataset", file=file):
            tqdm.write(f"row {number}", file=file)
        for _ in tqdm(range(3), file=file):
            pass
    lines = [without_bars(line) for line in LogLines(tmp_path / "log").read(rest=True)]
    assert [line for line in lines if line] == ["row 0", "row 1", "row 2"]


def test_sites_are_shown_when_they_change(capsys: pytest.CaptureFixture[str]) -> None:
    def site(name: str, state: str, problem: str | None = None) -> dict[str, str | None]:
        return {"client": name, "state": state, "problem": problem}

    looks = [
        [],
        [site("node 5", "asked"), site("node 6", "new")],
        [site("clinic", "planned"), site("node 6", "asked")],
        [site("clinic", "setting up"), site("node 6", "asked")],
        [site("clinic", "ready"), site("node 6", "refused", "site bank: too many rounds")],
        [site("bank", "ready")],
    ]
    shown, known = "", set[str]()
    for look in looks:
        shown = _show_sites({"clients": look}, shown, known)
    assert capsys.readouterr().out.splitlines() == [
        "sites: 2 starting",
        "sites: clinic starting, 1 more starting",
        "sites: clinic ready, node 6 refused (site bank: too many rounds)",
        "sites: bank ready, clinic absent",
    ]
