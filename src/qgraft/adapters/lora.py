"""LoRA: a frozen linear layer plus a trained low-rank delta.

                     x [.., in]
                    /          \\
        W x^T (frozen, packed)   A [r, in]   kaiming-uniform
                   |             |
                   |             B [out, r]  zeros, so training starts from the unchanged model
                    \\          /
          y = x W^T + s · (x A^T) B^T          s = lora_alpha / r,  or lora_alpha / sqrt(r) when rank-stabilized

Sources: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 for rank stabilization (arXiv:2312.03732). Names, initial
values and scaling are those of PEFT, so that its files and ours are the same.

The whole layer is one autograd function (lora_function.py).

Adapter weights are float32 whatever the base computes in: Adam in half precision loses small updates.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop_inputs

from qgraft.adapters.adapter import Part
from qgraft.adapters.holder import Holder, set_module
from qgraft.adapters.lora_function import LayerSegment, LoraFunction
from qgraft.adapters.peft_names import tensor_name
from qgraft.adapters.recompute import recompute_of
from qgraft.adapters.selection import BatchRows, Selection
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.formats import PackedTensor
from qgraft.kernels.autocast import to_autocast
from qgraft.linear import LinearLike, QuantizedLinear, nothing
from qgraft.ranges import COUNT, FINITE, SHARE, check_ranges

Values = tuple[Tensor, ...]  # of a part as a file has them: A, B and, of DoRA, the magnitudes
Frozen = QuantizedLinear | nn.Linear  # a layer of the base
ALL_ROWS: Final = slice(None)
_PISSA = re.compile(r"pissa(_niter_[1-9][0-9]{0,3})?")


@dataclass(frozen=True)
class LoraConfig:
    """The options of one LoRA, with PEFT's names.

    Attributes:
        r: rank of the delta.
        lora_alpha, use_rslora: the delta is scaled by lora_alpha / r, or by lora_alpha / sqrt(r).
        lora_dropout: share of the inputs of A that is zeroed in training.
        target_modules: "all-linear", a regular expression, or names of linear layers; target_parameters: of experts.
        layers_to_transform: numbers of the decoder's layers that have it; None for all.
        exact: change the base's minimums only, so that a merge loses nothing but their rounding (exact.py).
        use_dora: train the length of each row of the weight apart from its direction (dora.py).
        init_lora_weights: True (A random, B zero), "pissa" or "pissa_niter_N": begin with the principal components of the
            base's weight (pissa.py).
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    layers_to_transform: tuple[int, ...] | None = None
    exact: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(
            {"r": (self.r, COUNT), "lora_alpha": (self.lora_alpha, FINITE), "lora_dropout": (self.lora_dropout, SHARE)}
        )
        if wrong := impossible_methods(self):
            raise OptionError("; ".join(wrong))

    @property
    def scaling(self) -> float:
        """What the product B·A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Method(Protocol):
    """The options that make a LoRA another one than the plain one."""

    @property
    def lora_alpha(self) -> float: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def exact(self) -> bool: ...
    @property
    def use_dora(self) -> bool: ...
    @property
    def init_lora_weights(self) -> bool | str: ...


def impossible_methods(options: Method) -> list[str]:
    """A line for a start that is none, and for each combination that has no meaning."""
    init, dora, pissa = options.init_lora_weights, options.use_dora, starts_from_base(options.init_lora_weights)
    start = f"init_lora_weights={init}"
    known = pissa or init is True or init == "true"
    wrong = {
        f"init_lora_weights={init!r}: expected true, pissa, or pissa_niter_16 with any number from 1 on": not known,
        "exact and use_dora: an exact LoRA changes minimums alone, DoRA the whole weight": options.exact and dora,
        f"exact and {start}: no principal component is the same within groups of columns": options.exact and pissa,
        f"use_dora and {start}: what is begun with is taken from an ordinary LoRA": dora and pissa,
        f"lora_alpha of 0 or less and {start}: its components are divided by it": pissa and options.lora_alpha <= 0,
        f"lora_dropout and {start}: it would drop principal components of the base": pissa and options.lora_dropout > 0,
        "use_dora and lora_alpha=0: nothing that A and B learn would count": dora and not options.lora_alpha,
    }
    return [line for line, holds in wrong.items() if holds]


def starts_from_base(init_lora_weights: bool | str) -> bool:
    """Whether a LoRA begins with the principal components of the base's weight."""
    return isinstance(init_lora_weights, str) and _PISSA.fullmatch(init_lora_weights) is not None


