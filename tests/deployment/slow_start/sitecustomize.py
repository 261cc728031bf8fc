"""First on the path of a deployment: the process of a run starts slowly, as from a cold disk."""

import os
import sys
import time

if any("flwr-serverapp" in word for word in sys.orig_argv):
    with open(os.environ["FEDTUNE_TEST_STARTS"], "a") as started:
        started.write(f"{os.getpid()}\n")
    time.sleep(float(os.environ["FEDTUNE_TEST_SLOW_S"]))
