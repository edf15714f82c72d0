"""A GGUF file's vocabulary as llama.cpp takes it: tokens, of which kind each is, and which have a role.

A token's kind decides what happens to its text, on the way in and on the way out:

    control, unknown   cut out of a text before anything else, and left out when text is printed
    user-defined       cut out as well, but printed
    all others         made by merging; that a text spells one of them means nothing

The file says the kind (`token_type`), and llama.cpp corrects it by the token's text, because converters get it wrong: an
end of turn is a control token whatever the file says of it. `_corrected` repeats these corrections. Not repeated is where
llama.cpp leaves the choice to the order of a hash table: of several texts with one role in filling in code, the first
id is taken here.

Source: `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp (2026-10).
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.data.ends import ENDS
from qgraft.errors import CheckpointError

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)  # as in the file
SPECIAL = (CONTROL, UNKNOWN)
CUT_OUT = (CONTROL, UNKNOWN, USER_DEFINED)

FILL_IN_TEXTS = {  # the key of the id -> the texts that are looked for where the file has no such key
    ("fim_pre", "prefix"): ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                            "<|code_prefix|>", "<|prefix|>"),
    ("fim_suf", "suffix"): ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                            "<|code_suffix|>", "<|suffix|>"),
    ("fim_mid", "middle"): ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                            "<|code_middle|>", "<|middle|>"),
    ("fim_pad",): ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("fim_rep",): ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("fim_sep",): ("<|file_sep|>",),
}  # fmt: skip
_PRINTED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # of gpt-oss: control in the file, yet printed
ROLES = {  # transformers' name of a role -> the key of its id
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "cls": "cls",
}  # fmt: skip
_USUAL_IDS = {  # what a sentencepiece file that states none has
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with the kind of each, and the ids of those with a role ("bos", "eos", ...)."""

    path: Path
    model: str
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]  # token -> id
    roles: dict[str, int]

    def text(self, role: str) -> str | None:
        return self.tokens[self.roles[role]] if role in self.roles else None


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The vocabulary of `file`; CheckpointError where it has none, or one that llama.cpp would not load."""
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise CheckpointError(f"{file.path}: no tokenizer inside (tokenizer.ggml.tokens is missing)")
    stated: list[str] = file.metadata["tokenizer.ggml.tokens"]
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(stated)]  # llama.cpp's name for them
    if "\0" in "".join(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.tokens: got a token with a zero byte, where llama.cpp cuts it off"
        )
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) < len(tokens):
        number, token = next((number, token) for number, token in enumerate(tokens) if ids[token] != number)
        got = f"token {reprlib.repr(token)} has the ids {number} and {ids[token]}"
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens: {got}, expected each token once")
    model = file.metadata.get("tokenizer.ggml.model", "")
    kinds = _corrected(file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens), ids, file.metadata)
    return Vocabulary(file.path, model, tokens, kinds, ids, _roles(file.metadata, model, kinds))


def _corrected(stated: Sequence[int], ids: Mapping[str, int], metadata: Mapping[str, Any]) -> list[int]:
    """The kinds that the file states, with llama.cpp's corrections by the texts of tokens."""
    kinds = list(stated)

    def put(kind: int, *texts: str) -> None:
        for text in texts:
            if text in ids:
                kinds[ids[text]] = kind

    for keys, texts in FILL_IN_TEXTS.items():
        if not any(f"tokenizer.ggml.{key}_token_id" in metadata for key in keys):
            put(CONTROL, *sorted((text for text in texts if text in ids), key=ids.__getitem__)[:1])
    put(CONTROL, *ENDS)  # they end a turn or a text, whatever the file says of them
    put(USER_DEFINED, *_PRINTED)
    calls = "<|call|>" in ids or "<|calls|>" in ids
    if calls and ("<|return|>" in ids or "<|flush|>" in ids):
        put(USER_DEFINED, "<|end|>")  # ends a part of the answer there, not the answer
    if "<|tool_response>" in ids:
        put(NORMAL, "</s>")  # Gemma 4's vocabulary has it as a word among others
    return kinds


def _roles(metadata: Mapping[str, Any], model: str, kinds: Sequence[int]) -> dict[str, int]:
    roles = dict(_USUAL_IDS.get(str(model), {}))
    roles |= {
        role: metadata[key] for role, name in ROLES.items() if (key := f"tokenizer.ggml.{name}_token_id") in metadata
    }
    return {role: number for role, number in roles.items() if number < len(kinds)}
