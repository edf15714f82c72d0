"""A LoRA that begins with the principal components of the base's weight: PiSSA, for bases that cannot be changed.

    U S V^T = W (dequantized)        B0 = U_r sqrt(S_r / s)  [out, r]        A0 = sqrt(S_r / s) V_r^T  [r, in]
    y = W x + s (B A - B0 A0) x      A, B are trained, and begin as A0, B0

Source: Meng et al. 2024 (arXiv:2404.02948); `init_lora_weights` is PEFT's, "pissa" or "pissa_niter_N" (a faster SVD, by
chance, in N rounds). PEFT takes B0 A0 out of the base and writes what is left into it; a packed base stays as its file has
it, so what the LoRA begins with is subtracted here. The model is the same: W_res + s B A with W_res = W - s B0 A0. PEFT's
files come to this when they are converted (`path_initial_model_for_weight_conversion`): rank 2 r, [A; A0] and [B, -B0].

What is learned is small beside A0 and B0, and a difference of two large products would lose it wherever numbers are
rounded: in a file of half precision, in a pass in bfloat16. So the parameters are the differences, and the LoRA of rank 2 r

    B A - B0 A0  =  dB (A0 + dA) + B0 dA  =  [dB, B0] [A0 + dA; dA]          dA = A - A0,  dB = B - B0

is exactly zero at the beginning. It is an ordinary LoRA in files, for every reader, and for all that computes with it.
Weights decay towards the start (dA, dB), not A and B towards zero as in PEFT. Dropout would drop principal components of
the base; PEFT says to leave it out, and here it is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qgraft.adapters.lora import (
    ALL_ROWS,
    Frozen,
    Lora,
    LoraConfig,
    LoraLayer,
    LoraLinear,
    check_linear,
    starts_from_base,
)
from qgraft.adapters.peft_names import tensor_name
from qgraft.errors import OptionError


class PissaLora(Lora):
    """dA [r, in] and dB [out, r] in float32, with the A0 and B0 that they are the differences from."""

    first_a: Tensor
    first_b: Tensor

    def __init__(self, layer: LoraLinear, config: LoraConfig) -> None:
        weight = layer.dequantize().detach()
        A, B = principal_components(weight, config)
        super().__init__(
            layer.in_features, layer.out_features, config, weight.device, (torch.zeros_like(A), torch.zeros_like(B))
        )
        self.register_buffer("first_a", A, persistent=False)
        self.register_buffer("first_b", B, persistent=False)

    @property
    def stored_config(self) -> LoraConfig:
        """See Lora: of twice the rank, with the same scaling."""
        alpha = self.config.lora_alpha * (2**0.5 if self.config.use_rslora else 2)
        return replace(self.config, r=2 * self.config.r, lora_alpha=alpha, init_lora_weights=True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See Lora: A [2 r, in] and B [out, 2 r]."""
        A = torch.cat([self.first_a + self.lora_A, self.lora_A])
        return A, torch.cat([self.lora_B, self.first_b], dim=1)

    def delta(self, rows: slice = ALL_ROWS, base: Frozen | None = None) -> Tensor:
        """See Lora."""
        A, B = self.factors()
        return (B[rows] @ A) * self.config.scaling

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Those of the LoRA that it is; copies, which `taken` puts back."""
        A, B = self.factors()
        return {tensor_name(path, "A"): A.detach(), tensor_name(path, "B"): B.detach()}

    def taken(self, path: str, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See Part. A0 stays the same to the bit where it is the one that these tensors were made with."""
        (sum_A, A), (B, first_b) = state[tensor_name(path, "A")].chunk(2), state[tensor_name(path, "B")].chunk(2, dim=1)
        A, sum_A = A.to(self.lora_A), sum_A.to(self.lora_A)
        first_a = self.first_a.clone() if torch.equal(self.first_a + A, sum_A) else sum_A - A
        own = (self.lora_A.data, self.lora_B.data, self.first_a, self.first_b)
        return list(zip(own, (A, B, first_a, first_b), strict=True))


@torch.no_grad()
def principal_components(weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """(A0 [r, in], B0 [out, r]) of a float32 weight [out, in], as PEFT computes them."""
    _, _, rounds = str(config.init_lora_weights).partition("_niter_")
    if rounds:
        U, S, V = torch.svd_lowrank(weight, config.r, niter=int(rounds))
        Vh = V.T
    else:
        U, S, Vh = (each for each in torch.linalg.svd(weight, full_matrices=False))
    root = (S[: config.r] / config.scaling).sqrt()
    return root[:, None] * Vh[: config.r], U[:, : config.r] * root


def check_pissa(layers: Mapping[str, tuple[LoraLayer, LoraConfig]]) -> None:
    """Raise for a layer with such a LoRA: UnsupportedError where it is no linear layer, OptionError where its weight has
    fewer components than the rank."""
    starting = {path: each for path, each in layers.items() if starts_from_base(each[1].init_lora_weights)}
    check_linear({path: layer for path, (layer, _) in starting.items()}, "init_lora_weights", "such start")
    small = [
        f"{path}: r={config.r}, the weight is [{layer.out_features}, {layer.in_features}]"
        for path, (layer, config) in starting.items()
        if config.r > min(layer.out_features, layer.in_features)
    ]
    if small:
        raise OptionError("init_lora_weights: more components than a weight has:\n  " + "\n  ".join(small[:8]),
                          hint="a smaller r, or rank_pattern for these layers")  # fmt: skip
