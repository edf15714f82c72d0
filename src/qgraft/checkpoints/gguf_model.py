"""A GGUF file as a transformers model, with its weights left packed.

Four translations happen here, none of them on values of packed weights:

    names     `blk.3.attn_q.weight` <-> `model.layers.3.self_attn.q_proj.weight`, by the tables of the `gguf` package
    rows      of some architectures are stored in another order (gguf_rules.py)
    columns   likewise; they stay so, and the layer puts its inputs in their order (QuantizedLinear.input_order)
    floats    norms, biases, kernels of convolutions likewise; they are read as floats

transformers' own GGUF loader is the oracle of the tests; it turns every weight into floats, which this one never does.
"""

import hashlib
import re
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import BaseInfo, base_of
from qgraft.checkpoints.assemble import assemble, weight_formats
from qgraft.checkpoints.fingerprint import fingerprint
from qgraft.checkpoints.generation import GGUF_SAMPLING, sampling_said
from qgraft.checkpoints.gguf_config import gguf_config, idle_tensors, notes_of
from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_mixtures import FloatRows, joined_rows, tensors_apart
from qgraft.checkpoints.gguf_rope import apply_rotation, floats, rope_tensors
from qgraft.checkpoints.gguf_rules import (
    ARCHITECTURES,
    CHOICE,
    ROUTER,
    SHARED_GATE,
    Rules,
    column_order,
    expert_tensors,
    from_file,
    name_map,
    row_order,
    slice_of,
    tensor_name,
)
from qgraft.checkpoints.gguf_split import read_model
from qgraft.checkpoints.gguf_t5 import t5_same
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.glm_tokenizer import with_own_prompts
from qgraft.checkpoints.origin import Origin, Stored
from qgraft.errors import CheckpointError, UnsupportedError, near_match
from qgraft.experts import Stack
from qgraft.formats import PackedTensor, take_rows
from qgraft.model_parts import decoder_of, is_encoder_decoder

