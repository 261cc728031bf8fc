"""Which methods go together: refused in one line when the run is configured, all others work."""

from __future__ import annotations

import pytest
import torch

from fedtune.errors import ConfigError
from fedtune.strategies import METHODS, Method, build_method, setting_names
from fedtune.strategies.compatibility import why_not
from fedtune.strategies.table import pairs_table, settings_table, table
from tests.conftest import REPOSITORY
from tests.methods import named
from tests.strategies.cases import RULES, trained, update
from tests.strategies.one_round import one_round, stats_of

SERVERS = [n for n, cls in METHODS.items() if cls.axis == "server_optimizer"]
CORRECTIONS = [n for n, cls in METHODS.items() if cls.axis == "correction"]
NAMED_RULES = [n for n in RULES if named(n).properties.combines]
COORDINATES = "does not lead to factors in other coordinates"
REPLACED = "gradients of factors that the rule replaces by others"
ARBITRARY = "one arbitrary client would reach all others"
REFUSED = {
    "flora+fedadam": COORDINATES,
    "flexlora+fedavgm": COORDINATES,
    "fedex_lora+diloco": "the factors that the rule's addition to the base belongs to",
    "scaffold+flora": REPLACED,
    "scaffold+flexlora+fedadam": REPLACED,
    "fedsa_lora+scaffold": "what stays with each client means nothing",
    "scaffold+krum": ARBITRARY,
    "multikrum+scaffold": ARBITRARY,
    "scaffold+median": ARBITRARY,
    "scaffold+trimmed_mean+fedyogi": ARBITRARY,
}
ALLOWED = [
    "fedprox+ffa_lora+fedadam",
    "fedprox+flora",
    "fedprox+median+fedadam",
    "scaffold+fedex_lora",
    "scaffold+fednova",
    "scaffold+rolora+fedyogi",
    "fedsa_lora+fedavgm",
    "fednova+diloco",
]


def build(strategy: str) -> Method:
    return build_method(strategy, weight_by="tokens")


@pytest.mark.parametrize("strategy", REFUSED)
def test_refused_with_the_reason(strategy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(strategy)
    text = str(caught.value)
    assert text.startswith(f"--strategy {strategy}: ")
    assert REFUSED[strategy] in text
    assert text.endswith("Leave one of them out.")
    assert "\n" not in text


@pytest.mark.parametrize("strategy", ALLOWED)
def test_allowed(strategy: str) -> None:
    build(strategy)


@pytest.mark.parametrize("rule", NAMED_RULES)
@pytest.mark.parametrize("server", SERVERS)
def test_a_server_step_keeps_what_the_rule_is_exact_for(rule: str, server: str) -> None:
    """An allowed one starts from the rule's result and from nothing else. A refused one would have
    a term for the base beside it, or factors that the old ones do not compare to."""
    refused = why_not(METHODS[server](), METHODS[rule]()) is not None
    has = named(rule).properties
    assert refused == (has.refactors or has.changes_base)
    if refused:
        return
    method, alone = build(f"{rule}+{server}"), named(rule)
    clients = max(5, alone.rule.least_updates())
    old = update(0)
    updates = [trained(alone, old, k) for k in range(1, clients + 1)]
    stats = [stats_of(1 + k % 3) for k in range(clients)]
    middle, _ = one_round(alone, old, updates, stats)
    expected = {k: METHODS[server]().step(old[k], middle[k], {})[0] for k in middle}
    found, _ = one_round(method, old, updates, stats)
    assert found.keys() == expected.keys()
    for key in found:
        if found[key].dtype == torch.bfloat16:
            # The step takes the rule's result before it is rounded: `middle` lacks up to half a bit
            # of bf16, which the largest rate here doubles, and both ends are rounded once more.
            step = 2**-8 * max(middle[key].abs().max(), expected[key].abs().max())
            assert (found[key].float() - expected[key].float()).abs().max() <= 2 * step
        else:
            assert torch.equal(found[key], expected[key])


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_only_control_variates_mind_the_rule(correction: str) -> None:
    refused = [r for r in NAMED_RULES if why_not(METHODS[correction](), METHODS[r]())]
    assert bool(refused) == bool(named(correction).extras)


@pytest.mark.parametrize("generated", [table, settings_table, pairs_table])
def test_the_page_holds_the_generated_tables(generated) -> None:
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    made = generated(METHODS)
    assert f"\n\n{made}\n\n" in page, f"docs/methods.md: put in\n{made}"


def test_the_tables_have_every_method() -> None:
    rows = table(METHODS).splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == list(METHODS)
    assert any(row.startswith("| `fedex_lora` | rule | exact | no |") for row in rows)
    columns = pairs_table(METHODS).splitlines()[0]
    assert all(f"`{name}`" in columns for name in (*SERVERS, *CORRECTIONS))
    expected = sum(len(setting_names(name)) for name in METHODS)
    assert len(settings_table(METHODS).splitlines()) == 2 + expected
