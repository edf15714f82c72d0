"""A LoRA on one projection of all experts of a layer: PEFT's `target_parameters` on a mixture of experts.

    y = x W_e^T + s · (x A_e^T) B_e^T      for each row x and its expert e        A [E, r, in], B [E, out, r]

Gate and up are one projection with one A, as they are one parameter in transformers. Names, shapes in files, first values and
scaling are PEFT's: it keeps the module of the experts in a wrapper for each parameter, one in the other in the order in which
the module has them, and A and B of all experts in two matrices:

    <experts>.base_layer.lora_A.weight    of gate_up_proj, where down_proj has a LoRA, too     [E·r, in], by experts
    <experts>.lora_B.weight               of the only or the last parameter                    [out, r·E], by ranks

The router has no LoRA: its weight is no linear layer, and no parameter of the experts. Neither is there dropout, as in PEFT.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qgraft.adapters.adapter import Part
from qgraft.adapters.holder import modules_outside_adapters
from qgraft.adapters.lora import Lora, LoraConfig, LoraLayer, Values
from qgraft.adapters.lora_function import LayerSegment
from qgraft.adapters.peft_names import tensor_name
from qgraft.adapters.selection import BatchRows, Selection
from qgraft.adapters.targets import is_named
from qgraft.errors import OptionError, UnsupportedError, near_match, option
from qgraft.experts import QuantizedExperts, Routed, Segment, holds_experts

WRAPPED = ".base_layer"  # what PEFT calls the inside of a wrapper
PARAMETERS = ("gate_up_proj", "down_proj")  # in the order that transformers' modules have them in


class ExpertLora(Lora):
    """A [E, r, in] and B [E, out, r] in float32.

    Attributes:
        depth: how many of PEFT's wrappers are around its own.

    Args:
        values: A and B of these shapes.
    """

    depth = 0

    def __init__(self, layer: "LoraExperts", config: LoraConfig, values: Values | None = None) -> None:
        Part.__init__(self)
        experts, device = layer.base.num_experts, layer.base.device
        self.lora_A = nn.Parameter(torch.empty(experts, config.r, layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(experts, layer.out_features, config.r, device=device))
        self.config = config
        if values is None:
            nn.init.kaiming_uniform_(self.lora_A.view(-1, layer.in_features), a=math.sqrt(5))
        else:
            self.lora_A.data.copy_(values[0])
            self.lora_B.data.copy_(values[1])

    def factors(self) -> None:
        """See Lora: it is no product of two matrices, but of two for each expert."""

    def delta_of(self, expert: int, rows: slice = slice(None)) -> Tensor:
        """What the adapter adds to these rows of an expert's weight, [out, in]."""
        return (self.lora_B[expert, rows] @ self.lora_A[expert]) * self.config.scaling

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part. B is a copy; `taken` puts it back."""
        return peft_tensors(path, self.depth, self.lora_A.detach(), self.lora_B.detach())

    def taken(self, path: str, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See Part."""
        A, B = (state[name] for name in self.tensors(path))
        own = (self.lora_A.data, self.lora_B.data)
        return list(zip(own, by_experts(A, B, len(self.lora_A)), strict=True))


