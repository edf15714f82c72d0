"""The processor of a folder whose model sees images, or hears: what makes numbers of them, and places for them in a text.

transformers' own, with its image processor or feature extractor; its tokenizer is the model's. Where it cannot be made (no
Pillow or torchvision is installed, the folder has no preprocessor_config.json), the model loads without one, and says why.
"""

from pathlib import Path
from typing import Any

from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from qgraft.checkpoints.foreign import FOREIGN, one_line
from qgraft.data.pictures import INSTALL
from qgraft.model_parts import hears, vision_of


def folder_processor(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, list[str]]:
    """(The processor, which writes with this tokenizer; None for a model of text, and where there is none; notes)."""
    if hears(model.config):
        return _listener(folder, tokenizer)
    if not vision_of(model):
        return None, []
    if tokenizer is None:
        return None, ["the folder has no tokenizer, so no images are read"]
    try:
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except FOREIGN as error:
        return None, [f"no images are read: the folder's processor cannot be made ({one_line(error)[:160]}); "
                      f"where Pillow or torchvision is missing: {INSTALL}"]  # fmt: skip
    if not hasattr(processor, "image_processor"):
        return None, ["the folder has no processor of images, so none are read"]
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):  # in a file of its own in older folders, which tokenizers do not read
        tokenizer.chat_template = template
    processor.tokenizer = tokenizer
    return processor, []


def _listener(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, list[str]]:
    """The same of a model that hears."""
    if tokenizer is None:
        return None, ["the folder has no tokenizer, so no recordings are read"]
    try:
        return WhisperProcessor(WhisperFeatureExtractor.from_pretrained(str(folder)), tokenizer), []
    except FOREIGN as error:
        return None, [
            f"no recordings are read: the folder's feature extractor cannot be made ({one_line(error)[:160]})"
        ]
