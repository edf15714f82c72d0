"""What a command may write over: the one rule of merge, save, export and combine, asked before anything long is begun."""

from collections.abc import Iterable
from pathlib import Path

from qgraft import storage
from qgraft.errors import OptionError, StorageError, option

KINDS = {"gguf": b"GGUF", "json": b"{", "png": b"\x89PNG"}  # what is written in one file each, and how it begins


def check_new(path: Path, overwrite: bool = False, inputs: Iterable[Path] = (), kind: str = "") -> None:
    """Raise where writing to `path` would replace something: the one rule of merge, save, export and combine.

    Args:
        overwrite: whether what is there may be replaced; an empty folder always may, also one that is locked (locks.py).
        inputs: what the new file or folder is made of. None of them is ever replaced, nor a folder that holds one, nor what
            one holds, but for a file of this kind.
        kind: of the file that is written (KINDS). One that neither is called so nor begins so is not replaced: rows, weights.

    Raises StorageError, and OptionError where `path` is an input.
    """
    here = path.resolve()
    alike = bool(kind) and path.is_file() and (path.suffix == f".{kind}" or _begins(path, KINDS[kind]))
    for source in (each.resolve() for each in inputs if each.exists()):
        if here == source or (path.exists() and path.samefile(source)):
            raise OptionError(f"{path} is what is read, and is never written over", hint="give another name")
        if path.is_dir() and here in source.parents:
            raise OptionError(f"{path} holds {source.name}, which is read", hint="give another name")
        if path.exists() and source in here.parents and not alike:
            raise OptionError(f"{path} is a part of {source}, which is read, and is never written over",
                              hint="give another name")  # fmt: skip
    held = (each for each in path.iterdir() if each.name != storage.LOCK) if path.is_dir() else ()
    taken = any(held) if path.is_dir() else path.exists() or path.is_symlink()
    if taken and not overwrite:
        raise StorageError(
            f"{path} exists already", hint=f"give another name, or {option('overwrite')} to replace what is there"
        )
    if path.is_file() and kind and not alike:
        raise StorageError(f"{path} is no {kind.upper()} file as is written there, so it is not replaced",
                           hint="give another name")  # fmt: skip


def check_folder_target(target: Path) -> None:
    """Raise StorageError where publish_folder would put a folder in place of what no publish_folder wrote."""
    foreign = storage.unlisted_files(target)
    if target.is_dir() and not foreign:
        return
    if target.exists():
        got = f"it holds other files: {', '.join(foreign[:4])}" if target.is_dir() else "it is a file"
        raise StorageError(f"cannot write {target}: {got}", hint="give the name of a new folder")


def _begins(path: Path, with_bytes: bytes) -> bool:
    """Whether a file begins so, or is empty."""
    with storage.named_errors(path), open(path, "rb") as file:
        return file.read(len(with_bytes)) in (with_bytes, b"")
