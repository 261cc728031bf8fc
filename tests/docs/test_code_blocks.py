"""Every bash and python block of README.md and docs/*.md runs, in order, in a directory per file.

Above a block may stand `<!-- not run: reason -->`, or `<!-- slow -->` for `make test-slow` only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RUN = {
    "bash": ["bash", "-e", "-u", "-o", "pipefail", "-c"],
    "python": [sys.executable, "-c"],
}
OTHER_SHELLS = {"console", "sh", "shell", "zsh", "py"}  # would be skipped silently
TIMEOUT_S = 300
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
SET_UP = re.compile(r"^\s*(make|git clone)\b", re.MULTILINE)  # never run here


class Block(NamedTuple):
    """A fenced block, the line of its fence, and the comments right above it."""

    language: str
    line: int
    code: str
    comments: tuple[str, ...] = ()

    @property
    def skipped(self) -> bool:
        return any(comment.startswith("not run") for comment in self.comments)

    @property
    def slow(self) -> bool:
        return "slow" in self.comments


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks, top to bottom; the fence may be indented."""
    blocks, lines = [], text.splitlines()
    start, fence = 0, ""
    for number, line in enumerate(lines, start=1):
        found = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if found and not fence:
            fence, start, language = found[1], number, found[2]
        elif fence and line.strip() == fence:
            body = lines[start : number - 1]
            margin = len(lines[start - 1]) - len(lines[start - 1].lstrip())
            code = "".join(
                row[margin:] + "\n" if not row[:margin].strip() else row + "\n" for row in body
            )
            blocks.append(Block(language, start, code, _comments_above(lines[: start - 1])))
            fence = ""
    assert not fence, f"the block that starts in line {start} does not end"
    return blocks


def _comments_above(lines: list[str]) -> tuple[str, ...]:
    """Comments that end right above a fence, blank lines aside."""
    text = "\n".join(lines).rstrip()
    found: list[str] = []
    while text.endswith("-->"):
        opening = text.rindex("<!--")
        found.insert(0, COMMENT.fullmatch(text[opening:])[1])
        text = text[:opening].rstrip()
    return tuple(found)


def code_of(document: Path) -> list[Block]:
    return [block for block in blocks_of(document.read_text()) if block.language in RUN]


def run(block: Block, where: str, cwd: Path) -> None:
    bin_dir = str(Path(sys.executable).parent)
    done = subprocess.run(
        [*RUN[block.language], block.code],
        cwd=cwd,
        env={**os.environ, "PATH": bin_dir + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, (
        f"{where}, line {block.line}: status {done.returncode}\n{block.code}\n"
        f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )


def run_document(document: Path, directory: Path, *, slow: bool) -> None:
    (directory / "recipes").symlink_to(REPOSITORY / "recipes")
    for block in code_of(document):
        if not block.skipped and (slow or not block.slow):
            run(block, document.name, directory)


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@each_document
def test_blocks_run(document, tmp_path):
    run_document(document, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if any(block.slow for block in code_of(path))],
    ids=lambda path: path.name,
)
def test_slow_blocks_run(document, tmp_path):
    """From the top: later blocks use what earlier ones made."""
    run_document(document, tmp_path, slow=True)


def test_the_readme_has_both_kinds():
    assert {block.language for block in code_of(REPOSITORY / "README.md")} == {"bash", "python"}


@each_document
def test_a_block_that_is_not_run_says_why(document):
    for block in blocks_of(document.read_text()):
        where = f"{document.name}, line {block.line}"
        assert block.language not in OTHER_SHELLS, f"{where}: write bash or python"
        for comment in block.comments:
            if comment.startswith("not run"):
                assert re.fullmatch(r"not run: \S.{9,}", comment), f"{where}: give the reason"
        if block.language == "bash" and SET_UP.search(block.code):
            assert block.skipped, f"{where}: `make` and `git clone` need `<!-- not run: reason -->`"


def test_blocks_are_found():
    text = """
<!-- not run: needs a cluster -->

```bash
make demo
```
text
```python
print("<!-- slow -->")
```
1. item
   <!-- slow -->
   <!-- a remark -->
   ~~~bash
   if true; then
     echo
   fi
   ~~~
```
plain
```
"""
    assert blocks_of(text) == [
        Block("bash", 4, "make demo\n", ("not run: needs a cluster",)),
        Block("python", 8, 'print("<!-- slow -->")\n'),
        Block("bash", 14, "if true; then\n  echo\nfi\n", ("slow", "a remark")),
        Block("", 19, "plain\n"),
    ]
    first, second, third, _ = blocks_of(text)
    assert first.skipped
    assert not second.slow
    assert third.slow


@pytest.mark.parametrize(
    "block", [Block("bash", 1, "false\ntrue\n"), Block("python", 1, "raise ValueError\n")]
)
def test_a_failing_block_fails(block, tmp_path):
    with pytest.raises(AssertionError, match="line 1: status 1"):
        run(block, "README.md", tmp_path)
