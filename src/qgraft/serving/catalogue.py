"""The adapters of a server: those that it was started with, those of a folder, those that somebody loaded.

A name that is not loaded is looked for in the folder of adapters: NAME or NAME.gguf there. Of these at most `limit` are held;
for one more the one goes that was asked for least recently and that nobody uses. What somebody loads under a name of its own
is written into a list in the folder, which the next start reads, and other servers of the same folder at their next request:
what one of them loads or unloads, all do. Nothing outside of the folder is ever opened for a request:
names are letters, digits, "_" and "-", and a path, with all of its links followed, must lie in the folder.

An adapter of another base, or one that is broken, is refused by stage_adapter, which compares its seal. Who asks for one by
its name is told why without a path; the log has the whole reason, and who loads it by a path gets it.
"""

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraft import storage
from qgraft.adapter_files.folder import LoadedAdapter, stage_adapter
from qgraft.adapter_files.peft_config import CONFIG
from qgraft.adapters.attach import check_name, detach_adapter
from qgraft.adapters.base import selection_of
from qgraft.checkpoints.thudm_prefix import has_weights
from qgraft.errors import AdapterError, OptionError, QgraftError, StorageError, near_match
from qgraft.json_files import read_object
from qgraft.locks import file_locked
from qgraft.serving.engine import Engine
from qgraft.serving.fields import ApiError
from qgraft.serving.lora_protocol import LoadBody

LIST, LONGEST = "served.json", 200  # characters of an unknown name that are told
_SEPARATOR = re.compile(r"[/\\]")
log = logging.getLogger("qgraft.serving")
ATTEMPTS = 50  # to write the list, while another server does


def _all(name: str) -> bool:
    return True


@dataclass(frozen=True)
class Entry:
    """One adapter that is loaded.

    Attributes:
        pinned: whether it stays, however long nobody asks for it.
        listed: what the list said of it when it was loaded.
    """

    path: str
    pinned: bool = False
    listed: str | None = None


