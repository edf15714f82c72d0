"""save(): the model back into the container it came from, same format, same size, with what a merge put into it.

A model from a folder may also become a GGUF file, by the target's name (gguf_from_folder.py).

Only packed matrices are taken from the model. Everything else (metadata, tokenizer, norms, biases) is copied from the
file or folder that was loaded, so an unchanged GGUF model gives an identical file. What is written stands under its
final name whole or not at all (storage.py).
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from torch import nn

from qgraft import storage, targets
from qgraft.adapters.base import base_of, require_model
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.lora_experts import stack_paths
from qgraft.adapters.targets import find_targets
from qgraft.checkpoints import folder_write, gguf_write
from qgraft.checkpoints.fingerprint import fingerprint
from qgraft.checkpoints.folder_write import check_experts, check_source, folder_entries, write_folder
from qgraft.checkpoints.gguf_from_folder import Draft, draft_gguf, write_new_gguf
from qgraft.checkpoints.gguf_split import part_paths
from qgraft.checkpoints.gguf_write import gguf_entries, open_source, write_gguf
from qgraft.checkpoints.origin import Matrix, Origin, current_matrices, find_origin, is_linear
from qgraft.checkpoints.thudm_prefix import unsaved_adapters
from qgraft.errors import AdapterError, OptionError, StorageError, UnsupportedError, near_match, worded
from qgraft.formats import FORMATS, Format, fitting_format, get_format, misfit_notes
from qgraft.given import path_given
from qgraft.locks import file_locked

CONTAINERS: Final = {"gguf": gguf_write.CONTAINER, "folder": folder_write.CONTAINER}  # by Origin.container


@dataclass(frozen=True)
class SaveReport:
    """What save() wrote.

    Attributes:
        path: the file or folder.
        nbytes: its size; of a folder, the size of its weights.
        source_nbytes: the same of the container that the model was loaded from.
        changed: tensors that differ from those.
        formats: number of weights in each format, for example {"q4_1": 106168320}.
        notes: what a reader should know, each one sentence.
    """

    path: Path
    nbytes: int
    source_nbytes: int
    changed: int
    formats: dict[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e6:.1f} MB"
        if self.nbytes != self.source_nbytes:
            size += f" (was {self.source_nbytes / 1e6:.1f} MB)"
        return "\n".join([f"{self.path}: {size}, {self.changed} tensors changed", *self.notes])


def save(
    model: nn.Module, path: str | Path, *, to: str | Mapping[str, str] | None = None, overwrite: bool = False
) -> SaveReport:
    """Write the model's packed weights into a copy of the container that it was loaded from.

    Args:
        path: the file to write (GGUF), or the folder. A model in several files becomes as many, PATH-00001-of-0000N.gguf
            and those after it. A name that ends in .gguf makes a new GGUF file of a model from a
            folder, for llama.cpp and what is built on it; what such a file cannot say is refused.
        to: another format for every linear layer but the output layer, and for experts ("q8_0"), or for some layers:
            {name: format}, where a name is a module path, its last parts, the tensor's name in the container, or one of
            them with * in it; the first that fits a layer counts. Layers are requantized from their present values.
        overwrite: replace a file, or a folder that an earlier save wrote; without it an existing one is refused. What
            the model was loaded from is never replaced.

    A prefix that came with the folder is in the copy as it is in the source.

    Raises AdapterError while other adapters are active, CheckpointError when the container changed since it was loaded,
    OptionError, UnsupportedError for a format that the container cannot hold, StorageError, also while another process
    writes there.
    """
    if unsaved := unsaved_adapters(model, list(active_adapters(model))):
        raise AdapterError(
            f"the adapter {', '.join(unsaved)} is active and would not be in the saved weights",
            hint=worded(
                flags="`qgraft merge` writes it into the weights, `qgraft export` beside them",
                python="merge it first, write it with save_adapter(), or take it off with detach_lora()",
            ),
        )
    require_model(model)
    origin = find_origin(model)
    target = _absolute(path, origin)
    draft = _draft(model, origin, target)
    _check_target(target, origin, draft is not None, overwrite)
    with file_locked(target):
        _check_target(target, origin, draft is not None, overwrite)  # another process may just have written it
        matrices, notes = _plan(model, origin if draft is None else draft.origin, to)
        if draft is not None:
            written = write_new_gguf(target, model, draft, matrices, _uniform(model, matrices))
            notes += [f"a new GGUF file ({draft.architecture}), made of {origin.path}", *draft.notes]
        elif origin.container == "gguf":
            written = write_gguf(target, origin, matrices, _uniform(model, matrices))
        else:
            written = write_folder(target, origin, matrices, model)
    return SaveReport(target, *written, _count(matrices), tuple(notes))


def save_pretrained(model: nn.Module, save_directory: str | Path, **_: Any) -> None:
    """What `model.save_pretrained(folder)` does on a model of ours: save() for one that came from a folder.

    Raises UnsupportedError for one that came as a GGUF file, which is no folder, and what save() raises.
    """
    origin = base_of(model).origin
    if isinstance(origin, Origin) and origin.container == "gguf":
        raise UnsupportedError(
            f"save_pretrained({str(save_directory)!r}): the model came as a GGUF file, and is written as one",
            hint="qgraft.save(model, 'x.gguf'); the adapter alone: qgraft.save_adapter(model, folder)",
        )
    save(model, save_directory)


def check_target(
    model: nn.Module, path: str | Path, *, to: str | Mapping[str, str] | None = None, overwrite: bool = False
) -> int:
    """Raise what save() would raise for this path and these formats, before anything long is begun.

    Also where the disk has no room. Returns the bytes that the matrices will take there, nearly all of what is written.
    """
    origin = find_origin(model)
    target = _absolute(path, origin)
    draft = _draft(model, origin, target)
    _check_target(target, origin, draft is not None, overwrite)
    matrices, _ = _plan(model, origin if draft is None else draft.origin, to)
    nbytes = sum(matrix.nbytes for matrix in matrices if not matrix.stored.repeated)
    storage.require_room(target, nbytes)
    return nbytes


def current_fingerprint(model: nn.Module) -> str:
    """The fingerprint that the model's container would have if it were saved now. Raises CheckpointError."""
    origin = find_origin(model)
    matrices = current_matrices(model, origin)
    if origin.container == "gguf":
        return fingerprint(gguf_entries(open_source(origin), matrices))
    check_source(origin)
    return fingerprint(folder_entries(origin, matrices, model))


