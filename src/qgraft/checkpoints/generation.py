"""generation_config.json of a folder: how the model is to answer.

Of a decoder its end tokens are taken, where a turn ends often stands there alone, beside the end of a text, and the tokens
that it may never write; how it draws others is the caller's choice. Of an encoder-decoder all of it is: which tokens it
begins with, must and may not write, and with how many beams it was published.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.errors import CheckpointError
from qgraft.json_files import read_object
from qgraft.model_parts import is_encoder_decoder

GENERATION = "generation_config.json"


def read_generation(model: PreTrainedModel, folder: Path) -> None:
    """Let generate() go by what the folder says, if it says something. Raises CheckpointError for what is none of it."""
    path = folder / GENERATION
    if not path.is_file():
        return
    said = read_object(path, CheckpointError)
    ids, never = (_ids(path, said, key) for key in ("eos_token_id", "suppress_tokens"))
    if is_encoder_decoder(model.config):
        with ForeignErrors(str(path)):
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    elif model.generation_config is not None:
        model.generation_config.eos_token_id = ids or model.generation_config.eos_token_id
        model.generation_config.suppress_tokens = never or None


def _ids(path: Path, said: Mapping[str, Any], key: str) -> list[int]:
    """One id or several that the file says under this key; none where it says nothing."""
    told = said.get(key)
    ids = told if isinstance(told, list) else [] if told is None else [told]
    if odd := [token for token in ids if type(token) is not int or token < 0]:
        raise CheckpointError(f"{path}: {key}: got {odd[0]!r}, expected ids of tokens")
    return ids
