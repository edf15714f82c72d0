"""What is active: a default for all threads, and for each call what was active when it began.

    use_adapter(model, "law")            the default: what a call goes by for which nothing else is said
    with adapters_off(model): ...        for the calls of this thread (or asyncio task) alone
    model(..., adapter_names=[...])      for this call alone, row by row
    model(...), model.generate(...)      from its first layer, or token, to its last it goes by what was active at its
                                         beginning, whatever other threads choose meanwhile

The adapters, each one value (adapter.py), and the default stand in one `Selection` that all modules of a model share: the
model has it in its Base (base.py), and what carries parts of adapters (holder.py) as its attribute `selection`. What a call
goes by is an `Active` in a context variable, so each thread sees its own; a new thread, such as one that a streamer starts,
begins with the default. A layer asks `selection.now()`.

Some work is on the whole model and cannot be told apart by calls: training turns dropout on and exchanges the attention,
merging exchanges weights. It takes the model for its thread (`Selection.taken`), and is refused while other threads call
the model; their calls are refused while it lasts. An adapter that another thread's call goes by cannot be taken off.
No call waits for anything, so nothing can lock up; threads that attach and detach do so one after another.

Not chosen: a lock around each call, with which a server answers one request at a time; threading.local, which an asyncio
server shares among its requests.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from torch import Tensor, nn

from qgraft.adapters.adapter import Adapter, Part
from qgraft.errors import AdapterError, UnsupportedError, near_match

_NOW: ContextVar["Active | None"] = ContextVar("qgraft_active", default=None)
_CHANGING = threading.Lock()  # held for moments, while calls begin and selections change


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Which adapter serves which rows of one batch.

    Attributes:
        batch: how many rows there are.
        dims: dimensions of a layer's input: one more than token ids have.
        groups: (adapter, its rows, int64); a row in none of them is the base's.
    """

    batch: int
    dims: int
    groups: tuple[tuple[str, Tensor], ...]

    @property
    def uniform(self) -> bool:
        """Whether one adapter, or none, serves the whole batch."""
        return all(len(index) == self.batch for _, index in self.groups)

    def check(self, y: Tensor) -> None:
        """Raise UnsupportedError for a layer's output in which the rows of the batch cannot be told apart."""
        if y.shape[0] != self.batch or y.dim() != self.dims:
            raise UnsupportedError(
                f"adapter_names: a layer gave {list(y.shape)}, expected {self.batch} rows in {self.dims} dimensions",
                hint="this architecture mixes the rows of a batch; answer one adapter's rows at a time, with use_adapter",
            )


@dataclass(frozen=True, eq=False)
class Active:
    """What the adapters of a model add to its base in a call, or a block, and what that is within.

    Attributes:
        weights: the active adapters and their weights.
        rows: where set, it stands in for `weights`: each row of the batch has its own adapter.
        row_names: of a call of generate(), the adapters of the rows it was called with.
        evaluated: within a call of generate(), the keys and values of the prefixes that were computed in it.
        serve: where set, it stands in for `weights` and `rows` in layers with LoRAs: layer, input -> output
            (passes/batched.py); `weights` then says which adapters the call may come to.
        entrance: the module whose forward the call is; None for generate() and blocks.
        frame: of the function that the call lasts as long as; None for a block, which always ends by itself.
        thread: where it was begun.
        outer: what it is within, of this model or another one.
    """

    selection: "Selection"
    weights: Mapping[str, float]
    rows: BatchRows | None = None
    row_names: tuple[str | None, ...] | None = None
    evaluated: dict[str, Tensor] | None = None
    serve: Callable[[Any, Tensor], Tensor] | None = None
    entrance: nn.Module | None = None
    frame: FrameType | None = None
    thread: int = field(default_factory=threading.get_ident)
    outer: "Active | None" = None

    @property
    def uniform(self) -> Mapping[str, float] | None:
        """The adapters with their weights where they are the same for all of the batch, else None."""
        if self.rows is None:
            return self.weights
        return {name: 1.0 for name, _ in self.rows.groups} if self.rows.uniform else None

    def uses(self, name: str) -> bool:
        """Whether the call may come to the adapter `name`."""
        groups = () if self.rows is None else (group for group, _ in self.rows.groups)
        return name in self.weights or name in groups or name in (self.row_names or ())

    def lasts(self) -> bool:
        """Whether it has not ended, asked within it. A call that Ctrl-C ended stays behind: torch runs no hook then."""
        return self.frame is None or _leads_to(self.frame, inspect.currentframe())

    def runs(self) -> bool:
        """Whether it has not ended, asked in any thread."""
        return self.frame is None or _leads_to(self.frame, sys._current_frames().get(self.thread))

    def differs(self) -> bool:
        """Whether it is more than the default of its selection, so that it matters whether it lasts."""
        more = (self.row_names, self.evaluated, self.rows, self.serve)
        return any(part is not None for part in more) or self.weights is not self.selection.weights


