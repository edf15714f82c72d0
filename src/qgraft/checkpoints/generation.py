"""generation_config.json of a folder: how the model is to answer.

Of a decoder only its end tokens are taken: where a turn ends often stands there alone, beside the end of a text; how it draws
tokens is the caller's choice. Of an encoder-decoder all of it is: which tokens it begins with, must and may not write, and
with how many beams it was published.
"""

from pathlib import Path

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
    told = read_object(path, CheckpointError).get("eos_token_id")
    ids = told if isinstance(told, list) else [] if told is None else [told]
    if odd := [token for token in ids if type(token) is not int or token < 0]:
        raise CheckpointError(f"{path}: eos_token_id: got {odd[0]!r}, expected ids of tokens")
    if is_encoder_decoder(model.config):
        with ForeignErrors(str(path)):
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    elif model.generation_config is not None and ids:
        model.generation_config.eos_token_id = ids
