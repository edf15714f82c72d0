"""DoRA: the length of each row of the weight is trained apart from its direction.

    W' = m · (W + s B A) / n          m [out], n [out]: the lengths of the rows of W + s B A;  m begins as those of W
    y  = (m / n) ⊙ (W x + s B A x) + b

Source: Liu et al. 2024 (arXiv:2402.09353). Names, initial values and gradients are PEFT's (`use_dora`): n is a constant for
the gradient (section 4.3 of the paper), and inputs that dropout zeroes are zero for W, too, in what is added to the base's
own output.

W stays packed. The lengths come without W + s B A, in one product of W with the rows of A as its inputs:

    n² = |W|² + 2 s <W, B A> + s² |B A|²      <W, B A>[o] = sum_r B[o, r] (W A^T)[o, r]      |B A|²[o] = B[o] (A A^T) B[o]^T

|W|² is of the base alone, and kept with its bytes. The sums are float64, the product float32 whatever the layer computes in:
n is off by some 1e-7, unless s B A takes most of a row of W away. Where nothing is learned n is kept for as long as A, B and
the base are what they were, which their values say: a tensor can be written to in ways that torch does not count.

Beside other active adapters it adds W' - W of the base, as they add their deltas: a sum, whatever their order. PEFT's
forward pass scales by m / n also what adapters before it added, and its merges take other lengths of rows again.

A row of zeros has no direction: it stays as it is until B A gives it one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qgraft.adapters.lora import ALL_ROWS, Frozen, Lora, LoraConfig, LoraLayer, LoraLinear, Values, check_linear
from qgraft.adapters.lora_function import LayerSegment, drop_by_seed
from qgraft.adapters.peft_names import magnitude_name
from qgraft.kernels import linear
from qgraft.linear import QuantizedLinear, in_stored_order, rows_of


class DoraLora(Lora):
    """A LoRA with the lengths of the rows, float32 [out].

    Args:
        layer: that it will be on.
        values: A, B and the lengths to start from, copied; without them A is random, B zero, and the lengths are the base's.
    """

    about = "a DoRA"

    def __init__(self, layer: LoraLinear, config: LoraConfig, values: Values | None = None) -> None:
        device = squares_of_rows(layer.base).device
        super().__init__(layer.in_features, layer.out_features, config, device, values and values[:2])
        lengths = squares_of_rows(layer.base).sqrt() if values is None else values[2]
        self.lora_magnitude_vector = nn.Parameter(lengths.to(device, torch.float32, copy=True))
        self._known: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def factors(self) -> None:
        """See Lora: its B A is not all that it adds."""

    def scale(self, base: Frozen) -> Tensor:
        """m / n [out], whose gradient is that of m."""
        lengths = self._lengths(base)
        return torch.where(lengths > 0, self.lora_magnitude_vector / lengths.where(lengths > 0, 1.0), 1.0)

    def output(self, layer: LoraLinear, x: Tensor, segment: LayerSegment) -> Tensor | None:
        """See Lora: with the base's product in one call, where all of it is scaled."""
        whole = (segment.start, segment.stop) == (0, layer.tokens_of(x))
        if not whole or segment.dropout or segment.scaling != self.config.scaling:
            return None
        y, bias = layer.with_products(x, [((self.lora_A, self.lora_B), segment)]), layer.base.bias
        scale = self.scale(layer.base)
        return (y * scale if bias is None else (y - bias) * scale + bias).to(y.dtype)

    def added(self, x_SI: Tensor, segment: LayerSegment, base: Frozen) -> Tensor:
        """See Lora; beside others, in part, or with dropout."""
        dropped = drop_by_seed(x_SI, segment.dropout, segment.seed)
        product = base(dropped) if base.bias is None else base(dropped) - base.bias
        wide = dropped.to(torch.promote_types(dropped.dtype, self.lora_A.dtype))
        low = (wide @ self.lora_A.T.to(wide.dtype)) @ self.lora_B.T.to(wide.dtype) * self.config.scaling
        scale = self.scale(base)
        return ((scale - 1) * product + scale * low) * (segment.scaling / self.config.scaling)

    @torch.no_grad()
    def delta(self, rows: slice = ALL_ROWS, base: Frozen | None = None) -> Tensor:
        """See Lora: W' - W."""
        assert base is not None
        scale = self.scale(base)[rows, None]
        return rows_of(base, rows) * (scale - 1) + super().delta(rows) * scale

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part."""
        return super().tensors(path) | {magnitude_name(path): self.lora_magnitude_vector.detach()}

    def _lengths(self, base: Frozen) -> Tensor:
        """n [out] float32."""
        A, B, squares = self.lora_A.detach(), self.lora_B.detach(), squares_of_rows(base)
        if torch.is_grad_enabled() or A.device.type != "cpu":  # comparing would wait for a GPU
            return _lengths(base, squares, A, B, self.config.scaling)
        known = self._known
        if known is None or known[0] is not squares or not torch.equal(known[1], A) or not torch.equal(known[2], B):
            known = (squares, A.clone(), B.clone(), _lengths(base, squares, A, B, self.config.scaling))
            self._known = known
        return known[3]


@torch.no_grad()
def squares_of_rows(layer: Frozen) -> Tensor:
    """|W|² of each row of a QuantizedLinear or nn.Linear, [out] float64; of packed bytes always the same tensor."""
    if isinstance(layer, QuantizedLinear):
        return layer.packed_weight.squares()
    return layer.weight.float().square().sum(1).double()


@torch.no_grad()
def _lengths(base: Frozen, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    if isinstance(base, QuantizedLinear):
        cross_RO = linear(in_stored_order(base, A.float()), base.packed)
    else:
        cross_RO = A.float() @ base.weight.float().T
    B_OR, gram_RR = B.double(), A.double() @ A.double().T
    squared = squares + (2 * scaling) * (B_OR * cross_RO.T).sum(1) + scaling**2 * ((B_OR @ gram_RR) * B_OR).sum(1)
    return squared.clamp_(min=0).sqrt_().float()


def check_dora(layers: Mapping[str, LoraLayer]) -> None:
    """Raise UnsupportedError where one of these wrapped layers is no linear layer."""
    check_linear(layers, "use_dora", "DoRA here", ", or merge it into its float base with PEFT (merge_and_unload)")
