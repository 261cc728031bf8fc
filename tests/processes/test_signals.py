"""Signals as exceptions, held back, and found behind what breaks on the way out."""

import signal

import pytest

from fedtune.processes.signals import Stopped, held, interrupted_by, stoppable


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_block_with_its_status(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop, stoppable():
        signal.raise_signal(number)
    assert stop.value.code == 128 + number
    assert interrupted_by(stop.value) == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_held_takes_effect_afterwards(number):
    done = []

    def work():
        with stoppable():
            with held():
                signal.raise_signal(number)
                done.append("whole")
            done.append("never")

    with pytest.raises((KeyboardInterrupt, Stopped)):
        work()
    assert done == ["whole"]


def test_an_ignored_signal_stays_ignored():
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(), held():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_breaks_on_the_way_out_is_not_why():
    def work():
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal") as broken:
        work()
    assert interrupted_by(broken.value) == "SIGINT"
    assert interrupted_by(ValueError("x")) is None
