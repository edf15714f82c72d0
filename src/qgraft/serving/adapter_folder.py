"""A server's folder of adapters: which names lead where in it, and the list of what somebody loaded under a name of its own.

    NAME/, NAME.gguf     an adapter that can be asked for as NAME
    served.json          {"adapters": {"law": "law-2026", "tax": "old/tax.gguf"}}      paths in the folder, by other names

Several servers of one folder follow the list. No path leaves the folder, with all of its links followed.
"""

import time
from pathlib import Path

from qgraft import storage
from qgraft.adapter_files.peft_config import CONFIG
from qgraft.adapters.attach import check_name
from qgraft.checkpoints.thudm_prefix import has_weights
from qgraft.errors import AdapterError, OptionError, StorageError
from qgraft.json_files import read_object
from qgraft.locks import file_locked
from qgraft.serving.fields import ApiError

LIST = "served.json"
ATTEMPTS = 50  # to write the list, while another server does


class AdapterFolder:
    """See the module; without a folder there is nothing.

    Attributes:
        root: the folder.
        named: the list, paths by names, as it was read last.
    """

    def __init__(self, folder: Path | None) -> None:
        self.root, self._path = folder, None if folder is None else folder / LIST
        self.named: dict[str, str] = {}
        self._mark: tuple[int, ...] | None = None  # which list that was

    def follow(self) -> None:
        """Take in what others have written since. Raises AdapterError for what is no list."""
        if self._path is None:
            return
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            mark = None
        else:
            mark = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if mark != self._mark:
            self.named, self._mark = self._read(self._path), mark

    def change(self, name: str, path: str | None) -> None:
        """Write a name into the list, or take it out; what others have written into it stays. Raises StorageError."""
        assert self._path is not None
        for attempt in range(ATTEMPTS):
            try:
                with file_locked(self._path):
                    named = {each: where for each, where in self._read(self._path).items() if each != name}
                    storage.write_json(self._path, {"adapters": named if path is None else {**named, name: path}})
                break
            except StorageError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.02)

    def _read(self, path: Path) -> dict[str, str]:
        if not path.is_file():
            return {}
        given = read_object(path, AdapterError).get("adapters")
        if not isinstance(given, dict):
            raise AdapterError(f"{path}: expected an object `adapters` of paths by names")
        for name, where in given.items():
            try:
                check_name(name)
            except OptionError as error:
                raise AdapterError(f"{path}: {error.message}", hint="take the name out of the list") from error
            if not isinstance(where, str):
                raise AdapterError(f"{path}: {name}: got {where!r}, expected a path in the folder")
        return dict(given)

    # -- paths --

    def _root(self) -> Path:
        if self.root is None:
            raise ApiError(403, "this server has no folder of adapters to load from", kind="permission_error")
        return self.root

    def path_given(self, text: str) -> Path:
        """The path of a request, in the folder. Raises ApiError for one that leaves it, or is not there."""
        root = self._root()
        outside = ApiError(403, "lora_path: expected a path in the server's folder of adapters", param="lora_path",
                           kind="permission_error")  # fmt: skip
        if "\x00" in text or len(text) > 4096:
            raise outside
        path = (root / text).resolve()
        if root not in path.parents:
            raise outside
        if not path.exists():
            raise ApiError(404, "lora_path: there is no such adapter in the server's folder", param="lora_path",
                           kind="NotFoundError")  # fmt: skip
        return path

    def relative(self, path: Path) -> str:
        """A path of the folder as the list has it."""
        return str(path.relative_to(self._root()))

    def leads_in(self, text: str) -> bool:
        """Whether a path of the list is one that can be loaded from."""
        try:
            return self.path_given(text).exists()
        except ApiError:
            return False

    def holds(self, name: str) -> Path | None:
        """The adapter that lies here under this name."""
        try:
            check_name(name)
        except OptionError:
            return None
        for path in (self._root() / name, self._root() / f"{name}.gguf"):
            inside = self._root() in path.resolve().parents
            if inside and (_holds_adapter(path) if path.suffix != ".gguf" else path.is_file()):
                return path.resolve()
        return None

    def found(self, name: str) -> Path | None:
        """Where an adapter is that can be asked for by this name."""
        if self.root is None:
            return None
        return self.path_given(self.named[name]) if name in self.named else self.holds(name)


def _holds_adapter(folder: Path) -> bool:
    """Whether there is an adapter in a folder, as its names tell: that it can be read is load_adapter's question."""
    return folder.is_dir() and ((folder / CONFIG).is_file() or has_weights(folder))