SUPPRESSED = "tokenizer.ggml.suppress_tokens"


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a GGUF file; the weights are views of the mapped file.

    Raises CheckpointError for a broken file, UnsupportedError for an architecture or tensor type we do not serve.
    """
    file = read_model(path)
    rules = _rules(file)
    tokenizer = gguf_tokenizer(file)
    if file.metadata["general.architecture"] == "chatglm":
        tokenizer = with_own_prompts(tokenizer)
    config = gguf_config(file)
    reader = _TensorReader(file, rules, config)
    model = assemble(config, reader, dtype, str(path), same=t5_same(file) if is_encoder_decoder(config) else None)
    for place, stored in reader.matrices.items():
        if stored.column_order is not None:
            model.get_submodule(place).input_order = stored.column_order.argsort()
    for place in reader.apart:
        layer: Any = model.get_submodule(place)
        model.set_submodule(place, FloatRows(layer.dequantize(dtype)))
    header = Header(file)
    if TABLE[header.architecture].rotates:
        decoder = decoder_of(model)
        apply_rotation(getattr(decoder, "rotary_emb", None) or decoder.pos_emb, header, file)  # LFM2-MoE's name for it
    _set_answer_tokens(model, file)
    unused = sorted(file.tensors.keys() - reader.used - rope_tensors(header, file) - idle_tensors(header, file))
    if unused:
        raise CheckpointError(
            f"{path}: {len(unused)} tensors have no place in the architecture {config.model_type}: "
            f"{', '.join(unused[:8])}",
            hint="the file may hold more than the language model, or be of a newer architecture",
        )
    base = base_of(model)
    base.info = BaseInfo(
        source=str(path),
        container="gguf",
        architecture=config.model_type,
        fingerprint=gguf_fingerprint(file),
        formats=weight_formats(model),
        notes=notes_of(header, file),
        sampling=_sampling(file),
    )
    base.origin = Origin(file.path.absolute(), "gguf", gguf_digest(file), reader.matrices, parts=len(file.parts) or 1)
    return model, tokenizer


def gguf_digest(file: GgufFile) -> str:
    """What tells whether a file is the one that a model was loaded from: its whole header and its fingerprint."""
    header = hashlib.sha256()
    for part in file.parts or (file,):
        header.update(part.data[: part.data_offset].numpy().data)
    return f"{header.hexdigest()} {gguf_fingerprint(file)}"


def gguf_fingerprint(file: GgufFile) -> str:
    """The fingerprint of the base that a GGUF file holds: over its tensors, not its metadata."""
    return fingerprint((info.name, info.shape, info.format, file.tensor(info.name)) for info in file.tensors.values())


class _TensorReader:
    """Answers assemble()'s questions from a GGUF file and remembers which tensors were asked for, and for what."""

    def __init__(self, file: GgufFile, rules: Rules, config: PreTrainedConfig) -> None:
        self.file, self.rules, self.config = file, rules, config
        self.names = name_map(file.metadata["general.architecture"], config)
        self.used: set[str] = set()
        self.matrices: dict[str, Stored] = {}  # by module path
        self.apart: list[str] = []  # layers whose weights no matrix of the file is

    def __call__(self, name: str) -> PackedTensor | dict[str, Stack] | Tensor | None:
        stem, _, suffix = name.rpartition(".")
        fusable = () if self.rules.alternates else self.file.tensors.keys()
        if experts := expert_tensors(name, fusable):
            return self._of_experts(name, experts)
        if head := re.fullmatch(r"(.+)\.norms\.(\d+)", stem):
            return self._of_head(f"{head[1]}.{suffix}", int(head[2]))
        if apart := tensors_apart(name, self.file.tensors.keys()):
            return self._apart(stem, apart)
        if place := slice_of(self.names, name):
            return self._slice(stem, *place)
        gguf_name = tensor_name(self.names, name)
        if gguf_name is None or gguf_name not in self.file.tensors:
            return None
        self.used.add(gguf_name)
        info = self.file.tensors[gguf_name]
        if gguf_name.endswith(SHARED_GATE) and len(info.shape) == 1:
            self.matrices[stem] = Stored(gguf_name)
            data = self.file.tensor(gguf_name).view(torch.uint8).view(1, -1)
            return PackedTensor(info.format, (1, info.shape[0]), (data,))
        if len(info.shape) == 2 and not gguf_name.endswith((self.rules.kernels, ROUTER, CHOICE, *self.rules.floats)):
            order, packed = row_order(gguf_name, info.shape[0], self.rules, self.config), self.file.packed(gguf_name)
            self.matrices[stem] = Stored(gguf_name, order, column_order(gguf_name, self.config))
            return packed if order is None else take_rows(packed, order)
        value = floats(self.file, gguf_name)
        if gguf_name.endswith(CHOICE):
            return value.view(1, -1) if self.config.model_type == "ernie4_5_moe" else value.view(-1)
        if gguf_name.endswith(".ssm_a") and not bool((value < 0).all()):
            raise CheckpointError(f"{self.file.path}: {gguf_name}: expected negative numbers, by which a state decays")
        return from_file(gguf_name, value, self.rules, self.config)

    def _apart(self, path: str, tensors: tuple[str, str]) -> Tensor:
        """Rows that the file has in two tensors: of DeepSeek's keys, transposed, and values, or of Granite's gate and up."""
        self.used.update(tensors)
        self.apart.append(path)
        return joined_rows(*(floats(self.file, each) for each in tensors))

    def _slice(self, path: str, gguf_name: str, number: int) -> PackedTensor | None:
        """One matrix of a tensor [n, out, in]."""
        info = self.file.tensors.get(gguf_name)
        if info is None or len(info.shape) != 3 or number >= info.shape[0]:
            return None  # assemble() reports it as missing
        self.used.add(gguf_name)
        _, rows, width = info.shape
        data = self.file.tensor(gguf_name).view(torch.uint8).view(info.shape[0], rows, -1)[number]
        self.matrices[path] = Stored(gguf_name, number=number)
        return PackedTensor(info.format, (rows, width), (data,))

    def _of_experts(self, name: str, tensors: dict[str, str]) -> dict[str, Stack] | Tensor | None:
        """What the file has of the weights, or the biases, of all experts of a layer."""
        if not all(each in self.file.tensors for each in tensors.values()):
            return None
        self.used.update(tensors.values())
        if name.endswith("_bias"):
            parts = [floats(self.file, each) for each in tensors.values()]
            if not all(part.dim() == 2 and part.shape == parts[0].shape for part in parts):
                got = f"got shapes {[list(part.shape) for part in parts]}, expected biases [experts, out] of one shape"
                raise CheckpointError(f"{self.file.path}: tensors {', '.join(tensors.values())}: {got}")
            return torch.stack(parts, -1).flatten(1) if self.rules.alternates else torch.cat(parts, -1)
        self.matrices |= {f"{name}.{part}": Stored(each) for part, each in tensors.items()}
        return {part: self._stack(each) for part, each in tensors.items()}

    def _stack(self, name: str) -> Stack:
        info = self.file.tensors[name]
        if len(info.shape) != 3:
            got = f"tensor {name}: got shape {list(info.shape)}, expected matrices [experts, out, in]"
            raise CheckpointError(f"{self.file.path}: {got}")
        rows, width = info.shape[0] * info.shape[1], info.shape[2]
        data = self.file.tensor(name).view(torch.uint8).view(rows, -1)
        return Stack(info.shape[0], PackedTensor(info.format, (rows, width), (data,)))

    def _of_head(self, name: str, head: int) -> PackedTensor | Tensor | None:
        """One head's norm (StableLM 2 12B), which the file has in a row of one tensor."""
        stem, _, suffix = name.rpartition(".")
        gguf_name = f"{self.names.get_name(stem)}.{suffix}"
        if gguf_name not in self.file.tensors:
            return None
        self.used.add(gguf_name)
        rows = floats(self.file, gguf_name)
        heads = self.config.num_key_value_heads if ".attn_k_norm." in gguf_name else self.config.num_attention_heads
        return rows[head] if rows.shape[0] == heads else rows  # a wrong shape; assemble() reports it with the others