@dataclass(eq=False)
class Selection:
    """The adapters of one model, and which of them are active where nothing else is said.

    Attributes:
        adapters: those that are attached, by name, in the order of attaching; another dict after each change.
        weights: the default, the active adapters and their weights; another dict after each choice.
        serve: where set, it stands in for all choices: layer, input -> output (segments.py, while several jobs train).
            It is of the model and not of the call, because gradient checkpointing runs layers again in the backward pass,
            which on a GPU is another thread; the model is taken meanwhile.
        holder: the thread that has taken the model for itself, and what it does.
        running: the calls that have not ended.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    serve: Callable[[Any, Tensor], Tensor] | None = None
    holder: tuple[int, str] | None = None
    running: set[Active] = field(default_factory=set)

    def require(self, names: Iterable[str]) -> None:
        """Raise AdapterError when one of these names is not attached."""
        missing = [name for name in names if not isinstance(name, str) or name not in self.adapters]
        if missing:
            raise AdapterError(
                f"no adapter named {', '.join(map(repr, missing))}; attached: {', '.join(self.adapters) or 'none'}",
                hint=near_match(str(missing[0]), self.adapters),
            )

    def add(self, adapter: Adapter) -> None:
        """Put one more adapter on the list."""
        self.adapters = {**self.adapters, adapter.name: adapter}

    def change(self, name: str, **fields: Any) -> None:
        """Put another value, with other `fields`, in the place of the adapter `name`."""
        self.add(replace(self.adapters[name], **fields))

    def forget(self, gone: Mapping[str, Iterable[Part]]) -> None:
        """Strike parts of adapters off the list, and an adapter with its last one.

        Raises AdapterError, with nothing changed, where a call in another thread is using one of these adapters.
        """
        with _CHANGING:
            self.check_free()
            others = self._calls_of_others()
            if used := [name for name in gone if any(call.uses(name) for call in others)]:
                raise AdapterError(
                    f"adapter {', '.join(map(repr, used))} cannot be taken off: a call in another thread is using it",
                    hint="detach it when that call has ended",
                )
            left = {name: each.without(gone[name]) if name in gone else each for name, each in self.adapters.items()}
            self.adapters = {name: adapter for name, adapter in left.items() if adapter.parts}
            self.weights = {name: weight for name, weight in self.weights.items() if name in self.adapters}

    def choose(self, weights: Mapping[str, float]) -> None:
        """Make these adapters the default: they train from now on, those that were do not."""
        with _CHANGING:
            self.check_free()
            for name in self.weights.keys() | weights.keys():
                if name in self.adapters:
                    self.adapters[name].let_train(name in weights)
            self.weights = dict(weights)

    def now(self) -> Active:
        """What is active here: in the call or the block that this is within, else the default."""
        active = _NOW.get()
        while active is not None:
            if active.selection is self and (not active.differs() or active.lasts()):
                return active
            active = active.outer
        return Active(self, self.weights)

    def begin(self, frame: FrameType | None, **more: Any) -> Active:
        """Let a call begin that lasts as long as this frame. It goes by what is active now, but for `more`: fields of Active.

        Raises UnsupportedError where another thread has taken the model.
        """
        around, outer = self.now(), _lasting(_NOW.get())
        given = {"weights": around.weights, "evaluated": around.evaluated, "serve": around.serve, **more}
        active = Active(self, frame=frame, outer=outer, **given)
        with _CHANGING:
            self.check_free()
            if frame is not None:
                self.running.add(active)
        _NOW.set(active)
        return active

    @contextmanager
    def within(self, frame: FrameType | None, **more: Any) -> Iterator[None]:
        """The block is such a call; see begin(). Without a frame it is no call, but what the calls in it go by."""
        token = _NOW.set(_NOW.get())
        try:
            active = self.begin(frame, **more)
            try:
                yield
            finally:
                _clear(_NOW.get(), active)
                self.running.discard(active)
        finally:
            _NOW.reset(token)

    @contextmanager
    def taken(self, doing: str) -> Iterator[None]:
        """Within the block the model is this thread's alone.

        Args:
            doing: what is done with it, as in "the model is being trained".

        Raises UnsupportedError where another thread has taken it, or calls it.
        """
        with _CHANGING:
            self.check_free()
            if self._calls_of_others():
                raise UnsupportedError(
                    f"the model cannot be {doing} while another thread calls it", hint="wait until its calls have ended"
                )
            before, self.holder = self.holder, (threading.get_ident(), doing)
        try:
            yield
        finally:
            self.holder = before

    def check_free(self) -> None:
        """Raise UnsupportedError where another thread has taken the model for itself."""
        holder = self.holder
        if holder is not None and holder[0] != threading.get_ident():
            raise UnsupportedError(
                f"the model is being {holder[1]} in another thread, which needs it for itself",
                hint="call it when that has ended, or load the file once more: the memory of its weights is shared",
            )

    def _calls_of_others(self) -> list[Active]:
        """The calls that other threads are in. Those of threads that were broken off are cleared away."""
        others = [call for call in list(self.running) if call.thread != threading.get_ident()]
        self.running.difference_update(call for call in others if not call.runs())
        return [call for call in others if call in self.running]

    def __getstate__(self) -> dict[str, Any]:  # nobody is in a copy of the model
        return {**vars(self), "serve": None, "holder": None, "running": set()}


def end(frame: FrameType | None) -> None:
    """Let the call end that this frame began, if it did."""
    innermost = _lasting(_NOW.get())
    if innermost is not None and frame is not None and innermost.frame is frame:
        innermost.selection.running.discard(innermost)
        innermost = innermost.outer
    _NOW.set(innermost)


def _lasting(active: Active | None) -> Active | None:
    """The innermost call or block that has not ended; those within it are cleared away."""
    lasting = active
    while lasting is not None and not lasting.lasts():
        lasting = lasting.outer
    _clear(active, lasting)
    return lasting


def _clear(active: Active | None, until: Active | None) -> None:
    """Clear away the calls that were broken off within `until`."""
    while active is not None and active is not until:
        active.selection.running.discard(active)
        active = active.outer


def _leads_to(frame: FrameType, here: FrameType | None) -> bool:
    """Whether the function that is executed in `frame` has called, in the end, the one in `here`."""
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None
