"""llama.cpp's GGUF-LoRA: an adapter in one file, which llama.cpp runs beside the base's file. Written and read here.

    general.type = "adapter"   general.architecture = the base's   general.file_type   adapter.type = "lora"
    adapter.lora.alpha         f32, one for all tensors
    <tensor>.lora_a [r, in]    <tensor>.lora_b [out, r]    for a tensor of the base, as in blk.0.attn_q.weight.lora_a

For each pair llama.cpp computes

    y = W x + scale · B (A x)        scale = alpha / r, r being the columns of this B;  1 where alpha is 0 or missing

It knows no rank-stabilized scaling and no alpha of single layers. So `alpha` is the s·r that most layers have, which is
lora_alpha, or lora_alpha · sqrt(r) where rank-stabilized, and where a layer's own s·r differs, the quotient goes into B.
An adapter trained here is so written as it is: no value is rounded but to the file's dtype. Rows of B go in the order
that the file has the rows of its tensor in: B_file[row_order] = B; columns of A likewise.

Keys that begin with "qgraft" are ours, and llama.cpp passes over them: `qgraft.base.fingerprint` lets load_adapter
notice another base, where llama.cpp compares only architecture and shapes; `qgraft.prompt.system` and `.template` are
what the adapter was trained with. Norms in such a file are passed over, as llama.cpp does.

Sources: src/llama-adapter.h (get_scale), src/llama-adapter.cpp (the checks) and convert_lora_to_gguf.py of llama.cpp.
Not chosen: the names without ".weight" that one fork writes; llama.cpp finds no tensor for them.
"""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFType, GGUFWriter, Keys, LlamaFileType
from torch import Tensor, nn

from qgraft import storage, targets
from qgraft.adapter_files.expert_loras import experts_of_stacks, stack_tensors, stored_tensors
from qgraft.adapter_files.peft_config import peft_config
from qgraft.adapters.base import base_of, find_adapter
from qgraft.adapters.lora import Lora, LoraConfig
from qgraft.adapters.lora_experts import ExpertLora, LoraExperts, expert_layers, stack_paths
from qgraft.adapters.peft_names import tensor_name
from qgraft.adapters.states import loras_of, non_finite
from qgraft.adapters.whole import refuse_whole
from qgraft.checkpoints.gguf_file import GgufFile, read_gguf
from qgraft.checkpoints.gguf_from_folder import gguf_names
from qgraft.checkpoints.gguf_model import gguf_fingerprint
from qgraft.checkpoints.gguf_rope import floats
from qgraft.checkpoints.gguf_rules import WITHOUT_LORA
from qgraft.checkpoints.gguf_write import open_source
from qgraft.checkpoints.origin import Origin, find_origin, is_linear
from qgraft.data.templates import PROMPT_OPTIONS
from qgraft.errors import AdapterError, CheckpointError, OptionError, StorageError, UnsupportedError, near_match, worded
from qgraft.experts import QuantizedExperts
from qgraft.formats import dequantize

DTYPES = {
    "float32": (torch.float32, LlamaFileType.ALL_F32),
    "float16": (torch.float16, LlamaFileType.MOSTLY_F16),
}
FINGERPRINT, PROMPT = "qgraft.base.fingerprint", "qgraft.prompt"
_INVOCATION = "adapter.alora.invocation_tokens"  # Keys.Adapter.ALORA_INVOCATION_TOKENS of newer releases of gguf
_NAME = re.compile(r"(?P<base>.+)\.lora_(?P<part>[ab])")


@dataclass(frozen=True)
class ExportedLora:
    """What export_gguf_lora wrote: pairs for `layers` layers, `parameters` numbers, `nbytes` of file."""

    path: Path
    architecture: str
    layers: int
    parameters: int
    nbytes: int
    alpha: float


def is_gguf_lora(file: GgufFile) -> bool:
    """Whether a GGUF file says that it is an adapter, of whatever kind."""
    return bool(file.metadata.get(Keys.General.TYPE) == GGUFType.ADAPTER)


