"""A node of a run, as the server sees it: how far it has come, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedtune.adapters import Manifest
from fedtune.adapters.fingerprint import Fingerprint
from fedtune.transport.messages import Member

__all__ = ["Node", "Stage", "objection", "row"]

# new -> asked -> planned -> setting up -> ready; refused at either answer, and asked again later.
Stage = Literal["new", "asked", "planned", "setting up", "ready", "refused"]


@dataclass
class Node:
    """How far a node has come."""

    stage: Stage = "new"
    name: str = ""  # once it has told it
    pending: str = ""
    member: Member | None = None
    manifest: Manifest | None = None
    base: Fingerprint | None = None
    problem: str = ""
    retry_at: float = 0.0
    seen: float = 0.0


def objection(expected: Manifest, built: Manifest | None) -> str:
    """Why a node's adapter is another one; a node without a model takes what it gets."""
    return expected.objection_to(built.frozen(expected.static)) if built else ""


def row(number: int, node: Node) -> dict[str, Any]:
    """What people see of it."""
    name = node.member.name if node.member else node.name or f"node {number}"
    return {"client": name, "state": node.stage, "problem": node.problem or None}
