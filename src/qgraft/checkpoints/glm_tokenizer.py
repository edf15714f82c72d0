"""The tokenizers of ChatGLM3-6B and GLM-4-9B, from the vocabulary file of their folders (tokenizer.model).

    ChatGLM3   a sentencepiece file (BPE): the one of ChatGLM2, with four ids for roles behind its five special ones
    GLM-4      lines "base64 rank", as tiktoken has them: bytes of a token, and when it is merged

Both become the keys that llama.cpp's converter writes of them, and gguf_tokenizer reads these: ids are one thing, from a
folder or from a GGUF file. Its model's authors wrote ChatGLM3's ids 64792 and 64793 "sop" and "eop", which never stand in
a text that they tokenize. Here the text of a prompt holds them, and "people" would be cut in three: they are called <sop>
and <eop>, as GLM-4's are.

Prompts are chat templates (data/variants/chatglm3.jinja, glm.jinja) that give the ids of the releases' build_chat_input:

    ChatGLM3   [gMASK]<sop><|user|>\\n question<|assistant|>                a blank where sentencepiece begins a text
    GLM-4      [gMASK]<sop><|user|>\\nquestion<|assistant|>

Source: tokenization_chatglm.py of the releases (THUDM/ChatGLM3 60012cf; THUDM/GLM-4); ChatGLMModel in llama.cpp's
conversion/chatglm.py. Not chosen: the template in ChatGLM3's tokenizer_config.json, whose blanks are not those of its code.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.gguf_vocabulary import CONTROL, NORMAL
from qgraft.data.templates import variant
from qgraft.errors import CheckpointError, UnsupportedError

CHATGLM3 = "chatglm-spm"  # tokenizer.ggml.pre
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_CHATGLM3_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES)
_GLM4_SPECIAL = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES, "<|begin_of_image|>",
                 "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")  # fmt: skip
_RANK = re.compile(rb"([A-Za-z0-9+/]+=*) (\d+)\s*")
_BPE = 2  # ModelType of a sentencepiece file


def is_glm4(path: Path) -> bool:
    """Whether a vocabulary file holds ranks instead of a sentencepiece model."""
    with open(path, "rb") as file:
        return _RANK.fullmatch(file.readline(4096)) is not None


def chatglm3_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a ChatGLM3's folder. Raises CheckpointError, UnsupportedError for another file than that."""
    data = path.read_bytes()
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(data)
        SentencePieceProcessor().LoadFromSerializedProto(data)
    except (DecodeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece file ({error})") from error
    normal, kind = proto.normalizer_spec, proto.trainer_spec.model_type
    if kind != _BPE or normal.precompiled_charsmap or normal.remove_extra_whitespaces or not normal.add_dummy_prefix:
        raise UnsupportedError(f"{path}: a sentencepiece file that is no plain BPE, as ChatGLM3's is")
    texts = [*(piece.piece for piece in proto.pieces), *_CHATGLM3_SPECIAL]
    behind = len(_CHATGLM3_SPECIAL)
    return _tokenizer(path, {
        "model": "llama", "pre": CHATGLM3, "tokens": texts,
        "scores": [*(piece.score for piece in proto.pieces), *[0.0] * behind],
        "token_type": [*(piece.type for piece in proto.pieces), *[CONTROL] * behind],
        "eos_token_id": 2, "padding_token_id": 0, "unknown_token_id": 0, "add_bos_token": False,
    })  # fmt: skip


def glm4_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GLM-4-9B's folder. Raises CheckpointError for a file that is broken."""
    ranks = _ranks(path)
    letters = bytes_to_unicode()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    end = len(ranks)
    return _tokenizer(path, {
        "model": "gpt2", "pre": "glm4", "tokens": [*texts.values(), *_GLM4_SPECIAL],
        "merges": [f"{texts[left]} {texts[right]}" for left, right in _merges(ranks)],
        "token_type": [*[NORMAL] * end, *[CONTROL] * len(_GLM4_SPECIAL)],
        "eos_token_id": end, "padding_token_id": end, "add_bos_token": False,
    })  # fmt: skip


def _tokenizer(path: Path, keys: dict[str, Any]) -> PreTrainedTokenizerBase:
    metadata = {"general.architecture": "chatglm", **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}
    return with_own_prompts(gguf_tokenizer(GgufFile(path, 3, 32, metadata, {}, {}, 0, 0, torch.empty(0))))


def with_own_prompts(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the prompts of its release as its chat template."""
    sentencepiece = "<0x0A>" in tokenizer.get_vocab()
    tokenizer.chat_template = variant("chatglm3" if sentencepiece else "glm")
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, which is its id, in their order."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        found = _RANK.fullmatch(line)
        try:
            token = base64.b64decode(found[1], validate=True) if found else b""
        except binascii.Error:
            token = b""
        if found is None or not token or token in ranks or int(found[2]) != number:
            raise CheckpointError(
                f"{path}: line {number + 1}: got {line[:60]!r}, expected another token in base64, and {number}"
            )
        ranks[token] = number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{path}: no token for the byte {missing[0]}")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token, in the order of ranks: tiktoken merges whatever becomes the token of lowest rank."""
    pairs = []
    for token in ranks:
        whole = [(token[:at], token[at:]) for at in range(1, len(token))]
        found = [pair for pair in whole if pair[0] in ranks and pair[1] in ranks]
        pairs += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs
