"""A GGUF file as a transformers model: configuration and tokenizer from transformers, weights left packed.

Three translations happen here, all of them on names and rows, never on values of packed weights:

    names     `blk.3.attn_q.weight` <-> `model.layers.3.self_attn.q_proj.weight`, by the tables of the `gguf` package
    rows      llama.cpp stores the rows of q and k of llama-like models in the order its rotary embedding wants; block
              formats store whole rows, so undoing it reorders rows of bytes
    norms     Gemma and Nemotron keep 1 + w in the file where transformers keeps w

transformers' own GGUF loader is the oracle of the tests; it turns every weight into floats, which this one never does.
"""

import hashlib
import math
import re
import reprlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFValueType, GGUFWriter, TensorNameMap, get_tensor_name_map
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qgraft.checkpoints.assemble import BaseInfo, assemble, weight_formats
from qgraft.checkpoints.fingerprint import fingerprint
from qgraft.checkpoints.gguf_file import GgufFile, read_gguf
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.origin import Origin, Stored
from qgraft.errors import CheckpointError, UnsupportedError, near_match
from qgraft.formats import PackedTensor, dequantize


@dataclass(frozen=True)
class Rules:
    """How one architecture's GGUF tensors differ from transformers' parameters."""

    permuted_qk: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {  # general.architecture of the file
    "gemma2": Rules(norm_offset=1.0),
    "gemma3": Rules(norm_offset=1.0),
    "gpt2": Rules(),
    "llama": Rules(permuted_qk=True),  # mistral files carry this name too
    "nemotron": Rules(norm_offset=1.0),
    "phi3": Rules(),
    "qwen2": Rules(),
    "qwen3": Rules(),
    "stablelm": Rules(),
    "starcoder2": Rules(),
}

# Layers of the 27B models, whose attention is scaled by 1 / sqrt(width / heads) and not by 1 / sqrt(head_dim)
_LARGEST = {"gemma2": 46, "gemma3": 62}

