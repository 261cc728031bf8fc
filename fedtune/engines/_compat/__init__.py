"""Every private touch of Flower, and nothing else. Tested with flwr 1.41 and 1.42.

messages    a `Message` outside a task, for tests and the engine in this process
simulation  Flower's simulation, called from a program
version     which Flower this is, and whether its internals are known
bundle      the app as Flower packs it, and its hash
fleet       whether a node that a SuperLink knows has signed a request
supernode   Flower's SuperNode without its fixed waits
predecessor a node that was killed is reported by the next one
run_watch   a node asks whether the runs at its site go on
superexec   one ServerApp process a run, however slow the host
executor    one process that forks a ClientApp for each message
clientapp   what runs in the fork
objects     parts of a message that are not there yet are asked for again sooner
journal     how far a task has come, so that a killed fork can be started again
"""

from fedtune.engines._compat.bundle import build_app, hash_app
from fedtune.engines._compat.fleet import known_nodes
from fedtune.engines._compat.messages import client_failed, set_message_id, task_identity
from fedtune.engines._compat.objects import hasten_server
from fedtune.engines._compat.run_watch import RunWatch
from fedtune.engines._compat.simulation import quiet_flower, run_simulation
from fedtune.engines._compat.superexec import launch_runs_once
from fedtune.engines._compat.supernode import NodeOptions, run_supernode, run_untested_supernode
from fedtune.engines._compat.version import TESTED, flower_version, is_tested

__all__ = [
    "TESTED",
    "NodeOptions",
    "RunWatch",
    "build_app",
    "client_failed",
    "flower_version",
    "hash_app",
    "hasten_server",
    "is_tested",
    "known_nodes",
    "launch_runs_once",
    "quiet_flower",
    "run_simulation",
    "run_supernode",
    "run_untested_supernode",
    "set_message_id",
    "task_identity",
]
