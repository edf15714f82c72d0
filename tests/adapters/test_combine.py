"""combine: dense float64 sums are the oracle of every method; PEFT's whole singular value decomposition of the cuts."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qgraft.adapters.attach import attach_layers, attach_lora
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.choose import active_adapters, use_adapter
from qgraft.adapters.combine import METHODS, CombineReport, Factors, combine, combine_layers
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.states import lora_state_dict
from qgraft.errors import AdapterError, OptionError, UnsupportedError

SIZES = {"up": (24, 16), "down": (16, 24), "out": (40, 16)}  # layer -> (out, in)
CUTTING = [method for method in METHODS if method != "linear"]


class Block(nn.Module):
    """Three linear layers of different shapes, not all of them on every adapter."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, width) in SIZES.items():
            setattr(self, name, nn.Linear(width, rows, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.relu(self.up(x))))


def randomize(model: nn.Module, *names: str) -> None:
    for name in names:
        for lora in find_adapter(model, name).parts.values():
            nn.init.normal_(lora.lora_A)
            nn.init.normal_(lora.lora_B)


def with_two(**options: Any) -> Block:
    """law on all layers with rank 4; med on two with rank 2, rank-stabilized and with another alpha."""
    model = Block()
    attach_lora(model, r=4, lora_alpha=8, target_modules="up,down,out", name="law", **options)
    attach_lora(model, r=2, lora_alpha=5, target_modules="up,out", use_rslora=True, name="med")
    randomize(model, "law", "med")
    return model


def delta(model: nn.Module, name: str, path: str) -> np.ndarray:
    """An adapter's delta in float64, from its stored numbers and options alone; zeros where it is not."""
    lora = find_adapter(model, name).parts.get(path)
    if lora is None:
        return np.zeros(SIZES[path])
    config = lora.config
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return scaling * (lora.lora_B.detach().double().numpy() @ lora.lora_A.detach().double().numpy())


def whole(model: nn.Module, weights: dict[str, float], path: str) -> np.ndarray:
    return sum(weight * delta(model, name, path) for name, weight in weights.items())


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------- linear


