"""A Hugging Face folder (config.json, *.safetensors, tokenizer files) as a model, quantized on the way in if asked.

The files are mapped. With `quantize` each weight is read, packed and let go before the next one is touched: a 16-bit
checkpoint far larger than memory can become a 4-bit model that fits. Without it the weights stay in the 16 or 32 bits
they have, as formats f16, bf16 and f32, and are views of the mapped file, as packed ones always are.

Which weights are quantized: those of linear layers but the output layer, as llama.cpp and bitsandbytes choose too; the
embedding and the output layer hold little of the size and cost most of the quality. A layer whose width the format has
no blocks for keeps its 16 bits, and the load says so.

Which tensors make up a matrix, and whether it is packed already, its layout says (layouts/); packed ones stay as they are.

Nothing in the folder is executed: no `auto_map`, no remote code, no pickle beyond tensors (shards.py). ChatGLM's folders
bring their architecture and tokenizer as Python files; ours are in models/, and theirs are not looked at.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from qgraft.adapters.base import BaseInfo, base_of
from qgraft.checkpoints.assemble import assemble, empty_model, packable, weight_formats
from qgraft.checkpoints.fingerprint import fingerprint
from qgraft.checkpoints.folder_config import adapter_note, config_of, read_config_json
from qgraft.checkpoints.folder_experts import stored_stacks
from qgraft.checkpoints.folder_processor import folder_processor
from qgraft.checkpoints.folder_tokenizer import folder_tokenizer
from qgraft.checkpoints.generation import read_generation
from qgraft.checkpoints.heads import Heads, Task, head_names, settle_task
from qgraft.checkpoints.layouts import Layout, StoredMatrix, find_layout, owners, tensor_names
from qgraft.checkpoints.names import same_names, transformers_names
from qgraft.checkpoints.origin import Origin, Stored
from qgraft.checkpoints.pack_experts import experts_module, float_experts_note, pack_experts, packs_experts
from qgraft.checkpoints.shards import open_shard, open_shards, shard_paths
from qgraft.checkpoints.thudm_prefix import KEY as PREFIX_KEY
from qgraft.checkpoints.thudm_prefix import holds_only_prefix
from qgraft.errors import CheckpointError, UnsupportedError, worded
from qgraft.experts import Stack
from qgraft.formats import PackedTensor, fitting_format, get_format, hold_floats, misfit_notes
from qgraft.formats import quantize as quantize_weight
from qgraft.model_parts import is_within, vision_of
from qgraft.models.find import architecture_of


def load_folder(
    folder: Path,
    dtype: torch.dtype,
    quantize: str | None = None,
    task: Task = Task(),  # noqa: B008  # frozen
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and tokenizer of a folder; the tokenizer is None when the folder has none.

    Args:
        dtype: what the model computes in.
        quantize: a writable format for the linear layers ("q4_1", "chatglm-int4", ...), or None.
        task: what it is loaded for.

    Raises CheckpointError for missing or broken files, UnsupportedError for an unknown architecture or format, or a
    folder that is already quantized by another library.
    """
    if quantize is not None and get_format(quantize).quantize is None:
        raise UnsupportedError(f"quantize={quantize!r}: this format can be read but not written yet")
    raw = read_config_json(folder)
    config = config_of(folder, raw)
    tokenizer, tokenizer_notes = folder_tokenizer(folder, config)
    tokenizer_notes += settle_task(config, task, tokenizer)
    with ExitStack() as stack:
        exact = (
            architecture_of(config) is not None
        )  # transformers' own may leave tensors out, ours have a place for all
        reader = _FolderReader(open_shards(folder, stack), raw, quantize, empty_model(config, dtype), exact)
        unexpected = reader.unexpected()
        if exact and holds_only_prefix(list(reader.tensors)):
            raise CheckpointError(
                f"{folder} holds a prefix (P-Tuning v2) and no model",
                hint="give its base as the model, and this folder as the adapter: "
                + worded(flags="--adapter FOLDER", python="load_adapter(model, folder)"),
            )
        problems = [f"unexpected {name}" for name in unexpected] if exact else []
        model = assemble(config, reader, dtype, str(folder), problems, reader.same())
    base = base_of(model)
    base.processor, processor_notes = folder_processor(folder, model, tokenizer)
    sampling, generation_notes = read_generation(model, folder)
    base.info = BaseInfo(
        source=str(folder),
        container="folder",
        architecture=config.model_type,
        fingerprint=fingerprint(entry for entries in reader.entries.values() for entry in entries),
        formats=weight_formats(model),
        notes=(
            *adapter_note(folder),
            *reader.notes,
            *reader.heads.notes(),
            *reader.misfits(),
            *(float_experts_note(model, quantize) if quantize else ()),
            *_unexpected_note(unexpected),
            *tokenizer_notes,
            *processor_notes,
            *generation_notes,
        ),
        sampling=sampling,
    )
    digest = folder_digest(folder, reader.vectors)
    head = head_names(reader.names.stored, reader.heads.paths)
    base.origin = Origin(folder.absolute(), "folder", digest, reader.matrices, tuple(reader.vectors), head=head)
    return model, tokenizer


