"""Tensors of a message as differences to what the receiver has, and back.

    value   x' = payload                        there is nothing to take a difference to
    delta   x' = dtype(old + payload)           in fp32 at least
    bits    x' = old, its bit pattern moved on  lossless: the tensor is as narrow as the codec
    same    x' = old                            the sender's value has not changed

Sender and receiver make x' by the same operations, so they agree to the bit. Lossy codes touch
differences only: a `value` travels in 16 bits at least, unless it is a difference by itself, or the
user wants values coded (`--codec_on weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.adapters import Entry
from fedtune.errors import ManifestError
from fedtune.transport.bits import bit_difference, bit_sum
from fedtune.transport.bundle import Part, Slot, read_bundle, write_bundle
from fedtune.transport.codecs import CODECS, encode, opened
from fedtune.transport.codecs.base import empty, refused
from fedtune.transport.feedback import feed_back
from fedtune.transport.messages import ARRAYS
from fedtune.transport.settings import CodecSettings

__all__ = ["SAME", "Coded", "Form", "code", "form_of", "moved", "undo"]

VALUE, DELTA, BITS, SAME = "value", "delta", "bits", "same"
ALONE = 1 << 18  # values; a tensor of so many has a payload of its own, and is not copied for it

Tensors = Mapping[str, Tensor]


class Form(NamedTuple):
    """How one tensor is sent.

    Attributes:
        fed_back: whether the next message can make good what the codec loses.
    """

    kind: str
    codec: str = "none"
    fed_back: bool = False


@dataclass(frozen=True)
class Coded:
    """Tensors on the wire.

    Attributes:
        received: what the receiver makes of them.
        residual: what has been lost so far of those whose losses are fed back.
    """

    data: bytes
    received: dict[str, Tensor]
    residual: dict[str, Tensor]


def form_of(
    name: str,
    tensor: Tensor,
    old: Tensor | None,
    codec: str,
    settings: CodecSettings,
    *,
    is_difference: bool = False,
) -> Form:
    """How to send a tensor of which the receiver has `old`, None for nothing that helps.

    `is_difference`: the tensor's values are one.
    """
    chosen = CODECS[codec]
    if not tensor.is_floating_point() or not settings.takes(name, tuple(tensor.shape)):
        return Form(VALUE)
    if is_difference or settings.on == "weights":
        return Form(VALUE, codec, fed_back=is_difference)
    if old is None or Entry.of(old) != Entry.of(tensor):
        return Form(VALUE, "bf16")  # fp16 would lose small values, and refuse large ones
    if tensor.dtype.itemsize <= chosen.item_bytes:
        return Form(BITS, "zstd")
    return Form(DELTA, codec, fed_back=True)


def code(
    tensors: Tensors,
    forms: Mapping[str, Form],
    old: Tensors,
    *,
    residual: Tensors | None = None,
) -> Coded:
    """Encode tensors in the given forms.

    Args:
        old: what the receiver has of them.
        residual: what earlier messages lost; None: nothing is fed back.

    Raises:
        ManifestError: a value is not finite, or too large for its codec; names the tensor.
    """
    parts: list[Part] = []
    received: dict[str, Tensor] = {}
    lost = dict(residual or {})
    for form, names in _groups(tensors, forms):
        fed = residual if form.fed_back else None
        part, left = _part(form, names, tensors, old, fed)
        parts.append(part)
        received |= _unpacked(part, old)
        lost |= left
    return Coded(write_bundle(parts), received, {} if residual is None else lost)


def undo(data: bytes, old: Tensors) -> dict[str, Tensor]:
    """The tensors of a bundle, of which this side has `old`.

    Raises:
        FrameError: the bytes are no bundle, or one of differences to something else.
    """
    tensors: dict[str, Tensor] = {}
    for part in read_bundle(data):
        tensors |= _unpacked(part, old)
    return tensors


def moved(tensors: Tensors, received: Tensors, meant: Tensors) -> dict[str, Tensor]:
    """What has become of `received`, as the same difference to `meant`.

    Tensors that are differences by themselves, or of which nothing was received, stay as they are.
    """
    return {
        name: _moved(tensor, received[name], meant[name])
        if name in received and name in meant and name.startswith(ARRAYS)
        else tensor
        for name, tensor in tensors.items()
    }


def _moved(tensor: Tensor, received: Tensor, meant: Tensor) -> Tensor:
    if not tensor.is_floating_point() or Entry.of(tensor) != Entry.of(received):
        return tensor
    return (_wide(tensor) + (_wide(meant) - _wide(received))).to(tensor.dtype)


def _groups(tensors: Tensors, forms: Mapping[str, Form]) -> Iterable[tuple[Form, list[str]]]:
    """Tensors that share a payload: those of one form and dtype, without the large ones."""
    shared: dict[tuple[Form, torch.dtype], list[str]] = {}
    for name in sorted(tensors):
        tensor, form = tensors[name], forms[name]
        if tensor.numel() >= ALONE:
            yield form, [name]
        else:
            shared.setdefault((form, tensor.dtype), []).append(name)
    yield from ((form, names) for (form, _), names in shared.items())


def _part(
    form: Form, names: Sequence[str], tensors: Tensors, old: Tensors, residual: Tensors | None
) -> tuple[Part, dict[str, Tensor]]:
    """A payload, and what it has lost of each tensor where there is a `residual`."""
    slots = tuple(Slot(name, Entry.of(tensors[name])) for name in names)
    if form.kind == SAME:
        return Part(SAME, 1, slots, b""), {}
    align = 1 if form.kind == BITS else CODECS[form.codec].block
    flats = [_sent(form.kind, tensors[name], old.get(name)) for name in names]
    values = _joined(flats, align)
    try:
        if residual is None:
            return Part(form.kind, align, slots, encode(values, form.codec)), {}
        pairs = zip(names, flats, strict=True)
        earlier = [residual.get(name, torch.zeros_like(flat)).reshape(-1) for name, flat in pairs]
        fed = feed_back(values, _joined(earlier, align), form.codec)
    except ManifestError:
        for name, flat in zip(names, flats, strict=True):  # which of them it is
            lost = None if residual is None else residual.get(name)
            feed_back(flat, lost if lost is None else lost.reshape(-1), form.codec, name=name)
        raise
    part = Part(form.kind, align, slots, fed.payload)
    assert fed.residual is not None
    left = {slot.name: _cut(fed.residual, slot, start) for slot, start in part.places()}
    return part, left


def _sent(kind: str, tensor: Tensor, old: Tensor | None) -> Tensor:
    """What of a tensor goes into its payload, flat."""
    if kind == VALUE:
        return tensor.detach().reshape(-1)
    assert old is not None
    if kind == BITS:
        return bit_difference(tensor, old).reshape(-1)
    flats = [_wide(side).reshape(-1) for side in (tensor, old)]
    return torch.sub(*flats, out=empty(len(flats[0]), flats[0].dtype))


def _unpacked(part: Part, old: Tensors) -> dict[str, Tensor]:
    """The receiver's tensors."""
    for slot in part.slots:
        known = Entry.of(old[slot.name]) if slot.name in old else None
        if part.kind != VALUE and slot.entry != known:
            raise refused(f"a difference to {slot.name} {known}", f"one to {slot.entry}")
    if part.kind == SAME and not part.payload:
        return {slot.name: old[slot.name] for slot in part.slots}
    encoded, places = opened(part.payload), list(part.places())
    if part.kind != BITS and encoded.codec == "zstd":  # which expands a thousandfold
        raise refused(f"a {part.kind} without zstd", "one with it")
    size = places[-1][1] + places[-1][0].numel if places else 0
    if encoded.shape != (size,):
        raise refused(f"{size} values", f"{encoded.shape}")
    decoded = encoded.values()
    return {
        slot.name: _made(part.kind, _cut(decoded, slot, start), slot, old.get(slot.name))
        for slot, start in places
    }


