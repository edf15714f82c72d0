"""The adapters of a server: those that it was started with, those of a folder, those that somebody loaded.

A name that is not loaded is looked for in the folder of adapters: NAME or NAME.gguf there. Of these at most `limit` are held;
for one more the one goes that was asked for least recently and that nobody uses. What somebody loads under a name of its own
is written into a list in the folder, which the next start reads, and other servers of the same folder at their next request:
what one of them loads or unloads, all do. Nothing outside of the folder is ever opened for a request:
names are letters, digits, "_" and "-", and a path, with all of its links followed, must lie in the folder.

Files are read without the catalogue's lock, so a slow disk holds nobody up who asks for something else; two threads that want
the same adapter read it once.

An adapter of another base, or one that is broken, is refused by stage_adapter, which compares its seal. Who asks for one by
its name is told why without a path; the log has the whole reason, and who loads it by a path gets it.
"""

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraft.adapter_files.folder import LoadedAdapter, StagedAdapter, stage_adapter
from qgraft.adapters.attach import check_name, detach_adapter
from qgraft.adapters.base import selection_of
from qgraft.errors import AdapterError, OptionError, QgraftError, near_match
from qgraft.serving.adapter_folder import AdapterFolder
from qgraft.serving.engine import Engine
from qgraft.serving.fields import ApiError
from qgraft.serving.lora_protocol import LoadBody

