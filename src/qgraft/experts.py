"""The experts of a mixture, packed: stacks of matrices as in a file, a projection of all experts, their forward pass.

    file          ffn_gate_exps [E, I, H], ffn_up_exps [E, I, H], ffn_down_exps [E, H, I]       blocks of whole rows
    ExpertStack   one of them, seen as a matrix of E·I rows: expert e is its rows e·I to (e+1)·I, without a copy
    QuantizedExperts    y = x W_e^T for rows x that are sorted by their expert e; gate and up are one projection, as in
                        transformers, whose outputs lie one behind the other, or alternate (gpt-oss)
    transformers' module    keeps its class, router and gate; its 3D parameters `gate_up_proj` and `down_proj` are replaced by
                        projections of the same names, which is where adapters are put on them, too

transformers computes experts by a function that a registry names (`ALL_EXPERTS_FUNCTIONS`); ours is one of its entries. The
rows of all tokens are sorted once by their experts; within an expert they stay in the order of the tokens, so that the
tokens of one adapter are a run of rows in each expert.

Only experts that some token was routed to are multiplied, and only the pages of these are read.

Shapes: E experts, T tokens, K experts a token, R = T·K rows, I and O the inputs and outputs of a projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qgraft.formats import PackedTensor, get_format
from qgraft.kernels.lora import lora_backward, lora_forward
from qgraft.kernels.terms import Grads, Term
from qgraft.linear import (
    PackedWeight,
    QuantizedEmbedding,
    QuantizedLinear,
    packed_gradient,
    packed_product,
    to_autocast,
)

IMPLEMENTATION = "qgraft"  # among transformers' functions for experts
PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # parameters of all experts -> their stacks


@dataclass(frozen=True, eq=False)
class Stack:
    """The matrices of all experts in one packed tensor of `experts` times as many rows as one has."""

    experts: int
    packed: PackedTensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in)."""
        rows, width = self.packed.shape
        return self.experts, rows // self.experts, width


