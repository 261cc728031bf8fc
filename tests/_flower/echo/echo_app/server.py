"""Sends arrays to all nodes, some rounds; writes down times and replies."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from fedtune._flower.objects import hasten_server
from fedtune.transport.packed_grid import PackedGrid

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    if config["hasten"]:
        hasten_server()
    if config["pack"] and not config["stock"]:
        grid = PackedGrid(grid)
    out = Path(config["out"])
    nodes = []
    while len(nodes) < config["nodes"]:
        nodes = list(grid.get_node_ids())
        time.sleep(0.05)
    rounds = []
    for number in range(1, config["rounds"] + 1):
        rounds.append(one_round(grid, config, nodes, number))
        (out / "rounds.json").write_text(json.dumps(rounds))
    (out / "done.json").write_text(json.dumps(rounds))


def one_round(grid, config, nodes, number):
    count = config["arrays"]
    size = int(config["megabytes"] * 2**20 / 4 / count)
    rng = np.random.default_rng(number)
    arrays = ArrayRecord({f"a{i}": Array(rng.random(size, dtype=np.float32)) for i in range(count)})
    told = ConfigRecord({"round": number, "think": config["think"], "marks": config["out"]})
    content = RecordDict({"arrays": arrays, "config": told})
    sent = time.time()
    messages = [Message(content, node, config["kind"]) for node in nodes]
    replies = list(grid.send_and_receive(messages)) if config["stock"] else eager(grid, messages)
    result = {"sent": sent, "seconds": time.time() - sent, "replies": []}
    for reply in replies:
        plain = {"node": reply.metadata.src_node_id}
        if reply.has_error():
            plain["error"] = reply.error.reason
            plain["code"] = reply.error.code
        else:
            back = reply.content["arrays"]
            plain["right"] = all(
                np.array_equal(back[name].numpy(), arrays[name].numpy() + 1) for name in arrays
            )
            plain.update(dict(reply.content["config"]))
        result["replies"].append(plain)
    return result


def eager(grid, messages):
    pending, replies = set(grid.push_messages(messages)), []
    while pending:
        for reply in grid.pull_messages(pending):
            pending.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
        time.sleep(0.05)
    return replies