class LoraExperts(LoraLayer):
    """A projection of all experts with adapters on it; Routed rows -> [rows, out]."""

    base: QuantizedExperts
    part = ExpertLora
    stands_in: Callable[["LoraExperts", Routed], Tensor] | None = None  # what computes instead, while a merge is made

    def __init__(self, base: QuantizedExperts, selection: Selection | None = None) -> None:
        super().__init__(base, (base.in_features, base.out_features), selection)

    def make(self, config: LoraConfig, values: Values | None = None) -> ExpertLora:
        """See LoraLayer. Raises UnsupportedError for dropout."""
        if config.lora_dropout:
            raise UnsupportedError(
                f"lora_dropout={config.lora_dropout}: a LoRA on experts has none, in PEFT neither",
                hint=f"{option('lora_dropout', 0)}, or leave target_parameters out",
            )
        return ExpertLora(self, config, values)

    def forward(self, x: Any) -> Tensor:
        """Routed rows -> [rows, out]: what the base makes of them, with what the active adapters add."""
        return self.forward_alone(x) if self.stands_in is None else self.stands_in(self, x)

    def forward_alone(self, x: Any) -> Tensor:
        """See LoraLayer.forward."""
        return super().forward(x)

    def tokens_of(self, x: Any) -> int:
        """How many tokens the routed rows are of."""
        return cast(Routed, x).rows.total

    def with_segments(self, x: Any, served: Sequence[tuple[Lora, LayerSegment]]) -> Tensor:
        """[rows, out] with each of these adapters on the rows of its own tokens."""
        segments = [Segment(segment.start, segment.stop, segment.scaling) for _, segment in served]
        return self.base.with_loras(
            x, segments, [weight for lora, _ in served for weight in (lora.lora_A, lora.lora_B)]
        )

    def _row_by_row(self, x: Any, rows: BatchRows | None) -> Tensor:
        assert rows is not None
        routed = cast(Routed, x)
        if routed.rows.total % rows.batch:
            raise UnsupportedError(f"adapter_names: experts got {routed.rows.total} tokens of {rows.batch} rows")
        width = routed.rows.total // rows.batch
        served = [
            (lora, LayerSegment(row * width, (row + 1) * width, lora.config.scaling, 0.0, 0))
            for name, index in rows.groups
            if (lora := self.named(name)) is not None
            for row in index.tolist()
        ]
        return self.with_segments(routed, served)

    def _device(self) -> torch.device:
        return self.base.device


def peft_tensors(path: str, depth: int, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """PEFT's matrices, by their names, of A [E, r, in] and B [E, out, r] on the parameter `path` within `depth` wrappers."""
    stem = path.rpartition(".")[0] + WRAPPED * depth
    return {tensor_name(stem, "A"): A.flatten(0, 1), tensor_name(stem, "B"): B.permute(1, 2, 0).flatten(1)}


def depth_of(path: str, paths: Container[str]) -> int:
    """In how many of PEFT's wrappers the one of the parameter `path` lies, where an adapter is on all of `paths`."""
    stem, _, leaf = path.rpartition(".")
    return sum(f"{stem}.{other}" in paths for other in PARAMETERS[PARAMETERS.index(leaf) + 1 :])


def by_experts(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r] of PEFT's matrices [E·r, in] and [out, r·E]."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def expert_layers(model: nn.Module) -> dict[str, QuantizedExperts | LoraExperts]:
    """The packed projections of experts by their paths, wrapped ones under the path of their wrapper."""
    kinds = (QuantizedExperts, LoraExperts)
    return {path: module for path, module in modules_outside_adapters(model) if isinstance(module, kinds)}


def stack_paths(model: nn.Module) -> list[str]:
    """The paths of the stacks of experts, in the model without adapters."""
    layers = {
        path: layer.base if isinstance(layer, LoraExperts) else layer for path, layer in expert_layers(model).items()
    }
    return [f"{path}.{part}" for path, layer in layers.items() for part in layer.stacks()]


def find_parameters(model: nn.Module, target_parameters: Sequence[str]) -> list[str]:
    """The paths of the projections of experts that PEFT's `target_parameters` names: parameters, or the ends of their names.

    Raises OptionError for a name that is none of them.
    """
    if isinstance(target_parameters, str):
        target_parameters = target_parameters.split(",")
    names = [name.strip() for name in target_parameters if name.strip()]
    paths = list(expert_layers(model))
    missing = [name for name in names if not any(is_named(path, name) for path in paths)]
    if missing or not names:
        leaves = sorted({".".join(path.split(".")[-3:]) for path in paths})
        floats = any(holds_experts(module) for module in model.modules())
        there = ", ".join(leaves) or ("none: its experts are held as floats" if floats else "none: it has no experts")
        raise OptionError(
            f"target_parameters: no packed weights of experts are named {', '.join(missing) or '(nothing)'}; the model "
            f"has: {there}",
            hint=near_match(missing[0], leaves) if missing else None,
        )
    return [path for path in paths if any(is_named(path, name) for name in names)]


def nest(parts: Mapping[str, Part]) -> None:
    """Tell the parts of one adapter how deep they lie in PEFT's wrappers of the experts' modules."""
    for path, part in parts.items():
        if isinstance(part, ExpertLora):
            part.depth = depth_of(path, parts)


def expert_loras(parts: Mapping[str, Part]) -> Iterator[tuple[str, ExpertLora]]:
    """Those of the parts that are on experts, by their paths."""
    return ((path, part) for path, part in parts.items() if isinstance(part, ExpertLora))
