"""Ctrl-C, SIGTERM and SIGHUP: as exceptions in the main thread, and held back where it matters."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["STOPPING", "Stopped", "ends_once", "held", "interrupted_by", "status_of", "stoppable"]

STOPPING = (signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """SIGTERM or SIGHUP arrived; left alone it ends the program with status 128 + signal."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the block as `Stopped`, as Ctrl-C does as KeyboardInterrupt.

    In the main thread alone; a handler that is there already is kept.
    """
    handlers: dict[signal.Signals, Any] = {}
    if _in_main_thread():
        for number in STOPPING:
            if signal.getsignal(number) is signal.SIG_DFL:
                handlers[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def ends_once() -> Iterator[None]:
    """The first of Ctrl-C, SIGTERM and SIGHUP leaves the block; more of them change nothing.

    A command that ends is quick or has limits of its own, and a second signal in the middle of it
    would leave files and processes behind, or change its status while Python itself ends: so they
    stay ignored behind the block, too. Signals that were ignored before stay so.
    """
    if not _in_main_thread():
        yield
        return
    numbers = (signal.SIGINT, *STOPPING)
    usual = (signal.SIG_DFL, signal.default_int_handler)

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(128 + number)

    handlers = {each: signal.getsignal(each) for each in numbers}
    handlers = {each: known for each, known in handlers.items() if known in usual}
    for each in handlers:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each, known in handlers.items():
            if signal.getsignal(each) is end:
                signal.signal(each, known)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP that arrive inside take effect when the block is over."""
    if not _in_main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {}
    for number in (signal.SIGINT, *STOPPING):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            handlers[number] = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for known, handler in handlers.items():
            signal.signal(known, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def interrupted_by(error: BaseException | None) -> str | None:
    """Name of the signal behind an error, or None where there is none.

    What breaks while a signal takes its way out, such as a write to a terminal that is gone, is not
    why the program ends.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return "SIGINT"
        if isinstance(error, Stopped):
            return signal.Signals(int(str(error.code)) - 128).name
        error = error.__cause__ or error.__context__
    return None


def status_of(stop: KeyboardInterrupt | Stopped) -> int:
    """What a shell expects of a program that this ended: 130, 143, 129."""
    return int(str(stop.code)) if isinstance(stop, Stopped) else 128 + signal.SIGINT


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(128 + number)
