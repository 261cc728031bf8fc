"""In place of a site's node: asks the relay's ClientApp itself, as FAKE_NODE says.

FAKE_NODE is a list of words: `plan:7`, `train:7:1`, `finish:7:3` (run 7, round 1 or 3), `over:7`
(the node has heard that run 7 has ended), `brief` (little patience with a script that starts),
`die_once`, `die`. What comes back is appended to the file FAKE_NODE_LOG, an object a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from fedtune.files import append_line
from fedtune.relay.folder import Over
from fedtune.relay.site import ENVIRONMENT, SiteFolder


def act(word: str, log: Path) -> None:
    from tests.relay import asking

    kind, *numbers = word.split(":")
    if kind == "die" or (kind == "die_once" and not log.exists()):
        note(log, word, "")
        print("no power", flush=True)
        os._exit(3)
    if kind == "die_once":
        return
    if kind == "brief":
        from fedtune.relay import app

        app.PATIENCE_S = 0.5
        return
    if kind == "over":
        folder = SiteFolder(Path(os.environ[ENVIRONMENT])).run(numbers[0])
        at_once = folder.progress.round == 0
        folder.write_over(Over(folder.flower_run, "it has ended at the server", at_once))
        note(log, word, "")
        return
    run, *rounds = numbers
    round_ = [int(number) for number in rounds]
    error = ""
    try:
        if kind == "plan":
            asking.plan(run)
        elif kind == "train":
            asking.train(*round_, run)
        else:
            asking.finish(*round_, run)
            time.sleep(0.5)  # a slow network; meanwhile the script ends
            print("INFO :      Sending: query.finish message (ID: 1)", flush=True)
    except Exception as problem:
        error = str(problem)
    note(log, word, error)
    print("INFO :      Sent successfully", flush=True)


def note(log: Path, word: str, error: str) -> None:
    append_line(log, json.dumps({"word": word, "error": error, "pid": os.getpid()}))


def main() -> None:
    os.environ[ENVIRONMENT] = sys.argv[sys.argv.index("--site") + 1]
    log = Path(os.environ["FAKE_NODE_LOG"])
    words = os.environ["FAKE_NODE"].split()
    if words[:1] == ["die"] or (words[:1] == ["die_once"] and not log.exists()):
        act(words[0], log)
    print("INFO :      SuperNode ID: 5", flush=True)
    for word in words:
        act(word, log)
    time.sleep(600)


if __name__ == "__main__":
    main()