def _absolute(path: str | Path, origin: Origin) -> Path:
    """The target; the first of the files where a model came in several."""
    return part_paths(Path(os.path.abspath(path_given("path", path).expanduser())), origin.parts)[0]


def _draft(model: nn.Module, origin: Origin, target: Path) -> Draft | None:
    """The new GGUF file, where a model from a folder is to be one: by the target's name."""
    return draft_gguf(model) if origin.container == "folder" and target.suffix == ".gguf" else None


def _check_target(target: Path, origin: Origin, new: bool, overwrite: bool) -> None:
    parent = target.parent
    sources = part_paths(origin.path, origin.parts)
    for each in part_paths(target, origin.parts):
        targets.check_new(each, True, sources)
    if not parent.is_dir():
        nearest = next(each for each in (parent, *parent.parents) if each.exists())
        if not nearest.is_dir():
            raise StorageError(f"cannot write {target}: {nearest} is a file", hint="give a place in a folder")
        raise StorageError(f"cannot write {target}: {parent} does not exist", hint="create the folder first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {target}: no permission to write in {parent}")
    if (new or origin.container == "gguf") and target.is_dir():
        raise StorageError(f"cannot write {target}: it is a folder", hint=f"give a file: {target / origin.path.name}")
    if origin.container == "folder" and not new:
        _check_folder(target)
    for each in part_paths(target, origin.parts):
        targets.check_new(each, overwrite, kind="gguf" if new or origin.container == "gguf" else "")


def _check_folder(target: Path) -> None:
    """A folder is replaced only if an earlier save wrote all that is in it."""
    if target.exists() and not target.is_dir():
        raise StorageError(
            f"cannot write {target}: it is a file; a model from a folder is saved as a folder, or as NAME.gguf"
        )
    foreign = storage.unlisted_files(target)
    if foreign or (any(target.glob("*")) and not (target / "config.json").is_file()):
        listed = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise StorageError(
            f"cannot write {target}: the folder holds files that no save wrote: {listed or 'a training run'}",
            hint="give the name of a new folder",
        )


