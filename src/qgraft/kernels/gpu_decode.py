"""New tokens through a whole decoder on a GPU: the kernels of a step, recorded once as a CUDA graph and replayed.

A token of a model of 7 billion weights is 350 kernels of some 10 microseconds. Started one by one from Python they take ten
times as long as they run. A graph has them all; what differs between two steps lies in the GPU's memory, where the kernels
look: the texts' slots and lengths, addresses of keys and values, addresses of each row's LoRAs. So a graph is recorded for a
number of rows, the most LoRAs of a row, their largest rank (up to a power of two) and the longest text (likewise), and for
nothing else: texts, adapters and memories come and go without another.

    rows 1 .. FEW_ROWS   weights from packed bytes to registers, float32 sums (triton_gemv.py)
    more                 unpacked to bfloat16 one after another, multiplied by cuBLAS

Between the kernels numbers are float32, also where the model computes in bfloat16; keys and values are of the memory's dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qgraft.kernels import gpu_rows, triton_ops
from qgraft.kernels.cuda_graphs import power_of_two, recorded
from qgraft.kernels.decoder import PLACES, Decoder, Layer, Linear, Lora, Part, Row
from qgraft.kernels.pointwise import ACTIVATIONS
from qgraft.kernels.triton_ops import FEW_ROWS, gemv, interpreted, launch

MOST_GRAPHS = 12  # kept at a time
BLOCK = 16  # keys of a run in attention
SHORTEST = 256  # slots of a text that a graph is recorded for at least
_SILU = next(act for act in ACTIVATIONS if act.name == "silu")


class Structures:
    """See kernels/decoder.py. Raises ValueError for weights and norms that are not on one GPU, and what only C computes."""

    most_rows = 64

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.device = decoder.norm.device
        tensors = [tensor for layer in decoder.layers for tensor in _tensors(layer)]
        if any(tensor.device != self.device for tensor in tensors):
            raise ValueError("its weights are not all on one device")
        if any(linear.int8 for layer in decoder.layers for linear in _linears(layer)):
            raise ValueError("no GPU kernel computes in 8 bits")
        if any(layer.experts is not None or layer.sinks is not None for layer in decoder.layers):
            raise ValueError("no GPU kernel computes experts or sinks")
        if decoder.angles != decoder.channels or decoder.pairs or decoder.wide_norms or decoder.residual != 1:
            raise ValueError("no GPU kernel rotates a part of a head, norms all heads together or weights residuals")
        self._memory: tuple[tuple[Tensor, Tensor], ...] = ()
        self._states: dict[tuple[int, ...], _State] = {}

    def adapters(self, of_linears: Sequence[Sequence[Lora]]) -> "_Adapters":
        """See kernels/decoder.py."""
        return _Adapters(of_linears, self.device)

    def use(self, memory: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See kernels/decoder.py; contiguous, of one dtype."""
        self._memory = tuple(memory)

    def step(self, parts: Sequence[Part], rows: Sequence[Row], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See kernels/decoder.py."""
        adapters = [part.loras for part in parts if part.loras is not None]
        most = max((each.most for each in adapters), default=0)
        rank = power_of_two(max(16, *(each.rank for each in adapters))) if adapters else 0
        longest = power_of_two(max(SHORTEST, *(row.seen for row in rows)))
        key = (power_of_two(len(rows)), most, rank, longest)
        state = self._states.pop(key, None) or _State(self.decoder, self.device, *key)
        while len(self._states) >= MOST_GRAPHS:
            del self._states[next(iter(self._states))]
        self._states[key] = state  # the latest last
        state.fill(self._memory, parts, rows, x, cos, sin)
        return state.run()[: len(rows)].clone()


class _Adapters:
    """Addresses, ranks and scalings of LoRAs in all linear layers, as a table for the GPU.

    Attributes:
        table: [linear layers, most, 4] int64 on the CPU; see triton_gemv.down_kernel.
        most: LoRAs of a layer.
        rank: the largest.
    """

    def __init__(self, of_linears: Sequence[Sequence[Lora]], device: torch.device) -> None:
        self.most = max(len(loras) for loras in of_linears)
        self.rank = max((lora.A.shape[0] for loras in of_linears for lora in loras), default=1)
        self.table = torch.zeros(len(of_linears), self.most, 4, dtype=torch.int64)
        self._held = of_linears  # the tensors whose addresses these are
        for index, loras in enumerate(of_linears):
            for place, lora in enumerate(loras):
                for tensor in lora[:2]:
                    if tensor.dtype != torch.float32 or tensor.device != device or not tensor.is_contiguous():
                        got = f"{tensor.dtype} on {tensor.device}"
                        raise ValueError(f"a LoRA is {got}, expected contiguous float32 on {device}")
                bits = int(torch.tensor(lora.scaling, dtype=torch.float32).view(torch.int32))
                entry = [lora.A.data_ptr(), lora.B.data_ptr(), lora.A.shape[0], bits]
                self.table[index, place] = torch.tensor(entry)


@dataclass(eq=False)
class _State:
    """What a graph reads and writes, and the graph."""

    decoder: Decoder
    device: torch.device
    count: int
    most: int
    rank: int
    longest: int

    def __post_init__(self) -> None:
        d, layers, M = self.decoder, len(self.decoder.layers), self.count

        def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            with torch.inference_mode(False):  # or steps outside of that mode could not write to them
                return torch.zeros(shape, dtype=dtype, device=self.device)

        self.x = numbers(M, d.hidden)
        self.cos, self.sin = numbers(M, d.channels), numbers(M, d.channels)
        self.rows = numbers(M, 2, dtype=torch.int64)
        self.slots = numbers(M, self.longest, dtype=torch.int64)
        self.places = numbers(2 * layers, dtype=torch.int64)
        self.shape = numbers(1, dtype=torch.int64)
        self.table = numbers(len(PLACES) * layers, M, self.most, 4, dtype=torch.int64)
        self.h = numbers(len(PLACES), M, self.most, self.rank)
        self.dtype = torch.float32
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None
        self._runs = 0
        self._loras: list[Any] = []
        self._places: tuple[list[int], int] = ([], 0)

    def fill(
        self, memory: Sequence[tuple[Tensor, Tensor]], parts: Sequence[Part], rows: Sequence[Row], x: Tensor,
        cos: Tensor, sin: Tensor,
    ) -> None:  # fmt: skip
        """Put in what the step is of."""
        for whole, part in ((self.x, x), (self.cos, cos), (self.sin, sin)):
            whole[: len(part)].copy_(part)
        seen = _padded([[row.seen, row.front] for row in rows], self.count, 2, torch.int64)
        self.rows.copy_(seen, non_blocking=True)
        into = [whole[: row.seen] for whole, row in zip(self.slots, rows, strict=False)]
        torch._foreach_copy_(into, [row.slots[: row.seen] for row in rows])  # of any number of texts in one launch
        places, keys = [tensor.data_ptr() for pair in memory for tensor in pair], memory[0][0]
        dtype, capacity = keys.dtype, keys.shape[1]
        if dtype != self.dtype:
            self.dtype, self._replay, self._runs = dtype, None, 0
        if (places, capacity) != self._places:
            self.places.copy_(torch.tensor(places), non_blocking=True)
            self.shape.fill_(capacity)
            self._places = places, capacity
        if self.most:
            loras = [part.loras for part in parts for _ in range(part.rows)]
            if len(loras) != len(self._loras) or any(a is not b for a, b in zip(loras, self._loras, strict=True)):
                table = torch.zeros(self.table.shape, dtype=torch.int64)
                for index, each in enumerate(loras):
                    if each is not None:
                        table[:, index, : each.most] = each.table
                self.table.copy_(table, non_blocking=True)
                self._loras = loras

    def run(self) -> Tensor:
        """The states [count, hidden]: computed twice and recorded, then replayed, unless the graph comes to others."""
        self._runs += 1
        if self._replay is None:
            states = self._step()
            if self._runs == 2 and self.device.type == "cuda":  # Triton's interpreter has tensors of the CPU
                self._record(states)
            return states
        self._replay()
        assert self._result is not None
        return self._result

    def _record(self, expected: Tensor) -> None:
        """Record the step, if there is memory for it."""

        def step() -> None:
            self._result = self._step()

        try:
            replay = recorded(step, self.device)
        except RuntimeError:
            return
        replay()  # of the same tokens: their keys and values are written again
        assert self._result is not None
        if bool((self._result - expected).norm() <= 1e-3 * expected.norm()):
            self._replay = replay

    def _step(self) -> Tensor:
        d, x = self.decoder, self.x
        for index, layer in enumerate(d.layers):
            entry, (*qkv_of, o, gate_of, up_of, down) = index * len(PLACES), _linears(layer)
            last = entry + PLACES.index("down")
            a = gpu_rows.norm(x, layer.norms[0], d.epsilon)[0]
            qkv = self._products(a, qkv_of, entry)
            mixed = self._attended(qkv, layer, index)
            x = self._products(mixed, (o,), entry + 3, x)
            a = gpu_rows.norm(x, layer.norms[1], d.epsilon)[0]
            both = self._products(a, (gate_of, up_of), entry + 4)
            gate, up = both[:, : d.inner], both[:, d.inner :]
            x = self._products(gpu_rows.gated(_SILU, gate, up, None, torch.float32), (down,), last, x)
        return gpu_rows.norm(x, d.norm, d.epsilon)[0]

    def _products(self, x: Tensor, linears: Sequence[Linear], entry: int, residual: Tensor | None = None) -> Tensor:
        """[M, outputs of all], each with its bias, its LoRAs and the residual."""
        widths = [linear.packed.shape[0] for linear in linears]
        y = x.new_empty(self.count, sum(widths))
        loras = self.most, self.rank
        if self.most:
            table, h = self.table[entry : entry + len(linears)], self.h[: len(linears)]
            constants = {"NA": self.most, "R": self.rank, "BLOCK": 2048}
            arguments = (x, table, h, self.count, x.shape[1])
            grid = (self.rank, self.count * self.most, len(linears))
            launch(triton_ops.products().down_kernel, grid, arguments, constants, 4)
        start = 0
        for place, (linear, width) in enumerate(zip(linears, widths, strict=True)):
            out = y[:, start : start + width]
            start += width
            extras = (self.table[entry + place], self.h[place]) if self.most else None
            if self.count <= FEW_ROWS and linear.packed.format in triton_ops.UNITS:
                gemv(x, linear.packed, out, linear.bias, residual, extras, loras)
                continue
            product = x.to(self.dtype) @ triton_ops.weight(linear.packed, self.dtype, copies=False).T
            _add(product, out, linear.bias, residual, extras, loras)
        return y

    def _attended(self, qkv: Tensor, layer: Layer, index: int) -> Tensor:
        d, M = self.decoder, self.count
        H, G, D = d.heads, d.groups, d.channels
        q, y = qkv.new_empty(M, H * D), qkv.new_empty(M, H * D)
        kv = _triton_dtype(self.dtype)
        splits = 2 if interpreted() else 16  # programs that share the attention of a head
        normed, places = len(layer.norms) > 2, self.places[2 * index : 2 * index + 2]
        norms = layer.norms[2:] if normed else (qkv, qkv)
        arguments: tuple[Any, ...] = (
            qkv, *norms, self.cos, self.sin, q, places, self.shape, self.rows, self.slots, self.longest, float(d.epsilon),
        )  # fmt: skip
        constants = {
            "H": H,
            "G": G,
            "D": D,
            "HALF": power_of_two(D // 2),
            "NORM": normed,
            "KV": kv,
            "EXACT": interpreted(),
        }
        launch(_decoding().rotate_kernel, (H + 2 * G, M, 1), arguments, constants, 1)
        parts = qkv.new_empty(M, H, splits, D + 2)
        arguments = (
            q, places, self.shape, self.rows, self.slots, parts, self.longest, layer.window, float(d.scale),
        )  # fmt: skip
        constants = {"H": H, "G": G, "D": D, "WIDE": power_of_two(D), "SPLITS": splits, "BLOCK": BLOCK, "KV": kv}
        launch(_decoding().attend_kernel, (H, M, splits), arguments, constants, 4)
        constants = {"D": D, "WIDE": power_of_two(D), "SPLITS": splits}
        launch(_decoding().join_kernel, (H, M, 1), (parts, y, H), constants, 1)
        return y


def _add(
    product: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None,
    extras: tuple[Tensor, Tensor] | None, loras: tuple[int, int],
) -> None:  # fmt: skip
    """Write a product [M, rows] and what is added to it to `out`, whose rows may lie apart."""
    unused = product
    table, h = extras or (unused, unused)
    arguments = (
        product, out, unused if bias is None else bias, unused if residual is None else residual, table, h,
        product.shape[1], out.stride(0),
    )  # fmt: skip
    constants = {"BLOCK": 512, "BIAS": bias is not None, "ADD": residual is not None, "NA": loras[0], "R": loras[1]}
    launch(triton_ops.products().add_kernel, (-(-product.shape[1] // 512), len(product), 1), arguments, constants, 4)


def _linears(layer: Layer) -> list[Linear]:
    """Those that it has: of `LINEARS` all but the shared gate."""
    return [linear for linear in layer.linears if linear is not None]


def _tensors(layer: Layer) -> list[Tensor]:
    parts = [part for linear in _linears(layer) for part in (*linear.packed.parts, linear.bias)]
    return [tensor for tensor in (*parts, *layer.norms) if tensor is not None]


def _padded(values: list[list[int]], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    table = torch.zeros(rows, columns, dtype=dtype)
    table[: len(values)] = torch.tensor(values, dtype=dtype)
    return table


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@cache
def _decoding() -> ModuleType:
    from qgraft.kernels import triton_decoding

    return triton_decoding
