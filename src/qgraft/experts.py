"""The experts of a mixture, packed: stacks of matrices as in a file, a projection of all experts, their forward pass.

    file          ffn_gate_exps [E, I, H], ffn_up_exps [E, I, H], ffn_down_exps [E, H, I]       blocks of whole rows
                  ffn_gate_up_exps [E, 2I, H], in newer ones, instead of the first two
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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qgraft.formats import PackedTensor, slice_rows
from qgraft.kernels import choose
from qgraft.kernels import experts as kernels
from qgraft.kernels.autocast import to_autocast
from qgraft.kernels.experts import ExpertTerm, Projection, Rows
from qgraft.kernels.summed_lora import casts_kept, kept_casts
from qgraft.linear import (
    PackedWeight,
    QuantizedEmbedding,
    QuantizedLinear,
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
        return slice_rows(self.packed, index * self.out_features, (index + 1) * self.out_features)

    def replace(self, packed: PackedTensor) -> None:
        """Put other packed bytes of the same shape in place. Raises ValueError for another shape."""
        if packed.shape != self.packed_weight.shape:
            raise ValueError(f"replace: got shape {packed.shape}, expected {self.packed_weight.shape}")
        self.packed_weight.set(packed)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} x ({self.in_features}, {self.out_features}), {self.packed_weight.format}"


PackedLayer = QuantizedLinear | QuantizedEmbedding | ExpertStack  # modules that hold a packed weight


class Routed(NamedTuple):
    """Rows for the experts: those of one expert lie together, in the order of their tokens.

    Attributes:
        x: [R, in].
        rows: whose they are.
    """

    x: Tensor
    rows: Rows


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
        return _Product.apply(to_autocast(routed.x), self, routed.rows, segments, *weights)

    def projection(self, compute: str) -> Projection:
        """The weights as kernels take them; `compute` is the layer's, or what that was in the forward pass."""
        stacks = tuple(stack.packed for stack in self.stacks().values())
        return Projection(self.num_experts, stacks, tuple(self.outputs().values()), compute)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return "adapters: qgraft.attach_lora(target_parameters=...)"


class _Product(torch.autograd.Function):
    """QuantizedExperts.with_loras: y = x W_e^T + s · (x A_e^T) B_e^T. Gradients for x and every A and B.

    Without LoRAs nothing of the size of x is saved. How it is computed is the row `experts` of the table of kernels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        layer: QuantizedExperts,
        rows: Rows,
        segments: Sequence[Segment],
        *weights: Tensor,
    ) -> Tensor:
        """x [R, in]; A, B of each segment -> y [R, out]."""
        ctx.layer, ctx.segments, ctx.compute, ctx.casts = layer, segments, layer.compute, kept_casts()
        ctx.rows = rows
        x_RI = x_RI.contiguous()
        projection, terms = layer.projection(layer.compute), _terms(segments, weights)
        y_RO, hs = _kernels(x_RI, layer.compute).experts_forward(x_RI, projection, rows, terms)
        ctx.save_for_backward(*weights, *hs, *((x_RI,) if segments else ()))
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [R, out] -> gradients of x and of every A and B."""
        segments, saved = ctx.segments, ctx.saved_tensors
        weights, (*hs, x_RI) = saved[: 2 * len(segments)], saved[2 * len(segments) :] if segments else (grad,)
        g_RO, projection, terms = grad.contiguous(), ctx.layer.projection(ctx.compute), _terms(segments, weights)
        with nullcontext() if ctx.casts is None else casts_kept(ctx.casts):
            gx_RI, grads = _kernels(g_RO, ctx.compute).experts_backward(
                g_RO, projection, ctx.rows, terms, hs, x_RI, ctx.needs_input_grad[0]
            )
        return gx_RI, None, None, None, *(each for pair in grads for each in pair)


def _kernels(x: Tensor, compute: str) -> Any:
    """The module that computes a projection of such rows; 8 bits are the CPU's."""
    if compute == "int8" and x.dtype == torch.float32:
        return kernels
    return choose("experts", None, x.device.type, x.dtype).module


def _terms(segments: Sequence[Segment], weights: Sequence[Tensor]) -> list[ExpertTerm]:
    return [ExpertTerm(*segment, A, B) for segment, A, B in zip(segments, weights[::2], weights[1::2], strict=True)]


def route(hidden_TH: Tensor, chosen_TK: Tensor, experts: int) -> tuple[Routed, Tensor]:
    """(the rows of all tokens sorted by their experts, [R] which of the T·K choices each of them is)."""
    order = torch.argsort(chosen_TK.reshape(-1), stable=True)
    tokens = order // chosen_TK.shape[1]
    rows = Rows(tokens, chosen_TK.reshape(-1)[order], experts, len(hidden_TH))
    return Routed(hidden_TH[tokens], rows), order


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of a module of transformers whose projections are QuantizedExperts, with adapters on them or not.

    hidden_states [T, hidden], top_k_index and top_k_weights [T, K] -> [T, hidden].
    """
    routed, order = route(hidden_states, top_k_index, self.num_experts)
    biases = routed.rows.experts if self.has_bias else None
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
    return cut_outputs(module, leaf, value.transpose(1, 2) if module.is_transposed else value)


def cut_outputs(module: nn.Module, leaf: str, w_EO: Tensor) -> dict[str, Tensor]:
    """What of [E, out, ...] of all experts each stack has, by its name; views."""
    names = PARTS[leaf]
    cuts = w_EO.chunk(len(names), 1)
    if not module.is_concatenated:
        cuts = tuple(w_EO[:, number :: len(names)] for number in range(len(names)))
    return dict(zip(names, cuts, strict=True))


def join_outputs(module: nn.Module, cuts: Sequence[Tensor]) -> Tensor:
    """The inverse of `cut_outputs`: [E, out, ...] of all experts, from those of each stack."""
    if len(cuts) == 1:
        return cuts[0]
    return torch.cat(list(cuts), 1) if module.is_concatenated else torch.stack(list(cuts), 2).flatten(1, 2)


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