def _plan(model: nn.Module, origin: Origin, to: str | Mapping[str, str] | None) -> tuple[list[Matrix], list[str]]:
    """What is to be written, and notes on what stays as it is although `to` asks for it."""
    matrices = {matrix.path: matrix for matrix in current_matrices(model, origin)}
    fitted: dict[str, dict[str, tuple[int, str | None]]] = {}  # wanted format -> what fits whom
    stacks = set(stack_paths(model))
    for path, wanted in _wanted_formats(model, origin, to).items():
        matrix, width = matrices[path], matrices[path].packed.shape[1]
        fitting = fitting_format(_writable(origin, wanted, path in stacks).name, width)
        fitted.setdefault(wanted, {})[path] = (width, fitting)
        if fitting is not None:
            matrices[path] = replace(matrix, format=fitting)
    if origin.container == "folder" and stacks:
        check_experts(origin, list(matrices.values()), model)
    _check_held(origin, list(matrices.values()), stacks)
    return list(matrices.values()), [note for wanted, found in fitted.items() for note in misfit_notes(wanted, found)]


def _wanted_formats(model: nn.Module, origin: Origin, to: str | Mapping[str, str] | None) -> dict[str, str]:
    """{module path of a linear layer: the format that `to` asks for}."""
    if to is None:
        return {}
    if isinstance(to, str):
        return {path: to for path in _inner(model) if path in origin.matrices}
    names = {path: stored.name for path, stored in origin.matrices.items() if not stored.repeated}
    linears = {path: name for path, name in names.items() if is_linear(model, path)}
    wanted: dict[str, str] = {}
    for key, format_name in to.items():
        matched = [path for path, name in linears.items() if _is_called(key, path, name)]
        if not matched:
            leaves = {path.rpartition(".")[2] for path in linears}
            raise OptionError(
                f"to={{{key!r}: ...}}: no linear layer is named so; the model has: {', '.join(sorted(leaves))}",
                hint=near_match(key, leaves),
            )
        for path in matched:
            wanted.setdefault(path, format_name)
    return wanted


def _is_called(key: str, path: str, name: str) -> bool:
    return any(fnmatchcase(f".{word}", f"*.{key}") for word in (path, name, name.removesuffix(".weight")))


def _writable(origin: Origin, wanted: str, experts: bool) -> Format:
    """The format called `wanted`. Raises UnsupportedError when nothing can be requantized to it in this container."""
    chosen = get_format(wanted)
    container = CONTAINERS[origin.container]
    held = container.experts if experts else container.held
    if chosen.quantize is None or wanted not in held:
        possible = sorted(name for name in held if FORMATS[name].quantize is not None)
        raise UnsupportedError(
            f"to={wanted!r}: {container.kind} can get{' in experts' * experts}: {', '.join(possible)}"
        )
    return chosen


def _check_held(origin: Origin, matrices: Sequence[Matrix], stacks: Collection[str]) -> None:
    container = CONTAINERS[origin.container]
    held = {each.path: container.experts if each.path in stacks else container.held for each in matrices}
    homeless = Counter(each.format for each in matrices if each.format not in held[each.path])
    if homeless:
        found = ", ".join(f"{number} matrices in {name}" for name, number in sorted(homeless.items()))
        raise UnsupportedError(
            f"{found}: {container.kind} can hold: {', '.join(sorted(container.held))}", hint=container.hint
        )


def _uniform(model: nn.Module, matrices: Sequence[Matrix]) -> str | None:
    """The format that every linear layer but the output layer, and every expert, will have, if they agree."""
    inner = set(_inner(model))
    formats = {matrix.format for matrix in matrices if matrix.path in inner}
    return formats.pop() if len(formats) == 1 else None


def _inner(model: nn.Module) -> list[str]:
    """The paths of all linear layers but the output layer, and of the stacks of experts."""
    return find_targets(model, "all-linear") + stack_paths(model)


def _count(matrices: Sequence[Matrix]) -> dict[str, int]:
    """Number of weights in each format, as BaseInfo.formats has them."""
    formats: Counter[str] = Counter()
    for matrix in matrices:
        if not matrix.stored.repeated:
            formats[matrix.format] += matrix.packed.shape[0] * matrix.packed.shape[1]
    return dict(formats)
