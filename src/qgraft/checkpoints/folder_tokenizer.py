"""The tokenizer of a Hugging Face folder: transformers' own, or of a ChatGLM ours, made of its vocabulary file alone."""

import re
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.checkpoints.glm_tokenizer import chatglm3_tokenizer, glm4_tokenizer, is_glm4
from qgraft.errors import CheckpointError
from qgraft.json_files import read_object
from qgraft.models.find import Architecture, architecture_of

# What the tokenizers of transformers are made of: spiece.model, sentencepiece.bpe.model, vocab-src.json, source.spm, ...
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*.json", "vocab.txt", "*.spm", "bpe.codes", "*.tokenizer")
CONFIG = "tokenizer_config.json"
LARGEST_ID = (
    1 << 24
)  # of a token: the tokenizers package counts up to it when it writes a vocabulary; the largest have 2^18


def folder_tokenizer(folder: Path, config: PreTrainedConfig) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """The folder's tokenizer, and notes where there is none."""
    if architecture := architecture_of(config):
        return _native_tokenizer(folder, architecture, config)
    if not any(path.is_file() for name in VOCABULARIES for path in folder.glob(name)) and not _spells_bytes(folder):
        return None, []
    with ForeignErrors(f"{folder}: transformers cannot build the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer.decode(tokenizer("a 1").input_ids)  # a length that is a text, say, is only found out in use
        largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > LARGEST_ID:
        raise CheckpointError(f"{folder}: the tokenizer has a token with id {largest}, expected at most {LARGEST_ID}")
    return tokenizer, []


def _spells_bytes(folder: Path) -> bool:
    """Whether the folder names a class of transformers whose tokens are bytes or characters, which no file lists: ByT5's."""
    if not (folder / CONFIG).is_file():
        return False
    named = read_object(folder / CONFIG, CheckpointError, finite=False).get("tokenizer_class")
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    return isinstance(found, type) and getattr(found, "vocab_files_names", None) == {}


def _native_tokenizer(
    folder: Path, architecture: Architecture, config: PreTrainedConfig
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    path = folder / architecture.vocabulary
    if not path.is_file():
        return None, [f"the folder has no vocabulary file ({path.name}), so there is no tokenizer"]
    files = [folder / "config.json", folder / CONFIG]
    third = any(re.search(rb"chatglm3", file.read_bytes(), re.IGNORECASE) for file in files if file.is_file())
    with ForeignErrors(f"{path}: no tokenizer can be built of it"):
        if path.name == "tokenizer.model" and is_glm4(path):
            tokenizer = glm4_tokenizer(path)
        elif third:
            tokenizer = chatglm3_tokenizer(path)
        else:
            tokenizer = architecture.tokenizer(vocab_file=str(path))
    if problems := _vocabulary_problems(tokenizer, config):
        raise CheckpointError(
            f"{path} is not this model's vocabulary: {'; '.join(problems)}",
            hint="vocabulary and config.json come from one release: take both from there",
        )
    return tokenizer, []


def _vocabulary_problems(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[str]:
    """Where the tokenizer's ids and the model's part: ids beyond the embedding, or other ids for what both call alike."""
    problems = []
    if len(tokenizer) > config.vocab_size:
        problems.append(f"it has {len(tokenizer)} ids, and the model {config.vocab_size}")
    for name in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id"):
        ours, told = getattr(tokenizer, name, None), getattr(config, name, None)
        if isinstance(ours, int) and isinstance(told, int) and ours != told:
            problems.append(f"its {name} is {ours}, and config.json says {told}")
    return problems