def _made(kind: str, values: Tensor, slot: Slot, old: Tensor | None) -> Tensor:
    if kind == VALUE and Entry.of(values) == slot.entry:
        return values
    if kind in (DELTA, BITS) and old is not None and old.is_floating_point():
        size, integers = values.dtype.itemsize, not values.is_floating_point()
        if kind == BITS and integers and size == old.dtype.itemsize:
            return bit_sum(old, values)
        if kind == DELTA and values.dtype == _wide_dtype(old):
            most = torch.finfo(old.dtype).max  # what the codec changes may lead beyond it
            return values.add_(_wide(old)).clamp_(-most, most).to(old.dtype)
    raise refused(f"{kind} for {slot.entry}", f"{values.dtype}")


def _cut(flat: Tensor, slot: Slot, start: int) -> Tensor:
    """One tensor of several; it does not keep the others in memory."""
    values = flat[start : start + slot.numel].reshape(slot.entry.shape)
    return values if slot.numel == len(flat) else values.clone()


def _joined(flats: Sequence[Tensor], align: int) -> Tensor:
    """One after the other, each from a multiple of `align` on."""
    if len(flats) == 1:
        return flats[0]
    last = len(flats) - 1
    pads = [flat.new_zeros(-len(flat) % align if i < last else 0) for i, flat in enumerate(flats)]
    return torch.cat([piece for pair in zip(flats, pads, strict=True) for piece in pair])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
