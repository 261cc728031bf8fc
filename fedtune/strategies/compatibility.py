"""Which methods of different axes do not go together, and why.

Every refusal is between a rule and one method of another axis: a correction and a server optimizer
always go together.
"""

from __future__ import annotations

from fedtune.strategies.base import Correction, Rule
from fedtune.strategies.method import Part
from fedtune.strategies.server_step import ServerOptimizer

__all__ = ["why_not"]


def why_not(part: Part, rule: Rule) -> str | None:
    """Why a correction or a server optimizer does not go with a rule; None if it does."""
    if isinstance(part, ServerOptimizer):
        return _server_optimizer(rule)
    return _control_variates(rule) if isinstance(part, Correction) and part.extras else None


def _server_optimizer(rule: Rule) -> str | None:
    if rule.properties.refactors:
        return "a step from the old factors does not lead to factors in other coordinates"
    if rule.properties.changes_base:
        return "its step leaves the factors that the rule's addition to the base belongs to"
    return None


def _control_variates(rule: Rule) -> str | None:
    has = rule.properties
    if has.buffered:
        return "control variates of late updates are gradients at other parameters"
    if has.refactors:
        return "its control variates are gradients of factors that the rule replaces by others"
    if has.mixed_ranks:
        return "its control variates have one shape for all clients, whose ranks may differ"
    if has.personal:
        return "the mean control variate of what stays with each client means nothing"
    if has.robust:
        return "one arbitrary client would reach all others by the mean of the control variates"
    return None