@settings(max_examples=40, deadline=None)
@given(
    adapters=st.lists(
        st.tuples(
            st.integers(1, 20), st.floats(0.5, 64), st.booleans(), st.sets(st.sampled_from(sorted(SIZES)), min_size=1),
            st.floats(-3, 3).filter(lambda weight: abs(weight) > 0.01),
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_linear_is_the_dense_sum(adapters: list[tuple[int, float, bool, set[str], float]]) -> None:
    """Any ranks (also above the layer's own size), alphas, kinds of scaling, target sets and signs."""
    model, weights = Block(), {}
    for index, (r, alpha, stabilized, targets, weight) in enumerate(adapters):
        name = f"a{index}"
        attach_lora(model, r, alpha, target_modules=sorted(targets), use_rslora=stabilized, name=name)
        randomize(model, name)
        weights[name] = weight
    report = combine(model, weights, "sum")
    made = find_adapter(model, "sum").parts
    assert made.keys() == {path for _, _, _, targets, _ in adapters for path in targets}
    for path, lora in made.items():
        assert lora.config.scaling == 1.0
        assert lora.config.r == sum(r for r, _, _, targets, _ in adapters if path in targets) == report.ranks[path]
        scale = sum(np.linalg.norm(weight * delta(model, name, path)) for name, weight in weights.items())
        assert np.linalg.norm(delta(model, "sum", path) - whole(model, weights, path)) < 1e-6 * scale
    assert (report.error, report.worst) == (0.0, None)


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_rank_stabilized_adapters_keep_their_scale(method: str) -> None:
    """Where PEFT's combined adapter was sqrt(r) times too large (peft#3761): its options were those of the first."""
    model = Block()
    for name in ("law", "med"):
        attach_lora(model, r=4, lora_alpha=8, use_rslora=True, target_modules="up,out", name=name)
    randomize(model, "law", "med")
    combine(model, {"law": 1.0}, "same", method)
    combine(model, {"law": 0.7, "med": 0.3}, "both", method, r=8 if method == "svd" else None)
    for path in ("up", "out"):
        assert relative(delta(model, "same", path), delta(model, "law", path)) < 1e-6
        assert relative(delta(model, "both", path), whole(model, {"law": 0.7, "med": 0.3}, path)) < 1e-6


def test_the_combined_adapter_answers_as_the_weighted_set(random_x: Tensor) -> None:
    model, weights = with_two(), {"law": 0.7, "med": -0.4}
    use_adapter(model, weights)
    expected = model(random_x).detach()
    combine(model, weights, "both")
    assert active_adapters(model) == {"both": 1.0}
    assert relative(model(random_x).detach().numpy(), expected.numpy()) < 1e-5


@pytest.fixture
def random_x() -> Tensor:
    return torch.randn(5, 16)


# ---------------------------------------------------------------- svd


@pytest.mark.parametrize("r", [1, 3, 5, 6, 100])
def test_svd_is_the_best_approximation_and_says_what_it_lost(r: int) -> None:
    model, weights = with_two(), {"law": 0.7, "med": -1.3}
    report = combine(model, weights, "both", "svd", r=r)
    lost = total = 0.0
    for path in SIZES:
        expected, stacked = whole(model, weights, path), 4 + 2 * (path != "down")
        values = np.linalg.svd(expected)[1]
        best = float(np.linalg.norm(values[r:]) / np.linalg.norm(values))
        assert report.ranks[path] == min(r, stacked)
        assert report.cuts[path].error == pytest.approx(best, abs=1e-7)
        assert relative(delta(model, "both", path), expected) == pytest.approx(best, abs=2e-6)
        lost, total = lost + np.linalg.norm(values[r:]) ** 2, total + np.linalg.norm(values) ** 2
    assert report.error == pytest.approx((lost / total) ** 0.5, abs=1e-7)
    assert report.worst is not None
    assert report.worst[1] == max(cut.error for cut in report.cuts.values())


@pytest.mark.parametrize("method", CUTTING)
def test_the_default_rank_is_the_largest_of_the_inputs(method: str) -> None:
    model = with_two()
    assert combine(model, {"law": 1.0, "med": 1.0}, "both", method).ranks == {"up": 4, "down": 4, "out": 4}
    assert combine(model, {"med": 2.0}, "one", method, density=1.0).ranks == {"up": 2, "out": 2}


def test_svd_never_forms_the_dense_sum() -> None:
    """A delta of 200 000 x 300 000 would take 240 GB."""
    pairs = [Factors(torch.randn(2, 300_000), torch.randn(200_000, 2), 0.5) for _ in range(2)]
    adapters = {str(index): {"wide": pair} for index, pair in enumerate(pairs)}
    made, report = combine_layers(adapters, {"0": 1.0, "1": -2.0}, "both", "svd", r=3)
    columns = torch.arange(7)
    expected = pairs[0].B @ pairs[0].A[:, columns] * 0.5 - pairs[1].B @ pairs[1].A[:, columns]
    error = float((made["wide"].B @ made["wide"].A[:, columns] - expected).norm() / expected.norm())
    assert 0.0 < error < 1.0
    assert 0.1 < report.error < 0.5  # one of four directions of nearly equal sizes is gone


def test_adapters_of_zeros_combine_to_zeros() -> None:
    model = Block()
    attach_lora(model, r=2, target_modules="up", name="law")
    for method in METHODS:
        report = combine(model, {"law": 1.0}, f"zero-{method}", method)
        assert not delta(model, f"zero-{method}", "up").any()
        assert report.error == 0.0


# ---------------------------------------------------------------- ties, dare, magnitude_prune


def keep_largest(values: np.ndarray, density: float) -> np.ndarray:
    kept = np.zeros_like(values)
    order = np.argsort(-np.abs(values), axis=None)[: int(density * values.size)]
    kept.flat[order] = values.flat[order]
    return kept


def magnitude_oracle(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    return sum(w * keep_largest(d, density) for d, w in zip(deltas, weights, strict=True))


def ties_oracle(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Trim, elect a sign by the total, weighted mean over those that agree (section 3 of arXiv:2306.01708)."""
    trimmed = np.stack([keep_largest(d, density) for d in deltas])
    elected = np.where(trimmed.sum(0) >= 0, 1, -1)
    agrees = np.sign(trimmed) == elected
    weighted = trimmed * np.array(weights)[:, None, None]
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruned_sums_at_full_rank_are_those_of_the_papers(method: str, density: float) -> None:
    model, weights = with_two(), {"law": 0.7, "med": 1.3}
    report = combine(model, weights, "both", method, r=16, density=density)
    oracle = {"ties": ties_oracle, "magnitude_prune": magnitude_oracle}[method]
    for path in SIZES:
        on = [name for name in weights if path in find_adapter(model, name).parts]
        expected = oracle([delta(model, name, path) for name in on], [weights[name] for name in on], density)
        assert relative(delta(model, "both", path), expected) < 1e-5
        assert report.cuts[path].error < 1e-5


@pytest.mark.parametrize("method", ["svd", "ties", "magnitude_prune"])
def test_same_deltas_as_peft_with_a_whole_svd(method: str) -> None:
    """PEFT forms the dense delta and decomposes all of it. Its adapters are not rank-stabilized here: see peft#3761."""
    model, weights = Block(), {"law": 0.7, "med": 0.4}
    for name, r, targets in (("law", 4, ["up", "down", "out"]), ("med", 3, ["up", "out"])):
        attach_lora(model, r=r, lora_alpha=8, target_modules=targets, name=name)
    randomize(model, "law", "med")
    theirs = peft.get_peft_model(
        Block(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down", "out"]), "law"
    )
    theirs.add_adapter("med", peft.LoraConfig(r=3, lora_alpha=8, target_modules=["up", "out"]))
    for name in weights:
        result = peft.set_peft_model_state_dict(theirs, lora_state_dict(model, name), adapter_name=name)
        assert not result.unexpected_keys
    theirs.add_weighted_adapter(
        list(weights), list(weights.values()), "both", method if method == "svd" else f"{method}_svd", svd_rank=4,
        density=0.3,
    )  # fmt: skip
    combine(model, weights, "both", method, r=4, density=0.3)
    for path in SIZES:
        expected = getattr(theirs.base_model.model, path).get_delta_weight("both").detach().double().numpy()
        assert relative(delta(model, "both", path), expected) < 1e-4


def test_dare_keeps_a_share_at_random_and_scales_it() -> None:
    model = Block()
    attach_lora(model, r=2, lora_alpha=6, target_modules="out", name="law")
    randomize(model, "law")
    made = {}
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        combine(model, {"law": 1.5}, f"made-{len(made)}", "dare", r=16, density=0.25, seed=seed)
        made[len(made)] = delta(model, f"made-{len(made)}", "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(made[0], made[1])
    assert not np.allclose(made[0], made[2])
    ratio = made[0] / (1.5 * delta(model, "law", "out"))
    kept = ratio > 2
    np.testing.assert_allclose(ratio, np.where(kept, 4.0, 0.0), atol=0.05)
    assert 0.15 < kept.mean() < 0.35


@pytest.mark.parametrize("rank", [4, 12])
def test_the_cut_of_a_dense_delta_is_nearly_the_best(rank: int) -> None:
    """Pruned deltas have a slowly falling spectrum, the hard case of a randomized method."""
    factors = Factors(torch.randn(8, 300), torch.randn(200, 8))
    made, report = combine_layers({"law": {"x": factors}}, {"law": 1.0}, "cut", "magnitude_prune", r=rank, density=0.1)
    dense = magnitude_oracle([(factors.B.double() @ factors.A.double()).numpy()], [1.0], 0.1)
    values = np.linalg.svd(dense)[1]
    best = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
    got = relative((made["x"].B.double() @ made["x"].A.double()).numpy(), dense)
    assert best - 1e-6 < got < 1.005 * best
    assert report.error == pytest.approx(got, rel=1e-4)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.setitem(sys.modules, name, None)
    model = with_two()
    with pytest.raises(UnsupportedError, match="method ties is computed by PEFT") as caught:
        combine(model, {"law": 1.0}, "both", "ties")
    assert "pip install peft" in str(caught.value)
    assert combine(model, {"law": 1.0}, "both", "svd").method == "svd"


# ---------------------------------------------------------------- what is attached, report, mistakes


def test_inputs_stay_attached_and_untouched() -> None:
    model = with_two(lora_dropout=0.1)
    before = {name: {k: v.clone() for k, v in lora_state_dict(model, name).items()} for name in ("law", "med")}
    combine(model, {"law": 0.5, "med": 0.5}, "both")
    assert adapter_names(model) == ["law", "med", "both"]
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"both"}
    for name, state in before.items():
        assert all(torch.equal(tensor, state[key]) for key, tensor in lora_state_dict(model, name).items())
    combine(model, {"both": 2.0, "law": -1.0}, "again")  # a combined adapter is one like any other
    for path in SIZES:  # 2 · (law + med) / 2 - law = med
        difference = delta(model, "again", path) - delta(model, "med", path)
        assert np.linalg.norm(difference) < 1e-6 * np.linalg.norm(delta(model, "law", path))


def test_the_report_is_a_table() -> None:
    model = with_two()
    attach_layers(model, "tax", {"up": LoraConfig(r=1), "out": LoraConfig(r=3)})
    randomize(model, "tax")
    report = combine(model, {"law": 0.7, "tax": -0.25}, "both")
    assert str(report).splitlines() == [
        "both: linear of 2 adapters",
        "  adapter  weight    rank  layers",
        "  law         0.7       4       3",
        "  tax       -0.25  1 to 3       2",
        "  both             4 to 7       3",
        "truncation error: none, the sum is exact",
    ]
    cut = combine(model, {"law": 0.7, "tax": -0.25}, "cut", "svd", r=2)
    path, error = cut.worst or ("", 0.0)
    assert str(cut).splitlines()[-1] == f"truncation error: {cut.error:.2%}, at worst {error:.2%} in {path}"
    assert cut.as_dict()["layer_errors"][path] == error
    assert isinstance(cut, CombineReport)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapters": {"law": 1.0, "lav": 1.0}}, AdapterError, "no adapter named 'lav'; attached: law, med"),
        ({"adapters": {}}, OptionError, "got no adapters"),
        ({"adapters": {"law": float("nan"), "med": 1.0}}, OptionError, "got law=nan, expected finite"),
        ({"adapters": {"law": 1.0, "med": float("-inf")}}, OptionError, "got med=-inf"),
        ({"name": "law"}, AdapterError, "'law' is already attached"),
        ({"name": "a.b"}, OptionError, "adapter name 'a.b'"),
        ({"method": "tie"}, OptionError, "expected linear, svd, ties, dare, magnitude_prune\nhint: did you mean ties"),
        ({"method": "svd", "r": 0}, OptionError, "r=0"),
        ({"r": 4}, OptionError, "r=4: the ranks of a linear sum add up\nhint: method svd"),
        ({"method": "ties", "density": 0.0}, OptionError, "density=0.0"),
        ({"method": "ties", "density": 1.5}, OptionError, "density=1.5"),
        ({"method": "ties", "density": float("nan")}, OptionError, "density=nan"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_attached(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = with_two()
    options: dict[str, Any] = {"adapters": {"law": 0.5, "med": 0.5}, "name": "both", **change}
    with pytest.raises(error, match=message):
        combine(model, **options)
    assert adapter_names(model) == ["law", "med"]
    assert active_adapters(model) == {"med": 1.0}


def broken(name: str, value: float) -> Callable[[Block], None]:
    def spoil(model: Block) -> None:
        for lora in find_adapter(model, name).parts.values():
            lora.lora_B.data[0, 0] = value

    return spoil


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_listed_by_layer_and_adapter(method: str, value: float) -> None:
    model = with_two()
    broken("med", value)(model)
    with pytest.raises(AdapterError) as caught:
        combine(model, {"law": 0.5, "med": 0.5}, "both", method)
    assert str(caught.value).splitlines()[1:] == ["  up: NaN or infinity in med", "  out: NaN or infinity in med"]


def test_a_sum_that_overflows_is_refused() -> None:
    model = with_two()
    broken("law", 3e38)(model)
    with pytest.raises(AdapterError, match="both would hold NaN or infinity in 3 layers"):
        combine(model, {"law": 1e6}, "both")
    assert adapter_names(model) == ["law", "med"]


def test_layers_of_other_sizes_are_listed() -> None:
    pairs = {"law": Factors(torch.ones(1, 4), torch.ones(6, 1)), "med": Factors(torch.ones(1, 4), torch.ones(5, 1))}
    with pytest.raises(AdapterError, match=r"x: a delta \[5, 4\] in med, but \[6, 4\] in law"):
        combine_layers({name: {"x": pair} for name, pair in pairs.items()}, {"law": 1, "med": 1}, "both")
