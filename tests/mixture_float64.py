"""Experts of a decoder's layer with random weights, as kernels take them, and what they make of a row in float64."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgraft.formats import get_format
from qgraft.kernels.decoder import Experts, Linear, Routing

INNER = 32  # of an expert


class Mixture(NamedTuple):
    """What a layer has; `tied`: the last two experts and the first have the same row of the router.

    Attributes:
        shared: "", "expert" or "gated expert": what the layer has beside them.
        clamp: with biases of experts and of the router, and gate and up of one parameter.
    """

    experts: int
    routing: Routing
    correction: bool = False
    shared: str = ""
    clamp: tuple[float, float] | None = None
    alternates: bool = False
    tied: bool = False


MIXTURES = {
    "softmax": (Mixture(5, Routing(3, normalized=True)), {"wide_norms": True}),
    "shared": (Mixture(6, Routing(2), shared="gated expert"), {}),
    "groups": (
        Mixture(
            12, Routing(3, "sigmoid", 4, 2, normalized=True, added_to_sum=1e-20, scaling=2.5), True, shared="expert"
        ),
        {"rotated": 16},
    ),
    "floored": (Mixture(7, Routing(4, normalized=True, least_sum=0.9), True), {"pairs": True, "rotated": 24}),
    "clamped": (
        Mixture(9, Routing(4, "logits"), clamp=(1.0, 1.7), alternates=True), {"sinks": True, "residual": 0.7},
    ),
    "one behind the other": (Mixture(3, Routing(3, "logits"), clamp=(2.0, 0.5)), {}),
    "tied": (Mixture(4, Routing(2), tied=True), {}),
    "one": (Mixture(1, Routing(1)), {}),
}  # fmt: skip


class Floats(NamedTuple):
    """The numbers of the experts: E of them."""

    given: Mixture
    gate: Tensor  # [E inner, hidden]
    up: Tensor
    down: Tensor  # [E hidden, inner]
    router: Tensor
    router_bias: Tensor | None
    correction: Tensor | None
    bias: Tensor | None
    down_bias: Tensor | None


def made(given: Mixture, hidden: int, format: str) -> tuple[Floats, dict[str, Any]]:
    """(the numbers that packed weights mean, the packed weights by name)."""
    count, shapes = given.experts, {"gate": (INNER, hidden), "up": (INNER, hidden), "down": (hidden, INNER)}
    packed = {
        name: get_format(format).quantize(torch.randn(count * rows, columns) * 0.2)
        for name, (rows, columns) in shapes.items()
    }
    router = torch.randn(count, hidden) * 0.2
    if given.tied:
        router[-2:] = router[0]
    biased = given.clamp is not None
    return Floats(
        given, *(get_format(format).dequantize(each, torch.float64) for each in packed.values()), router,
        torch.randn(count) if biased else None, torch.randn(count) * 0.3 if given.correction else None,
        torch.randn(count, 2 * INNER) if biased else None, torch.randn(count, hidden) if biased else None,
    ), packed  # fmt: skip


def plain(floats: Floats, packed: dict[str, Any], int8: bool) -> Experts:
    """As kernels take them."""
    return Experts(
        Linear(packed["gate"], None, int8), Linear(packed["up"], None, int8), Linear(packed["down"], floats.down_bias, int8),
        floats.router, floats.given.routing, floats.router_bias, floats.correction, floats.bias, floats.given.alternates,
        floats.given.clamp,
    )  # fmt: skip


def chosen(floats: Floats, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the experts of a row [K], their weights [K]), of experts with equal scores the first ones."""
    routing, logits = floats.given.routing, floats.router.double() @ x
    if floats.router_bias is not None:
        logits = logits + floats.router_bias.double()
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "logits": logits}[routing.scores]
    choice = scores if floats.correction is None else scores + floats.correction.double()
    if routing.groups > 1:
        of_groups = choice.view(routing.groups, -1)
        kept = of_groups.topk(2).values.sum(-1).topk(routing.kept).indices
        hidden = torch.full_like(of_groups, -torch.inf)
        hidden[kept] = of_groups[kept]
        choice = hidden.flatten()
    experts = choice.sort(descending=True, stable=True).indices[: routing.chosen]
    weights = scores[experts].softmax(-1) if routing.scores == "logits" else scores[experts]
    if routing.normalized:
        weights = weights / (weights.sum().clamp(min=routing.least_sum) + routing.added_to_sum)
    return experts, weights * routing.scaling


def loras(given: Mixture, hidden: int, ranks: Sequence[int]) -> dict[str, list[tuple[Tensor, Tensor, float]]]:
    """LoRAs of these ranks on all experts: gate and up have one A, and B of both lies in one tensor."""
    count, found = given.experts, {"expert_gate": [], "expert_up": [], "expert_down": []}
    for r in ranks:
        A, B = torch.randn(count, r, hidden), torch.randn(count, 2 * INNER, r)
        found["expert_gate"].append((A, B[:, :INNER], 0.3 / r))
        found["expert_up"].append((A, B[:, INNER:], 0.3 / r))
        found["expert_down"].append((torch.randn(count, r, INNER), torch.randn(count, hidden, r), 0.3 / r))
    return found


def added(loras: Sequence[tuple[Tensor, Tensor, float]], expert: int, x: Tensor) -> Tensor | float:
    """What they add to the product of an expert with x."""
    return sum(scaling * (B[expert].double() @ (A[expert].double() @ x)) for A, B, scaling in loras)


def expected(floats: Floats, x: Tensor, loras: dict[str, Any]) -> Tensor:
    """What the experts make of a row, [hidden]."""
    total = torch.zeros_like(x)
    for expert, weight in zip(*(each.tolist() for each in chosen(floats, x)), strict=True):
        gate, up = (part.view(floats.given.experts, INNER, -1)[expert] @ x for part in (floats.gate, floats.up))
        if floats.bias is not None:
            bias = floats.bias[expert].double()
            of_gate, of_up = (bias[::2], bias[1::2]) if floats.given.alternates else bias.chunk(2)
            gate, up = gate + of_gate, up + of_up
        gate, up = gate + added(loras["expert_gate"], expert, x), up + added(loras["expert_up"], expert, x)
        if floats.given.clamp is None:
            h = torch.nn.functional.silu(gate) * up
        else:
            limit, alpha = floats.given.clamp
            gate = gate.clamp(max=limit)
            h = (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)
        y = floats.down.view(floats.given.experts, len(x), INNER)[expert] @ h
        y = y + added(loras["expert_down"], expert, h)
        total = total + weight * (y if floats.down_bias is None else y + floats.down_bias[expert].double())
    return total
