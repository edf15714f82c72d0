"""A Hugging Face folder (config.json, *.safetensors, tokenizer files) as a model, quantized on the way in if asked.

The files are mapped, each weight is read, packed and let go before the next one is touched: a 16-bit checkpoint far
larger than memory can become a 4-bit model that fits. Without `quantize` the weights stay in the 16 or 32 bits they have
in the file, as formats f16, bf16 and f32 of the same kind.

Which weights are quantized: those of linear layers but the output layer, as llama.cpp and bitsandbytes choose too; the
embedding and the output layer hold little of the size and cost most of the quality. A layer whose width the format has
no blocks for keeps its 16 bits, and the load says so.

A matrix stored in int8 beside a `weight_scale` is ChatGLM's row-wise layout (folder_write.py draws it) and stays packed
as it is: 8 bits where it is as wide as the layer, 4 where it is half as wide.

Nothing in the folder is executed: no pickle, no `auto_map`, no remote code.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from qgraft.checkpoints.assemble import BaseInfo, TokenizerErrors, assemble, empty_model, weight_formats
from qgraft.checkpoints.fingerprint import fingerprint
from qgraft.checkpoints.origin import Origin, Stored
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.formats import PackedTensor, get_format
from qgraft.formats import quantize as quantize_weight

INDEX = "model.safetensors.index.json"
_FLOAT_FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def load_folder(
    folder: Path, dtype: torch.dtype, quantize: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and tokenizer of a folder; the tokenizer is None when the folder has none.

    Args:
        dtype: what the model computes in.
        quantize: a writable format for the linear layers ("q4_1", "chatglm-int4", ...), or None.

    Raises CheckpointError for missing or broken files, UnsupportedError for an unknown architecture or format, or a
    folder that is already quantized by another library.
    """
    if quantize is not None and get_format(quantize).quantize is None:
        raise UnsupportedError(f"quantize={quantize!r}: this format can be read but not written yet")
    config = _config(folder)
    with ExitStack() as stack:
        tensors = open_shards(folder, stack)
        reader = _FolderReader(tensors, quantize, empty_model(config, dtype))
        model = assemble(config, reader, dtype, str(folder))
    model.qgraft_base = BaseInfo(  # type: ignore[assignment]
        source=str(folder),
        container="folder",
        architecture=config.model_type,
        fingerprint=fingerprint(reader.entries),
        formats=weight_formats(model),
        notes=tuple(reader.notes + reader.unused_notes()),
    )
    _mark_repeated(model, reader)
    digest = folder_digest(folder, reader.vectors)
    model.qgraft_origin = Origin(  # type: ignore[assignment]
        folder.absolute(), "folder", digest, reader.matrices, tuple(reader.vectors)
    )
    return model, _tokenizer(folder)


def folder_digest(folder: Path, vectors: Collection[str]) -> str:
    """What tells whether a folder is the one that a model was loaded from: its config, what its tensors are called and
    like, and the values of these `vectors`. The matrices a model has in memory."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    entries: list[tuple[str, tuple[int, ...], str, Tensor]] = []
    with ExitStack() as stack:
        for path in shard_paths(folder):
            shard = open_shard(path, stack)
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                about = shard.get_slice(name)
                value = shard.get_tensor(name) if name in vectors else torch.empty(0)
                entries.append((f"{path.name}: {name}", tuple(about.get_shape()), str(about.get_dtype()), value))
    return f"{config} {fingerprint(entries)}"


def _mark_repeated(model: PreTrainedModel, reader: "_FolderReader") -> None:
    """A tied output layer's weight may be in the file as well; a save writes there what the model has."""
    output = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is output), None)
    if path is not None and path not in reader.matrices and f"{path}.weight" in reader.tensors:
        reader.matrices[path] = Stored(f"{path}.weight", repeated=True)


