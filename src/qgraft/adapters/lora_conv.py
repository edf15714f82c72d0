"""A LoRA on a convolution of 1x1: the same matrix for the channels of every pixel, and so is what is added.

    y[b, :, h, w] = W x[b, :, h, w] + s · B A x[b, :, h, w] + bias        A [r, in], B [out, r]

In files A is [r, in, 1, 1] and B [out, r, 1, 1], as of PEFT's Conv2d and kohya's. So are proj_in and proj_out of Stable
Diffusion 1's attention. Convolutions that see neighbours have no LoRA here: their A is a convolution, and no matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qgraft.adapters.lora import Lora, LoraLayer
from qgraft.adapters.lora_function import LayerSegment, drop_by_seed
from qgraft.adapters.selection import Selection
from qgraft.kernels.autocast import to_autocast


class ConvLora(Lora):
    """A LoRA whose A and B have two dimensions more in files."""

    about = "a LoRA on a convolution"

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part."""
        return {name: tensor[..., None, None] for name, tensor in super().tensors(path).items()}


class LoraConv(LoraLayer):
    """A 1x1 convolution with adapters on it; x [B, in, H, W] or [in, H, W] -> the same with out."""

    base: nn.Conv2d
    part = ConvLora

    def __init__(self, base: nn.Conv2d, selection: Selection | None = None) -> None:
        super().__init__(base, (base.in_channels, base.out_channels), selection)

    def tokens_of(self, x: Tensor) -> int:
        """How many pixels x [B, in, H, W] has."""
        return x.numel() // self.in_features

    def with_segments(self, x: Tensor, served: Sequence[tuple[Lora, LayerSegment]]) -> Tensor:
        """x [B, in, H, W] -> [B, out, H, W] with each of these adapters on its own pixels, counted image by image."""
        y = self.base(x)
        for lora, segment in served:
            x_SI = _pixels(x)[segment.start : segment.stop]
            added_SO = _added(drop_by_seed(x_SI, segment.dropout, segment.seed), lora, segment.scaling).to(y.dtype)
            whole_NO = added_SO.new_zeros(self.tokens_of(x), self.out_features)
            rows = torch.arange(segment.start, segment.stop, device=y.device)
            whole_NO = added_SO if len(added_SO) == len(whole_NO) else whole_NO.index_add(0, rows, added_SO)
            y = y + _image(whole_NO, y)
        return y

    def _add_to_rows(self, y: Tensor, x: Tensor, index: Tensor, lora: Lora) -> Tensor:
        own = x.index_select(0, index)
        dropped = drop_by_seed(_pixels(own), *self._dropout(lora))
        added = _added(dropped, lora, lora.config.scaling).to(y.dtype)
        return y.index_add(0, index, _image(added, y[: len(index)]))

    @property
    def weight(self) -> Tensor:
        """[out, in, 1, 1], the base's, without what the adapters add."""
        return self.base.weight

    def _device(self) -> torch.device:
        return self.base.weight.device


def _pixels(x: Tensor) -> Tensor:
    """x [B, in, H, W] or [in, H, W] -> [pixels, in]."""
    return to_autocast(x).movedim(-3, -1).reshape(-1, x.shape[-3])


def _image(pixels_NO: Tensor, like: Tensor) -> Tensor:
    """[pixels, out] -> as `like` is, [B, out, H, W] or [out, H, W]."""
    return pixels_NO.view(like.movedim(-3, -1).shape).movedim(-1, -3)


def _added(x_SI: Tensor, lora: Lora, scaling: float) -> Tensor:
    """What the adapter adds for these pixels, [pixels, out]."""
    wide = x_SI.to(torch.promote_types(x_SI.dtype, lora.lora_A.dtype))
    return (wide @ lora.lora_A.T.to(wide.dtype)) @ lora.lora_B.T.to(wide.dtype) * scaling


def is_pointwise(module: nn.Module) -> bool:
    """Whether this is a convolution of 1x1 that sees one pixel at a time and all of its channels, with adapters or not."""
    if type(module) is not nn.Conv2d:
        return isinstance(module, LoraConv)
    alone = module.padding in ((0, 0), "valid", "same") and module.stride == (1, 1) and module.groups == 1
    return alone and module.kernel_size == (1, 1)
