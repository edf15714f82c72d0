"""Make one adapter out of several: weights w_i, deltas Δ_i = s_i B_i A_i.

    linear            Σ w_i Δ_i, exactly: the ranks are stacked, weights and scalings go into B

                          Σ w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] · [A_1; A_2; ...]

                      so the adapters may differ in rank, alpha, rank stabilization and target layers
    svd               the same sum cut to rank r: its best approximation of that rank (Eckart-Young). B = Q_B R_B and
                      A^T = Q_A R_A leave a core R_B R_A^T, as small as the ranks are, whose singular values are those
                      of the sum; the sum itself [out, in] is never formed
    magnitude_prune   of each delta only the `density` largest numbers, then the weighted sum
    dare              of each delta a random `density` of the numbers, scaled by 1/density, then the weighted sum (Yu et
                      al. 2023, arXiv:2311.03099)
    ties              trimmed as in magnitude_prune; a sign elected for each number, and the weighted mean over those
                      adapters that agree with it (Yadav et al. 2023, arXiv:2306.01708)

The last three are defined on the deltas, not on their factors: the sum of pruned B_i times the sum of pruned A_i holds
products B_i A_j of two different adapters. So each delta is formed, one layer at a time, and the result, which has full
rank, is cut to rank r by a randomized range finder (Halko et al. 2009, arXiv:0909.4061). PEFT calls this ties_svd,
dare_linear_svd and magnitude_prune_svd; its pure functions on tensors (peft.utils.merge_utils) do the pruning here.

What the cut loses is reported relative to what it cuts: ‖sum − B A‖ / ‖sum‖, Frobenius. Every layer of the result has
scaling 1 (lora_alpha = r). A layer that only some of the adapters are on is made of those.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.attach import attach_layers, check_new_name
from qgraft.adapters.base import find_adapter, require_loras, selection_of
from qgraft.adapters.choose import check_weights
from qgraft.adapters.kept_rows import rows_of_all
from qgraft.adapters.lora import Lora, LoraConfig
from qgraft.adapters.lora_experts import ExpertLora
from qgraft.adapters.states import loras_of
from qgraft.adapters.whole import refuse_whole
from qgraft.errors import AdapterError, OptionError, UnsupportedError, near_match, worded
from qgraft.given import described
from qgraft.ranges import COUNT, SEED, SHARE_ABOVE_0, check_ranges

PRUNING = ("ties", "dare", "magnitude_prune")
METHODS = ("linear", "svd", *PRUNING)
DENSITY = 0.5  # where nothing is said
_OVERSAMPLED, _ITERATIONS = 16, 4  # of the range finder


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter's part in one layer: delta = scaling · B·A with A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]


Layers = Mapping[str, Factors]  # module path -> factors


@dataclass(frozen=True)
class Cut:
    """What cutting one layer to its rank lost: Frobenius norms of the difference and of what was cut."""

    lost: float
    whole: float

    @property
    def error(self) -> float:
        """lost / whole, 0 for a layer of zeros."""
        return self.lost / self.whole if self.whole else 0.0


@dataclass(frozen=True)
class CombineReport:
    """What combine made.

    Attributes:
        name: the new adapter.
        method: one of METHODS.
        weights: adapter -> its weight.
        input_ranks: adapter -> module path -> rank.
        ranks: module path -> rank of the new adapter.
        cuts: module path -> what the cut to that rank lost; empty for linear, which is exact.
    """

    name: str
    method: str
    weights: dict[str, float]
    input_ranks: dict[str, dict[str, int]]
    ranks: dict[str, int]
    cuts: dict[str, Cut]

    @property
    def error(self) -> float:
        """The relative truncation error over all layers together."""
        lost, whole = (sum(getattr(cut, key) ** 2 for cut in self.cuts.values()) for key in ("lost", "whole"))
        return (lost / whole) ** 0.5 if whole else 0.0

    @property
    def worst(self) -> tuple[str, float] | None:
        """(module path, relative error) of the layer that lost the largest share."""
        errors = {path: cut.error for path, cut in self.cuts.items()}
        return max(errors.items(), key=lambda item: item[1]) if errors else None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "method": self.method,
            "weights": self.weights,
            "ranks": self.ranks,
            "truncation_error": self.error,
            "layer_errors": {path: cut.error for path, cut in self.cuts.items()},
        }

    def __str__(self) -> str:
        made = (self.name, "", _span(self.ranks), str(len(self.ranks)))
        rows = [("adapter", "weight", "rank", "layers")]
        for name, weight in self.weights.items():
            ranks = self.input_ranks[name]
            rows.append((name, f"{weight:g}", _span(ranks), str(len(ranks))))
        lines = [f"{self.name}: {self.method} of {len(self.weights)} adapters", *_table([*rows, made])]
        if self.worst is None:
            return "\n".join([*lines, "truncation error: none, the sum is exact"])
        path, error = self.worst
        return "\n".join([*lines, f"truncation error: {self.error:.2%}, at worst {error:.2%} in {path}"])


def combine(
    model: nn.Module,
    adapters: Mapping[str, float],
    name: str,
    method: str = "linear",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> CombineReport:
    """Make a new adapter `name` out of attached ones and make it the active one; those stay attached.

    Args:
        adapters: attached adapter -> weight, which may be negative.
        method: linear (exact), svd (cut to rank r), ties, dare or magnitude_prune; see the module's docstring.
        r: rank of the result; default the largest of the inputs. Not for linear, whose ranks add up.
        density: share of each delta's numbers that ties, dare and magnitude_prune keep; None for DENSITY.
        seed: of dare's choice; the result depends on it, not on torch's own generator.

    Raises AdapterError for an unknown or taken name and for NaN, OptionError for an impossible option, UnsupportedError
    where a method needs PEFT and it is not installed.
    """
    check_new_name(model, name)
    if not isinstance(adapters, Mapping):
        raise OptionError(
            f"combine: got {described(adapters)}, expected weights by names", hint="{'law': 0.7, 'med': 0.3}"
        )
    selection_of(model).require(adapters)
    require_loras(model, adapters, "combine")
    for adapter in adapters:
        refuse_whole(find_adapter(model, adapter), "combine")
    loras = {adapter: loras_of(find_adapter(model, adapter), "combine") for adapter in adapters}
    layers = {adapter: {path: _factors(path, lora) for path, lora in own.items()} for adapter, own in loras.items()}
    combined, report = combine_layers(layers, adapters, name, method, r, density, seed)
    inexact = {path for own in loras.values() for path, lora in own.items() if not lora.config.exact}
    exact = combined.keys() - (
        inexact if method == "linear" else combined.keys()
    )  # sums of A stay as A are, cuts do not
    configs = {path: LoraConfig(made.rank, made.rank, exact=path in exact) for path, made in combined.items()}
    kept = rows_of_all([find_adapter(model, adapter).kept for adapter in adapters])
    attach_layers(model, name, configs, {path: (made.A, made.B) for path, made in combined.items()})
    selection_of(model).change(name, kept=kept)
    return report


def no_product_error(action: str, path: str, about: str) -> UnsupportedError:
    """The error where `action` needs A and B, and the layer at `path` has something else."""
    return UnsupportedError(
        f"{action}: {path}: {about} is no product of two matrices",
        hint=worded(flags="merge one after the other", python="use_adapter(model, {'a': 0.5, 'b': 0.5}) adds them up"),
    )


def experts_error(path: str) -> UnsupportedError:
    """The error where A and B are those of all experts of a layer, whose ranks cannot be added up in one product."""
    return UnsupportedError(
        f"combine: {path}: a LoRA on experts is a product of two matrices for each of them",
        hint=worded(flags="merge one after the other", python="use_adapter(model, {'a': 0.5, 'b': 0.5}) adds them up"),
    )


def _factors(path: str, lora: Lora) -> Factors:
    if isinstance(lora, ExpertLora):
        raise experts_error(path)
    if (pair := lora.factors()) is None:
        raise no_product_error("combine", path, lora.about)
    return Factors(pair[0].detach().cpu(), pair[1].detach().cpu(), lora.config.scaling)


def combine_layers(
    adapters: Mapping[str, Layers],
    weights: Mapping[str, float],
    name: str,
    method: str = "linear",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, Factors], CombineReport]:
    """The new adapter's factors, each of scaling 1, on the CPU in float32; see combine for the arguments.

    Args:
        adapters: adapter -> its layers, on the CPU.
        weights: the same adapters' weights.
    """
    check_options(weights, method, r, density, seed)
    _check_shapes(adapters)
    rank = r or max(factors.rank for layers in adapters.values() for factors in layers.values())
    merge = _pruning(method, DENSITY if density is None else density) if method in PRUNING else None
    combined: dict[str, Factors] = {}
    cuts: dict[str, Cut] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for path in sorted({path for layers in adapters.values() for path in layers}):
            parts = [(layers[path], weights[adapter]) for adapter, layers in adapters.items() if path in layers]
            if merge is not None:
                combined[path], cuts[path] = _cut_dense(merge(parts), rank)
            elif method == "svd":
                combined[path], cuts[path] = _cut_stacked(_stacked(parts, torch.float64), rank)
            else:
                combined[path] = _stacked(parts)
    if broken := [path for path, made in combined.items() if not _finite(made)]:
        raise AdapterError(f"{name} would hold NaN or infinity in {len(broken)} layers, {broken[0]} first")
    input_ranks = {
        adapter: {path: factors.rank for path, factors in layers.items()} for adapter, layers in adapters.items()
    }
    ranks = {path: made.rank for path, made in combined.items()}
    return combined, CombineReport(name, method, dict(weights), input_ranks, ranks, cuts)


def check_options(weights: Mapping[Any, float], method: str, r: int | None, density: float | None, seed: int) -> None:
    """Raise OptionError for options of combine that cannot be; `weights` by whatever the adapters are named."""
    if method not in METHODS:
        raise OptionError(f"method={method!r}: expected {', '.join(METHODS)}", hint=near_match(method, METHODS))
    if not weights:
        raise OptionError("combine: got no adapters, expected at least one")
    check_weights(weights)
    share = DENSITY if density is None else density
    check_ranges({"r": (1 if r is None else r, COUNT), "density": (share, SHARE_ABOVE_0), "seed": (seed, SEED)})
    if r is not None and method == "linear":
        raise OptionError(f"r={r}: the ranks of a linear sum add up", hint=f"method svd cuts the sum to rank {r}")


def _check_shapes(adapters: Mapping[str, Layers]) -> None:
    """Raise AdapterError that lists every layer with NaN, and every layer that has not one size in all adapters."""
    sizes: dict[str, tuple[str, list[int]]] = {}
    problems = []
    for adapter, layers in adapters.items():
        for path, factors in layers.items():
            size = [factors.B.shape[0], factors.A.shape[1]]
            first, expected = sizes.setdefault(path, (adapter, size))
            if size != expected:
                problems.append(f"{path}: a delta {size} in {adapter}, but {expected} in {first}")
            if not _finite(factors):
                problems.append(f"{path}: NaN or infinity in {adapter}")
    if problems:
        raise AdapterError("the adapters cannot be combined:\n  " + "\n  ".join(problems))


def _finite(factors: Factors) -> bool:
    return bool(torch.isfinite(factors.A).all()) and bool(torch.isfinite(factors.B).all())


def _stacked(parts: Sequence[tuple[Factors, float]], dtype: torch.dtype = torch.float32) -> Factors:
    """The weighted sum as one pair. A factor on B is multiplied in float64 and rounded once."""
    A = torch.cat([factors.A.to(dtype) for factors, _ in parts])
    B = torch.cat([(factors.B.double() * (weight * factors.scaling)).to(dtype) for factors, weight in parts], dim=1)
    return Factors(A, B)


def _cut_stacked(whole: Factors, rank: int) -> tuple[Factors, Cut]:
    """The best approximation of rank `rank` or less, from the factors alone."""
    Q_B, R_B = torch.linalg.qr(whole.B)
    Q_A, R_A = torch.linalg.qr(whole.A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    cut = Cut(lost=float(S[rank:].norm()), whole=float(S.norm()))
    root = S[:rank].sqrt()  # half of the size to each side, as in trained adapters
    A = root[:, None] * (Vh[:rank] @ Q_A.T)
    B = (Q_B @ U[:, :rank]) * root
    return Factors(A.float(), B.float()), cut


def _cut_dense(whole_OI: Tensor, rank: int) -> tuple[Factors, Cut]:
    """An approximation of rank `rank` or less that is as good as the best to about a thousandth.

    A few products with the matrix and its transpose find the `rank` + 16 directions in which it is largest; within
    them the singular value decomposition is exact. A whole one takes a hundred times longer for a layer of 4096.
    """
    width = min(rank + _OVERSAMPLED, *whole_OI.shape)
    Q = torch.randn(whole_OI.shape[1], width)
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(whole_OI.T @ torch.linalg.qr(whole_OI @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(whole_OI @ Q, full_matrices=False)
    root = S[:rank].sqrt()
    cut_to = Factors(root[:, None] * (Vh[:rank] @ Q.T), U[:, :rank] * root)
    return cut_to, Cut(lost=float((whole_OI - cut_to.B @ cut_to.A).norm()), whole=float(whole_OI.norm()))


def _pruning(method: str, density: float) -> Callable[[Sequence[tuple[Factors, float]]], Tensor]:
    """The function that makes one delta [out, in] of several; PEFT's, so PEFT must be there."""
    try:
        from peft.utils import merge_utils
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"method {method} is computed by PEFT, which is not installed ({error})",
            hint="pip install peft; linear and svd need nothing",
        ) from error
    functions: dict[str, Any] = {
        "ties": merge_utils.ties, "dare": merge_utils.dare_linear, "magnitude_prune": merge_utils.magnitude_prune,
    }  # fmt: skip

    def merged(parts: Sequence[tuple[Factors, float]]) -> Tensor:
        deltas = [(factors.B.float() @ factors.A.float()) * factors.scaling for factors, _ in parts]
        weights = torch.tensor([weight for _, weight in parts])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # density 1 keeps everything, as is asked for
            made = functions[method](deltas, weights, density)
        assert isinstance(made, Tensor)
        return made

    return merged


def _span(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(low) if low == high else f"{low} to {high}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"  {row[0]:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], others, strict=True))
        for row in rows
    ]