LONGEST = 200  # characters of an unknown name that are told
_SEPARATOR = re.compile(r"[/\\]")
log = logging.getLogger("qgraft.serving")
ATTEMPTS = 20  # to have all adapters of a request loaded at once, while others want other ones


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
        self._loading: set[str] = set()
        self._loaded = threading.Condition(self._lock)  # one of these is there, or cannot be
        self._there = AdapterFolder(self.folder)
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
            found |= {
                name: path
                for name, path in self._there.named.items()
                if name not in found and self._there.leads_in(path)
            }
        if self.folder is not None:
            for path in sorted(self.folder.iterdir()):
                name = path.name.removesuffix(".gguf")
                if name not in found and name != self.base and self._there.holds(name) is not None:
                    found[name] = str(path)
        return found

    def pin(self, name: str, path: str) -> LoadedAdapter:
        """Load an adapter that stays: one that the server was started with."""
        check_name(name)
        with self._alone(name):
            staged = stage_adapter(self.engine.model, path, name, force=self.force)
            with self._lock:
                self._give_number(name)
                return self._put(staged, name, Path(path), pinned=True)

    def adopt(self, name: str, path: str) -> None:
        """An adapter that is on the model already: its own prefix."""
        self.entries[name] = Entry(path, pinned=True)
        self._give_number(name)

    def knows(self, name: str) -> bool:
        """Whether it can be asked for."""
        with self._lock:
            self._follow_list()
            return name in self.names() or self._found(name) is not None

    def need(self, names: Iterable[str], allows: Callable[[str], bool] = _all) -> None:
        """Have these loaded. Raises ApiError 404 for a name that there is not, AdapterError for one that does not fit."""
        wanted = list(names)
        for _ in range(ATTEMPTS * (len(wanted) + 1)):
            missing = self._missing(wanted, allows)
            if missing is None:
                return
            self._bring(*missing, wanted)
        raise self._crowded()

    def _missing(self, wanted: Sequence[str], allows: Callable[[str], bool]) -> tuple[str, Path] | None:
        """The first of these that is not loaded, and where it is."""
        with self._lock:
            self._follow_list()
            self.sweep()
            for name in wanted:
                if name in self._leaving and name in self._there.named:
                    raise ApiError(
                        409, f"adapter '{name}' is being replaced: answers still need the old one", retry_after=1
                    )
                if name in self._leaving or name not in self.entries:
                    path = self._found(name)
                    if path is None:
                        raise self.unknown(name, allows)
                    if name in self._leaving:  # its name leads to it again
                        raise self._unloading(name)
                    return name, path
                self._used[name] = time.monotonic()
            return None

    def _bring(self, name: str, path: Path, wanted: Iterable[str]) -> None:
        """Load one that somebody asked for by its name, unless it comes, goes or changes meanwhile."""
        with self._alone(name):
            if name in self.entries:
                return
            with _without_paths(name, path):
                staged = stage_adapter(self.engine.model, path, name)
                with self._lock:
                    self._follow_list()
                    if self._found(name) == path and name not in self._leaving:
                        self._make_room(wanted)
                        self._put(staged, name, path, listed=self._there.named.get(name))
                        self._give_number(name)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Within the block no other thread loads an adapter under this name."""
        with self._loaded:
            while name in self._loading:
                self._loaded.wait()
            self._loading.add(name)
        try:
            yield
        finally:
            with self._loaded:
                self._loading.remove(name)
                self._loaded.notify_all()

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block these are loaded, and stay so. Raises as need() does."""
        wanted = list(names)
        for _ in range(ATTEMPTS):
            self.need(wanted)
            with self._lock:
                if all(name in self.entries and name not in self._leaving for name in wanted):
                    yield
                    return
        raise self._crowded()

    def _crowded(self) -> ApiError:
        return ApiError(503, "adapters come and go faster than requests", kind="overloaded", retry_after=1)

    def _unloading(self, name: str) -> ApiError:
        return ApiError(409, f"adapter '{name}' is being unloaded: answers still need it", retry_after=1)

    def load(self, body: LoadBody) -> None:
        """Load an adapter under a name, for good. Raises ApiError, AdapterError."""
        try:
            check_name(body.name)
        except OptionError as error:
            raise ApiError(400, error.message, param="lora_name", kind="InvalidUserInput") from error
        if body.name == self.base:
            raise ApiError(400, f"'{body.name}' is the base model's name", param="lora_name", kind="InvalidUserInput")
        path = self._there.path_given(body.path)
        listed = self._there.relative(path)
        with self._alone(body.name):
            self._check_may_come(body)
            trial = f"{body.name[:56]}-loading" if body.name in self.entries else body.name
            staged = stage_adapter(self.engine.model, path, trial)
            with self._lock:
                self._check_may_come(body)
                if body.name in self.entries:
                    self._replace(staged, trial, body.name, path, listed)
                else:
                    self._make_room([body.name])
                    self._put(staged, body.name, path, listed=listed)
                    self._give_number(body.name)
                self._there.change(body.name, listed)
                self._follow_list()

    def _check_may_come(self, body: LoadBody) -> None:
        """Raise ApiError where an adapter cannot be loaded under this name now."""
        with self._lock:
            self.sweep()
            if body.name in self._leaving:
                raise self._unloading(body.name)
            if body.name in self.entries and not body.replace:
                raise ApiError(
                    400, f"The lora adapter '{body.name}' has already been loaded. If you want to load the adapter in "
                    "place, set 'load_inplace' to True.", kind="InvalidUserInput",
                )  # fmt: skip
            if body.name in self.entries and self.engine.uses(body.name):
                raise ApiError(
                    409, f"adapter '{body.name}' is in use: it is replaced when no answer needs it", retry_after=1
                )

    def unload(self, name: str) -> None:
        """Take an adapter off, when nobody uses it any more. Raises ApiError 404 for one that is not loaded."""
        with self._lock:
            self._follow_list()
            if name not in self.names() and name not in self._there.named:
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
            if name in self._there.named:
                self._there.change(name, None)
                self._follow_list()
            self.sweep()

    def holds(self, name: str) -> bool:
        """Whether unload() would take it off, or out of the list."""
        with self._lock:
            return name in self.names() or name in self._there.named

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

    def _put(
        self, staged: StagedAdapter, name: str, path: Path, pinned: bool = False, listed: str | None = None
    ) -> LoadedAdapter:
        if staged.grows and not pinned:
            raise AdapterError(f"adapter {name!r} has new tokens, with which the tokenizer of all answers would change",
                               hint="name it when the server is started: --adapter FOLDER")  # fmt: skip
        with self._exchange(staged.alone):
            loaded = staged.put(name)
        self.entries[name] = Entry(str(path), pinned, listed)
        self._used[name] = time.monotonic()
        return loaded

    def _exchange(self, alone: bool) -> AbstractContextManager[None]:
        """Where an adapter is put on: in the middle of a pass where the model has others (adapters/attach.py)."""
        if alone:
            return self.engine.paused()
        return nullcontext() if selection_of(self.engine.model).adapters else self.engine.between_passes()

    def _detach(self, name: str) -> None:
        is_prefix = selection_of(self.engine.model).adapters[name].is_prefix
        with self.engine.paused() if is_prefix else self.engine.between_passes():
            detach_adapter(self.engine.model, name)
        self._leaving.discard(name)
        self._used.pop(name, None)
        del self.entries[name]

    def _replace(self, staged: StagedAdapter, trial: str, name: str, path: Path, listed: str) -> None:
        """Another adapter under the name; the one before stays where that does not fit."""
        before = self.entries[name]
        self._put(staged, trial, path)
        self._detach(trial)
        self._detach(name)
        self._put(staged, name, path, before.pinned, listed)

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

    def _found(self, name: str) -> Path | None:
        return self._there.found(name)

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
        self._there.follow()
        for name, entry in self.entries.items():
            if entry.listed is not None and self._there.named.get(name) != entry.listed and not entry.pinned:
                self._leaving.add(name)


@contextmanager
def _without_paths(name: str, path: Path) -> Iterator[None]:
    """Within the block errors say no path to who asked for an adapter by its name, but to the log."""
    try:
        yield
    except ApiError:
        raise
    except QgraftError as error:
        log.warning("adapter %s cannot be loaded: %s", name, error)
        message = error.message.replace(f"{path}/", "").replace(str(path), name)
        lines = [line for line in message.splitlines() if not _SEPARATOR.search(line)]
        told = "\n".join(lines).rstrip(":") or f"adapter '{name}' cannot be loaded: the server's log says why"
        raise AdapterError(told) from error