ROPE_FACTORS = "rope_freqs.weight"
_TOKENIZERS = ("gpt2", "llama")  # byte-level BPE, sentencepiece
_OPTIONAL_SIZES = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count", "vocab_size")
_SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", *_OPTIONAL_SIZES)


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a GGUF file; the weights are views of the mapped file.

    Raises CheckpointError for a broken file, UnsupportedError for an architecture or tensor type we do not serve.
    """
    file = read_gguf(path)
    rules = _rules(file)
    tokenizer = gguf_tokenizer(file)
    config = gguf_config(file)
    reader = _TensorReader(file, rules, config)
    model = assemble(config, reader, dtype, str(path))
    _apply_rope_factors(model, file)
    _set_end_tokens(model, file)
    unused = sorted(file.tensors.keys() - reader.used - {ROPE_FACTORS})
    if unused:
        raise CheckpointError(
            f"{path}: {len(unused)} tensors have no place in the architecture {config.model_type}: "
            f"{', '.join(unused[:8])}",
            hint="the file may hold more than the language model, or be of a newer architecture",
        )
    model.qgraft_base = BaseInfo(  # type: ignore[assignment]
        source=str(path),
        container="gguf",
        architecture=config.model_type,
        fingerprint=gguf_fingerprint(file),
        formats=weight_formats(model),
    )
    model.qgraft_origin = Origin(path.absolute(), "gguf", gguf_digest(file), reader.matrices)  # type: ignore[assignment]
    return model, tokenizer


def gguf_digest(file: GgufFile) -> str:
    """What tells whether a file is the one that a model was loaded from: its whole header and its fingerprint."""
    header = hashlib.sha256(file.data[: file.data_offset].numpy().data)
    return f"{header.hexdigest()} {gguf_fingerprint(file)}"


def gguf_fingerprint(file: GgufFile) -> str:
    """The fingerprint of the base that a GGUF file holds: over its tensors, not its metadata."""
    return fingerprint((info.name, info.shape, info.format, file.tensor(info.name)) for info in file.tensors.values())


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The configuration that transformers reads from the file's metadata, completed where it passes over a key.

    transformers walks every string of the vocabulary to read a dozen numbers (4 s and 250 MB for 49 k tokens). So it is
    handed a copy of the header whose vocabulary is a list of zeros of the same length and whose tensors are names only.
    """
    _check_sizes(file)
    with tempfile.TemporaryDirectory() as folder:
        _write_bare_header(file, Path(folder) / "header.gguf")
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
            _complete(config, file)
            config.name_or_path = str(file.path)
        except (ArithmeticError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
            message = f"{file.path}: transformers cannot read the configuration: {_brief(error)}"
            raise CheckpointError(message) from error
    return config


def _check_sizes(file: GgufFile) -> None:
    """Widths and counts are integers that the tensors can bear out, before anything is built in their size."""
    architecture = file.metadata.get("general.architecture")
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    widest = max((max(info.shape) for info in file.tensors.values()), default=0)
    problems = []
    for key in _SIZES:
        got, most = file.metadata.get(f"{architecture}.{key}"), len(blocks) if key == "block_count" else widest
        if got is None and key in _OPTIONAL_SIZES:
            continue
        if not isinstance(got, int) or not 1 <= got <= most:
            problems.append(f"{architecture}.{key}: got {_brief(got)}, expected an integer from 1 to {most}")
    if problems:
        raise CheckpointError(f"{file.path}: the metadata does not fit the tensors:\n  " + "\n  ".join(problems))


def _complete(config: PreTrainedConfig, file: GgufFile) -> None:
    """Set what the metadata says and transformers' reader leaves at its default; which keys, depends on the class."""

    def get(key: str) -> Any:
        return file.metadata.get(f"{architecture}.{key}")

    architecture = file.metadata["general.architecture"]
    if architecture in _LARGEST:  # no key states it; llama.cpp knows the model by its number of layers
        largest = get("block_count") == _LARGEST[architecture]
        width = get("embedding_length") // get("attention.head_count") if largest else get("attention.key_length")
        config.query_pre_attn_scalar = width or config.query_pre_attn_scalar
    if window := get("attention.sliding_window"):
        if not hasattr(config, "sliding_window"):
            raise UnsupportedError(
                f"{file.path}: attention.sliding_window {_brief(window)}: {architecture} has no window here"
            )
        config.sliding_window = window
    if config.model_type == "gpt2" and get("context_length"):
        config.n_positions = get("context_length")
    if (key_length := get("attention.key_length")) and getattr(config, "head_dim", None):
        config.head_dim = key_length
    for name in ("norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        if (epsilon := get("attention.layer_norm_epsilon")) and hasattr(config, name):
            setattr(config, name, epsilon)
    nested: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = nested.get("full_attention", nested)  # gemma3's windowed layers have their own, which no file states
    if rope:
        rope.update(_rope_parameters(file.path, get, getattr(config, "head_dim", None)))


def _rope_parameters(path: Path, get: Callable[[str], Any], head_dim: int | None) -> dict[str, Any]:
    """The rotary embedding as the metadata states it, in transformers' words."""
    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = head_dim or width // heads
    rope: dict[str, Any] = {}
    if get("rope.freq_base"):
        rope["rope_theta"] = get("rope.freq_base")
    if (rotated := get("rope.dimension_count")) and rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    kind = get("rope.scaling.type") or "none"
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{path}: rope.scaling.type {_brief(kind)}; supported: none, linear, yarn")
    rope |= {"rope_type": kind, "factor": float(get("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    return rope


def _brief(value: object) -> str:
    """One line of what was got, however long or strange it is."""
    return reprlib.repr(value) if not isinstance(value, Exception) else " ".join(str(value).split())[:300]


def _write_bare_header(file: GgufFile, path: Path) -> None:
    writer = GGUFWriter(path, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if key == "tokenizer.ggml.tokens":
            writer.add_key_value(key, [0] * len(value), GGUFValueType.ARRAY, GGUFValueType.INT8)
        elif key != "general.architecture" and not (key.startswith("tokenizer.") and isinstance(value, list)):
            _copy_value(writer, key, value, file.metadata_types[key])
    for name in file.tensors:
        writer.add_tensor_info(name, [1], torch.zeros(1).numpy().dtype, 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    writer.fout[0].write(bytes(writer.data_alignment + 4 * writer.data_alignment * len(file.tensors)))
    writer.close()


def _copy_value(writer: GGUFWriter, key: str, value: Any, types: int | tuple[int, int]) -> None:
    if value == []:  # the writer cannot express an empty list, and no configuration needs one
        return
    kind, inner = types if isinstance(types, tuple) else (types, None)
    writer.add_key_value(key, value, GGUFValueType(kind), None if inner is None else GGUFValueType(inner))


class _TensorReader:
    """Answers assemble()'s questions from a GGUF file and remembers which tensors were asked for, and for what."""

    def __init__(self, file: GgufFile, rules: Rules, config: PreTrainedConfig) -> None:
        self.file, self.rules, self.config = file, rules, config
        self.names = _name_map(file, config)
        self.used: set[str] = set()
        self.matrices: dict[str, Stored] = {}  # by module path

    def __call__(self, name: str) -> PackedTensor | Tensor | None:
        stem, _, suffix = name.rpartition(".")
        gguf_stem = self.names.get_name(stem)
        gguf_name = f"{gguf_stem}.{suffix}"
        if gguf_stem is None or gguf_name not in self.file.tensors:
            return None
        self.used.add(gguf_name)
        info = self.file.tensors[gguf_name]
        order = self._row_order(gguf_name, info.shape[0])
        if len(info.shape) == 2:
            packed = self.file.packed(gguf_name)
            self.matrices[stem] = Stored(gguf_name, order)
            return packed if order is None else packed.rows(order)
        value = _float(self.file, gguf_name)
        if order is not None:
            value = value[order]
        return value - self.rules.norm_offset if "norm" in gguf_name and suffix == "weight" else value

    def _row_order(self, gguf_name: str, rows: int) -> Tensor | None:
        """Which stored row is row i of transformers' q or k; None where the orders agree.

        A head's rows are stored as pairs (i, i + dim/2) interleaved: [0, d/2, 1, d/2 + 1, ...].
        """
        match = re.search(r"\.attn_([qk])\.", gguf_name)
        if match is None or not self.rules.permuted_qk:
            return None
        heads = self.config.num_attention_heads if match[1] == "q" else self.config.num_key_value_heads
        if rows % (2 * heads):
            return None  # a wrong shape; assemble() reports it with the others
        return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _float(file: GgufFile, name: str) -> Tensor:
    """The tensor `name` of any shape and format as float32."""
    info = file.tensors[name]
    flat = PackedTensor(info.format, (1, math.prod(info.shape)), file.tensor(name).view(torch.uint8).view(1, -1))
    return dequantize(flat, torch.float32).view(info.shape)


def _name_map(file: GgufFile, config: PreTrainedConfig) -> TensorNameMap:
    architecture = file.metadata["general.architecture"]
    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(known[architecture], config.num_hidden_layers)


def _rules(file: GgufFile) -> Rules:
    architecture = file.metadata.get("general.architecture")
    if file.metadata.get("general.type") == "adapter":
        raise UnsupportedError(f"{file.path} is a GGUF adapter, not a model", hint="give the base model's file")
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    raise UnsupportedError(
        f"{file.path}: architecture {architecture!r}; supported: {', '.join(sorted(ARCHITECTURES))}",
        hint=near_match(str(architecture), ARCHITECTURES),
    )


def _apply_rope_factors(model: PreTrainedModel, file: GgufFile) -> None:
    """Llama 3.1 and later store a divisor for each rotary frequency; transformers' GGUF reader passes over it."""
    if ROPE_FACTORS not in file.tensors:
        return
    factors = _float(file, ROPE_FACTORS)
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None or rotary.inv_freq.shape != factors.shape:
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} {list(factors.shape)} fits no rotary embedding of the model"
        )
    rotary.inv_freq = rotary.inv_freq / factors
    rotary.original_inv_freq = rotary.inv_freq


def _set_end_tokens(model: PreTrainedModel, file: GgufFile) -> None:
    """Generation stops at the end of a text and at the end of a turn, where the file names both."""
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(i for i in ids if i is not None))
    if unique and model.generation_config is not None:
        model.generation_config.eos_token_id = unique
