"""NEFTune: uniform noise on the embeddings of what is learned (Jain et al. 2023, arXiv:2310.05914).

    x = table[ids] + alpha / sqrt(L d) · u        u uniform in [-1, 1], L tokens in the sample, d numbers in an embedding

L is that of each sample, as if it passed alone: a packed row is no sample. (Where batches are padded it is that of the
padded row, so there a short sample gets less noise beside a long one.)

The noise of a pass comes from a seed, which is drawn from the generator that dropout is drawn from: a run that goes on
draws the same, and a job among others what it draws alone.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Noisy:
    """Consecutive tokens of a row that get noise.

    Attributes:
        positions: of its tokens, int64 on the CPU; each sample begins with 0.
        alpha: how much; None and 0 for none.
        generator: where the seed is drawn from; None for torch's own.
    """

    positions: Tensor
    alpha: float | None
    generator: torch.Generator | None = None

    def drawn(self, width: int, device: torch.device) -> Tensor:
        """The noise [tokens, width] float32; draws nothing from the generator where there is none."""
        tokens = len(self.positions)
        if not self.alpha:
            return torch.zeros(tokens, width, device=device)
        seed = int(torch.randint(2**62, (), generator=self.generator).item())
        starts = (self.positions == 0).nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([tokens]))
        scale_T = (self.alpha / (lengths * width).double().sqrt()).float().repeat_interleave(lengths)
        noise_TD = torch.empty(tokens, width, device=device)
        noise_TD.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(seed))
        return noise_TD * scale_T.to(device, non_blocking=True)[:, None]


@contextmanager
def noisy_embeddings(model: PreTrainedModel, parts: Sequence[Noisy]) -> Iterator[None]:
    """Within the block the embeddings of a row [1, tokens], these parts one after another, come with noise."""
    if not any(part.alpha for part in parts):
        yield
        return
    tokens = sum(len(part.positions) for part in parts)

    def add(module: Any, given: Any, y: Tensor) -> Tensor:
        if math.prod(y.shape[:-1]) != tokens:
            raise UnsupportedError(
                f"neftune_noise_alpha: {type(model).__name__} embeds {math.prod(y.shape[:-1])} tokens, expected {tokens}",
                hint="this architecture does not embed a row as a whole; train without the noise",
            )
        noise_TD = torch.cat([part.drawn(y.shape[-1], y.device) for part in parts])
        return (y + noise_TD.view(y.shape)).to(y.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