class Lora(Part):
    """One adapter's part in one layer: A [r, in], B [out, r] in float32, and their scaling.

    Args:
        values: A and B to start from, copied; without them A is random and B zero.
    """

    kind = "lora"
    of_embedding = False  # whether A meets the rows of a table that are looked up, and not an input
    about: ClassVar[str] = "a LoRA"  # what it is, where `factors` gives None
    config: LoraConfig

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: LoraConfig,
        device: torch.device,
        values: Values | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, dtype=torch.float32, device=device))
        self.config = config
        if values is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            self.lora_A.data.copy_(values[0])
            self.lora_B.data.copy_(values[1])

    @property
    def stored_config(self) -> LoraConfig:
        """The options of the LoRA that its `tensors` are in a file."""
        return self.config

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] for the kernels; None for a part that is no product of two, which `added` computes."""
        return self.lora_A, self.lora_B

    def added(self, x_SI: Tensor, segment: LayerSegment, base: Frozen) -> Tensor:
        """What a part without factors adds for these inputs to the layer `base`, [tokens, out] in the dtype of x."""
        raise NotImplementedError

    def output(self, layer: "LoraLinear", x: Tensor, segment: LayerSegment) -> Tensor | None:
        """The layer's whole output where no other part is active; None where the base's is made first, as of most kinds."""
        return None

    def delta(self, rows: slice = ALL_ROWS, base: Frozen | None = None) -> Tensor:
        """What the adapter adds to these rows of the weight, [out, in]: scaling · B·A, or what it makes of that of `base`."""
        return (self.lora_B[rows] @ self.lora_A) * self.config.scaling

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part."""
        pair = {"A": self.lora_A, "B": self.lora_B}
        return {tensor_name(path, part, self.of_embedding): tensor.detach() for part, tensor in pair.items()}


class LoraLayer(Holder):
    """A layer of the base with any number of named adapters on it, some of them active.

    With no active adapter the output is the base's, bit for bit. What the adapters see of an input, and where what they
    add goes, is said by the kind: `tokens_of`, `with_segments` and `_add_to_rows`.

    Args:
        base: the wrapped layer, frozen from now on.
        sizes: (in_features, out_features) of the adapters' A and B.
        selection: that of the model, which says what is active; a layer on its own has its own.
    """

    base: nn.Module
    part: type[Lora] = Lora

    def __init__(self, base: nn.Module, sizes: tuple[int, int], selection: Selection | None = None) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = sizes
        self.loras = nn.ModuleDict()
        self.selection = selection or Selection()
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters of the model, name -> weight. Set, they are the default from now on."""
        return dict(self.selection.now().weights)

    @active.setter
    def active(self, weights: dict[str, float]) -> None:
        self.selection.weights = weights

    @property
    def held(self) -> nn.ModuleDict:
        """See Holder."""
        return self.loras

    def make(self, config: LoraConfig, values: Values | None = None) -> Lora:
        """A LoRA that fits the layer, not on it yet; see Lora for `values`."""
        return self.part(self.in_features, self.out_features, config, self._device(), values)

    def add(self, name: str, part: Part) -> None:
        """See Holder."""
        self.loras[name] = part.to(self._device())

    def take_away(self, model: nn.Module, path: str) -> None:
        """See Holder."""
        set_module(model, path, self.base)

    def forward(self, x: Tensor) -> Tensor:
        """What the base makes of x, with what the active adapters add."""
        active = self.selection.now()
        if (serve := self.selection.serve or active.serve) is not None:
            return serve(self, x)
        weights = active.uniform
        return self._row_by_row(x, active.rows) if weights is None else self._with(x, weights)

    def tokens_of(self, x: Tensor) -> int:
        """How many tokens the input x is of."""
        raise NotImplementedError

    def with_segments(self, x: Tensor, served: Sequence[tuple[Lora, LayerSegment]]) -> Tensor:
        """The output for x with each of these adapters on its own tokens."""
        raise NotImplementedError

    def _add_to_rows(self, y: Tensor, x: Tensor, index: Tensor, lora: Lora) -> Tensor:
        """y with what the adapter adds in the rows `index` of the batch."""
        raise NotImplementedError

    def _with(self, x: Tensor, weights: Mapping[str, float]) -> Tensor:
        tokens = self.tokens_of(x)
        active = [(lora, weight) for name, weight in weights.items() if (lora := self.named(name)) is not None]
        # A seed instead of a mask: drawn from torch's generator, so a resumed run draws the same ones.
        served = [
            (lora, LayerSegment(0, tokens, lora.config.scaling * weight, *self._dropout(lora)))
            for lora, weight in active
        ]
        return self.with_segments(x, served)

    def named(self, name: str) -> Lora | None:
        """The layer's LoRA of this name, in one look: another thread may be taking it off."""
        return cast(Lora | None, self.loras._modules.get(name))

    def _dropout(self, lora: Lora) -> tuple[float, int]:
        """(dropout, a seed for its mask)."""
        dropout = lora.config.lora_dropout if self.training else 0.0
        return dropout, int(torch.randint(2**62, ()).item()) if dropout else 0

    def _row_by_row(self, x: Tensor, rows: BatchRows | None) -> Tensor:
        """The base for the whole batch at once, then each adapter for all of its rows at once."""
        assert rows is not None
        y = self.base(x)
        rows.check(y)
        for name, index in rows.groups:
            if (lora := self.named(name)) is not None:
                y = self._add_to_rows(y, x, index, lora)
        return y

    def _device(self) -> torch.device:
        raise NotImplementedError


