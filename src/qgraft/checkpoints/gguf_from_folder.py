"""A model that was loaded from a Hugging Face folder, written as a new GGUF file that llama.cpp runs.

    header            the keys that gguf_write_keys.py and gguf_write_tokenizer.py find for it, by gguf.GGUFWriter
    matrices          as the model holds them: q_4_1 stays q4_1, f16 stays f16; rows of q and k in llama.cpp's order
    norms, biases     float32, from the folder (the model may compute in 16 bits); 1 + w where llama.cpp wants it

For the architectures that gguf_model.py reads, by the same tables. What a file cannot say is refused before anything is
computed (`why_not_gguf`): the header is drafted, read again as any file's is, and compared with the model. A GGUF file has
the loaded file as its template (gguf_write.py); here there is none, hence the writer of the `gguf` package.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor, nn

from qgraft import storage
from qgraft.adapters.base import base_of
from qgraft.adapters.lora import LoraLayer
from qgraft.adapters.lora_experts import stack_paths
from qgraft.checkpoints.folder_model import read_vectors
from qgraft.checkpoints.folder_write import check_source
from qgraft.checkpoints.generation import GGUF_SAMPLING
from qgraft.checkpoints.gguf_file import GgufFile, TensorInfo
from qgraft.checkpoints.gguf_key_parts import WINDOW
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_llamacpp import why_unread
from qgraft.checkpoints.gguf_model import SUPPRESSED
from qgraft.checkpoints.gguf_rules import (
    ARCHITECTURES,
    ROUTER,
    column_order,
    expert_tensors,
    name_map,
    row_order,
    tensor_name,
    to_file,
)
from qgraft.checkpoints.gguf_t5 import t5_notes
from qgraft.checkpoints.gguf_write import FILE_TYPES, TYPE_IDS
from qgraft.checkpoints.gguf_write_keys import ARCHITECTURE_OF, lost_in_keys, written_keys
from qgraft.checkpoints.gguf_write_tokenizer import check_tokenizer, tokenizer_keys
from qgraft.checkpoints.origin import Matrix, Origin, Stored, find_origin, module_at
from qgraft.data.scripted import WritesPrompts
from qgraft.errors import CheckpointError, StorageError, UnsupportedError, worded
from qgraft.formats import get_format
from qgraft.linear import QuantizedEmbedding, QuantizedLinear
from qgraft.model_parts import decoder_of, heads_of

ALIGNMENT = 32
POSITIONS = "position_embd.weight"  # llama.cpp adds them in float32


@dataclass(frozen=True, eq=False)
class Draft:
    """The file as it will be, without the values of its tensors.

    Attributes:
        origin: where the matrices of the model lie in the file to be; like that of a loaded file.
        file: header and, as its only data, the tensors of the rotations.
        vectors: parameter of the model -> tensor of the file; several parameters for one tensor are its rows. Of the biases
            of all experts, which may be several tensors, the parameter's name with that of the stack behind it.
        notes: what differs in llama.cpp, each one sentence.
    """

    origin: Origin
    file: GgufFile
    vectors: dict[str, str]
    rotations: dict[str, Tensor]
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return str(self.file.metadata["general.architecture"])


def why_not_gguf(model: nn.Module) -> str | None:
    """Why a model from a folder cannot be written as a GGUF file; None where it can.

    It is asked before merging and before training, of the model as it was loaded: formats are not looked at, because
    save(..., to=) can give others.
    """
    try:
        draft_gguf(model)
    except (UnsupportedError, CheckpointError) as error:
        return error.message
    return None


def gguf_names(model: Any) -> tuple[str, Origin]:
    """(general.architecture, where the matrices of a model from a folder lie in its GGUF file).

    Raises UnsupportedError for an architecture that is not written.
    """
    origin = find_origin(model)
    architecture = _architecture(model)
    matrices, _ = _places(model, architecture, partial(_refusal, origin.path))
    return architecture, Origin(origin.path, "gguf", origin.digest, matrices)


def _architecture(model: Any) -> str:
    architecture = ARCHITECTURE_OF.get(model.config.model_type)
    if architecture is None or isinstance(base_of(model).tokenizer, WritesPrompts):  # ChatGLM-6B and ChatGLM2-6B
        possible = ", ".join(sorted(ARCHITECTURE_OF))
        raise _refusal(find_origin(model).path, f"its architecture is {model.config.model_type}; possible: {possible}")
    return architecture


def draft_gguf(model: Any) -> Draft:
    """The file that `model` would be. Raises UnsupportedError for what no GGUF file can say."""
    origin = find_origin(model)
    refuse = partial(_refusal, origin.path)
    if heads := heads_of(model):
        raise refuse(f"it has no place for the head of a classifier ({', '.join(heads)})")
    config, architecture = model.config, _architecture(model)
    tokenizer = base_of(model).tokenizer
    if tokenizer is None:
        raise refuse("it came without a tokenizer, and a GGUF file holds one")
    matrices, vectors = _places(model, architecture, refuse)
    names = {*(each.name for each in matrices.values()), *vectors.values()}
    if (unread := why_unread(architecture, config, names)) is not None:
        raise refuse(unread)
    shapes = {each.name: _file_shape(each, _held(model, path).shape) for path, each in matrices.items()}
    rows = shapes["token_embd.weight"][0]
    if beyond := [token for token in base_of(model).tokens.values() if token.id >= rows]:
        raise refuse(f"an adapter has rows of new tokens, {beyond[0].text!r} with the id {beyond[0].id}, and the embedding "
                     f"has {rows} rows until it is merged",
                     hint=worded(flags="`qgraft merge --output FOLDER`, then `qgraft export --model FOLDER --to gguf`",
                                 python="merge() it first, then save()"))  # fmt: skip
    rotary = decoder_of(model).rotary_emb if TABLE[architecture].rotates else None
    try:
        keys, rotations = written_keys(config, architecture, rotary)
        keys = {"general.architecture": architecture, "general.name": origin.path.resolve().name, **keys}
        keys |= tokenizer_keys(tokenizer, rows) | _answer_tokens(model, tokenizer)
        file = _header(origin.path, keys, shapes, _vector_shapes(model, vectors), rotations)
        notes = check_tokenizer(tokenizer, file)
        lost = lost_in_keys(config, rotary, file)
    except (UnsupportedError, CheckpointError) as error:
        raise refuse(error.message) from error
    if lost:
        raise refuse(f"no key of it states {'; '.join(lost)}")
    if (window := keys.get(f"{architecture}.{WINDOW}")) and architecture in ("phi3", "starcoder2"):
        notes.append(f"llama.cpp passes over this architecture's window of {window} tokens: longer texts differ there")
    notes += t5_notes(file)
    to_be = Origin(origin.path, "gguf", origin.digest, matrices)
    return Draft(to_be, file, vectors, rotations, tuple(notes))


def write_new_gguf(
    target: Path, model: Any, draft: Draft, matrices: Sequence[Matrix], uniform: str | None
) -> tuple[int, int, int]:
    """Write the model with these matrices to `target`, whole or not at all.

    Returns (bytes written, bytes of the folder's weights, tensors written). Raises CheckpointError, StorageError.
    """
    origin = find_origin(model)
    check_source(origin)
    matrices = [_in_float32(each) if each.stored.name == POSITIONS else each for each in matrices]
    vectors = {**_vectors(model, draft), **draft.rotations}
    infos: dict[str, tuple[tuple[int, ...], str]] = {
        each.stored.name: (_file_shape(each.stored, each.packed.shape), each.format) for each in matrices
    }
    infos |= {name: (tuple(value.shape), "f32") for name, value in vectors.items()}
    header = _header_bytes(draft, infos, uniform)
    sizes = [_padded(_nbytes(*info)) for info in infos.values()]
    data = chain(_matrix_chunks(matrices), _vector_chunks(vectors))
    nbytes = len(header) + sum(sizes)
    storage.write_chunks(target, chain([header], data), nbytes)
    before = sum(path.stat().st_size for path in origin.path.iterdir() if path.suffix in (".safetensors", ".bin"))
    return nbytes, before, len(infos)


_KEEP = "keep the adapter as it is: PEFT reads its folder; or train on the GGUF file of the base"


def _refusal(path: Path, why: str, hint: str = _KEEP) -> UnsupportedError:
    return UnsupportedError(f"{path} cannot be written as a GGUF file: {why}", hint=hint)


def _places(model: Any, architecture: str, refuse: Any) -> tuple[dict[str, Stored], dict[str, str]]:
    """({module path: its matrix in the file}, {parameter: its tensor}); what is tied is written once."""
    names, rules = name_map(architecture, model.config), ARCHITECTURES[architecture]
    matrices, vectors, seen = dict[str, Stored](), dict[str, str](), set[int]()

    def stored(parameter: str) -> str:
        found = tensor_name(names, re.sub(r"\.norms\.\d+\.", ".", parameter))
        if found is None:
            raise refuse(f"llama.cpp has no tensor for {parameter.removesuffix('.weight')}")
        return found

    for path in stack_paths(model):
        parameter, _, part = path.rpartition(".")
        experts: Any = module_at(model, path)
        matrices[path] = Stored(expert_tensors(parameter)[part], experts=experts.num_experts)
    for path, module in model.named_modules():
        held: Any = module.base if isinstance(module, LoraLayer) else module
        inner = path.endswith(".base") and isinstance(model.get_submodule(path[:-5]), LoraLayer)
        if not isinstance(held, QuantizedLinear | QuantizedEmbedding) or inner or id(held.packed_weight) in seen:
            continue
        seen.add(id(held.packed_weight))
        name = stored(f"{path}.weight")
        rows: int = held.packed_weight.get().shape[0]
        matrices[path] = Stored(name, row_order(name, rows, rules, model.config), column_order(name, model.config))
    held_buffers = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in held_buffers]
    for name, parameter in chain(model.named_parameters(), buffers):
        if ".packed_weight." in name:
            continue
        if ".loras." in name or ".lora_" in name or name == "computes_in":
            continue
        plain = name.replace(".base.", ".")
        if biases := expert_tensors(plain):
            if parameter.dim() != 2:
                raise refuse(
                    f"{name} is held as floats, and experts are written packed",
                    hint=worded(flags="give --quantize f16, or smaller", python='load with quantize="f16", or smaller'),
                )
            vectors |= {f"{plain}.{part}": tensor for part, tensor in biases.items()}
            continue
        if parameter.dim() != 1 and not stored(plain).endswith((rules.kernels, ROUTER)):
            raise refuse(f"{name} is a {parameter.dim()}-dimensional parameter that is kept as floats")
        vectors[plain] = stored(plain)
    return matrices, vectors


def _held(model: Any, path: str) -> Any:
    held: Any = module_at(model, path)
    return held.packed_weight.get()


def _file_shape(stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] of a matrix, [experts, out, in] of a stack."""
    rows, width = shape
    return (stored.experts, rows // stored.experts, width) if stored.experts else (rows, width)


def _vector_shapes(model: Any, vectors: dict[str, str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in vectors.items():
        owner, _, leaf = name.rpartition(".")
        if parts := _parts_of_biases(owner):
            experts, width = model.get_parameter(owner).shape
            shapes[tensor] = (experts, width // len(parts))
            continue
        module = model.get_submodule(owner)
        shape = getattr(module.base if isinstance(module, LoraLayer) else module, leaf).shape
        rows = shapes.get(tensor, (0,))[0] + 1
        shapes[tensor] = (
            (rows, *shape) if ".norms." in name else tuple(size for size in shape if size != 1 or len(shape) == 1)
        )
    return shapes


def _parts_of_biases(parameter: str) -> dict[str, str]:
    """The tensors of a file that the biases of all experts of a layer are; none where it is another parameter."""
    return expert_tensors(parameter) if parameter.endswith("_bias") else {}


def _answer_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A second end token that the folder states: where a turn ends; and those that it rules out in answers."""
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    others = [each for each in (stated if isinstance(stated, list) else [stated]) if each is not None]
    others = [each for each in others if each != tokenizer.eos_token_id]
    never = list(getattr(model.generation_config, "suppress_tokens", None) or ())
    drawn = {} if (info := base_of(model).info) is None else info.sampling
    sampling = {key: drawn[name] for key, name in GGUF_SAMPLING.items() if name in drawn}
    ends = {"tokenizer.ggml.eot_token_id": others[0]} if others else {}
    return ends | ({SUPPRESSED: never} if never else {}) | sampling


def _header(
    path: Path,
    keys: dict[str, Any],
    matrices: dict[str, tuple[int, ...]],
    vectors: dict[str, tuple[int, ...]],
    rotations: dict[str, Tensor],
) -> GgufFile:
    """The header as a reader would have it; of the tensors only the rotations have values."""
    infos = {name: TensorInfo(name, shape, "f16", 0, 0) for name, shape in matrices.items()}
    infos |= {name: TensorInfo(name, shape, "f32", 0, 0) for name, shape in vectors.items()}
    data, end = [torch.empty(0)], 0
    for name, value in rotations.items():
        infos[name] = TensorInfo(name, tuple(value.shape), "f32", end, 4 * value.numel())
        data.append(value.float())
        end += 4 * value.numel()
    return GgufFile(path, 3, ALIGNMENT, keys, {}, infos, 0, 0, torch.cat(data).view(torch.uint8))


def _vectors(model: Any, draft: Draft) -> dict[str, Tensor]:
    """Tensor of the file -> float32 values, with rows of heads put together, permuted and with llama.cpp's 1 + w."""
    origin, rules = find_origin(model), ARCHITECTURES[draft.architecture]
    rows: dict[str, list[Tensor]] = {}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in draft.vectors)
    biases = {owner: tensors for owner in owners if (tensors := _parts_of_biases(owner))}
    plain = [name for name in draft.vectors if name.rpartition(".")[0] not in biases]
    for parameter, value in read_vectors(origin.path, model.config, [*plain, *biases]).items():
        if parameter in biases:
            tensors = biases[parameter]
            count = len(tensors)
            cuts = [value[:, n::count] for n in range(count)] if rules.alternates else value.chunk(count, 1)
            rows |= {tensor: [cut.float().cpu()] for tensor, cut in zip(tensors.values(), cuts, strict=True)}
            continue
        rows.setdefault(draft.vectors[parameter], []).append(value.float().cpu())
    found = {}
    for name, parts in rows.items():
        value = torch.stack(parts) if len(parts) > 1 else parts[0]
        found[name] = to_file(name, value, rules, model.config)
    return found


def _in_float32(matrix: Matrix) -> Matrix:
    return Matrix(matrix.path, matrix.stored, matrix.packed, "f32")


def _nbytes(shape: tuple[int, ...], format: str) -> int:
    return get_format(format).nbytes(math.prod(shape[:-1]), shape[-1])


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _header_bytes(draft: Draft, infos: dict[str, tuple[tuple[int, ...], str]], uniform: str | None) -> bytes:
    """Keys and tensor infos as the `gguf` package writes them, up to where the first tensor begins."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header.gguf"
            writer = GGUFWriter(path, draft.architecture)
            for key, value in draft.file.metadata.items():
                _add(writer, key, value)
            if uniform in FILE_TYPES:
                writer.add_file_type(FILE_TYPES[uniform])
            writer.add_quantization_version(2)
            for name, (shape, format) in infos.items():
                kind = GGMLQuantizationType(TYPE_IDS[format])
                writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, format), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot write a temporary file: {error.strerror or error}", hint="TMPDIR names the folder of such files"
        ) from error
    return header + bytes(_padded(len(header)) - len(header))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":
        return  # written by the writer itself
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
        bytes: writer.add_array,
    }
    adders[type(value)](key, value)


def _matrix_chunks(matrices: Sequence[Matrix]) -> Iterator[bytes]:
    for matrix in matrices:
        written = 0
        for panel in matrix.panels():
            (data,) = panel.parts
            raw = data.numpy().tobytes()
            written += len(raw)
            yield raw
        yield bytes(_padded(written) - written)


def _vector_chunks(vectors: dict[str, Tensor]) -> Iterator[bytes]:
    for value in vectors.values():
        raw = value.float().contiguous().numpy().tobytes()
        yield raw + bytes(_padded(len(raw)) - len(raw))
