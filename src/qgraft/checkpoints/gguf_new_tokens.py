"""The header of a GGUF file with more tokens in it: what llama.cpp reads of a vocabulary, and the tables' sizes.

    tokenizer.ggml.tokens        the texts, at the end
    tokenizer.ggml.token_type    4 (user-defined), or 3 (control) for special ones; made where the file has none
    tokenizer.ggml.scores        -1000, as llama.cpp's converter gives added tokens; only where the file has scores
    ARCHITECTURE.vocab_size      the number of rows; only where the file says it
    tensor infos                 the tables' number of rows

No merges are added: such tokens are cut out of a text before merging. All other keys stay byte for byte where they are.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qgraft.checkpoints.gguf_file import ARRAY, CODES, STRING, GgufFile, TensorInfo
from qgraft.checkpoints.gguf_vocabulary import CONTROL, NORMAL, USER_DEFINED
from qgraft.errors import CheckpointError

TOKENS, KINDS, SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
_SCORE, _INT32 = -1000.0, 5
_COUNTS = 8  # bytes before the two counts: magic and version


def longer_header(
    file: GgufFile,
    header: bytes,
    tokens: Sequence[Any],
    shapes: Mapping[str, tuple[int, ...]],
    nbytes_of: Callable[[Any, int | tuple[int, int]], int],
) -> bytes:
    """The header of `file`, without padding, with these tokens (data.new_tokens.NewToken) behind its own and the tensors in
    these shapes; their types and offsets are left open.

    Args:
        header: the file's, up to the end of the tensor infos.
        nbytes_of: how many bytes a value of a type takes.

    Raises CheckpointError where the ids are not those that come next.
    """
    (keys,) = struct.unpack_from("<Q", header, _COUNTS + 8)
    pieces, position = [], _COUNTS + 16
    rows = None
    if TOKENS in file.metadata:
        rows = _check_next(file, tokens)
    more = _additions(file, tokens) if rows is not None else {}
    for key, value in file.metadata.items():
        kind = file.metadata_types[key]
        start, position = position, position + 8 + len(key.encode()) + 4 + nbytes_of(value, kind)
        raw = header[start:position]
        if key in more:
            raw = _longer(raw, len(key.encode()), len(value), more.pop(key), kind)
        elif rows is not None and key == f"{file.metadata.get('general.architecture')}.vocab_size":
            raw = raw[:-4] + struct.pack("<I", rows)
        pieces.append(raw)
    if rows is not None and KINDS in more:
        kinds = [*[NORMAL] * len(file.metadata[TOKENS]), *more[KINDS]]
        pieces.append(struct.pack("<Q", len(KINDS)) + KINDS.encode() + struct.pack("<IIQ", ARRAY, _INT32, len(kinds))
                      + struct.pack(f"<{len(kinds)}i", *kinds))  # fmt: skip
        keys += 1
    counts = header[: _COUNTS + 8] + struct.pack("<Q", keys)
    infos = b"".join(_info(info, shapes.get(name, info.shape)) for name, info in file.tensors.items())
    return counts + b"".join(pieces) + infos


def _check_next(file: GgufFile, tokens: Sequence[Any]) -> int:
    """How many tokens the file has then."""
    own: list[str] = file.metadata[TOKENS]
    expected = list(range(len(own), len(own) + len(tokens)))
    if [token.id for token in tokens] != expected:
        got = ", ".join(str(token.id) for token in tokens[:8])
        raise CheckpointError(f"{file.path}: new tokens {got}: its {len(own)} tokens are followed by {len(own)}")
    return len(own) + len(tokens)


def _additions(file: GgufFile, tokens: Sequence[Any]) -> dict[str, list[Any]]:
    added: dict[str, list[Any]] = {
        TOKENS: [token.text for token in tokens],
        KINDS: [CONTROL if token.special else USER_DEFINED for token in tokens],
    }
    return added | ({SCORES: [_SCORE] * len(tokens)} if SCORES in file.metadata else {})


def _longer(raw: bytes, key_nbytes: int, count: int, added: list[Any], kind: int | tuple[int, int]) -> bytes:
    """A key with its array, and more elements behind those that it has."""
    assert isinstance(kind, tuple)
    at = 8 + key_nbytes + 4 + 4  # of the count
    if kind[1] == STRING:
        elements = b"".join(struct.pack("<Q", len(text.encode())) + text.encode() for text in added)
    else:
        elements = struct.pack(f"<{len(added)}{CODES[kind[1]]}", *added)
    return raw[:at] + struct.pack("<Q", count + len(added)) + raw[at + 8 :] + elements


def _info(info: TensorInfo, shape: tuple[int, ...]) -> bytes:
    """A tensor info with its type and offset left open."""
    name = info.name.encode()
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return struct.pack("<Q", len(name)) + name + dims + bytes(12)
