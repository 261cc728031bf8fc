"""`fedtune.aggregate`: its arguments, what it refuses, and the tensors that are not LoRA's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedtune
from fedtune.adapters import collect
from fedtune.errors import ConfigError, FedtuneError, ManifestError
from fedtune.strategies import METHODS
from fedtune.strategies.lora import LORA_RULES
from fedtune.strategies.lora.factors import Factors
from fedtune.strategies.lora.names import lora_modules
from tests.methods import named
from tests.strategies.lora.oracles import Params, clients, peft_net, trained

PRODUCT_RULES = ["fedex_lora", "flexlora", "flora", "hetlora", "raflora"]


def lora(rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """One layer, 5 -> 4, and a head that is trained in full."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_A.weight": (rank, 5), "q.lora_B.weight": (4, rank), "score.weight": (3, 4)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def three(**changes: Any) -> list[Params]:
    return [lora(seed=seed, **changes) for seed in range(3)]


@pytest.mark.parametrize("name", ["fedavg", *PRODUCT_RULES])
def test_weights_default_to_equal_ones_and_scale_away(name: str) -> None:
    one = fedtune.aggregate(name, three())
    for weights in ([1, 1, 1], [0.5, 0.5, 0.5]):
        other = fedtune.aggregate(name, three(), weights=weights)
        assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)


@pytest.mark.parametrize("name", ["fedavg", "fedit", *PRODUCT_RULES])
def test_other_tensors_are_averaged(name: str) -> None:
    out = fedtune.aggregate(name, three(), [1, 2, 5])
    want = sum(w / 8 * u["score.weight"].double() for w, u in zip([1, 2, 5], three(), strict=True))
    torch.testing.assert_close(out.params["score.weight"], want.float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", PRODUCT_RULES)
def test_shapes_dtypes_and_names(name: str) -> None:
    out = fedtune.aggregate(name, three(dtype=torch.bfloat16), scaling={"q": 2})
    assert {n: t.shape for n, t in out.params.items()} == {n: t.shape for n, t in lora().items()}
    assert {t.dtype for t in out.params.values()} == {torch.bfloat16}
    assert out.scaling == {"q": 2.0}
    for b, a in out.base.values():
        assert b.dtype == a.dtype == torch.float32
        assert (b.shape[0], a.shape[1], b.shape[1]) == (4, 5, a.shape[0])


def test_half_precision_adapters() -> None:
    """Base terms are fp32; FedEx-LoRA rounds its means to 8 bits, and the residual says so."""
    updates = three(dtype=torch.bfloat16)
    assert fedtune.aggregate("flora", updates).residual <= 1e-6
    assert 1e-4 < fedtune.aggregate("fedex_lora", updates).residual < 1e-2


def test_scaling_as_number_dict_and_list_agree() -> None:
    outs = [
        fedtune.aggregate("fedex_lora", three(), scaling=given)
        for given in (1.5, {"q": 1.5}, [1.5] * 3, [{"q": 1.5}, 1.5, {"q": 1.5}])
    ]
    for out in outs[1:]:
        assert out.scaling == {"q": 1.5}
        assert torch.equal(out.base["q"].B, outs[0].base["q"].B)


@pytest.mark.parametrize("name", ["ffa_lora", "fedex_lora", "flexlora", "flora"])
def test_clients_of_different_scaling_are_added_up_right(name: str) -> None:
    updates = three(dtype=torch.float64)
    if name == "ffa_lora":
        updates = [{**u, "q.lora_A.weight": updates[0]["q.lora_A.weight"]} for u in updates]
    settings = {"rank": 6} if name == "flexlora" else {}
    own, weights = [0.5, 1.0, 4.0], [1, 2, 5]
    out = fedtune.aggregate(name, updates, weights, scaling=own, **settings)
    want = sum(
        w / 8 * s * u["q.lora_B.weight"] @ u["q.lora_A.weight"]
        for w, s, u in zip(weights, own, updates, strict=True)
    )
    got = out.scaling["q"] * out.params["q.lora_B.weight"] @ out.params["q.lora_A.weight"]
    if "q" in out.base:
        got = got + out.base["q"].B @ out.base["q"].A
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_does_not_travel_comes_from_the_reference() -> None:
    """FFA-LoRA sends B alone; A is static."""
    static = {"q.lora_A.weight": lora()["q.lora_A.weight"]}
    sent = [{n: t for n, t in u.items() if n not in static} for u in three()]
    out = fedtune.aggregate("ffa_lora", sent, reference=static)
    assert sorted(out.params) == sorted(sent[0])
    assert out.residual == out.residual_fedavg <= 1e-7  # one A: the plain mean is exact
    assert math.isnan(fedtune.aggregate("ffa_lora", sent).residual)


def test_without_lora_the_mean_is_the_definition() -> None:
    updates = [{"prompt_encoder.embedding.weight": torch.full((2, 3), float(k))} for k in range(3)]
    out = fedtune.aggregate("fedavg", updates, [1, 1, 2])
    assert out.params["prompt_encoder.embedding.weight"].unique().tolist() == [1.25]
    assert (out.residual, out.residual_fedavg, out.base, out.scaling) == (0.0, 0.0, {}, {})


def test_magnitudes_of_dora_are_averaged_where_the_rule_allows_it() -> None:
    updates = clients(peft_net(use_dora=True))
    magnitudes = [n for n in updates[0] if "lora_magnitude_vector" in n]
    assert magnitudes
    for name in ("fedit", "fedsa_lora"):
        out = fedtune.aggregate(name, updates)
        for key in magnitudes:
            want = sum(update[key] for update in updates) / 3
            torch.testing.assert_close(out.params[key], want, rtol=1e-14, atol=1e-14)
    for name in set(LORA_RULES) - {"fedit", "fedsa_lora"}:
        with pytest.raises(ConfigError, match=f"{name}: expected .*lora.* received dora: a DoRA"):
            fedtune.aggregate(name, updates)


def broken(change: Callable[[Params], Any]) -> list[Params]:
    updates = three()
    change(updates[1])
    return updates


def put(name: str, value: Any) -> Callable[[Params], Any]:
    return lambda update: update.update({name: value})


REFUSED: dict[str, tuple[str, list[Params], dict[str, Any], str]] = {
    "unknown method": ("fedexlora", three(), {}, "Did you mean fedex_lora"),
    "unknown setting": ("flexlora", three(), {"energi": 0.5}, "Did you mean energy"),
    "no settings": ("fedit", three(), {"rank": 1}, "It has none"),
    "out of range": ("flexlora", three(), {"energy": 1.5}, ">= 0 and <= 1"),
    "no updates": ("fedavg", [], {}, "at least one update"),
    "weights, count": ("fedavg", three(), {"weights": [1, 2]}, "expected 3 numbers"),
    "weights, sign": ("fedavg", three(), {"weights": [1, -1, 2]}, "numbers > 0"),
    "scaling, count": ("flora", three(), {"scaling": [1.0]}, r"one per update \(3\)"),
    "scaling, module": ("flora", three(), {"scaling": {"k": 1.0}}, "none for `q`"),
    "scaling, sign": ("flora", three(), {"scaling": 0.0}, "number > 0"),
    "missing": (
        "fedavg",
        broken(lambda u: u.pop("score.weight")),
        {},
        "update 1: `score.weight` is missing",
    ),
    "extra": ("fedavg", broken(put("k", torch.ones(1))), {}, "update 1: `k` is in no other"),
    "shape": (
        "flora",
        broken(put("q.lora_A.weight", torch.ones(2, 6))),
        {},
        r"update 1: `q.lora_A.weight`: expected float32 \[2, 5\]",
    ),
    "dtype": ("fedavg", broken(put("score.weight", torch.ones(3, 4).half())), {}, "float16"),
    "nan": (
        "fedavg",
        broken(put("score.weight", torch.full((3, 4), math.nan))),
        {},
        "update 1: `score.weight`: expected finite",
    ),
    "ranks": ("fedex_lora", [lora(2), lora(3)], {}, "fedex_lora expected equal ranks"),
    "one rank": (
        "flora",
        broken(put("q.lora_A.weight", torch.ones(3, 5))),
        {},
        "received 2 in lora_B and 3 in lora_A",
    ),
    "no lora": ("flexlora", [{"w": torch.ones(2)}], {}, "received other. Use fedavg"),
    "unknown kind": (
        "flora",
        [{**lora(), "q.lora_diag": torch.ones(2)}],
        {},
        "received lora_diag. Use fedavg or fedit",
    ),
    "half a pair": (
        "flora",
        [{"q.lora_A.weight": torch.ones(2, 5)}],
        {},
        "`q.lora_B.weight` is missing",
    ),
    "convolution": (
        "flora",
        [{"q.lora_A.weight": torch.ones(2, 5, 3, 3), "q.lora_B.weight": torch.ones(4, 2, 1, 1)}],
        {},
        "Use fedit for convolutions",
    ),
    "A is trained": ("ffa_lora", three(), {}, "`q`: ffa_lora expected one factor that is equal"),
    "both are trained": ("rolora", three(), {}, "`q`: rolora expected one factor"),
    "no reference": ("fedadam", three(), {}, "expected `reference`"),
    "method, type": (3, three(), {"weights": None}, "the name of a method, received 3"),
    "updates, type": ("fedavg", lora(), {}, "expected a list with one dict .* received dict"),
    "update, type": ("fedavg", [*three(), None], {}, "update 3: expected a dict .* received None"),
    "update, key": ("fedavg", broken(put(3, torch.ones(1))), {}, "update 1: expected names"),
    "update, array": (
        "fedavg",
        broken(put("score.weight", torch.ones(3, 4).numpy())),
        {},
        "update 1: `score.weight`: expected a dense torch tensor, received ndarray",
    ),
    "update, sparse": (
        "fedavg",
        broken(put("score.weight", torch.ones(3, 4).to_sparse())),
        {},
        "received a sparse",
    ),
    "update, factor": (
        "flora",
        [{"q.lora_A.weight": torch.ones(2), "q.lora_B.weight": torch.ones(2)}],
        {},
        "`q.lora_B.weight`: expected a LoRA factor",
    ),
    "update, rank 0": ("flora", [lora(0)], {}, "expected a LoRA factor"),
    **{
        f"weights, {given!r}": ("fedavg", three(), {"weights": given}, "expected 3 numbers > 0")
        for given in (
            3,
            "123",
            [0, 0, 0],
            [1, math.nan, 1],
            [1, "2", 3],
            [1, math.inf, 1],
            {0: 1},
            [True] * 3,
            [1e200] * 3,
            [1, 1e-320, 1],
            [[1], [1], [1]],
        )
    },
    **{
        f"scaling, {given!r}": ("fedavg", three(), {"scaling": given}, "expected a number > 0")
        for given in (
            "2",
            None,
            math.nan,
            [1, None, 1],
            {"q": "2"},
            {"q": -1.0},
            [{"q": math.inf}] * 3,
        )
    },
    "scaling of nothing": ("fedavg", [{"w": torch.ones(2)}], {"scaling": -1}, "a number > 0"),
    "setting, text": ("flexlora", three(), {"energy": "0.5"}, "expected .* received '0.5'"),
    "setting, None": ("fedavgm", three(), {"lr": None}, "lr: expected a number > 0, received None"),
    "setting, list": ("fedavgm", three(), {"beta": [0.5]}, "beta: expected a number"),
    "a correction": ("fedprox", three(), {}, "fedprox changes how clients train"),
    "a correction, joined": ("scaffold+median", three(), {}, "scaffold does not go with median"),
    "steps": ("fednova+fedadam", three(), {}, "number of steps"),
    "a pair": ("flora+fedadam", three(), {}, r"aggregate flora\+fedadam: fedadam does not go"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    name, updates, options, message = REFUSED[case]
    with pytest.raises(FedtuneError, match=message) as caught:
        fedtune.aggregate(name, updates, **options)
    assert "\n" not in str(caught.value)
    kind = ConfigError if options or case in ("unknown method", "no lora") else FedtuneError
    assert isinstance(caught.value, kind)


def with_q(b: tuple[int, ...], a: tuple[int, ...]) -> Params:
    """A reference whose layer has factors of other shapes."""
    return {**lora(), "q.lora_B.weight": torch.ones(b), "q.lora_A.weight": torch.ones(a)}


BAD_REFERENCES: dict[str, tuple[str, Any, str]] = {
    **{
        f"shape {shape}": (
            name,
            {**lora(), "score.weight": torch.ones(shape)},
            r"reference: `score.weight`: expected float32 \[3, 4\] as in update 0, received",
        )
        for shape, name in {
            (1, 4): "fedavgm",
            (): "diloco",
            (5, 3, 4): "fedadam",
            (7, 4): "fedyogi",
            (3, 1): "fedavg",
        }.items()
    },
    "dtype": ("fedavgm", lora(dtype=torch.float64), "expected float32 .* received float64"),
    "nan": (
        "fedavgm",
        {**lora(), "score.weight": torch.full((3, 4), math.nan)},
        "reference: `score.weight`: expected finite numbers",
    ),
    "inf, of a method without a step": (
        "hetlora",
        {**lora(), "score.weight": torch.full((3, 4), math.inf)},
        "reference: `score.weight`: expected finite",
    ),
    "rank": ("fedex_lora", with_q((4, 3), (3, 5)), "expected equal ranks"),
    "one rank": ("hetlora", with_q((4, 3), (2, 5)), "reference: `q`: expected one rank"),
    "another layer": ("raflora", with_q((4, 2), (2, 6)), "reference: `q.lora_A.weight`"),
    "type": ("fedavgm", [lora()], "reference: expected a dict of tensors by name, received list"),
    "value": ("fedavgm", {**lora(), "score.weight": 1.0}, "received float"),
}


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_a_reference_is_checked_as_updates_are(case: str) -> None:
    name, reference, message = BAD_REFERENCES[case]
    kind = ConfigError if case in ("type", "value") else ManifestError
    with pytest.raises(kind, match=message) as caught:
        fedtune.aggregate(name, three(), reference=reference)
    assert "\n" not in str(caught.value)


def test_static_factors_fit_those_that_travel() -> None:
    sent = [{n: t for n, t in u.items() if n != "q.lora_A.weight"} for u in three()]
    with pytest.raises(ManifestError, match="reference: `q`: expected one rank"):
        fedtune.aggregate("ffa_lora", sent, reference={"q.lora_A.weight": torch.ones(5, 5)})


def test_the_global_rank_is_that_of_the_reference() -> None:
    """As in a run, where it does not shrink because its largest client was not sampled."""
    out = fedtune.aggregate("hetlora+fedavgm", [lora(2), lora(1)], reference=lora(3, seed=9))
    assert out.params["q.lora_A.weight"].shape == (3, 5)
    with pytest.raises(ManifestError, match="reference: `q.lora_A.weight`: .* the round has made"):
        fedtune.aggregate("hetlora+fedavgm", [lora(2), lora(3)], reference=lora(1))


def test_weights_scaling_and_updates_of_other_number_types() -> None:
    want = fedtune.aggregate("fedex_lora", three(), [1, 2, 5], scaling=2)
    parameters = [{n: torch.nn.Parameter(t) for n, t in u.items()} for u in three()]
    for weights in (torch.tensor([1, 2, 5]), (1.0, 2.0, 5.0), torch.tensor([1.0, 2, 5]).numpy()):
        got = fedtune.aggregate("fedex_lora", tuple(parameters), weights, scaling=2.0)
        assert all(torch.equal(got.params[n], want.params[n]) for n in want.params)
        assert not any(t.requires_grad for t in got.params.values())


def test_a_server_optimizer_starts_from_the_reference() -> None:
    start = lora(seed=9)
    out = fedtune.aggregate("fedavgm", three(), reference=start)
    assert sorted(out.params) == sorted(start)
    assert out.residual > 0


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fedprox", "scaffold", "fednova"}))
def test_every_method_that_needs_updates_alone_can_be_called(name: str) -> None:
    rule, start = named(name).rule, collect(peft_net())
    updates = [trained(start, seed, moves=lambda n: rule.trains(n, 1)) for seed in range(6)]
    out = fedtune.aggregate(name, updates, reference=start)
    assert out.params.keys() == {n for n in start if rule.travels(n)}
    assert 0 <= out.residual < math.inf


def test_a_rule_and_a_server_optimizer() -> None:
    """With a step of the whole delta it is the rule alone, which needs no reference."""
    updates = [{**one, "q.lora_A.weight": lora()["q.lora_A.weight"]} for one in three()]
    plain = fedtune.aggregate("ffa_lora", updates)
    joined = fedtune.aggregate("ffa_lora+fedavgm", updates, reference=lora(seed=9), lr=1, beta=0)
    assert all(torch.equal(plain.params[n], joined.params[n]) for n in plain.params)
    assert joined.residual == plain.residual <= 1e-7


def test_base_terms_unpack_as_b_and_a() -> None:
    out = fedtune.aggregate("flora", three())
    b, a = out.base["q"]
    assert isinstance(out.base["q"], Factors)
    assert (b.shape, a.shape) == ((4, 6), (6, 5))
    assert list(lora_modules(out.params)) == list(out.base)


def test_half_of_a_pair_is_refused_by_name() -> None:
    with pytest.raises(ManifestError, match=r"lora_A.weight` is missing"):
        fedtune.aggregate("fedex_lora", [{"q.lora_B.weight": torch.ones(4, 2)}])
