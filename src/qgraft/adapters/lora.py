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

The whole layer is one autograd function. It saves x, A and B and nothing else: x A^T is computed again in the backward
pass (2·r·in operations a token, a few thousandths of the layer), the dropout mask is drawn again from its seed, the
base has no weight gradient, and the input gradient is skipped where nothing below needs it. Written with ordinary
modules, the same layer keeps x A^T, the masked x and an output-sized temporary. Where x itself is cheap to compute from
what is kept anyway (`recomputable`), not even x is saved.

Adapter weights are float32 whatever the base computes in: Adam in half precision loses small updates.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout as drop_inputs

from qgraft.adapters.selection import Rows, Selection
from qgraft.errors import AdapterError, OptionError
from qgraft.formats import PackedTensor
from qgraft.kernels import few_shapes
from qgraft.linear import LinearLike, QuantizedLinear, grad_input, product_dtype, to_autocast


@dataclass(frozen=True)
class LoraConfig:
    """The options of one LoRA, with PEFT's names.

    Attributes:
        r: rank of the delta.
        lora_alpha: the delta is scaled by lora_alpha / r.
        lora_dropout: share of the inputs of A that is zeroed in training.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        target_modules: "all-linear", a regular expression, or names of linear layers.
        layers_to_transform: numbers of the decoder's layers that have it; None for all.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise OptionError(f"r={self.r}: the rank of a LoRA must be at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise OptionError(f"lora_dropout={self.lora_dropout}: expected a number from 0 up to, not including, 1")

    @property
    def scaling(self) -> float:
        """What the product B·A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor is computed again: `make(*tensors)`, cheaply, bit for bit what it was."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def recomputable(x: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Let a LoraLinear that is given x save `tensors` instead, and compute x = make(*tensors) again when it needs it."""
    x.qgraft_recipe = Recipe(make, tensors)  # type: ignore[attr-defined]
    return x


class Lora(nn.Module):
    """One adapter's part in one layer: A [r, in], B [out, r] in float32, and their scaling.

    Args:
        values: A and B to start from, copied; without them A is random and B zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: LoraConfig,
        device: torch.device,
        values: tuple[Tensor, Tensor] | None = None,
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

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: scaling · B·A, [out, in]."""
        return (self.lora_B @ self.lora_A) * self.config.scaling


