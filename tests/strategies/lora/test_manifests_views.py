"""What each client gets of the global adapter: padded, cut, or shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedtune.adapters import Entry, Manifest, collect
from fedtune.server.rounds.client_views import ClientViews
from fedtune.strategies.base import Round
from fedtune.strategies.lora import FlexLoRA
from fedtune.strategies.lora.manifests import at_ranks, ranks_in
from fedtune.strategies.lora.names import lora_modules
from fedtune.transport.records import params_of
from tests.strategies.lora.oracles import Params, clients, deltas, peft_net, relative, trained

MODULES = list(lora_modules(collect(peft_net())))


def manifest_of(params: Params) -> Manifest:
    entries = {name: Entry.of(tensor) for name, tensor in params.items()}
    return Manifest("LORA", "base", {}, entries, scaling=dict.fromkeys(MODULES, 2.0))


def product(params: Params) -> dict[str, Tensor]:
    return {name: params[m.b] @ params[m.a] for name, m in lora_modules(params).items()}


def test_equal_views_share_a_record() -> None:
    params = trained(collect(peft_net(4)), 0)
    manifest = manifest_of(params)
    views = ClientViews(params, "1")
    arrays = views.record(None)
    low, mixed = at_ranks(manifest, 2), at_ranks(manifest, {MODULES[0]: 2})
    assert views.record(manifest) is views.record(at_ranks(low, 4)) is arrays
    assert views.record(low) is views.record(at_ranks(manifest, 2)) is not arrays
    assert views.record(mixed) not in (arrays, views.record(low))
    some = [m.b for m in lora_modules(params).values()]
    assert views.record(low, some) is views.record(low, reversed(some))
    assert params_of(views.record(low, some)).keys() == params.keys() - set(some)
    assert params_of(views.record(low)).keys() == params.keys()


def test_a_higher_rank_is_the_same_product_and_can_train() -> None:
    """A's new rows and B's new columns are not both 0, and the same for the same key."""
    params = trained(collect(peft_net(2)), 0)
    manifest = at_ranks(manifest_of(params), 5)
    views, again, other = (ClientViews(params, key) for key in ("1", "1", "2"))
    wide = views.params(manifest)
    assert ranks_in(wide) == dict.fromkeys(MODULES, 5)
    assert relative(product(wide), product(params)) <= 1e-15  # 0 is added to sums
    assert all(torch.equal(wide[name], again.params(manifest)[name]) for name in wide)
    assert any(not torch.equal(wide[name], other.params(manifest)[name]) for name in wide)
    for module in lora_modules(wide).values():
        sizes = wide[module.b][:, 2:].norm(dim=0) + wide[module.a][2:].norm(dim=1)
        assert bool((sizes > 1e-3).all())


@pytest.mark.parametrize("energy", [0.0, 0.9])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank_after_flexlora_is_the_best_of_that_rank(rank: int, energy: float) -> None:
    """Eckart-Young: the error is the tail of the dense SVD of the mean update, in each layer."""
    scale, weights = 1.7, (1.0, 5.0, 2.0)
    updates = clients(peft_net(4, alpha=4 * scale))
    fold = FlexLoRA(energy=energy).fold(Round(scaling=dict.fromkeys(MODULES, scale)))
    for update, weight in zip(updates, weights, strict=True):
        fold.add(update, weight)
    whole = fold.result()
    views = ClientViews(whole, "1")
    lower = views.params(at_ranks(manifest_of(whole), rank))
    merged = deltas(peft_net(rank, alpha=rank * scale), lower)  # the scale is kept: s B A
    ends = [deltas(peft_net(4, alpha=4 * scale), update) for update in updates]
    for name in MODULES:
        pairs = zip(ends, weights, strict=True)
        target = sum(w / sum(weights) * end[name] for end, w in pairs)
        tail = torch.linalg.svdvals(target)[min(rank, ranks_in(whole)[name]) :].norm()
        error = (merged[name] - target).norm()
        assert float(error) == pytest.approx(float(tail), rel=1e-12)  # fp64
        assert float(tail) > 0.05 * float(target.norm())
