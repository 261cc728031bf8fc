"""Bytes between the server and its nodes, counted where they leave and where they arrive."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Meter", "Traffic"]


@dataclass
class Meter:
    """Counts of one place since the run began.

    Attributes:
        down: bytes of records to each node.
        up: bytes of records from each node.
        codec_s: seconds spent encoding and decoding, at the clients too.
    """

    down: Counter[int] = field(default_factory=Counter)
    up: Counter[int] = field(default_factory=Counter)
    codec_s: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Bytes by node as they travelled, and `raw`: as they would have without a codec."""

    down: Counter[int] = field(default_factory=Counter)
    up: Counter[int] = field(default_factory=Counter)
    down_raw: Counter[int] = field(default_factory=Counter)
    up_raw: Counter[int] = field(default_factory=Counter)
    codec_s: float = 0.0

    @classmethod
    def now(cls, wire: Meter, raw: Meter) -> Traffic:
        """All there has been so far."""
        return cls(
            Counter(wire.down), Counter(wire.up), Counter(raw.down), Counter(raw.up), wire.codec_s
        )

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.down - earlier.down,
            self.up - earlier.up,
            self.down_raw - earlier.down_raw,
            self.up_raw - earlier.up_raw,
            self.codec_s - earlier.codec_s,
        )

    def of(self, node: int) -> dict[str, int]:
        """The figures of one node, as in `rounds.jsonl`."""
        return {f"bytes_{kind}": counts[node] for kind, counts in self._kinds()}

    @property
    def total(self) -> dict[str, int]:
        """The same over all nodes."""
        return {f"bytes_{kind}": counts.total() for kind, counts in self._kinds()}

    @property
    def nodes(self) -> list[int]:
        """Who sent or got anything."""
        return sorted({node for _, counts in self._kinds() for node in counts})

    def _kinds(self) -> list[tuple[str, Counter[int]]]:
        kinds = {"up": self.up, "down": self.down, "up_raw": self.up_raw, "down_raw": self.down_raw}
        return list(kinds.items())