class LoraLinear(nn.Module):
    """A linear layer with any number of named adapters on it, some of them active.

    Itself a LinearLike: the questions about the weight go to the wrapped layer. With no active adapter the output is
    the base's, bit for bit.

    Args:
        selection: that of the model, which says what is active; a layer on its own has its own.
    """

    def __init__(self, base: QuantizedLinear | nn.Linear, selection: Selection | None = None) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.loras = nn.ModuleDict()
        self.selection = selection or Selection()
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters of the model, name -> weight."""
        return self.selection.weights

    @active.setter
    def active(self, weights: dict[str, float]) -> None:
        self.selection.weights = weights

    def add(self, name: str, config: LoraConfig, values: tuple[Tensor, Tensor] | None = None) -> None:
        """Put a new adapter `name` on the layer, inactive; see Lora for `values`."""
        lora = Lora(self.in_features, self.out_features, config, self._device(), values)
        self.loras[name] = lora
        self.selection.add(name, lora)

    def remove(self, name: str) -> None:
        """Take the adapter `name` off the layer, if it is on it."""
        if name in self.loras:
            self.selection.forget(name, self.loras.pop(name))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.selection.serve is not None:
            return self.selection.serve(self, x)
        if self.selection.rows is not None:
            return self._row_by_row(x, self.selection.rows)
        return self._with(x, self.active.items())

    def _with(self, x: Tensor, adapters: Iterable[tuple[str, float]]) -> Tensor:
        active = [(cast(Lora, self.loras[name]), weight) for name, weight in adapters if name in self.loras]
        if not active:
            return self.base(x)
        A, B, scaling, dropout = _combined(active)
        if not self.training:
            dropout = 0.0
        # A seed instead of a mask: drawn from torch's generator, so a resumed run draws the same ones.
        seed = int(torch.randint(2**62, ()).item()) if dropout else 0
        recipe: Recipe | None = getattr(x, "qgraft_recipe", None)
        make, sources = (None, ()) if recipe is None else (recipe.make, recipe.tensors)
        return LoraFunction.apply(to_autocast(x), A, B, self.base, scaling, dropout, seed, make, *sources)

    def _row_by_row(self, x: Tensor, rows: Rows) -> Tensor:
        """The base for the whole batch at once, then each adapter for all of its rows at once."""
        if rows.uniform:
            return self._with(x, [(name, 1.0) for name, _ in rows.groups])
        rows.check(x)
        x = to_autocast(x)
        y = self.base(x)
        for name, index in rows.groups:
            if name in self.loras:
                lora = cast(Lora, self.loras[name])
                dropped = drop_inputs(x.index_select(0, index), lora.config.lora_dropout, self.training)
                h = dropped @ lora.lora_A.to(x.dtype).T
                add = y.index_add if y.requires_grad else y.index_add_  # autograd forbids it in place
                y = add(0, index, h @ lora.lora_B.to(x.dtype).T, alpha=lora.config.scaling)
        return y

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
        tensor = self.base.weight if isinstance(self.base, nn.Linear) else self.base.packed.data
        return tensor.device


def _combined(active: list[tuple[Lora, float]]) -> tuple[Tensor, Tensor, float, float]:
    """(A, B, scaling, dropout) of the active adapters as one: stacked A, and B with each adapter's factor in it.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] · [A_1; A_2; ...]
    """
    if len(active) == 1:
        (lora, weight) = active[0]
        return lora.lora_A, lora.lora_B, lora.config.scaling * weight, lora.config.lora_dropout
    A = torch.cat([lora.lora_A for lora, _ in active])
    B = torch.cat([lora.lora_B * (lora.config.scaling * weight) for lora, weight in active], dim=1)
    return A, B, 1.0, max(lora.config.lora_dropout for lora, _ in active)


class LoraFunction(torch.autograd.Function):
    """y = base(x) + scaling · (drop(x) A^T) B^T, saving only x, A and B. Gradients for x, A and B.

    With h = drop(x) A^T and g = dL/dy:

        dB = scaling · g^T h      gh = scaling · g B      dA = gh^T drop(x)      dx = g W + drop'(gh A)

    The narrow products are written with the rank as rows (h^T = A x^T), which BLAS does up to three times as fast.
    Where the base computes in bfloat16 (`QuantizedLinear.compute`), the products do, but the delta is added in float32:
    it is mostly smaller than half a step of a bfloat16 y, to which adding it would change nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        base: nn.Module,
        scaling: float,
        dropout: float,
        seed: int,
        make: Callable[..., Tensor] | None = None,
        *sources: Tensor,
    ) -> Tensor:
        """x [..., in], A [r, in], B [out, r] -> y [..., out] in the dtype of x; x = make(*sources), where given."""
        ctx.base, ctx.scaling, ctx.dropout, ctx.seed, ctx.make = base, scaling, dropout, seed, make
        dtype = ctx.dtype = product_dtype(base, x)
        rows = x.numel() // x.shape[-1]
        x_NI = few_shapes(x.reshape(rows, x.shape[-1]).to(dtype))
        ctx.save_for_backward(A, B, *(sources if make else (x_NI,)))
        y_NO = base(x_NI)[:rows].to(x.dtype)
        h_RN = (A.to(dtype) @ drop_by_seed(x_NI, dropout, seed).T)[:, :rows]
        y_NO.addmm_(h_RN.to(x.dtype).T, B.to(x.dtype).T, alpha=scaling)
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable  # a second derivative is refused: it would have to keep what this function does not save
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [..., out] -> gradients of x, A and B."""
        A, B, *sources = ctx.saved_tensors
        x = ctx.make(*sources) if ctx.make else sources[0]
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        rows = grad.numel() // grad.shape[-1]
        x_NI, g_NO = (few_shapes(t.reshape(-1, t.shape[-1]).to(ctx.dtype)) for t in (x, grad))
        dropped_NI = drop_by_seed(x_NI, ctx.dropout, ctx.seed)
        gh_RN = (B.to(ctx.dtype).T @ g_NO.T).mul_(ctx.scaling)
        grad_A = (gh_RN @ dropped_NI).to(A.dtype) if needs_A else None
        grad_B = None
        if needs_B:
            h_RN = A.to(ctx.dtype) @ dropped_NI.T
            grad_B = (h_RN @ g_NO).to(B.dtype).mul_(ctx.scaling).T
        grad_x = None
        if needs_x:
            gx_NI = grad_input(ctx.base, g_NO)[:rows].to(grad.dtype)
            if ctx.dropout:
                gx_NI += drop_by_seed((gh_RN.T @ A.to(ctx.dtype)).to(grad.dtype), ctx.dropout, ctx.seed)[:rows]
            else:
                gx_NI.addmm_(gh_RN[:, :rows].to(grad.dtype).T, A.to(grad.dtype))
            grad_x = gx_NI.view(*grad.shape[:-1], gx_NI.shape[-1])
        return grad_x, grad_A, grad_B, None, None, None, None, None, *(None for _ in sources)


def drop_by_seed(x_NI: Tensor, dropout: float, seed: int) -> Tensor:
    """Inverted dropout with the mask that `seed` stands for; x itself when dropout is 0."""
    if not dropout:
        return x_NI
    generator = torch.Generator(x_NI.device).manual_seed(seed)
    keep_NI = torch.empty_like(x_NI).bernoulli_(1.0 - dropout, generator=generator)
    return x_NI * keep_NI.div_(1.0 - dropout)
