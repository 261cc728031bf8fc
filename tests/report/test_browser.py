"""The report in headless Chromium: no overflow, no console errors, no request, both widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedtune.report import write_report
from tests.report.made_up import made_up_rounds, made_up_summary, write_run

BINARIES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BINARIES if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
# Runs in a test copy only: the report itself has no script and forbids them.
PROBE = """<script>
const wide = innerWidth;
const stray = [...document.querySelectorAll('main *')]
  .filter(e => !e.closest('.scroll') && !e.closest('svg'))
  .filter(e => e.getBoundingClientRect().right > wide + 0.5)
  .map(e => e.tagName + '.' + e.className);
const cut = [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width)
  .flatMap(s => [...s.querySelectorAll('text')]
    .filter(t => t.getBoundingClientRect().right > s.getBoundingClientRect().right + 0.5)
    .map(t => t.textContent));
parent.document.documentElement.dataset.probe = JSON.stringify({
  wide, scroll: document.documentElement.scrollWidth, stray, cut,
  charts: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width).length,
  requests: performance.getEntriesByType('resource').map(e => e.name),
});
</script></body>"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser found (looked for {', '.join(BINARIES)})"
)


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def probe(page: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    """Layout facts of an instrumented copy, in a frame: a window is never narrower than 500 px."""
    text = re.sub(r"<meta http-equiv=.*?/>", "", page.read_text(encoding="utf-8"))
    text = html.escape(text.replace("</body>", PROBE))
    frame = f'<iframe style="border:0" width="{width}" height="900" srcdoc="{text}"></iframe>'
    copy = tmp_path / "copy.html"
    copy.write_text(f'<!DOCTYPE html><meta charset="utf-8">{frame}', encoding="utf-8")
    done = browse(copy, tmp_path / f"profile-{width}", "--window-size=1400,1000", "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr
    facts: dict[str, Any] = json.loads(html.unescape(found[1]))
    return facts


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("rounds", [1, 10])
def test_nothing_overflows_and_nothing_is_fetched(tmp_path: Path, width: int, rounds: int):
    summary = made_up_summary(rounds)
    page = write_report(write_run(tmp_path / "run", summary, made_up_rounds(summary)))
    facts = probe(page, tmp_path, width)
    assert facts["wide"] == width
    assert facts["scroll"] <= width
    assert facts["stray"] == []
    assert facts["cut"] == []
    assert facts["charts"] == 3
    assert facts["requests"] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_no_console_message_and_a_picture(run_dir: Path, tmp_path: Path, width: int):
    page, picture = write_report(run_dir), tmp_path / "page.png"
    size = f"--window-size={width},900"
    done = browse(page, tmp_path / "profile", size, f"--screenshot={picture}")
    assert "CONSOLE" not in done.stderr
    assert picture.stat().st_size > 10_000


def test_dark_mode_is_dark(run_dir: Path, tmp_path: Path):
    from matplotlib.image import imread

    page, means = write_report(run_dir), {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        prefers = f"--blink-settings=preferredColorScheme={number}"
        browse(page, tmp_path / scheme, prefers, f"--screenshot={picture}")
        means[scheme] = float(imread(picture)[:, :, :3].mean())
    assert means["dark"] < 0.25
    assert means["light"] > 0.85