def _rules(file: GgufFile) -> Rules:
    architecture = file.metadata.get("general.architecture")
    if file.metadata.get("general.type") == "adapter":
        raise UnsupportedError(f"{file.path} is a GGUF adapter, not a model", hint="give the base model's file")
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    raise UnsupportedError(
        f"{file.path}: architecture {architecture!r}; supported: {', '.join(sorted(ARCHITECTURES))}",
        hint=(
            "an encoder alone writes nothing; give the file of the whole model"
            if architecture == "t5encoder"
            else near_match(str(architecture), ARCHITECTURES)
        ),
    )


def _sampling(file: GgufFile) -> dict[str, float]:
    """How the file would have answers drawn; numbers as they were before they became 32 bits."""
    told = {name: file.metadata.get(key) for key, name in GGUF_SAMPLING.items()}
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in told.items()}
    return sampling_said(file.path, rounded)


def _set_answer_tokens(model: PreTrainedModel, file: GgufFile) -> None:
    """Generation stops at the end of a text and at the end of a turn, where the file names both; what it rules out is not
    written."""
    if model.generation_config is None:
        return
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(i for i in ids if i is not None))
    if unique:
        model.generation_config.eos_token_id = unique
    never, count = file.metadata.get(SUPPRESSED, []), len(file.metadata.get("tokenizer.ggml.tokens", []))
    if not isinstance(never, list) or not all(type(token) is int and 0 <= token < count for token in never):
        raise CheckpointError(f"{file.path}: {SUPPRESSED}: got {reprlib.repr(never)}, expected ids below {count}")
    model.generation_config.suppress_tokens = never or None