class ExpertStack(nn.Module):
    """The weights of all experts in one packed tensor, as a file has them."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = stack.shape
        self.packed_weight = PackedWeight(stack.packed)

    @property
    def packed(self) -> PackedTensor:
        """The stored bytes of all experts, [experts * out, in]."""
        return self.packed_weight.get()

    def expert(self, index: int) -> PackedTensor:
        """The weight [out, in] of one expert: views of the stored bytes."""
        return rows_of(self.packed, index * self.out_features, (index + 1) * self.out_features)

    def replace(self, packed: PackedTensor) -> None:
        """Put other packed bytes of the same shape in place. Raises ValueError for another shape."""
        if packed.shape != self.packed_weight.shape:
            raise ValueError(f"replace: got shape {packed.shape}, expected {self.packed_weight.shape}")
        self.packed_weight.set(packed)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} x ({self.in_features}, {self.out_features}), {self.packed_weight.format}"


PackedLayer = QuantizedLinear | QuantizedEmbedding | ExpertStack  # modules that hold a packed weight


def rows_of(packed: PackedTensor, start: int, stop: int) -> PackedTensor:
    """Rows of a packed weight, in a format that can be cut by rows, as views."""
    assert get_format(packed.format).by_rows
    return PackedTensor(
        packed.format, (stop - start, packed.shape[1]), tuple(part[start:stop] for part in packed.parts)
    )


class Routed(NamedTuple):
    """Rows for the experts: those of one expert lie together, in the order of their tokens.

    Attributes:
        x: [R, in].
        tokens: [R] int64, the token of each row.
        experts: [R] int64, ascending.
        groups: (expert, start, stop): its rows, for each expert that has some.
        total: how many tokens there are in the pass.
    """

    x: Tensor
    tokens: Tensor
    experts: Tensor
    groups: list[tuple[int, int, int]]
    total: int


class Segment(NamedTuple):
    """Which tokens of a pass a LoRA of the experts serves, and what its product is multiplied by."""

    start: int
    stop: int
    scaling: float


class QuantizedExperts(nn.Module):
    """y = x W_e^T with packed, frozen weights; each row of x is multiplied by its own expert e.

    Attributes:
        compute: as QuantizedLinear's.
        alternates: whether the outputs of several stacks alternate, instead of following each other.

    Args:
        stacks: what a file has of the weights, by name, in the order of their outputs.
    """

    compute = "float32"

    def __init__(self, stacks: Mapping[str, Stack], alternates: bool = False) -> None:
        super().__init__()
        for name, stack in stacks.items():
            self.add_module(name, ExpertStack(stack))
        self.alternates = alternates
        first = next(iter(self.stacks().values()))
        self.num_experts, self.in_features = first.num_experts, first.in_features
        self.out_features = sum(stack.out_features for stack in self.stacks().values())

    def stacks(self) -> dict[str, ExpertStack]:
        """By name, in the order of their outputs."""
        return {name: module for name, module in self.named_children() if isinstance(module, ExpertStack)}

    def outputs(self) -> dict[str, slice]:
        """The outputs that each stack makes, by its name."""
        found, start, stacks = {}, 0, self.stacks()
        for number, (name, stack) in enumerate(stacks.items()):
            stop = start + stack.out_features
            found[name] = slice(number, None, len(stacks)) if self.alternates else slice(start, stop)
            start = stop
        return found

    def _made(self) -> list[tuple[ExpertStack, slice]]:
        return list(zip(self.stacks().values(), self.outputs().values(), strict=True))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(iter(self.stacks().values())).packed.device

    def forward(self, routed: Routed) -> Tensor:
        """rows [R, in] -> [R, out] in the dtype of the rows."""
        return self.with_loras(routed, (), ())

    def with_loras(self, routed: Routed, segments: Sequence[Segment], weights: Sequence[Tensor]) -> Tensor:
        """The same with LoRAs, each on the rows of its own tokens.

        Args:
            weights: A [E, r, in] and B [E, out, r] of each segment.
        """
        return _Product.apply(to_autocast(routed.x), self, routed, segments, *weights)

    def product(self, x_RI: Tensor, index: int) -> Tensor:
        """x W_e^T of one expert, [rows, out]."""
        y_RO = x_RI.new_empty(len(x_RI), self.out_features)
        for stack, outputs in self._made():
            y_RO[:, outputs] = packed_product(x_RI, stack.expert(index), self.compute)
        return y_RO

    def grad_input(self, g_RO: Tensor, index: int, compute: str) -> Tensor:
        """g W_e of one expert, [rows, in]; `compute` is what it was in the forward pass."""
        parts = [
            packed_gradient(g_RO[:, outputs].contiguous(), stack.expert(index), compute)
            for stack, outputs in self._made()
        ]
        for part in parts[1:]:
            parts[0] += part
        return parts[0]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return "adapters: qgraft.attach_lora(target_parameters=...)"


class _Product(torch.autograd.Function):
    """QuantizedExperts.with_loras: y = x W_e^T + s · (x A_e^T) B_e^T. Gradients for x and every A and B.

    Without LoRAs nothing of the size of x is saved. The products are those of linear layers, an expert after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        layer: QuantizedExperts,
        routed: Routed,
        segments: Sequence[Segment],
        *weights: Tensor,
    ) -> Tensor:
        """x [R, in]; A, B of each segment -> y [R, out]."""
        ctx.layer, ctx.segments, ctx.compute = layer, segments, layer.compute
        ctx.routed = routed._replace(x=x_RI.new_empty(0))  # which the function shall not keep
        x_RI = x_RI.contiguous()
        y_RO, hs = x_RI.new_empty(len(x_RI), layer.out_features), []
        for index, start, stop in routed.groups:
            y_SO = layer.product(x_RI[start:stop], index)
            if terms := _terms(routed, start, stop, index, segments, weights, x_RI):
                y_SO, own = lora_forward(x_RI[start:stop], y_SO, [term for _, term in terms])
                hs += own
            y_RO[start:stop] = y_SO
        ctx.save_for_backward(*weights, *hs, *((x_RI,) if segments else ()))
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [R, out] -> gradients of x and of every A and B."""
        layer, routed, segments, saved = ctx.layer, ctx.routed, ctx.segments, ctx.saved_tensors
        weights, (*hs, x_RI) = saved[: 2 * len(segments)], saved[2 * len(segments) :] if segments else (grad,)
        grads = [torch.zeros_like(weight) for weight in weights]
        g_RO, wanted = grad.contiguous(), ctx.needs_input_grad[0]
        gx_RI = g_RO.new_empty(len(g_RO), layer.in_features) if wanted else None
        at = 0
        for index, start, stop in routed.groups:
            g_SO = g_RO[start:stop]
            gx_SI = layer.grad_input(g_SO, index, ctx.compute) if wanted else None
            terms = _terms(routed, start, stop, index, segments, weights, x_RI)
            if terms:
                gx_SI, own = lora_backward(g_SO, gx_SI, [term for _, term in terms], hs[at : at + len(terms)])
                _add(grads, index, [number for number, _ in terms], own)
                at += len(terms)
            if gx_RI is not None and gx_SI is not None:
                gx_RI[start:stop] = gx_SI
        return gx_RI, None, None, None, *grads


def _add(grads: list[Tensor], index: int, numbers: list[int], own: Sequence[Grads]) -> None:
    for number, each in zip(numbers, own, strict=True):
        grads[2 * number][index] += each.A
        grads[2 * number + 1][index] += each.B


def _terms(
    routed: Routed,
    start: int,
    stop: int,
    index: int,
    segments: Sequence[Segment],
    weights: Sequence[Tensor],
    x_RI: Tensor,
) -> list[tuple[int, Term]]:
    """(number of the segment, its LoRA on the rows start:stop of one expert) of those that have rows there."""
    terms = []
    for number, segment in enumerate(segments):
        first, last = 0, stop - start
        if (segment.start, segment.stop) != (0, routed.total):
            ends = torch.tensor([segment.start, segment.stop], device=routed.tokens.device)
            first, last = torch.searchsorted(routed.tokens[start:stop], ends).tolist()
        if first < last:
            A, B = weights[2 * number][index], weights[2 * number + 1][index]
            x_SI = x_RI[start + first : start + last]
            terms.append((number, Term(first, last, segment.scaling, A, B, x_SI)))
    return terms


def route(hidden_TH: Tensor, chosen_TK: Tensor, experts: int) -> tuple[Routed, Tensor]:
    """(the rows of all tokens sorted by their experts, [R] which of the T·K choices each of them is)."""
    order = torch.argsort(chosen_TK.reshape(-1), stable=True)
    tokens, ids = order // chosen_TK.shape[1], chosen_TK.reshape(-1)[order]
    ends = torch.bincount(ids, minlength=experts).cumsum(0).tolist()
    groups = [
        (index, start, stop)
        for index, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        if start < stop
    ]
    return Routed(hidden_TH[tokens], tokens, ids, groups, len(hidden_TH)), order


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of a module of transformers whose projections are QuantizedExperts, with adapters on them or not.

    hidden_states [T, hidden], top_k_index and top_k_weights [T, K] -> [T, hidden].
    """
    routed, order = route(hidden_states, top_k_index, self.num_experts)
    biases = routed.experts if self.has_bias else None
    y = self.gate_up_proj(routed)
    z = self._apply_gate(y if biases is None else y + self.gate_up_proj_bias[biases])
    out = self.down_proj(routed._replace(x=z))
    out = out if biases is None else out + self.down_proj_bias[biases]
    weighted = out * top_k_weights.reshape(-1)[order][:, None]
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def holds_experts(module: nn.Module) -> bool:
    """Whether this is transformers' module of all experts of a layer, whose weights can be stacks instead."""
    plain = not getattr(module, "has_post_expert_norm", False) and getattr(module, "has_gate", False)
    return bool(plain) and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def parts_of(module: nn.Module, leaf: str, value: Tensor) -> dict[str, Tensor]:
    """The matrices [E, out, in] of all experts in the numbers of the parameter `leaf`, by the names of the stacks; views."""
    w_EOI = value.transpose(1, 2) if module.is_transposed else value
    names = PARTS[leaf]
    cuts = w_EOI.chunk(len(names), 1)
    if not module.is_concatenated:
        cuts = tuple(w_EOI[:, number :: len(names)] for number in range(len(names)))
    return dict(zip(names, cuts, strict=True))


def misfit(module: nn.Module, leaf: str, stacks: Mapping[str, Stack]) -> str | None:
    """What is wrong with stacks for the parameter `leaf` of such a module; None where they fit."""
    experts, *sizes = getattr(module, leaf).shape
    out, width = reversed(sizes) if module.is_transposed else sizes
    expected = [(experts, out // len(stacks), width)] * len(stacks)
    got = [stack.shape for stack in stacks.values()]
    return None if got == expected else f"got experts {got}, expected {expected}"


def place(module: nn.Module, leaf: str, stacks: Mapping[str, Stack]) -> None:
    """Put packed weights in the place of the parameter `leaf`."""
    delattr(module, leaf)
    module.add_module(leaf, QuantizedExperts(stacks, not module.is_concatenated))