def folder_digest(folder: Path, vectors: Collection[str]) -> str:
    """What tells whether a folder is the one that a model was loaded from: its config, what its tensors are called and
    like, and the values of these `vectors` and of a prefix. The matrices a model has in memory."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    entries: list[tuple[str, tuple[int, ...], str, Tensor]] = []
    with ExitStack() as stack:
        for path in shard_paths(folder):
            shard = open_shard(path, stack)
            for name in shard.names:
                sampled = name in vectors or name.startswith(PREFIX_KEY)
                value = shard.tensor(name) if sampled else torch.empty(0)
                entries.append((f"{path.name}: {name}", *shard.describe(name), value))
    return f"{config} {fingerprint(entries)}"


class _FolderReader:
    """Answers assemble()'s questions from open weight files, packing weights as they pass."""

    def __init__(
        self,
        tensors: dict[str, Callable[[], Tensor]],
        config: Mapping[str, Any],
        quantize: str | None,
        model: PreTrainedModel,
        exact: bool,
    ) -> None:
        self.tensors, self.config, self.quantize, self.model = tensors, config, quantize, model
        self.owners = owners(tensors)
        self.nameless = set(self.owners.values()) - self.owners.keys()  # no tensor is called as these matrices are
        weights = dict.fromkeys(self.owners.get(name, name) for name in tensors)
        self.names = (same_names if exact else transformers_names)(model, weights)
        output, self.heads, vision = model.get_output_embeddings(), Heads(model), vision_of(model)
        paths = [path for path, _ in model.named_modules() if path and packable(model, path)]
        self.layers: dict[str, Any] = {f"{path}.weight": model.get_submodule(path) for path in paths}
        self.quantized_names = {
            name
            for name, m in self.layers.items()
            if m is not output and not isinstance(m, nn.Embedding) and not is_within(name, vision)
        }
        self.ignored = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]  # recomputed
        if exact:
            self.ignored.append(rf"^{re.escape(PREFIX_KEY)}")  # attached when the model is there
        # what the fingerprint is made of, by the tensor's name
        self.entries: dict[str, list[tuple[str, tuple[int, ...], str, Tensor]]] = {}
        self.matrices: dict[str, Stored] = {}  # by module path
        self.vectors: list[str] = []  # the tensors that are read as floats
        self.notes: list[str] = []
        self.fitted: dict[str, tuple[int, str | None]] = {}  # what was quantized -> its width and format

    def __call__(self, name: str) -> PackedTensor | dict[str, Stack] | Tensor | None:
        if name in self.names.made:
            return self._make(name)
        stored = self.names.stored.get(name)
        if (drawn := self.heads.value(name, self.tensors.get(stored or ""))) is not None:
            return drawn
        if stored is None:
            return None
        matrix = StoredMatrix(stored, self.tensors, self.config)
        layout = find_layout(matrix)
        if layout.packed_as is not None:
            module = self._check_packed(name, layout)
            if layout.experts:
                return self._note_stacks(name, stored_stacks(name, module, layout, matrix))
        elif (value := matrix.numbers()).dim() != 2 or name not in self.layers:
            if (stacks := self._experts(name, value)) is not None:
                return stacks
            self._note_vector(stored, value)
            return value
        transposed = isinstance(self.layers[name], Conv1D)
        self.matrices[name.removesuffix(".weight")] = Stored(stored, transposed=transposed)
        found = layout.read(matrix, self._shape(name), transposed)
        packed = found if isinstance(found, PackedTensor) else self._pack(name, found)
        self.entries[stored] = matrix_entries(stored, packed)
        return packed

    def _check_packed(self, name: str, layout: Layout) -> Any:
        """The layer, or the experts, that a matrix is read for as it is: it is packed already."""
        module = experts_module(self.model, name) if layout.experts else self.layers.get(name)
        if module is None:
            kinds = "experts" if layout.experts else "linear layers and embeddings"
            raise UnsupportedError(
                f"{name} is stored in {layout.packed_as}, which is read for {kinds} only",
                hint="give the float checkpoint's folder",
            )
        if self.quantize is not None:
            raise UnsupportedError(
                f"quantize={self.quantize!r}: {name} is stored in {layout.packed_as} already",
                hint="leave quantize out, or give the float checkpoint's folder",
            )
        return module

    def _shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the layer whose weight is called so."""
        layer = self.layers[name]
        rows, columns = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
        return rows, columns

    def _experts(self, name: str, value: Tensor) -> dict[str, Stack] | None:
        """A parameter of all experts, packed where that is asked for."""
        module = experts_module(self.model, name) if self.quantize and packs_experts(self.quantize) else None
        if module is None or value.shape != getattr(module, name.rpartition(".")[2]).shape:  # reported by assemble()
            return None
        stacks, fitting = pack_experts(name, module, value, str(self.quantize))
        self.fitted |= {f"{name}.{part}": (stack.shape[2], fitting) for part, stack in stacks.items()}
        return self._note_stacks(name, stacks)

    def _note_stacks(self, name: str, stacks: dict[str, Stack]) -> dict[str, Stack]:
        for part, stack in stacks.items():
            path = f"{name}.{part}"
            self.matrices[path] = Stored(path)
            self.entries[path] = matrix_entries(path, stack.packed)
        return stacks

    def _make(self, name: str) -> PackedTensor | dict[str, Stack] | Tensor:
        """What transformers computes of several tensors: floats, also where a layer holds it."""
        made = self.names.made[name]
        for stored, _ in made.sources:
            if (layout := find_layout(StoredMatrix(stored, self.tensors, self.config))).packed_as is not None:
                raise UnsupportedError(f"{name} is computed of {stored}, which is stored in {layout.packed_as}")
        value = made.value(name, self.model, self.tensors)
        if (stacks := self._experts(name, value)) is not None:
            return stacks
        for stored, _ in made.sources:
            if stored not in self.entries:  # of a rule that makes several parameters, each is asked for
                self._note_vector(stored, self.tensors[stored]())
        if name not in self.layers or value.dim() != 2:
            return value
        return self._pack(name, value.T.contiguous() if isinstance(self.layers[name], Conv1D) else value)

    def _note_vector(self, stored: str, value: Tensor) -> None:
        if stored not in self.entries:
            self.vectors.append(stored)
            self.entries[stored] = [(stored, tuple(value.shape), str(value.dtype), value)]

    def same(self) -> dict[str, str]:
        """{parameter: the one that it is tied to and that is read}, as transformers ties them.

        Where a folder has both, and they differ, they are two parameters, whatever the configuration says.
        """
        ties = self.model.all_tied_weights_keys
        found: dict[str, str] = {}
        for target, source in ties.items():
            if target in self.names and source in self.names:
                one, other = (self.names.stored.get(name) for name in (target, source))
                if one is None or other is None or not self._equal(one, other):
                    self.notes.append(f"{target} and {source} differ in the folder, so they are not tied")
                    continue
                found[target] = source
                if target in self.layers:
                    self.matrices[target.removesuffix(".weight")] = Stored(one, repeated=True)  # a save writes it, too
            elif target in self.names:
                found[source] = target
            else:
                others = [other for other, its in ties.items() if its == source and other in self.names]
                found[target] = source if source in self.names or not others else others[0]
        return found

    def _equal(self, one: str, other: str) -> bool:
        """Whether two matrices of the folder have the same tensors, all of them."""
        a, b = (StoredMatrix(name, self.tensors, self.config) for name in (one, other))
        layout = find_layout(a)
        return find_layout(b) is layout and a.equals(b, layout.suffixes)

    def unexpected(self) -> list[str]:
        """The file's tensors that the model has no place for, without those that it computes itself."""
        placeless = set(self.names.unexpected)
        unknown = [name for name in self.tensors if self.owners.get(name, name) in placeless or self._is_stray(name)]
        return sorted(name for name in unknown if not any(re.search(pattern, name) for pattern in self.ignored))

    def _is_stray(self, name: str) -> bool:
        """Whether a tensor would be part of a matrix, were it kept in another layout: scales beside plain numbers."""
        weight = self.owners.get(name, name)
        if name == weight and name not in self.nameless:
            return False
        return name not in tensor_names(find_layout(StoredMatrix(weight, self.tensors, self.config)), weight)

    def misfits(self) -> list[str]:
        """Which matrices are not in the format that was asked for."""
        return [] if self.quantize is None else misfit_notes(self.quantize, self.fitted)

    def _pack(self, name: str, w_OI: Tensor) -> PackedTensor:
        try:
            return self._quantize(name, w_OI)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error.message}", hint=error.hint) from error

    def _quantize(self, name: str, w_OI: Tensor) -> PackedTensor:
        held = hold_floats(w_OI)
        if self.quantize is None or name not in self.quantized_names:
            return held
        fitting = fitting_format(self.quantize, w_OI.shape[1])
        self.fitted[name] = (w_OI.shape[1], fitting)
        return held if fitting is None else quantize_weight(w_OI, fitting)


def read_vectors(folder: Path, config: PreTrainedConfig, names: Collection[str]) -> dict[str, Tensor]:
    """The parameters called so (norms, biases) as the folder stores them, whatever a model of it computes in."""
    with ExitStack() as stack:
        exact = architecture_of(config) is not None
        tensors = open_shards(folder, stack)
        reader = _FolderReader(tensors, read_config_json(folder), None, empty_model(config, torch.float32), exact)
        found = {name: reader(name) for name in names}
    if missing := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{folder}: no tensor for {missing[0]}")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def matrix_entries(name: str, packed: PackedTensor) -> list[tuple[str, tuple[int, ...], str, Tensor]]:
    """What one matrix of a folder contributes to its fingerprint."""
    data, *others = packed.parts
    entries: list[tuple[str, tuple[int, ...], str, Tensor]] = [(name, packed.shape, packed.format, data)]
    for part, tensor in zip(get_format(packed.format).parts[1:], others, strict=True):
        entries.append((f"{name}_{part.name}", tuple(tensor.shape), str(tensor.dtype), tensor))
    return entries


def _unexpected_note(names: list[str]) -> list[str]:
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return [f"{len(names)} tensors of the folder have no place in the model: {listed}"] if names else []