def export_gguf_lora(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    dtype: str = "float16",
    arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ExportedLora:
    """Write the LoRA `name` (default: the only one) to `path` in llama.cpp's layout, whole or not at all.

    Args:
        model: its tensors in a GGUF file give the pairs their names: in the file that it was loaded from, or in the
            one that its folder would be, as save() and llama.cpp's converter write it.
        dtype: "float16", which llama.cpp's users expect, or "float32", which keeps every bit.
        arguments: of the training; its system prompt and template are written, so that `qgraft chat` uses them.
        overwrite: replace a file that is there; never the base's own.

    Raises AdapterError for layers without a tensor in the file, for NaN and on merged weights, UnsupportedError for a
    folder of an architecture that has no GGUF file, OptionError for an unknown dtype or the base's own file as `path`,
    CheckpointError for a base file that changed since it was loaded, StorageError.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: expected {' or '.join(DTYPES)}", hint=near_match(dtype, DTYPES))
    path, adapter = Path(path), find_adapter(model, name)
    refuse_whole(adapter, "a GGUF-LoRA")
    loras = loras_of(adapter, "a GGUF-LoRA")
    targets.check_new(path, overwrite, [find_origin(model).path], "gguf")
    base = _names_of_base(model)
    fingerprint = _unmerged(model)
    alpha = _common_alpha(lora.stored_config for lora in loras.values())
    experts = {path: layer.base for path, layer in expert_layers(model).items() if isinstance(layer, LoraExperts)}
    tensors = _file_tensors(adapter.name, loras, experts, base, alpha, DTYPES[dtype][0])
    try:
        with tempfile.TemporaryDirectory() as folder:
            writer = GGUFWriter(Path(folder) / "lora.gguf", base.architecture)
            _add_metadata(writer, adapter.name, base, fingerprint, alpha, DTYPES[dtype][1])
            _add_prompt(writer, arguments or {})
            _write(writer, tensors)
            data = _whole(Path(folder) / "lora.gguf")
    except (OSError, CheckpointError) as error:
        raise StorageError(
            f"cannot write a temporary file: {error.message if isinstance(error, CheckpointError) else error.strerror}",
            hint="TMPDIR names the folder of such files",
        ) from error
    storage.write_file(path, data)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return ExportedLora(path, base.architecture, len(tensors) // 2, numbers, len(data), alpha)


def read_gguf_lora(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """The GGUF-LoRA at `path` as an adapter folder for `model` would hold it: (PEFT's options, tensors, seal).

    The tensors have PEFT's names, float32 values and rows in the model's order; those that belong to no linear layer of
    the model are listed under their own names, for the caller to refuse. The seal is None where the file names no base.

    Raises CheckpointError for a file that is no whole GGUF, AdapterError for one that is no LoRA or of another
    architecture, UnsupportedError for a kind of LoRA or a base that this cannot serve.
    """
    base = _names_of_base(model)
    file = read_gguf(path)
    alpha = _check_kind(file)
    if (got := file.metadata.get(Keys.General.ARCHITECTURE)) != base.architecture:
        raise AdapterError(f"{path}: made for the architecture {got!r}, this model is {base.architecture!r}")
    matrices = base.origin.matrices
    places = {s.name: (p, s) for p, s in matrices.items() if not s.repeated and is_linear(model, p)}
    pairs: dict[str, dict[str, Tensor]] = {}  # module path -> "A" and "B"
    stacks = set(stack_paths(model))
    of_experts: dict[str, dict[str, Tensor]] = {}  # likewise, by the paths of stacks
    state: dict[str, Tensor] = {}
    for name, info in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is not None and match["base"] in places and len(info.shape) == 2:
            layer, stored = places[match["base"]]
            part = match["part"].upper()
            value = _matrix(file, name, stored.row_order if part == "B" else None)
            if part == "A" and stored.column_order is not None:
                value = value[:, stored.column_order]
            pairs.setdefault(layer, {})[part] = value
        elif match is not None and len(info.shape) == 3 and places.get(match["base"], ("",))[0] in stacks:
            of_experts.setdefault(places[match["base"]][0], {})[match["part"].upper()] = floats(file, name)
        elif not name.endswith("_norm.weight"):
            state[f"{name} {list(info.shape)}"] = torch.empty(0)
    found = experts_of_stacks(model, path, of_experts)
    state |= stored_tensors({layer: (A, B) for layer, (A, B, _) in found.items()})
    for layer, pair in pairs.items():
        state |= {tensor_name(layer, part): value for part, value in pair.items()}
    return _options(alpha, pairs, found), state, _seal(file)


@dataclass(frozen=True, eq=False)
class _Base:
    """The GGUF file that a LoRA is for: its architecture, its name, and where the model's matrices lie in it."""

    architecture: str
    name: str
    origin: Origin


def _names_of_base(model: nn.Module) -> _Base:
    """Of the file that the model was loaded from, or that its folder would be (gguf_from_folder.py)."""
    origin = find_origin(model)
    if origin.container != "gguf":
        architecture, to_be = gguf_names(model)
        return _Base(architecture, origin.path.resolve().name, to_be)
    metadata = open_source(origin).metadata
    name = str(metadata.get(Keys.General.NAME) or origin.path.stem)
    return _Base(str(metadata[Keys.General.ARCHITECTURE]), name, origin)


def _unmerged(model: nn.Module) -> str | None:
    """The fingerprint of the file that llama.cpp will have: the adapter must be on its weights.

    None for a base from a folder, whose GGUF file, made here or by llama.cpp's converter, has a fingerprint of its own.
    """
    origin, info = find_origin(model), base_of(model).info
    of_file = gguf_fingerprint(open_source(origin)) if origin.container == "gguf" else None
    merged = base_of(model).merged is not None or info is None
    if merged or (of_file is not None and info is not None and info.fingerprint != of_file):
        raise AdapterError(
            f"the model's weights are no longer those of {origin.path}: an adapter was merged into them",
            hint="save the merged model and load that file, or unmerge",
        )
    return of_file


def _own_alpha(config: LoraConfig) -> float:
    """The alpha of one layer, s·r, as the file's float32 holds it."""
    exact = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1.0)
    return float(torch.tensor(exact, dtype=torch.float32))


def _common_alpha(configs: Iterable[LoraConfig]) -> float:
    """The alpha that leaves B as it is in most layers; not 0, which llama.cpp takes for none. Raises AdapterError."""
    alpha = Counter(_own_alpha(config) for config in configs).most_common(1)[0][0]
    if not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha: got {alpha}, expected a finite number")
    return alpha or 1.0


def _file_tensors(
    name: str,
    loras: Mapping[str, Lora],
    layers: Mapping[str, QuantizedExperts],
    base: _Base,
    alpha: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """{tensor name in the file: values, rows in the file's order, with what differs from `alpha` in B}."""
    origin, tensors = base.origin, dict[str, Tensor]()
    problems, alone = [], WITHOUT_LORA.get(base.architecture, ())
    for path, lora in loras.items():
        if isinstance(lora, ExpertLora):
            names = {part: stored.name for place, stored in origin.matrices.items()
                     for stem, _, part in [place.rpartition(".")] if stem == path}  # fmt: skip
            values = stack_tensors(lora, layers[path], names, _own_alpha(lora.config) / alpha)
            tensors |= {name: value.to(dtype).contiguous() for name, value in values.items()}
            continue
        stored = origin.matrices.get(path)
        if stored is None or stored.repeated:
            problems.append(f"{path}: {origin.path.name} has no tensor of its own for it")
            continue
        if stored.name.endswith(alone):
            problems.append(f"{path}: llama.cpp passes over a LoRA on {stored.name}")
            continue
        if lora.of_embedding:
            problems.append(f"{path}: a LoRA on the embedding, which a GGUF-LoRA of qgraft does not hold")
            continue
        if (pair := lora.factors()) is None:
            problems.append(f"{path}: {lora.about}, which llama.cpp cannot compute; merge it")
            continue
        A, B = (each.detach().cpu() for each in pair)
        if (own := _own_alpha(lora.stored_config)) != alpha:
            B = (B.double() * (own / alpha)).float()
        if stored.row_order is not None:
            B = B[stored.row_order.argsort()]
        if stored.column_order is not None:
            A = A[:, stored.column_order.argsort()]
        tensors[stored.name + ".lora_a"] = A.to(dtype).contiguous()
        tensors[stored.name + ".lora_b"] = B.to(dtype).contiguous()
    if problems:
        listed = "\n  ".join(problems)
        raise AdapterError(
            f"adapter {name!r} cannot be a GGUF-LoRA:\n  {listed}",
            hint="merge it and give llama.cpp the merged file, or train without these layers",
        )
    if broken := non_finite(tensors):
        reason = f"NaN or infinity in {len(broken)} tensors as {dtype}".replace("torch.", "")
        fits = "values above 65504 need float32" if dtype == torch.float16 else None
        raise AdapterError(f"adapter {name!r} is not written: {reason}, {broken[0]} first", hint=fits)
    return tensors


def _add_metadata(
    writer: GGUFWriter, name: str, base: _Base, fingerprint: str | None, alpha: float, file_type: LlamaFileType
) -> None:
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.name)
    writer.add_file_type(file_type)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    if fingerprint is not None:
        writer.add_string(FINGERPRINT, fingerprint)


def _add_prompt(writer: GGUFWriter, arguments: Mapping[str, Any]) -> None:
    for key in PROMPT_OPTIONS:
        if isinstance(value := arguments.get(key), bool):
            writer.add_bool(f"{PROMPT}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{PROMPT}.{key}", value)


def _write(writer: GGUFWriter, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _whole(path: Path) -> bytes:
    """The bytes of a file that numpy wrote tensors to, which says nothing where the disk took only some of them.

    Raises CheckpointError.
    """
    read_gguf(path)
    return path.read_bytes()


def _check_kind(file: GgufFile) -> float:
    """The file's alpha (0.0 where it has none), after checking that the file is a plain LoRA."""
    if not is_gguf_lora(file):
        got = file.metadata.get(Keys.General.TYPE, "model")
        raise AdapterError(
            f"{file.path} is a GGUF {got!r}, not an adapter",
            hint=worded(flags="give it as --model", python="load() takes it"),
        )
    if (kind := file.metadata.get(Keys.Adapter.TYPE)) != "lora":
        raise UnsupportedError(f"{file.path}: {Keys.Adapter.TYPE} {kind!r}; supported: 'lora'")
    if _INVOCATION in file.metadata:
        raise UnsupportedError(
            f"{file.path}: a LoRA that waits for its invocation tokens (aLoRA); supported: a plain one"
        )
    alpha = file.metadata.get(Keys.Adapter.LORA_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise AdapterError(f"{file.path}: {Keys.Adapter.LORA_ALPHA}: got {alpha!r}, expected a finite float")
    return alpha


def _matrix(file: GgufFile, name: str, order: Tensor | None) -> Tensor:
    """The tensor as float32, its rows in the model's order; as it is where it has another number of rows."""
    value = dequantize(file.packed(name), torch.float32)
    return value if order is None or len(order) != len(value) else value[order]


def _options(
    alpha: float, pairs: Mapping[str, Mapping[str, Tensor]], experts: Mapping[str, tuple[Tensor, Tensor, int]]
) -> dict[str, Any]:
    """PEFT's options with which alpha / r is what llama.cpp multiplies each pair by."""
    ranks = {layer: len(pair["A"]) for layer, pair in pairs.items() if len(pair) == 2}
    layers = {layer: LoraConfig(rank, alpha or float(rank)) for layer, rank in ranks.items()}
    linears = sorted(layers)
    for layer, (A, _, rank) in experts.items():  # A of gate and up may be two, whose ranks add up
        layers[layer] = LoraConfig(A.shape[1], (alpha or float(rank)) * A.shape[1] / rank)
    if not layers:
        return {"r": 1, "lora_alpha": alpha}
    return peft_config(layers, linears, None) | ({"target_parameters": sorted(experts)} if experts else {})


def _seal(file: GgufFile) -> dict[str, Any] | None:
    """What of qgraft.json is in the file: the base's fingerprint and name, and how prompts were made in training."""
    fingerprint = file.metadata.get(FINGERPRINT)
    if not isinstance(fingerprint, str):
        return None
    name = file.metadata.get(Keys.General.BASE_MODEL_NAME.format(id=0))
    arguments = {key: file.metadata[f"{PROMPT}.{key}"] for key in PROMPT_OPTIONS if f"{PROMPT}.{key}" in file.metadata}
    return {"base": {"fingerprint": fingerprint, "source": name}, "arguments": arguments}
