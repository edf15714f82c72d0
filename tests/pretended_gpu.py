"""A pretended GPU: its tensors lie in the CPU's memory, but they say `cuda:0`, and what a GPU would refuse is refused.

`OnGpu` is a tensor that holds another one. Every operation computes with what it holds, after it was looked at:

    tensors of both devices in one operation   DeviceMixed, but for copies, indices and single numbers, as in torch
    a C kernel that is handed the address      DeviceMixed
    a number that the CPU wants to know        a wait, in `PretendedGpu.waits`: .item(), .tolist(), bool(), nonzero(), a mask
    a copy from the CPU that is waited for     a wait, too, if it is of more than one number and not `non_blocking`

Values are right, so control flow that depends on them is what it is on a GPU. `torch.cuda` answers as an H100 of 80 GiB does,
and a backward pass has a thread of its own, as it has there: context variables of the forward pass are not set in it.

Not chosen: FakeTensorMode, which has no values; a model on the meta device, likewise.
"""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qgraft.formats.device_tables import forget_tables
from qgraft.kernels import choose, ops, triton_ops, varlen
from qgraft.kernels.table import PACKED_OPS

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
MAY_MIX = (aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
INDICES = MAY_MIX[2:]
WAITING = (
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive,
    aten.equal, aten.bincount, aten.histc,
)  # fmt: skip
OPS = {name: getattr(ops, f"_{name.replace('linear_grad_input_', 'grad_input_')}_op") for name in PACKED_OPS}
MEMORY = 80 << 30


class DeviceMixed(RuntimeError):
    """What a GPU refuses."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        assert type(held) is not cls
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held.detach()

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        if "kernels/cpu" in sys._getframe(1).f_code.co_filename.replace("\\", "/"):
            raise DeviceMixed("a C kernel is handed a tensor of the GPU")
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        _pretended().wait("tolist")
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _pretended().compute(func, args, kwargs or {})


class Generator(torch.Generator):
    """One for tensors of one device, as in torch."""

    def __new__(cls, device: Any = CPU) -> "Generator":
        return super().__new__(cls, CPU)

    def __init__(self, device: Any = CPU) -> None:
        self.place = GPU if is_gpu(device) else CPU

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed(seed)
        return self

    def graphsafe_set_state(self, state: torch.Generator) -> None:
        self.set_state(state.get_state())

    device = property(lambda self: self.place)  # type: ignore[assignment]


_now: list["PretendedGpu"] = []


def _pretended() -> "PretendedGpu":
    return _now[-1]


def held(value: Any) -> Any:
    """What a tensor of the GPU holds; anything else as it is."""
    return value.held if isinstance(value, OnGpu) else value


def is_gpu(device: Any) -> bool:
    return device is not None and not isinstance(device, Tensor) and torch.device(device).type == "cuda"


class PretendedGpu:
    """What happened on it.

    Attributes:
        waits: (what, where) of each time that the CPU waited for it.
        graph: the CUDA graph that is being recorded.
        current: the number of the current GPU; only of that one work is recorded.
    """

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []
        self.graph: Graph | None = None
        self.current = 0
        self._place = threading.local()  # where factories of torch's own code make their tensors

    def wait(self, what: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} at {_where()}")
        self.waits.append((what, _where()))

    @contextlib.contextmanager
    def placing(self, device: torch.device) -> Iterator[None]:
        before = getattr(self._place, "device", None)
        self._place.device = device
        try:
            yield
        finally:
            self._place.device = before

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation below autograd."""
        packet = func.overloadpacket
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_gpu = [each for each in tensors if isinstance(each, OnGpu)]
        on_cpu = [each for each in tensors if not isinstance(each, OnGpu) and each.dim() and each.device.type == "cpu"]
        if on_gpu and on_cpu and packet not in MAY_MIX:
            shapes = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in tensors)
            raise DeviceMixed(f"{func}: tensors of different devices: {shapes}")
        if on_gpu and func.namespace == "qgraft":  # registered for all devices: its own code looks at them
            with _Modes(self):
                return OPS[packet.__name__](*args, **kwargs)
        place = getattr(self._place, "device", None) or GPU  # the autograd engine's own code goes by its gradients
        if tensors:
            place = GPU if on_gpu else CPU
        if packet is aten._to_copy:
            place = getattr(self._place, "move", None) or place
        if on_gpu or place is GPU:
            self._look(packet, args, kwargs, on_gpu, on_cpu, place)
        given = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "non_blocking")}
        if "device" in given and not (given["device"] is not None and torch.device(given["device"]).type == "meta"):
            given["device"] = CPU
        elif "device" in given:
            place = CPU
        args, given = tree_map(held, args), tree_map(held, given)
        of_two = packet is aten.mm and "dtype" in func._overloadname
        out = self._run(func._schema, _mm_of_two_dtypes if of_two else func, args, given)
        return self._placed(func, out, tensors, args, place)

    def _run(self, schema: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if self.graph is None:
            return func(*args, **kwargs)
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.graph.keep([each for each in tree_leaves(written) if isinstance(each, Tensor)])
        out = func(*args, **kwargs)
        self.graph.tape.append((lambda: func(*args, **kwargs), out))
        return out

    def _placed(self, func: Any, out: Any, tensors: list[Tensor], args: Any, place: torch.device) -> Any:
        """Results as tensors of their device; what was written to is the tensor that was given."""
        known = {id(held(each)): each for each in tensors}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            return OnGpu(value) if place is GPU and value.device.type == "cpu" else value

        return tree_map(wrapped, out)

    def _look(self, packet: Any, args: Any, kwargs: Any, on_gpu: Any, on_cpu: Any, place: Any) -> None:
        """Note what a GPU would be waited for."""
        if packet in WAITING or (packet is aten.repeat_interleave and kwargs.get("output_size") is None and on_gpu):
            self.wait(packet.__name__)
        elif packet in INDICES:
            masks = [each for each in args[1] if isinstance(each, OnGpu) and each.dtype in (torch.bool, torch.uint8)]
            if masks or on_cpu:
                self.wait("mask" if masks else "index of the CPU")
        elif packet in (aten.copy_, aten._to_copy):
            source, target = (args[1], args[0]) if packet is aten.copy_ else (args[0], None)
            from_gpu, to_gpu = isinstance(source, OnGpu), isinstance(target, OnGpu) or (target is None and place is GPU)
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if from_gpu != to_gpu and waits and (from_gpu or source.numel() > 1):
                self.wait("copy from the CPU" if to_gpu else "copy to the CPU")


def _mm_of_two_dtypes(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """aten.mm.dtype, which the CPU has not."""
    return aten.mm(a.to(dtype), b.to(dtype))


class Graph:
    """Records what is started while it is, and starts it again on the same memory. Recording itself changes nothing."""

    def __init__(self) -> None:
        self.tape: list[tuple[Callable[[], Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def keep(self, written: list[Tensor]) -> None:
        """Remember what these were before they are written to."""
        self._before += [(each, each.clone()) for each in written]

    def undo(self) -> None:
        while self._before:
            tensor, then = self._before.pop()
            tensor.copy_(then)

    def replay(self) -> None:
        assert _pretended().graph is None
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            for start, outs in self.tape:
                for old, new in zip(tree_leaves(outs), tree_leaves(start()), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def recording(graph: Graph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """As torch.cuda.graph."""
    assert capture_error_mode == "thread_local"
    gpu = _pretended()
    gpu.graph = graph if gpu.current == GPU.index else None
    try:
        yield
    finally:
        gpu.graph = None
        graph.undo()


def _where() -> str:
    frames = [frame for frame in traceback.extract_stack() if "pretended_gpu" not in frame.filename]
    ours = [frame for frame in frames if "/qgraft/" in frame.filename] or frames
    last = next((each for each in reversed(frames) if "/torch/" not in each.filename), frames[-1])
    inner = "" if last is ours[-1] else f", in {'/'.join(last.filename.split('/')[-2:])}:{last.lineno} {last.name}"
    return f"{ours[-1].filename.rpartition('/qgraft/')[2]}:{ours[-1].lineno} {ours[-1].name}{inner}"


@contextlib.contextmanager
def as_current(device: Any) -> Iterator[None]:
    """As torch.cuda.device."""
    gpu = _pretended()
    before, gpu.current = gpu.current, torch.device(device).index or 0
    try:
        yield
    finally:
        gpu.current = before


class _Dispatched(TorchDispatchMode):
    """Factories, which have no tensor that would say where they are."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.compute(func, args, kwargs or {})


class _Called(TorchFunctionMode):
    """What Python calls: devices by name are known only here."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, args, kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.resize_ and isinstance(args[0], OnGpu):
            return OnGpu(args[0].held.view(*args[1:]))
        if func is Tensor.data.__set__ and isinstance(args[0], OnGpu) and isinstance(args[1], OnGpu):
            args[0].held = args[1].held
            return func(*args)
        named = kwargs.get("device")
        on_gpu = any(isinstance(each, OnGpu) for each in tree_leaves((args, kwargs)))
        gpu = is_gpu(named) or (named is None and on_gpu)
        if is_gpu(named):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "place", CPU) != (GPU if gpu else CPU):
            raise DeviceMixed(f"{func}: a generator of {generator.device} for a tensor of the other device")
        with self.gpu.placing(GPU if gpu else CPU):
            out = func(*args, **kwargs)
        if kwargs.get("out") is not None:
            return kwargs["out"]
        if gpu and func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) and type(out) is Tensor:
            if out.numel() > 1:
                self.gpu.wait("numbers of Python")
            return OnGpu(out).requires_grad_(out.requires_grad)
        return out

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0]
        if func is Tensor.to:
            first = [GPU if isinstance(each, str) and each.startswith("cuda") else each for each in args[1:]]
            named = kwargs.get("device", next((each for each in first if isinstance(each, (str, torch.device))), None))
            like = next((each for each in first if isinstance(each, Tensor)), None)
            device = like.device if like is not None else None if named is None else torch.device(named)
            dtypes = [each for each in (*first, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
            dtype = dtypes[0] if dtypes else like.dtype if like is not None else source.dtype
            flags = [each for each in first if isinstance(each, bool)]
            non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
            copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        else:
            device, dtype = (GPU if func is Tensor.cuda else CPU), source.dtype
            non_blocking, copy = kwargs.get("non_blocking", False), False
        if device is None or device.type == source.device.type or "meta" in (device.type, source.device.type):
            if device is None or device.type != "cuda":
                return func(*args, **kwargs)
            return source.to(dtype=dtype, copy=copy) if copy or dtype != source.dtype else source
        place = self.gpu._place
        place.move = GPU if device.type == "cuda" else CPU
        try:
            return torch.ops.aten._to_copy(source, dtype=dtype, non_blocking=non_blocking)
        finally:
            place.move = None


class _Modes(contextlib.ExitStack):
    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.enter_context(_Dispatched(gpu))
        self.enter_context(_Called(gpu))


def _varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch's varlen kernel as it is in 2.11: tables on the GPU, in half precision, as many heads of keys as of queries."""
    assert all(isinstance(each, OnGpu) for each in (query, key, value, cu_seq_q, cu_seq_k))
    assert cu_seq_q.dtype == torch.int32 and query.dtype in (torch.bfloat16, torch.float16)
    assert window_size[1] == 0
    if query.shape[1] != key.shape[1]:
        raise RuntimeError(f"{query.shape[1]} heads of queries, {key.shape[1]} of keys")
    at_T = torch.arange(len(query), device=query.device)
    sample_T = torch.searchsorted(
        cu_seq_q, at_T, right=True
    )  # on the GPU, or a graph would know the bounds of one batch
    distance = at_T[:, None] - at_T
    seen = (sample_T[:, None] == sample_T) & (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    q, k, v = (each.transpose(0, 1)[None].float() for each in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out[0].transpose(0, 1).to(query.dtype)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Within the block there is a GPU."""
    gpu = PretendedGpu()
    engine, launch = torch.autograd._engine_run_backward, triton_ops.launch

    def run_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, OnGpu) for each in tensors):
            return engine(tensors, *args, **kwargs)
        result: list[Any] = []

        def work() -> None:
            try:
                with _Modes(gpu):
                    result.append(engine(tensors, *args, **kwargs))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def launched(kernel: Any, grid: Any, arguments: Any, constants: Any, warps: int) -> None:
        mixed = [each for each in arguments if isinstance(each, Tensor) and not isinstance(each, OnGpu)]
        if mixed and any(isinstance(each, OnGpu) for each in arguments):
            raise DeviceMixed(f"{kernel} is handed a tensor of the CPU")
        given = [held(each) for each in arguments]
        if gpu.graph is not None:
            gpu.graph.keep([each for each in given if isinstance(each, Tensor)])
            gpu.graph.tape.append((lambda: launch(kernel, grid, given, constants, warps), None))
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own tensors
            launch(kernel, grid, given, constants, warps)

    properties = SimpleNamespace(total_memory=MEMORY, multi_processor_count=132, major=9, minor=0, name="pretended")
    answers: dict[str, Any] = {
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 1 << 30),
        **dict.fromkeys(("_lazy_init", "empty_cache", "synchronize", "reset_peak_memory_stats", "set_device", "manual_seed",
                         "manual_seed_all", "set_rng_state", "current_stream"), lambda *_: None),
        "is_available": lambda: True, "is_initialized": lambda: False, "device_count": lambda: 1,
        "current_device": lambda: gpu.current, "device": as_current,
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: "pretended", "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (MEMORY, MEMORY), "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "graph_pool_handle": lambda: (0, 0), "CUDAGraph": Graph, "graph": recording,
        "is_current_stream_capturing": lambda: gpu.graph is not None, "stream": lambda _: contextlib.nullcontext(),
        "default_generators": (Generator(GPU),),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as last:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay what they are, as with .data
        last.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.autograd, "_engine_run_backward", run_backward)
        for name in [each for each in sys.modules if each.startswith("qgraft.kernels.")]:
            if getattr(sys.modules[name], "launch", None) is launch:
                patch.setattr(sys.modules[name], "launch", launched)
        patch.setattr(varlen, "_function", lambda: (_varlen_attn, frozenset({"scale", "window_size"})))
        known = (choose, varlen.status, varlen._groups_untold)
        for forget in (*(each.cache_clear for each in known), forget_tables):
            forget()
            last.callback(forget)
        _now.append(gpu)
        last.callback(_now.pop)
        with _Modes(gpu):
            yield gpu