class _FolderReader:
    """Answers assemble()'s questions from open safetensors files, packing weights as they pass."""

    def __init__(
        self,
        tensors: dict[str, Callable[[], Tensor]],
        quantize: str | None,
        model: PreTrainedModel,
    ) -> None:
        self.tensors, self.quantize = tensors, quantize
        self.bits = getattr(model.config, "quantization_bit", None) or None
        output = model.get_output_embeddings()
        self.linears = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self.quantized_names = {name for name, m in self.linears.items() if m is not output}
        self.entries: list[tuple[str, tuple[int, ...], str, Tensor]] = []  # what the fingerprint is made of
        self.matrices: dict[str, Stored] = {}  # by module path
        self.vectors: list[str] = []
        self.notes: list[str] = []

    def __call__(self, name: str) -> PackedTensor | Tensor | None:
        if name not in self.tensors:
            return None
        value = self.tensors[name]()
        if value.dim() != 2:
            self.vectors.append(name)
            self.entries.append((name, tuple(value.shape), str(value.dtype), value))
            return value
        transposed = isinstance(self.linears.get(name), Conv1D)
        self.matrices[name.removesuffix(".weight")] = Stored(name, transposed=transposed)
        if value.dtype == torch.int8 and name in self.linears and f"{name}_scale" in self.tensors:
            packed = self._read_rowwise(name, value)
        else:
            packed = self._pack(name, value.T.contiguous() if transposed else value)
        self.entries += matrix_entries(name, packed)
        return packed

    def unused_notes(self) -> list[str]:
        """One note on the file's tensors that the model did not ask for; rotary tables of old checkpoints are usual."""
        used = {name for name, *_ in self.entries}
        unused = sorted(name for name in self.tensors if name not in used and not name.endswith("rotary_emb.inv_freq"))
        listed = ", ".join(unused[:4]) + (", ..." if len(unused) > 4 else "")
        return [f"{len(unused)} tensors of the folder have no place in the model: {listed}"] if unused else []

    def _read_rowwise(self, name: str, data: Tensor) -> PackedTensor:
        """An int8 matrix with its scales: 8 bits where it is as wide as the layer, 4 where it is half as wide."""
        if self.quantize is not None:
            raise UnsupportedError(
                f"quantize={self.quantize!r}: {name} is stored in int8 with scales already",
                hint="leave quantize out, or give the float checkpoint's folder",
            )
        layer = self.linears[name]
        width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
        rows, bits = data.shape[0], 4 if data.shape[1] * 2 == width else 8
        if self.bits not in (None, bits):
            got = f"config.json says quantization_bit={self.bits!r}"
            raise CheckpointError(f"{name}: got int8 {list(data.shape)}, {bits} bits a weight, but {got}")
        scale = self.tensors[f"{name}_scale"]()
        fits = scale.shape == (rows,) and scale.dtype in (torch.float16, torch.float32)
        if not fits or not bool(scale.isfinite().all()):
            got = f"{scale.dtype} {list(scale.shape)}" if not fits else "NaN or infinity"
            raise CheckpointError(f"{name}_scale: got {got}, expected [{rows}] finite float16 or float32")
        return PackedTensor(f"chatglm-int{bits}", (rows, data.shape[1] * 8 // bits), data, scale)

    def _pack(self, name: str, w_OI: Tensor) -> PackedTensor:
        try:
            return self._quantize(name, w_OI)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error.message}", hint=error.hint) from error

    def _quantize(self, name: str, w_OI: Tensor) -> PackedTensor:
        stored = _FLOAT_FORMATS.get(w_OI.dtype)
        if stored is None:
            raise UnsupportedError(f"dtype {w_OI.dtype}; expected float32, float16 or bfloat16")
        if self.quantize is None or name not in self.quantized_names:
            return quantize_weight(w_OI, stored)
        block = get_format(self.quantize).block_size
        if w_OI.shape[1] % block:
            self.notes.append(f"{name} stays {stored}: {w_OI.shape[1]} inputs are no multiple of {block}")
            return quantize_weight(w_OI, stored)
        return quantize_weight(w_OI, self.quantize)


def matrix_entries(name: str, packed: PackedTensor) -> list[tuple[str, tuple[int, ...], str, Tensor]]:
    """What one matrix of a folder contributes to its fingerprint."""
    entries: list[tuple[str, tuple[int, ...], str, Tensor]] = [(name, packed.shape, packed.format, packed.data)]
    if packed.scale is not None:
        entries.append((f"{name}_scale", tuple(packed.scale.shape), str(packed.scale.dtype), packed.scale))
    return entries


def read_config_json(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises CheckpointError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json", hint="give a .gguf file or a folder saved by transformers")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: got a JSON {type(raw).__name__}, expected an object")
    return raw


def _config(folder: Path) -> PreTrainedConfig:
    path, raw = folder / "config.json", read_config_json(folder)
    quantization = raw.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config: got {quantization!r}, expected an object")
    if method := quantization.get("quant_method"):
        raise UnsupportedError(
            f"{folder} is already quantized with {method!r}",
            hint="load the float checkpoint with quantize=..., or a GGUF",
        )
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        if raw.get("model_type") in CONFIG_MAPPING:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())[:300]}") from error
        raise UnsupportedError(f"{folder}: model_type {raw.get('model_type')!r} is unknown to transformers") from error


def open_shard(path: Path, stack: ExitStack) -> Any:
    """The safetensors file at `path`, open until `stack` closes. Raises CheckpointError."""
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def open_shards(folder: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """{parameter name: function that reads it} over all safetensors files of the folder."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in shard_paths(folder):
        shard = open_shard(path, stack)
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            readers[name] = lambda shard=shard, name=name: shard.get_tensor(name)  # type: ignore[misc]
    return readers


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or else all. Raises CheckpointError."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in names if PureWindowsPath(name).name != name or Path(name).name != name]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index} is not an index of shards: {error}") from error
        if outside:
            raise CheckpointError(f"{index} names files outside the folder: {', '.join(outside)}")
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise CheckpointError(
            f"{folder}: {'missing ' + ', '.join(missing) if missing else 'no *.safetensors file'}",
            hint="pickled weights (*.bin) are not loaded from here: convert them to safetensors",
        )
    return paths


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    with TokenizerErrors(folder):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
