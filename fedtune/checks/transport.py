"""Rules about quantized transport."""

from __future__ import annotations

from fedtune.config import Arguments, TransportArguments
from fedtune.strategies import Method
from fedtune.transport.settings import CodecSettings

__all__ = ["codec", "error_feedback"]

OF_A_CODEC = ("codec_on", "codec_direction", "error_feedback", "codec_args")


def codec(args: Arguments) -> str | None:
    """Well-formed `--codec_args`, and no details of a codec that is not there."""
    given, default = args.transport, TransportArguments()
    CodecSettings.of(given, refactors=False)
    if given.codec != "none":
        return None
    for flag in OF_A_CODEC:
        value = getattr(given, flag)
        if value and value != getattr(default, flag):
            return f"--{flag} has no effect with --codec none. Name a codec, or leave it out."
    return None


def error_feedback(args: Arguments, method: Method) -> str | None:
    """Whether there is a next update that what was lost can be added to."""
    transport = args.transport
    if not transport.error_feedback:
        return None
    if transport.codec_on == "weights":
        return (
            "--error_feedback with --codec_on weights: what was lost is added to a difference, and "
            "values travel. Use --codec_on delta, or leave it out."
        )
    if transport.codec_direction == "down":
        return (
            "--error_feedback with --codec_direction down: it is for updates, and on the way down "
            "the next difference contains what was lost. Use both or up, or leave it out."
        )
    if method.properties.refactors:
        return (
            f"--error_feedback with --strategy {args.federation.strategy}: its factors are new in "
            "every round, so what was lost has nothing to be added to. Leave it out."
        )
    return None