class LoraLinear(LoraLayer):
    """A linear layer with adapters on it; x [..., in] -> [..., out].

    Itself a LinearLike: the questions about the weight go to the wrapped layer.
    """

    base: Frozen

    def __init__(self, base: Frozen, selection: Selection | None = None) -> None:
        super().__init__(base, (base.in_features, base.out_features), selection)

    def tokens_of(self, x: Tensor) -> int:
        """How many tokens x [..., in] is of."""
        return x.numel() // x.shape[-1]

    def with_segments(self, x: Tensor, served: Sequence[tuple[Lora, LayerSegment]]) -> Tensor:
        """x [..., in] -> [..., out] with each of these adapters on its own tokens."""
        if len(served) == 1 and (output := served[0][0].output(self, x, served[0][1])) is not None:
            return output
        found = [(lora, lora.factors(), segment) for lora, segment in served]
        products = [(pair, segment) for _, pair, segment in found if pair is not None]
        y = self.with_products(x, products) if products else self.base(x)
        for lora, pair, segment in found:
            if pair is None:
                y = self._with_part(y, x, lora, segment)
        return y

    def with_products(self, x: Tensor, products: Sequence[tuple[tuple[Tensor, Tensor], LayerSegment]]) -> Tensor:
        """The same with what these A and B add."""
        again = recompute_of(x)
        weights, segments = [weight for pair, _ in products for weight in pair], [segment for _, segment in products]
        sources = again.tensors if again else ()
        return LoraFunction.apply(to_autocast(x), self.base, segments, again, *weights, *sources)

    def _with_part(self, y: Tensor, x: Tensor, lora: Lora, segment: LayerSegment) -> Tensor:
        """y with what a part without factors adds to the tokens of its segment."""
        x_NI = to_autocast(x).reshape(-1, self.in_features)
        added = lora.added(x_NI[segment.start : segment.stop], segment, self.base).to(y.dtype)
        if len(added) == len(x_NI):
            return y + added.view_as(y)
        rows = torch.arange(segment.start, segment.stop, device=y.device)
        return y.reshape(-1, self.out_features).index_add(0, rows, added).view_as(y)

    def _row_by_row(self, x: Tensor, rows: BatchRows | None) -> Tensor:
        return super()._row_by_row(to_autocast(x), rows)

    def _add_to_rows(self, y: Tensor, x: Tensor, index: Tensor, lora: Lora) -> Tensor:
        own, add = x.index_select(0, index), y.index_add if y.requires_grad else y.index_add_  # which autograd forbids
        if (pair := lora.factors()) is None:
            segment = LayerSegment(0, self.tokens_of(own), lora.config.scaling, *self._dropout(lora))
            added = lora.added(own.reshape(-1, self.in_features), segment, self.base)
            return add(0, index, added.view(*own.shape[:-1], -1).to(y.dtype))
        dropped = drop_inputs(own, lora.config.lora_dropout, self.training)
        h = dropped @ pair[0].to(x.dtype).T
        return add(0, index, h @ pair[1].to(x.dtype).T, alpha=lora.config.scaling)

    @property
    def weight(self) -> Tensor:
        """As that of a QuantizedLinear: the base's values would lack what the adapters add."""
        return nothing(self.out_features, self.in_features, self.base.weight.dtype, self._device())

    @property
    def is_packed(self) -> bool:
        """Whether the base's weight is a packed tensor."""
        return isinstance(self.base, QuantizedLinear)

    @property
    def packed(self) -> PackedTensor:
        """The base's stored bytes."""
        if not isinstance(self.base, QuantizedLinear):
            raise AdapterError(f"{type(self.base).__name__} holds no packed weight")
        return self.base.packed

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The base's weight [out, in], without any adapter."""
        return self.base.weight.to(dtype) if isinstance(self.base, nn.Linear) else self.base.dequantize(dtype)

    def replace(self, packed: PackedTensor) -> None:
        """Put other packed bytes in place of the base's weight."""
        if not isinstance(self.base, LinearLike):
            raise AdapterError(f"{type(self.base).__name__} holds no packed weight to replace")
        self.base.replace(packed)

    def _device(self) -> torch.device:
        return (self.base.weight if isinstance(self.base, nn.Linear) else self.base.packed).device


def check_linear(layers: Mapping[str, LoraLayer], name: str, has: str, otherwise: str = "") -> None:
    """Raise UnsupportedError where one of these wrapped layers is no linear layer: what linear layers alone have.

    Args:
        name: of the option that asks for it; `has`: in words.
        otherwise: what else the hint says.
    """
    if others := [path for path, layer in layers.items() if not isinstance(layer, LoraLinear)]:
        raise UnsupportedError(
            f"{name}: {', '.join(others)}: embeddings, experts and convolutions have no {has}; linear layers have",
            hint=f"leave them out of target_modules and target_parameters{otherwise}",
        )
