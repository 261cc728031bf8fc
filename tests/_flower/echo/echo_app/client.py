"""Answers every message with its own arrays; says which process did it."""

import os
import signal
import sys
import time

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.transport.packing import packed

app = ClientApp(mods=[packed])


@app.train()
def train(message, context):
    started = time.time()
    config = message.content["config"]
    marks = config["marks"]
    with open(f"{marks}/{context.node_id}-{config['round']}", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(config["think"])
    arrays = message.content["arrays"]
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {name: Array(array.numpy() + 1) for name, array in arrays.items()}
            ),
            "config": ConfigRecord(
                {
                    "pid": os.getpid(),
                    "parent": os.getppid(),
                    "torch": "torch" in sys.modules,
                    "site": os.environ.get("FEDTUNE_SITE", ""),
                    "started": started,
                    "ended": time.time(),
                }
            ),
        }
    )
    return Message(content, reply_to=message)


@app.query("die")
def die(message, context):
    with open(f"{message.content['config']['marks']}/{context.node_id}-die", "a") as file:
        file.write(f"{os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)
