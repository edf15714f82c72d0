"""How recordings with their texts go through a model that hears: side by side, by the model's own forward pass.

    input_features   [B, mel, frames]  float, what the folder's feature extractor makes of 30 seconds, silence behind a sound
    attention_mask   [B, frames]       only of a model that masks features in training (apply_spec_augment)
    labels           [B, T]            those of pairs (pairs.py), as are weights

The encoder reads the same number of positions of every recording, so that nothing is padded there; the labels are padded
behind their end. That the loss is the model's own is found out on the longest text and the shortest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import Batch
from qgraft.data.sounds import Sound
from qgraft.data.speech_samples import SpeechSample, listen, require_listener
from qgraft.errors import UnsupportedError
from qgraft.model_parts import computed_dtype
from qgraft.passes.broken import of_numbers
from qgraft.passes.pairs import collate_targets, longest_and_shortest, target_losses, tried_together


def features_of(model: PreTrainedModel, sounds: Sequence[Sound]) -> Batch:
    """What the encoder reads of recordings, on the CPU. Raises DataError for one that is not what it was."""
    processor, config = require_listener(model), model.config
    made = processor.feature_extractor
    masked = bool(getattr(config, "apply_spec_augment", False))
    found = made(
        [listen(processor, sound) for sound in sounds], sampling_rate=made.sampling_rate, return_tensors="pt",
        return_attention_mask=masked,
    )  # fmt: skip
    features = {"input_features": found["input_features"].to(computed_dtype(model))}
    return features | ({"attention_mask": found["attention_mask"]} if masked else {})


def collate_speech(model: PreTrainedModel, samples: Sequence[SpeechSample]) -> Batch:
    """One batch of these samples, on the CPU, in their order."""
    return {**features_of(model, [sample.images[0] for sample in samples]), **collate_targets(samples)}


def speech_losses(
    model: PreTrainedModel, samples: Sequence[SpeechSample], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(The sum of weight times cross-entropy over the labels of a pass, differentiable; that of each label, unweighted).

    float32 scalar and [labels], sample after sample.
    """
    return target_losses(model, collate_speech(model, samples), label_smoothing)


@torch.inference_mode()
def generate_spoken(model: PreTrainedModel, sounds: Sequence[Sound], **told: Any) -> list[list[int]]:
    """What generate() writes of each recording. Raises UnsupportedError where it cannot be told a language."""
    if "language" in told and not hasattr(model.generation_config, "lang_to_id"):
        raise UnsupportedError("generation_config.json names no lang_to_id, by which a language is told",
                               hint="take the file of the model's newest release")  # fmt: skip
    given: Any = {key: value.to(model.device) for key, value in features_of(model, sounds).items()}
    generate: Any = model.generate
    found: list[list[int]] = generate(**given, **{"logits_processor": of_numbers(model), **told}).tolist()
    return found


@contextmanager
def speech_together(model: PreTrainedModel, samples: Sequence[SpeechSample]) -> Iterator[str | None]:
    """Within the block passes of several samples compute what the model says of each alone; see padded_together."""
    two, what = longest_and_shortest(samples), "a recording is not the mean cross-entropy of its text's tokens"
    yield tried_together(model, two, speech_losses, _own_loss, what, "every recording passes through it alone")


def _own_loss(model: PreTrainedModel, sample: SpeechSample) -> Tensor:
    """What the model itself says of a sample, called as anybody would."""
    own: Any = model
    batch = {key: value.to(model.device) for key, value in collate_speech(model, [sample]).items()}
    batch.pop("weights", None)
    loss: Tensor = own(**batch, use_cache=False).loss
    return loss.float()