class Catalogue:
    """See the module.

    Args:
        base: the base's name, which no adapter can have.
        folder: where names are looked for; None for nowhere.
        limit: how many adapters are held beside those that are pinned.
        force: load pinned ones although something differs.
    """

    def __init__(
        self, engine: Engine, base: str, folder: Path | None = None, limit: int = 64, *, force: bool = False
    ) -> None:
        self.engine, self.base, self.limit, self.force = engine, base, limit, force
        self.folder = None if folder is None else folder.resolve()
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.scales: dict[str, float] = {}  # llama-server's global ones
        self._numbers: dict[str, int] = {}
        self._next_number = 0
        self._used: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._lock = threading.RLock()
        self._named: dict[str, str] = {}  # in the list
        self._mark: tuple[int, ...] | None = None  # which list that was
        if self.folder is not None:
            self._follow_list()

    def names(self) -> list[str]:
        """The adapters that are loaded, and can be asked for, in the order of their loading."""
        with self._lock:
            return [name for name in self.entries if name not in self._leaving]

    def numbered(self) -> dict[int, str]:
        """llama-server's ids of adapters: the names that they have as long as this server runs, until they are unloaded.

        One that goes to make room keeps its id, and is loaded again when somebody asks for it.
        """
        with self._lock:
            return {number: name for name, number in self._numbers.items() if name not in self._leaving}

    def available(self) -> dict[str, str]:
        """Every name that can be asked for, with its path: those that are loaded, those of the list and of the folder."""
        with self._lock:
            self._follow_list()
            found = {name: self.entries[name].path for name in self.names()}
            found |= {name: path for name, path in self._named.items() if name not in found and self._leads_in(path)}
        if self.folder is not None:
            for path in sorted(self.folder.iterdir()):
                name = path.name.removesuffix(".gguf")
                if name not in found and name != self.base and self._in_folder(name) is not None:
                    found[name] = str(path)
        return found

    def pin(self, name: str, path: str) -> LoadedAdapter:
        """Load an adapter that stays: one that the server was started with."""
        check_name(name)
        with self._lock:
            self._give_number(name)
            return self._load(name, Path(path), pinned=True)

    def adopt(self, name: str, path: str) -> None:
        """An adapter that is on the model already: its own prefix."""
        self.entries[name] = Entry(path, pinned=True)
        self._give_number(name)

    def knows(self, name: str) -> bool:
        """Whether it can be asked for."""
        with self._lock:
            self._follow_list()
            returns = name not in self._leaving or name in self._named  # under its name comes another one
            return name in self.names() or (returns and self._found(name) is not None)

    def need(self, names: Iterable[str], allows: Callable[[str], bool] = _all) -> None:
        """Have these loaded. Raises ApiError 404 for a name that there is not, AdapterError for one that does not fit."""
        with self._lock:
            wanted = list(names)
            self._follow_list()
            self.sweep()
            for name in wanted:
                if name in self._leaving and name in self._named:
                    raise ApiError(
                        409, f"adapter '{name}' is being replaced: answers still need the old one", retry_after=1
                    )
                if name in self._leaving:
                    raise self.unknown(name, allows)
                if name not in self.entries:
                    path = self._found(name)
                    if path is None:
                        raise self.unknown(name, allows)
                    self._make_room(wanted)
                    self._load_named(name, path)
                    self._give_number(name)
                self._used[name] = time.monotonic()

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block these are loaded, and stay so. Raises as need() does."""
        with self._lock:
            self.need(names)
            yield

    def load(self, body: LoadBody) -> None:
        """Load an adapter under a name, for good. Raises ApiError, AdapterError."""
        with self._lock:
            self.sweep()
            try:
                check_name(body.name)
            except OptionError as error:
                raise ApiError(400, error.message, param="lora_name", kind="InvalidUserInput") from error
            if body.name == self.base:
                raise ApiError(
                    400, f"'{body.name}' is the base model's name", param="lora_name", kind="InvalidUserInput"
                )
            path = self._path_given(body.path)
            listed = str(path.relative_to(self._root()))
            if body.name in self._leaving:
                raise ApiError(409, f"adapter '{body.name}' is being unloaded: answers still need it", retry_after=1)
            if body.name in self.entries:
                if not body.replace:
                    raise ApiError(
                        400, f"The lora adapter '{body.name}' has already been loaded. If you want to load the adapter in "
                        "place, set 'load_inplace' to True.", kind="InvalidUserInput",
                    )  # fmt: skip
                self._replace(body.name, path, listed)
            else:
                self._make_room([body.name])
                self._load(body.name, path, listed=listed)
                self._give_number(body.name)
            self._change_list(body.name, listed)

    def unload(self, name: str) -> None:
        """Take an adapter off, when nobody uses it any more. Raises ApiError 404 for one that is not loaded."""
        with self._lock:
            self._follow_list()
            if name not in self.names() and name not in self._named:
                raise ApiError(
                    404, f"The lora adapter '{name}' cannot be found.", kind="NotFoundError", param="lora_name"
                )
            if (entry := self.entries.get(name)) is not None and entry.pinned:
                raise ApiError(
                    403, f"'{name}' was named when the server was started, and stays", kind="permission_error",
                    param="lora_name",
                )  # fmt: skip
            if entry is not None:
                self._leaving.add(name)
            self.scales.pop(name, None)
            if name in self._named:
                self._change_list(name, None)
            self.sweep()

    def holds(self, name: str) -> bool:
        """Whether unload() would take it off, or out of the list."""
        with self._lock:
            return name in self.names() or name in self._named

    def sweep(self) -> None:
        """Take off what was unloaded while somebody used it."""
        with self._lock:
            for name in [name for name in self._leaving if not self.engine.uses(name)]:
                self._detach(name)
                self._numbers.pop(name, None)

    def trained(self, names: Iterable[str]) -> list[Mapping[str, Any]]:
        """What these were trained with, of those that are loaded."""
        adapters = selection_of(self.engine.model).adapters
        return [adapters[name].trained for name in names if name in adapters]

    def _give_number(self, name: str) -> None:
        if name not in self._numbers:
            self._numbers[name], self._next_number = self._next_number, self._next_number + 1

    # -- loading --

    def _load(self, name: str, path: Path, pinned: bool = False, listed: str | None = None) -> LoadedAdapter:
        staged = stage_adapter(self.engine.model, path, name, force=self.force and pinned)
        with self._exchange(staged.alone):
            loaded = staged.put()
        self.entries[name] = Entry(str(path), pinned, listed)
        self._used[name] = time.monotonic()
        return loaded

    def _exchange(self, alone: bool) -> AbstractContextManager[None]:
        """Where an adapter is put on: in the middle of a pass where the model has others (adapters/attach.py)."""
        if alone:
            return self.engine.paused()
        return nullcontext() if selection_of(self.engine.model).adapters else self.engine.between_passes()

    def _load_named(self, name: str, path: Path) -> None:
        """Load what somebody asked for by its name: an error says no path to them, but to the log."""
        try:
            self._load(name, path, listed=self._named.get(name))
        except QgraftError as error:
            log.warning("adapter %s cannot be loaded: %s", name, error)
            message = error.message.replace(f"{path}/", "").replace(str(path), name)
            lines = [line for line in message.splitlines() if not _SEPARATOR.search(line)]
            told = "\n".join(lines).rstrip(":") or f"adapter '{name}' cannot be loaded: the server's log says why"
            raise AdapterError(told) from error

    def _detach(self, name: str) -> None:
        is_prefix = selection_of(self.engine.model).adapters[name].is_prefix
        with self.engine.paused() if is_prefix else self.engine.between_passes():
            detach_adapter(self.engine.model, name)
        self._leaving.discard(name)
        self._used.pop(name, None)
        del self.entries[name]

    def _replace(self, name: str, path: Path, listed: str) -> None:
        """Another adapter under the name; the one before stays where that cannot be loaded."""
        if self.engine.uses(name):
            raise ApiError(409, f"adapter '{name}' is in use: it is replaced when no answer needs it", retry_after=1)
        trial, before = f"{name[:56]}-loading", self.entries[name]
        self._load(trial, path)
        self._detach(trial)
        self._detach(name)
        self._load(name, path, before.pinned, listed)

    def _make_room(self, wanted: Iterable[str]) -> None:
        """Take adapters off until there is room for one more. Raises ApiError 503 where all are in use."""
        keep = set(wanted)
        while len(held := [name for name, entry in self.entries.items() if not entry.pinned]) >= self.limit:
            idle = [name for name in held if name not in keep and not self.engine.uses(name)]
            if not idle:
                raise ApiError(
                    503, f"{self.limit} adapters are in use, and no more are held", kind="overloaded", retry_after=1
                )
            self._detach(min(idle, key=lambda name: self._used.get(name, 0.0)))

    # -- paths --

    def _root(self) -> Path:
        if self.folder is None:
            raise ApiError(403, "this server has no folder of adapters to load from", kind="permission_error")
        return self.folder

    def _path_given(self, text: str) -> Path:
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

    def _leads_in(self, text: str) -> bool:
        """Whether a path of the list is one that can be loaded from."""
        try:
            return self._path_given(text).exists()
        except ApiError:
            return False

    def _in_folder(self, name: str) -> Path | None:
        """The adapter of this name in the folder."""
        try:
            check_name(name)
        except OptionError:
            return None
        for path in (self._root() / name, self._root() / f"{name}.gguf"):
            inside = self._root() in path.resolve().parents
            if inside and (_holds_adapter(path) if path.suffix != ".gguf" else path.is_file()):
                return path.resolve()
        return None

    def _found(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        if name in self._named:
            return self._path_given(self._named[name])
        return self._in_folder(name)

    def unknown(self, name: str, allows: Callable[[str], bool] = _all) -> ApiError:
        """What is said of a name that there is not, in OpenAI's words.

        Args:
            allows: which others may be told of, for who meant one of them.
        """
        close = near_match(name[:LONGEST], [each for each in (self.base, *self.names()) if allows(each)])
        return ApiError(404, f"The model `{name[:LONGEST]}` does not exist.", kind="NotFoundError",
                        code="model_not_found", param="model", hint=close)  # fmt: skip

    # -- the list --

    def _follow_list(self) -> None:
        """Take in what others have written since: what is not listed any more as it was loaded leaves."""
        if self.folder is None:
            return
        try:
            stat = (self._root() / LIST).stat()
        except FileNotFoundError:
            mark = None
        else:
            mark = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if mark != self._mark:
            self._named, self._mark = self._read_list(), mark
        for name, entry in self.entries.items():
            if entry.listed is not None and self._named.get(name) != entry.listed and not entry.pinned:
                self._leaving.add(name)

    def _read_list(self) -> dict[str, str]:
        path = self._root() / LIST
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

    def _change_list(self, name: str, path: str | None) -> None:
        """Write a name into the list, or take it out; what others have written into it stays."""
        for attempt in range(ATTEMPTS):
            try:
                with file_locked(self._root() / LIST):
                    named = {each: where for each, where in self._read_list().items() if each != name}
                    storage.write_json(
                        self._root() / LIST, {"adapters": named if path is None else {**named, name: path}}
                    )
                break
            except StorageError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.02)
        self._follow_list()


def _holds_adapter(folder: Path) -> bool:
    """Whether there is an adapter in a folder, as its names tell: that it can be read is load_adapter's question."""
    return folder.is_dir() and ((folder / CONFIG).is_file() or has_weights(folder))
