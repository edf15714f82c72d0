"""generation_config.json of a folder: how the model is to answer.

Of a decoder its end tokens are taken, where a turn ends often stands there alone, beside the end of a text; the tokens that
it may never write, and the rules of an answer (answer_rules.py). How it draws is the caller's choice: what the file says of
that is what a server does for who says nothing (`BaseInfo.sampling`), and `chat` takes the likeliest token, as its help says.
So is how long an answer may be. What else changes answers (beams, other ways to cut) is not gone by, and is noted.
Of an encoder-decoder all of it is taken: which tokens it begins with, must and may not write, and with how many beams it was
published.

A GGUF file has the end tokens, those never to be written, and how answers are drawn: `general.sampling.*`, as llama.cpp's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from qgraft.checkpoints.answer_rules import KEYS, processors_of
from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.errors import CheckpointError
from qgraft.json_files import read_object
from qgraft.model_parts import is_encoder_decoder

GENERATION = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
GGUF_SAMPLING = {
    "general.sampling.temp": "temperature", "general.sampling.top_p": "top_p", "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p", "general.sampling.penalty_repeat": "repetition_penalty",
}  # fmt: skip
_UNHEEDED: dict[str, tuple[Any, ...]] = {  # with what changes nothing
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "penalty_alpha": (0,), "dola_layers": (),
    "constraints": ([],), "force_words_ids": ([],), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "top_h": (), "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,), "guidance_scale": (1,),
    "watermarking_config": ({},), "stop_strings": ([], ""), "token_healing": (False,), "max_time": (),
}  # fmt: skip


def read_generation(model: PreTrainedModel, folder: Path) -> tuple[dict[str, float], tuple[str, ...]]:
    """Let generate() go by what the folder says, if it says something: (how it would have answers drawn, notes).

    Raises CheckpointError for what is none of it.
    """
    path = folder / GENERATION
    if not path.is_file():
        return {}, ()
    said = read_object(path, CheckpointError)
    ids, never = (_ids(path, said, key) for key in ("eos_token_id", "suppress_tokens"))
    if is_encoder_decoder(model.config):
        with ForeignErrors(str(path)):
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        return {}, ()
    if model.generation_config is None:
        return {}, ()
    model.generation_config.eos_token_id = ids or model.generation_config.eos_token_id
    model.generation_config.suppress_tokens = never or None
    for key in KEYS:
        told = said.get(key)
        setattr(model.generation_config, key, getattr(GenerationConfig(), key) if told is None else told)
    with ForeignErrors(str(path)):
        processors_of(model.generation_config, 1, 1, ids)
    odd = {key: said[key] for key, same in _UNHEEDED.items() if said.get(key) is not None and said[key] not in same}
    named = ", ".join(f"{key}={value!r:.60}" for key, value in odd.items())
    return sampling_said(path, said), ((f"{GENERATION}: {named}: no answer goes by this here",) if odd else ())


def sampling_said(path: Path, said: Mapping[str, Any]) -> dict[str, float]:
    """How answers would be drawn, of keys by a server's names. Raises CheckpointError for what is no number."""
    found = {key: said[key] for key in SAMPLING if said.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{path}: {key}: got {value!r:.60}, expected a number")
    return found


def _ids(path: Path, said: Mapping[str, Any], key: str) -> list[int]:
    """One id or several that the file says under this key; none where it says nothing."""
    told = said.get(key)
    ids = told if isinstance(told, list) else [] if told is None else [told]
    if odd := [token for token in ids if type(token) is not int or token < 0]:
        raise CheckpointError(f"{path}: {key}: got {odd[0]!r}, expected ids of tokens")
    return ids
