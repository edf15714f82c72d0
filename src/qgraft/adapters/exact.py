"""An exact LoRA: a change of the minimums that the base stores, so that a merge loses nothing but their rounding.

Formats with minimums hold a weight as w[o, i] = step * code + m[o, g] * n[o, s] (formats/grid.py): a real minimum m for each
group g of columns, and in the K-quants an integer n for each sub-group s. Whatever changes m alone is written back into the
file as it is. So the delta is made constant within the groups (QA-LoRA's idea, arXiv:2309.14717):

    dm[o, g]    = scaling · sum_r B[o, r] A[r, g] · unit[o, g]        A [r, groups], B [out, r]: what is trained
    delta[o, i] = dm[o, g]                     q4_1, q5_1: g = i / 32,  unit = SPREAD
    delta[o, i] = dm[o, g] * n[o, s]           q2_k, q4_k, q5_k: g = i / 256,  unit = SPREAD / root mean square of n in g

Without sub-groups (`BlockLora`) that is a LoRA whose A is the same in the 32 columns of a group: kernels, files and other
programs see that LoRA. With them (`MinimumLora`) it has the rank of no LoRA. Both factors of the sum are taken apart then:

    p[s] = sum of x over the columns of s      y[o] += sum_s N[o, s] p[s]      N[o, s] = dm[o, g] * n[o, s]

which costs 1/16 or 1/32 of the base's product. n is remembered as it was when the part was made: a merge of something else
into the layer may change the base's, and not what this adapter computes.

SPREAD is there for the optimizer. The sum of 32 inputs grows like their root, not like their number, so a step of Adam in A
moves the output less than in a LoRA, whose A has a number for each column. A power of two, so that A goes into a file
and comes back with the same bits. (SmolLM2, q4_1, 72 identity rows twice, rate 1.5e-3, r = 8: held-out loss 0.712 without
it, 0.535 with it; an ordinary LoRA 0.553. With 16 it is 0.381: that is a larger rate, which a LoRA can be given as well.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qgraft.adapters.lora import ALL_ROWS, Frozen, Lora, LoraConfig, LoraLayer, LoraLinear, Values, check_linear
from qgraft.adapters.lora_function import LayerSegment, drop_by_seed
from qgraft.adapters.peft_names import minimums_name, tensor_name
from qgraft.errors import AdapterError, UnsupportedError, option
from qgraft.formats import FORMATS, PackedTensor, unpack
from qgraft.linear import QuantizedLinear

SPREAD = 4.0


@dataclass(frozen=True)
class Minimums:
    """Where a format keeps its minimums.

    Attributes:
        width: columns that share a stored real one.
        subs: sub-groups in them, each with an integer; 1 where there are no integers.
    """

    width: int
    subs: int


@cache
def minimums_of(format: str) -> Minimums | None:
    """Where the format keeps its minimums; None for formats without them, and for what qgraft cannot write again."""
    layout = FORMATS[format]
    if layout.unpack is None or layout.pack is None:
        return None
    width = layout.block_size
    parts = tuple(torch.zeros(part.shape(1, width), dtype=part.dtypes[0]) for part in layout.parts)
    grid = unpack(PackedTensor(format, (1, width), parts))
    if grid.m is None or grid.group_of is not None:
        return None
    groups, integers = grid.m.shape[1], grid.sub_minimums
    return Minimums(width // groups, 1 if integers is None else integers.shape[1] // groups)


def formats_with_minimums() -> list[str]:
    """The formats that an exact LoRA can be put on."""
    return sorted(name for name in FORMATS if minimums_of(name) is not None)


def minimums_at(layer: nn.Module) -> Minimums | None:
    """The same of a layer of the model, wrapped or not; None where its weight has none, or not for inputs side by side."""
    base = layer.base if isinstance(layer, LoraLayer) else layer
    if not isinstance(base, QuantizedLinear) or base.input_order is not None:
        return None
    return minimums_of(base.packed_weight.format)


class BlockLora(Lora):
    """An exact LoRA on a format whose minimums have no integers: A [r, groups], the same in all columns of a group."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: LoraConfig,
        device: torch.device,
        values: Values | None = None,
        *,
        width: int,
    ) -> None:
        if values is not None:
            values = (self._block_values(values[0], width), values[1])
        super().__init__(in_features // width, out_features, config, device, values)
        self.width = width
        if values is None:
            _fit_to_sums(self.lora_A, width)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See Lora; A with a column for each input."""
        return (self.lora_A * SPREAD).repeat_interleave(self.width, dim=1), self.lora_B

    def change(self) -> Tensor:
        """dm [out, groups], float64."""
        return (self.lora_B.double() @ self.lora_A.double()) * (SPREAD * self.config.scaling)

    def delta(self, rows: slice = ALL_ROWS, base: Frozen | None = None) -> Tensor:
        """See Lora."""
        return self.change()[rows].float().repeat_interleave(self.width, dim=1)

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Those of the LoRA that it is. A is a copy, unlike B; `taken` puts it back."""
        A, B = self.factors()
        return {tensor_name(path, "A"): A.detach(), tensor_name(path, "B"): B.detach()}

    def taken(self, path: str, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See Part."""
        A = state[tensor_name(path, "A")]
        if blocks(A, self.width) is None:
            raise AdapterError(f"{path}: got an A that differs within {self.width} columns, expected an exact LoRA's")
        own = (self.lora_A.data, self._block_values(A, self.width))
        return [own, (self.lora_B.data, state[tensor_name(path, "B")])]

    @staticmethod
    def _block_values(A: Tensor, width: int) -> Tensor:
        return A[:, ::width] / SPREAD


class MinimumLora(Lora):
    """An exact LoRA on a K-quant: A [r, groups], with the integers of the base's minimums, int8 [out, sub-groups]."""

    about = "an exact LoRA on a K-quant"
    integers: Tensor
    unit: Tensor

    def __init__(self, packed: PackedTensor, config: LoraConfig, values: Values | None = None) -> None:
        out_features, in_features = packed.shape
        grid = unpack(packed)
        assert grid.m is not None
        assert grid.sub_minimums is not None
        groups = grid.m.shape[1]
        super().__init__(groups, out_features, config, packed.device, values)
        n_OGS = grid.sub_minimums.float().unflatten(1, (groups, -1))
        size_OG = n_OGS.square().mean(dim=2).sqrt_()
        self.register_buffer("integers", grid.sub_minimums.clone(), persistent=False)
        unit_OG = torch.where(size_OG > 0, SPREAD / size_OG.clamp(min=1e-6), 0.0)
        self.register_buffer("unit", unit_OG, persistent=False)
        if values is None:
            _fit_to_sums(self.lora_A, in_features // groups)
        self.width = in_features // grid.sub_minimums.shape[1]  # of a sub-group

    def factors(self) -> None:
        """See Lora: it has none."""

    def change(self) -> Tensor:
        """dm [out, groups], float64."""
        return (self.lora_B.double() @ self.lora_A.double()) * self.config.scaling * self.unit.double()

    def delta(self, rows: slice = ALL_ROWS, base: Frozen | None = None) -> Tensor:
        """See Lora."""
        n_OGS = self.integers[rows].double().unflatten(1, (self.unit.shape[1], -1))
        return (n_OGS * self.change()[rows, :, None]).flatten(1).float().repeat_interleave(self.width, dim=1)

    def added(self, x_SI: Tensor, segment: LayerSegment, base: Frozen) -> Tensor:
        """See Lora."""
        tensors = (self.lora_A, self.lora_B, self.integers, self.unit)
        return cast(Tensor, _MinimumFunction.apply(x_SI, *tensors, segment.scaling, segment.dropout, segment.seed))

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Under names of their own: with a LoRA's, programs that know nothing of the integers would misread them."""
        pair = {"A": self.lora_A, "B": self.lora_B}
        return {minimums_name(path, part): tensor.detach() for part, tensor in pair.items()}


class _MinimumFunction(torch.autograd.Function):
    """y = p N^T; gradients for x, A and B. It saves p, A and B: N is made again, p is x by the sub-group.

    Shapes: S tokens, I inputs, O outputs, G groups, K sub-groups.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SI: Tensor, A: Tensor, B: Tensor, n_OK: Tensor, unit_OG: Tensor,
        scaling: float, dropout: float, seed: int,
    ) -> Tensor:  # fmt: skip
        """x [S, I] -> [S, O] in the dtype of x."""
        dropped = drop_by_seed(x_SI, dropout, seed)
        p_SK = dropped.to(torch.promote_types(x_SI.dtype, A.dtype)).unflatten(1, (n_OK.shape[1], -1)).sum(dim=2)
        ctx.save_for_backward(p_SK, A, B, n_OK, unit_OG)
        ctx.given = (scaling, dropout, seed, x_SI.shape, x_SI.dtype)
        return (p_SK @ _minimums(A, B, n_OK, unit_OG, scaling).to(p_SK.dtype).T).to(x_SI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        """g [S, O] -> gradients of x, A and B."""
        p_SK, A, B, n_OK, unit_OG = ctx.saved_tensors
        scaling, dropout, seed, (tokens, width), dtype = ctx.given
        g_SO, gx_SI = grad_SO.to(p_SK.dtype), None
        if ctx.needs_input_grad[0]:
            gp_SK = g_SO @ _minimums(A, B, n_OK, unit_OG, scaling).to(p_SK.dtype)
            gx_SI = gp_SK.to(dtype)[:, :, None].expand(-1, -1, width // p_SK.shape[1]).reshape(tokens, width)
            gx_SI = drop_by_seed(gx_SI, dropout, seed)
        gN_OGK = ((g_SO.T @ p_SK).to(A.dtype) * n_OK).unflatten(1, (unit_OG.shape[1], -1))
        gdm_OG = gN_OGK.sum(dim=2) * (unit_OG * scaling)
        return gx_SI, B.T @ gdm_OG, gdm_OG @ A.T, None, None, None, None, None


def _minimums(A: Tensor, B: Tensor, n_OK: Tensor, unit_OG: Tensor, scaling: float) -> Tensor:
    """N [O, K]: what a sum of inputs is multiplied by."""
    dm_OG = (B @ A) * (unit_OG * scaling)
    return (dm_OG[:, :, None] * n_OK.unflatten(1, (unit_OG.shape[1], -1))).flatten(1)


@torch.no_grad()
def _fit_to_sums(A: Tensor, width: int) -> None:
    """Make a new A as large beside sums of `width` inputs as that of a LoRA is beside the inputs."""
    A.div_(SPREAD * math.sqrt(width))


def blocks(A: Tensor, width: int) -> Tensor | None:
    """The numbers [r, groups] of an A [r, in] that is the same in all `width` columns of a group; None for any other."""
    if A.shape[1] % width:
        return None
    A_RGW = A.unflatten(1, (-1, width))
    return A_RGW[:, :, 0] if bool((A_RGW[:, :, :1] == A_RGW).all()) else None


def make_part(layer: LoraLayer, config: LoraConfig, values: Values | None = None) -> Lora:
    """A LoRA that fits the layer, not on it yet: an exact one where its options say so.

    Args:
        values: A and B as files have them, copied; without them A is random and B zero.
    """
    if not config.exact:
        return layer.make(config, values)
    assert isinstance(layer, LoraLinear)
    place = minimums_at(layer)
    assert place is not None
    if place.subs > 1:
        return MinimumLora(layer.packed, config, values)
    packed = layer.packed
    return BlockLora(packed.shape[1], packed.shape[0], config, packed.device, values, width=place.width)


def check_exact(layers: Mapping[str, LoraLayer]) -> None:
    """Raise UnsupportedError where these wrapped layers have no minimums, naming all of them with their formats."""
    check_linear(layers, "exact", "exact LoRA")
    missing = {path: _format(layer) for path, layer in layers.items() if minimums_at(layer) is None}
    if not missing:
        return
    listed = [f"{path}: {format}" for path, format in missing.items()]
    shown = "\n  ".join(listed[:8] + [f"... ({len(listed)} in all)"] * (len(listed) > 8))
    raise UnsupportedError(
        f"exact: {len(missing)} of {len(layers)} target layers hold no minimums that an exact LoRA could change:\n  {shown}",
        hint=_other_layers(sorted(layers.keys() - missing.keys()), sorted(missing)),
    )


def _other_layers(fitting: list[str], missing: list[str]) -> str:
    """What to do about layers without minimums."""
    formats = f"the formats with minimums are {', '.join(formats_with_minimums())}"
    if not fitting:
        return f"{formats}; leave exact out for an ordinary LoRA"
    left_out = {path.rpartition(".")[2] for path in missing}
    names = sorted({path.rpartition(".")[2] for path in fitting} - left_out)
    chosen = option("target_modules", ",".join(names)) if names else "target_modules with a regular expression of paths"
    mixed = left_out & {path.rpartition(".")[2] for path in fitting}
    among = (
        f" (of {', '.join(sorted(mixed))} some do: a regular expression of whole paths chooses them)" if mixed else ""
    )
    return f"{formats}; {chosen} leaves out the layers that have none{among}"


def _format(layer: nn.Module) -> str:
    base = layer.base if isinstance(layer, LoraLayer) else layer
    if not isinstance(base, QuantizedLinear):
        return "not packed"
    format = base.packed_weight.format
    return format if base.input_order is None else f"{format}, with its columns in another order than its inputs"
