"""Files of torch.save, of which nothing is executed: the one place where torch.load is called.

A pickle is a program: it can call any function of the machine it is read on. Here only torch's restricted unpickler reads it
(`weights_only=True`), which builds tensors and plain containers and calls nothing else; a file that asks for more is refused,
and the error names what it asked for. torch's own message advises to set weights_only=False, so it is never passed on.
Not chosen: reading the archive ourselves, which would be a second unpickler to keep safe.
"""

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgraft.errors import QgraftError

WORDS = {  # safetensors' words for dtypes
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
# What torch's unpickler was seen to raise for files with shuffled or flipped bytes, beside UnpicklingError
_BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)")


def load_pickle(path: Path, error: type[QgraftError], *, mmap: bool = False) -> Any:
    """What torch.save wrote to `path`, on the CPU; `mmap` maps a file that is a zip, as those are since torch 1.6.

    Raises `error`.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as reason:
        if asked := _ASKED_FOR.search(str(reason)):
            raise error(
                f"{path} is refused: its pickle asks for {asked[1]}, and a file of weights needs no such thing",
                hint="it may be made to run commands on your machine: get the weights from elsewhere, as safetensors",
            ) from reason
        raise error(f"{path}: torch's restricted unpickler cannot read it: {_one_line(reason)}") from reason
    except _BROKEN as reason:
        raise error(f"{path}: torch cannot read it: {_one_line(reason)}") from reason


def load_tensors(path: Path, error: type[QgraftError], *, mmap: bool = False) -> dict[str, Tensor]:
    """Tensors by name, each of them numbers on the CPU that the file really holds. Raises `error`."""
    loaded = load_pickle(path, error, mmap=mmap)
    odd = [f"{name!r}: {type(value).__name__}" for name, value in loaded.items() if not isinstance(value, Tensor)] \
        if isinstance(loaded, Mapping) else [type(loaded).__name__]  # fmt: skip
    if odd:
        raise error(f"{path}: expected a mapping of names to tensors, got {', '.join(odd[:8])}")
    size = path.stat().st_size
    problems = [f"{name!r}: {problem}" for name, value in loaded.items() if (problem := _problem(name, value, size))]
    if problems:
        raise error(f"{path}: tensors of a kind that is not read: {', '.join(problems[:8])}")
    return dict(loaded)


def _problem(name: object, value: Tensor, size: int) -> str:
    """What keeps a tensor from being read as numbers, "" where nothing does."""
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return f"{value.layout} on {value.device.type}" + " quantized" * value.is_quantized
    if value.dtype not in WORDS:
        return str(value.dtype)
    return f"{list(value.shape)} is larger than the file" if value.nbytes > size else ""


def _one_line(reason: Exception) -> str:
    text = " ".join(str(reason).split())
    if "Weights only load failed" in text:  # what follows is advice to load it all the same
        text = text.partition("WeightsUnpickler error:")[2].strip().partition(" Please file")[0]
    text = text.partition("weights_only")[0].partition(" Check the documentation")[0]
    return text[:300].rstrip(" `.,(") or type(reason).__name__
