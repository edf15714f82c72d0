"""NaN and infinity: said where they come out, with where they come from: the base's file, the adapter, or the computation.

No file is searched for them when it is loaded: that would read all of it. They reach every logit, so whoever looks at logits
or a loss looks for them there. One thing keeps them back: PyTorch's attention on a CPU says 0 where all scores of a query
are NaN and there are fewer of them than a vector has lanes. So behind a short prompt more tokens are asked about.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from qgraft.adapters.base import adapter_names, base_of, find_adapter
from qgraft.adapters.states import non_finite
from qgraft.attention import PREFIX, attention_of
from qgraft.errors import QgraftError, TrainingError
from qgraft.experts import PackedLayer
from qgraft.formats import dequantize
from qgraft.model_parts import computed_dtype, decoder_states, has_decoder, hears, is_encoder_decoder, vision_of

LANES = 16  # of the widest vectors of a CPU, in float32


class BrokenLogitsError(QgraftError):
    """Logits from which no token can be taken: NaN, or nothing that is allowed."""


def check_held_out(model: nn.Module, loss: float, otherwise: str = "lower learning_rate") -> None:
    """Raise TrainingError for a held-out loss that is no number, which says where that comes from.

    Args:
        otherwise: what helps where all weights are numbers.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the held-out loss is {loss}",
            hint=where_it_comes_from(model) or f"weights are numbers, so the computation overflows: {otherwise}",
        )


class _Numbers(LogitsProcessor):
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept_back = not self.begun and input_ids.shape[1] < LANES and _keeps_back_nan(self.model, input_ids)
        self.begun = True
        if kept_back or bool(scores.isnan().any()):
            raise BrokenLogitsError("the model's logits are NaN, so no answer can be written",
                                    hint=where_it_comes_from(self.model))  # fmt: skip
        return scores


def of_numbers(model: nn.Module) -> LogitsProcessorList:
    """What generate() takes as logits_processor to raise BrokenLogitsError for NaN, of which it would write the token 0."""
    return LogitsProcessorList([_Numbers(model)])


@torch.no_grad()
def _keeps_back_nan(model: Any, prompt_BT: Tensor) -> bool:
    """Whether as many tokens as a vector has lanes have states with NaN, fewer might not: a prompt, its end repeated."""
    if prompt_BT.device.type != "cpu" or attention_of(model) not in ("sdpa", PREFIX) or not has_decoder(model):
        return False
    last_BR = prompt_BT[:, -1:].expand(-1, LANES)
    ids_BT = last_BR if vision_of(model) else torch.cat([prompt_BT, last_BR], 1)  # an image's ids are none without it
    given: dict[str, Any] = {"input_ids": ids_BT}
    if is_encoder_decoder(model.config):
        given["decoder_input_ids"] = ids_BT
    if hears(model.config):  # 30 seconds are positions enough for the encoder
        silence = torch.zeros(*ids_BT.shape, model.config.d_model, dtype=computed_dtype(model))
        given = {"decoder_input_ids": ids_BT, "encoder_outputs": (silence,)}
    return bool(decoder_states(model, **given).isnan().any())


def where_it_comes_from(model: nn.Module) -> str | None:
    """What of the model holds NaN or infinity, in a sentence; None where all of it are numbers."""
    for name in adapter_names(model):
        if broken := non_finite(find_adapter(model, name).state_dict()):
            return f"the adapter {name!r} holds NaN or infinity, in {broken[0]}: load it again, or start anew"
    if path := _broken_weight(model):
        info = base_of(model).info
        return (
            f"the base holds NaN or infinity, in {path}: {info.source if info else 'its file'} is broken, not the rows"
        )
    return None


@torch.no_grad()
def _broken_weight(model: nn.Module) -> str | None:
    """The path of a weight of the base that is not finite. Unpacks one layer after the other."""
    for path, module in model.named_modules():
        weights = [(name, weight.detach()) for name, weight in module.named_parameters(recurse=False)]
        if isinstance(module, PackedLayer):
            weights.append(("weight", dequantize(module.packed_weight.get(), torch.float32)))
        for name, weight in weights:
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                return f"{path}.{name}"
    return None
