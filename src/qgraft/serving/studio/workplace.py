"""The folder that the page works in: what lies where, and which names a request may give.

    FOLDER/NAME/               a run: what `qgraft train` writes; the server finds its adapter by the name
    FOLDER/GROUP/NAME/         one that was put there otherwise
    FOLDER/datasets/NAME.csv   what was dropped on the page
    FOLDER/merged/NAME.gguf    merged files, each with NAME.merge.json beside it
    FOLDER/.qgraft/            what was started from the page: its options, its state, what it wrote to the terminal

A request gives names, never paths: their letters are checked, and what they lead to must lie in the folder with all links
followed.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from qgraft.adapters.attach import check_name
from qgraft.errors import OptionError, StorageError
from qgraft.json_files import read_object
from qgraft.serving.fields import ApiError
from qgraft.storage import make_folder, named_errors

DATASETS, MERGED, HIDDEN = "datasets", "merged", ".qgraft"
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
RUN_FILES = ("run.json", "metrics.jsonl")
_PART = re.compile(r"[\w-][\w.-]{0,99}")


class Workplace:
    """See the module. The folder is made where it is missing.

    Args:
        model: what children load as their base, as a path that does not depend on the current folder.
        quantize: the format that it is packed in while loading.

    Raises OptionError, StorageError.
    """

    def __init__(self, root: Path, model: str, quantize: str | None = None) -> None:
        self.root, self.quantize = root.resolve(), quantize
        self.model = str(Path(model).resolve()) if Path(model).exists() else model
        if "," in str(self.root):
            raise OptionError(f"folder {self.root}: a comma separates datasets", hint="choose a folder without one")
        if self.root.exists() and not self.root.is_dir():
            raise StorageError(f"folder {self.root} is a file, expected a folder")
        for name in ("", DATASETS, MERGED, HIDDEN):
            make_folder(self.root / name)

    # -- names --

    def dataset(self, name: str) -> Path:
        """The file of a dataset, which need not be there. Raises ApiError for a name that none can have."""
        if not isinstance(name, str) or not _PART.fullmatch(name) or not name.endswith(SUFFIXES):
            raise ApiError(
                400,
                f"dataset: expected a name of letters and digits that ends in {', '.join(SUFFIXES)}",
                param="dataset",
            )
        return self._inside(self.root / DATASETS / name, "dataset")

    def run(self, name: str) -> Path:
        """The folder of a run that is there. Raises ApiError."""
        parts = name.split("/") if isinstance(name, str) else []
        if not 1 <= len(parts) <= 2 or not all(_PART.fullmatch(part) for part in parts):
            raise ApiError(400, "name: expected the name of a run", param="name")
        path = self._inside(self.root.joinpath(*parts), "name")
        if not is_run(path):
            raise ApiError(404, f"there is no run {name!r}", kind="NotFoundError", param="name")
        return path

    def started(self, name: str) -> Path:
        """The folder of a run that was started here, and may have written nothing yet. Raises ApiError."""
        return self._inside(self.root / name, "name")

    def new_run(self, name: object) -> Path:
        """The folder of a run that is to be. Raises ApiError for a name that no adapter can have, or that is taken."""
        path = self._new(self.root, name, "")
        if path.exists() and any(path.iterdir()):
            raise ApiError(409, f"there is something called {path.name!r} already: choose another name", param="name")
        return path

    def new_merged(self, name: object) -> Path:
        """The file of a merge that is to be; one that is there stays. Raises ApiError."""
        path = self._new(self.root / MERGED, name, ".gguf")
        if path.exists():
            raise ApiError(409, f"there is a file {path.name} already: choose another name", param="name")
        return path

    def merged(self, name: str) -> Path:
        """A merged file that is there. Raises ApiError."""
        if not isinstance(name, str) or not _PART.fullmatch(name) or not name.endswith(".gguf"):
            raise ApiError(400, "name: expected the name of a merged file", param="name")
        path = self._inside(self.root / MERGED / name, "name")
        if not path.is_file():
            raise ApiError(404, f"there is no file {name!r}", kind="NotFoundError", param="name")
        return path

    # -- what is there --

    def datasets(self) -> list[Path]:
        """The newest first."""
        return _newest(
            path for path in (self.root / DATASETS).iterdir() if path.suffix in SUFFIXES and self._is_our_file(path)
        )

    def runs(self) -> dict[str, Path]:
        """Folders of runs by their names, the newest first; not those that links lead out of the folder to."""
        groups = [path for path in self.root.iterdir() if self._is_ours(path) and not is_run(path)]
        found = [path for folder in (self.root, *groups) for path in folder.iterdir() if self._is_ours(path)]
        return {path.relative_to(self.root).as_posix(): path for path in _newest(filter(is_run, found))}

    def merges(self) -> list[Path]:
        """The merged files, the newest first."""
        return _newest(path for path in (self.root / MERGED).glob("*.gguf") if self._is_our_file(path))

    def _is_our_file(self, path: Path) -> bool:
        return path.is_file() and self.root in path.resolve().parents

    def _is_ours(self, path: Path) -> bool:
        named = _PART.fullmatch(path.name) and path.name not in (DATASETS, MERGED)
        return bool(named) and path.is_dir() and self.root in path.resolve().parents

    def _new(self, folder: Path, name: object, suffix: str) -> Path:
        try:
            check_name(name[:100] if isinstance(name, str) else "")
        except OptionError as error:
            raise ApiError(400, error.message, param="name", hint=error.hint) from error
        if name in (DATASETS, MERGED):
            raise ApiError(400, f"name: {name!r} is a folder of the page itself", param="name")
        return self._inside(folder / f"{name}{suffix}", "name")

    def _inside(self, path: Path, param: str) -> Path:
        with named_errors(path):
            inside = self.root in path.resolve().parents
        if not inside:
            raise ApiError(403, f"{param}: leads out of the server's folder", param=param, kind="permission_error")
        return path


def is_run(path: Path) -> bool:
    """Whether `qgraft train` wrote, or writes, there."""
    return any((path / name).is_file() for name in RUN_FILES)


def read_or_none(path: Path) -> dict[str, object] | None:
    """The object in a JSON file that others write; None where there is none, or it is broken."""
    try:
        return read_object(path, StorageError, finite=False) if path.is_file() else None
    except StorageError:
        return None


def _newest(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=_changed, reverse=True)


def _changed(path: Path) -> float:
    log = path / RUN_FILES[1]
    try:
        return (log if log.exists() else path).stat().st_mtime
    except FileNotFoundError:  # it is being deleted
        return 0.0
