"""calibration.safetensors: the rows that an adapter keeps of its training, beside its weights (adapters/kept_rows.py).

    ids       I32 [tokens]    token ids of all rows, one row behind the other
    weights   F32 [tokens]    of the loss of each token; 0 where it is not learned
    lengths   I32 [rows]      tokens of each row
    held_out  U8  [rows]      1: the run held it out; 0: it learned it
    text      I64 [rows]      a hash of what the tokenizer called the row's ids
    metadata  qgraft_calibration: 1, the version; learned: how many rows the kept ones were drawn from

The seal covers the file where it is there. It may be deleted: it holds rows of the training set, which whoever has the
tokenizer can read, and an adapter without it is an adapter all the same. Whole rows in a file of its own were chosen over
names of rows in the training set, which can change, or be on another machine.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qgraft.adapters.kept_rows import HELD_TOKENS, KEPT_TOKENS, LONGEST, KeptRow, KeptRows, drawn
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.shards import Shard, open_shard
from qgraft.data.tokenizing import IGNORED, Sample, cut_sample
from qgraft.errors import AdapterError, CheckpointError, DataError, worded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION = "calibration.safetensors"
_VERSION_KEY, _VERSION, _LEARNED = "qgraft_calibration", "1", "learned"
_KINDS = {"ids": "I32", "weights": "F32", "lengths": "I32", "held_out": "U8", "text": "I64"}
_MOST_BYTES = 1 << 20
_MOST_DIGITS = 12  # of a number of rows


# ---------------------------------------------------------------- samples


def keep_samples(
    tokenizer: "PreTrainedTokenizerBase", learned: Sequence[Sample], held_out: Sequence[Sample], seed: int
) -> KeptRows | None:
    """What an adapter keeps of the samples of its run; None where not one of them learns something within LONGEST tokens."""
    kept = _rows(tokenizer, learned, KEPT_TOKENS, seed, held_out=False)
    held = _rows(tokenizer, held_out, HELD_TOKENS, seed, held_out=True)
    return KeptRows((*kept, *held), len(learned)) if kept else None


def _rows(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence[Sample], tokens: int, seed: int, *, held_out: bool
) -> list[KeptRow]:
    """Some of the samples, of so many tokens; all are looked at, and only those that are kept are hashed."""
    cut = [each for sample in samples if (each := cut_sample(sample, LONGEST)) is not None]
    chosen = [cut[number] for number in drawn([len(each.input_ids) for each in cut], tokens, seed)]
    rows = [KeptRow(*_columns(each), held_out, _text(tokenizer, each.input_ids)) for each in chosen]
    return [row for row in rows if any(row.weights[1:])]


def _columns(sample: Sample) -> "tuple[array[int], array[float]]":
    given = sample.weights or [1.0] * len(sample.labels)
    weights = [0.0 if label == IGNORED else weight for label, weight in zip(sample.labels, given, strict=True)]
    return array("i", sample.input_ids), array("f", weights)


def samples_of(rows: Iterable[KeptRow]) -> list[Sample]:
    """The samples that these rows were kept from."""
    samples = []
    for number, row in enumerate(rows, 1):
        ids, weights = row.ids.tolist(), row.weights.tolist()
        labels = [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]
        plain = {*weights} <= {0.0, 1.0}
        samples.append(Sample(ids, labels, f"{CALIBRATION}:{number}", None if plain else weights))
    return samples


def check_text(tokenizer: "PreTrainedTokenizerBase", rows: KeptRows, tokens: int) -> None:
    """Raise DataError where these rows are no text, or another one, in a vocabulary of so many tokens and its tokenizer."""
    instead = worded(flags="give --dataset rows.jsonl", python="give calibration=rows")
    for number, row in enumerate(rows.rows, 1):
        if max(row.ids) >= tokens:
            raise DataError(
                f"{CALIBRATION}: row {number} holds the token {max(row.ids)}, and the model has {tokens} of them",
                hint=instead,
            )
        if _text(tokenizer, row.ids.tolist()) != row.text:
            raise DataError(
                f"{CALIBRATION}: row {number} was written with another tokenizer, for which its tokens are other text",
                hint=f"load the tokenizer that the adapter was trained with, or {instead}",
            )


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> int:
    """64 bits of the SHA-256 of the pieces of text that these ids are.

    Not of the whole vocabulary: releases of transformers differ in which tokens they add to one.
    """
    pieces = json.dumps(tokenizer.convert_ids_to_tokens(ids)).encode()
    return int.from_bytes(hashlib.sha256(pieces).digest()[:8], "little", signed=True)


# ---------------------------------------------------------------- the file


def write_rows(path: Path, kept: KeptRows) -> None:
    """Write the file. Raises StorageError."""
    tensors = {
        "ids": torch.tensor([token for row in kept.rows for token in row.ids], dtype=torch.int32),
        "weights": torch.tensor([weight for row in kept.rows for weight in row.weights], dtype=torch.float32),
        "lengths": torch.tensor([len(row.ids) for row in kept.rows], dtype=torch.int32),
        "held_out": torch.tensor([row.held_out for row in kept.rows], dtype=torch.uint8),
        "text": torch.tensor([row.text for row in kept.rows], dtype=torch.int64),
    }
    metadata = {"format": "pt", _VERSION_KEY: _VERSION, _LEARNED: str(kept.learned)}
    write_safetensors(path, {name: (_KINDS[name], tensor) for name, tensor in tensors.items()}, metadata)


def read_rows(folder: Path, seal: Mapping[str, Any] | None) -> KeptRows | None:
    """The rows that the adapter in `folder` keeps; None where its seal names none, or they were deleted.

    Raises AdapterError for a file that write_rows does not write.
    """
    path = folder / CALIBRATION
    if not path.is_file() or CALIBRATION not in ((seal or {}).get("files") or {}):
        return None
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise _damaged(path, f"got {size} bytes, expected at most {_MOST_BYTES}")
    with ExitStack() as stack:
        try:
            return _read(path, open_shard(path, stack))
        except CheckpointError as error:
            raise _damaged(path, error.message.removeprefix(f"{path}: ")) from error


def _read(path: Path, shard: Shard) -> KeptRows:
    version, learned = shard.metadata.get(_VERSION_KEY), shard.metadata.get(_LEARNED, "")
    if version != _VERSION:
        raise _damaged(path, f"got version {version} of the file, expected {_VERSION}")
    about = {name: shard.describe(name) for name in shard.names}
    kinds, shapes = ({name: each[part] for name, each in about.items()} for part in (1, 0))
    if kinds != _KINDS or any(len(shape) != 1 for shape in shapes.values()):
        raise _damaged(path, f"got tensors {about}, expected {_KINDS} with one axis each")
    columns = {name: shard.tensor(name).tolist() for name in _KINDS}
    if problem := _problem(columns):
        raise _damaged(path, problem)
    kept = columns["held_out"].count(0)
    if not (learned.isascii() and learned.isdigit() and len(learned) <= _MOST_DIGITS and int(learned) >= kept):
        raise _damaged(path, f"got {learned[:20]!r} under {_LEARNED}, expected a number of rows, {kept} or more")
    rows, start = [], 0
    for number, length in enumerate(columns["lengths"]):
        ids, weights = (columns[name][start : start + length] for name in ("ids", "weights"))
        if not any(weights[1:]):
            raise _damaged(path, f"row {number + 1} learns no token")
        held_out, text = bool(columns["held_out"][number]), columns["text"][number]
        rows.append(KeptRow(array("i", ids), array("f", weights), held_out, text))
        start += length
    return KeptRows(tuple(rows), int(learned))


def _problem(columns: Mapping[str, list[Any]]) -> str | None:
    """What cannot be in these numbers."""
    lengths, tokens = columns["lengths"], len(columns["ids"])
    if not lengths or len({len(columns[name]) for name in ("lengths", "held_out", "text")}) > 1:
        return f"got {len(lengths)} lengths, {len(columns['held_out'])} marks and {len(columns['text'])} hashes of rows"
    if any(not 2 <= length <= LONGEST for length in lengths):
        return f"got rows of {min(lengths)} to {max(lengths)} tokens, expected 2 to {LONGEST}"
    if not sum(lengths) == tokens == len(columns["weights"]):
        return f"got rows of {sum(lengths)} tokens, {tokens} ids and {len(columns['weights'])} weights"
    if min(columns["ids"]) < 0:
        return f"got the token {min(columns['ids'])}"
    if not all(math.isfinite(weight) and weight >= 0 for weight in columns["weights"]):
        return "got weights that are negative or no numbers"
    if not {*columns["held_out"]} <= {0, 1} or all(columns["held_out"]):
        return "expected 0 or 1 for rows that were learned or held out, and at least one that was learned"
    return None


def _damaged(path: Path, what: str) -> AdapterError:
    return AdapterError(f"{path} cannot be read: {what}", hint=f"delete {path.name} to go without the rows in it")
