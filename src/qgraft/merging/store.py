"""The layers that a merge has solved, on the disk until the merge is done: one that is killed goes on from there.

    OUTPUT.merging/
        merging.json         which merge this is: base, adapters, rows, options, releases, machine
        00001.safetensors    the first layer's packed parts; in its metadata the layer's report, and a SHA-256 of both
        00002.safetensors    ...

A layer's file is written whole, as soon as the layer is solved. A merge that finds a folder of its own takes what is whole
there, and computes only the passes through these layers; the bytes are those of a merge without a kill, because all that
decides them is in merging.json: every number of base and adapters that is read, the calibration rows, what computes and with
how many threads. One that differs in any of it begins anew. A file that is damaged is solved again.

On a CPU a merge goes on with the mapped file in place of what it has written, so the solved layers of a large model take no
memory that the system could not have back. The files lose their names in the end and live on as long as they are mapped.

Not chosen: the fingerprint for the base, which samples its bytes (checkpoints/fingerprint.py) and needs the file: all are
hashed here, seconds for the gigabytes of a merge that takes minutes. Nor are the rounds of distilling kept that may follow
the last layer: each gives all layers anew, as large as the model, so a kill there costs these rounds.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from qgraft import __version__, storage
from qgraft.adapters.base import adapters_of, find_adapter
from qgraft.attention import attention_of
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.pickles import WORDS
from qgraft.checkpoints.shards import open_shard
from qgraft.errors import CheckpointError, StorageError, worded
from qgraft.experts import QuantizedExperts
from qgraft.formats import FORMATS, PackedTensor
from qgraft.json_files import OWN, covered_text, is_covered, parse_json, read_object
from qgraft.kernels import KERNELS_VARIABLE, native_status
from qgraft.linear import QuantizedLinear
from qgraft.locks import folder_locked
from qgraft.mapped import release
from qgraft.merging.calibration import Calibration
from qgraft.merging.layer import LayerReport
from qgraft.progress import LOGGER

ABOUT = "merging.json"
_ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # limits that libraries obey
# and what a kill leaves of one that is being written
_LAYER_FILE = re.compile(r"\d{5,}\.safetensors|\.(\d{5,}\.safetensors|merging\.json)\.tmp-\d+")

Solved = tuple[PackedTensor, LayerReport]


class WorkDir:
    """A folder of solved layers, held by this process. `work_in` makes one.

    Attributes:
        reserve: bytes that must have room beside the layers.
        found: what an earlier merge left of this one, by module path.
    """

    def __init__(self, folder: Path, console: Console | None, reserve: int = 0) -> None:
        self.folder, self.reserve, self._console = folder, reserve, console
        self.found: dict[str, Solved] = {}
        self._numbers: dict[str, int] = {}
        self._which = ""
        self._kept = 0

    def begin(self, about: Mapping[str, Any], layers: Mapping[str, PackedTensor]) -> None:
        """Take what is there of this merge, or begin anew.

        Args:
            about: identity() of the merge.
            layers: module path -> weight that will be merged.

        Raises StorageError, also where the disk has no room for what is still to be solved.
        """
        about = {**about, "layers": list(layers)}
        self._which = _digest([json.dumps(about, sort_keys=True).encode()])
        self._numbers = {path: number for number, path in enumerate(layers, 1)}
        if self._is_of(about):
            self.found = {path: each for path in layers if (each := self._read(path, layers[path])) is not None}
            self._tell_found(len(layers))
        else:
            self._clear()
            storage.write_file(self.folder / ABOUT, covered_text({"merge": about}).encode())
        self._kept = len(self.found)
        left = sum(packed.nbytes for path, packed in layers.items() if path not in self.found)
        storage.require_room(self.folder / ABOUT, left + self.reserve)

    def keep(self, path: str, packed: PackedTensor, report: LayerReport) -> PackedTensor:
        """Write a layer that was just solved, and return it as it lies there, mapped. Raises StorageError."""
        text = json.dumps(asdict(report))
        metadata = {"report": text, OWN: self._sha256(path, packed, text)}
        write_safetensors(self._file(path), {name: (WORDS[t.dtype], t) for name, t in _named(packed)}, metadata)
        self._kept += 1
        if packed.device.type != "cpu":
            return packed
        with ExitStack() as stack:
            shard = open_shard(self._file(path), stack)
            return replace(packed, parts=tuple(shard.tensor(name) for name, _ in _named(packed)))

    @property
    def note(self) -> str | None:
        """For the report of a merge that went on from an earlier one."""
        if not self.found:
            return None
        return f"{len(self.found)} of {len(self._numbers)} layers were solved by an earlier call, which is not in the seconds"

    def close(self, done: bool) -> None:
        """Take all away where the merge is done or nothing was solved, else say how to go on."""
        if done or not any(self.folder.glob("*.safetensors")):
            self._clear()
        elif self._kept:  # else what is there was not looked at
            again = worded(
                flags="the same command goes on from there, also with another --min-retained",
                python="the same call goes on from there, also with another min_retained",
            )
            self._say(f"{self._kept} of {len(self._numbers)} layers are solved and kept in {self.folder}: {again}")

    def check_own(self) -> None:
        """Raise StorageError where anything but a merge has put something into the folder."""
        names = [path.name for path in self.folder.iterdir() if path.name not in (ABOUT, storage.LOCK)]
        if foreign := sorted(name for name in names if not _LAYER_FILE.fullmatch(name)):
            raise StorageError(
                f"{self.folder} is where a merge keeps the layers that are solved, but it holds {', '.join(foreign[:4])}",
                hint=worded(flags="move it away, or choose another --output", python="give work_dir= another folder"),
            )

    def _is_of(self, about: dict[str, Any]) -> bool:
        """Whether the folder is of this merge. Says so where it is of another."""
        path = self.folder / ABOUT
        if not path.exists():
            return False
        try:
            found = read_object(path, StorageError)
        except StorageError as error:
            self._say(f"{error.message}; beginning anew")
            return False
        merge = found.get("merge")
        if not isinstance(merge, dict) or not is_covered(path.read_text(encoding="utf-8"), found.get(OWN)):
            self._say(f"{path} was changed since it was written; beginning anew")
            return False
        if others := [key for key in about.keys() | merge.keys() if about.get(key) != merge.get(key)]:
            self._say(f"{self.folder} is of another merge (other {', '.join(sorted(others))}); beginning anew")
        return not others

    def _tell_found(self, total: int) -> None:
        damaged = sum(self._file(path).exists() for path in self._numbers if path not in self.found)
        more = f"; damaged, so solved again: {damaged}" if damaged else ""
        if len(self.found) < total:
            self._say(f"going on from layer {len(self.found) + 1} of {total}{more}")
        else:
            self._say(f"all {total} layers are solved already")

    def _read(self, path: str, like: PackedTensor) -> Solved | None:
        """The layer as it was kept; None where it was not, or its file is damaged."""
        file, expected = self._file(path), dict(_named(like))
        if not file.is_file():
            return None
        with ExitStack() as stack:
            try:
                shard = open_shard(file, stack)
                if {*shard.names} != expected.keys():
                    return None
                parts = {name: shard.tensor(name) for name in expected}
            except CheckpointError:
                return None
        if any(parts[name].shape != t.shape or parts[name].dtype != t.dtype for name, t in expected.items()):
            return None
        packed, text = PackedTensor(like.format, like.shape, tuple(parts.values())), shard.metadata.get("report", "")
        if shard.metadata.get(OWN) != self._sha256(path, packed, text):
            return None
        release(*packed.parts)
        said = parse_json(text, finite=False)
        report = LayerReport(
            **{each.name: said[each.name] for each in fields(LayerReport)}
            | {"steps": (*said["steps"],), "rounded": (*said["rounded"],)}
        )
        return packed.map(lambda part: part.to(like.device)), report

    def _sha256(self, path: str, packed: PackedTensor, report: str) -> str:
        about = json.dumps([self._which, path, packed.format, packed.shape, report]).encode()
        return _digest([about, *(_raw(part) for part in packed.parts)])

    def _file(self, path: str) -> Path:
        return self.folder / f"{self._numbers[path]:05d}.safetensors"

    def _clear(self) -> None:
        """Remove what merges have put into the folder; what says which merge it is of comes first."""
        with storage.named_errors(self.folder):
            (self.folder / ABOUT).unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if _LAYER_FILE.fullmatch(path.name):
                    path.unlink()

    def _say(self, text: str) -> None:
        if self._console is None:
            LOGGER.info(text)
        else:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def work_in(folder: str | Path, console: Console | None, reserve: int = 0) -> Iterator[WorkDir]:
    """Hold `folder` within the block. It is taken away where the block ends well, and stays with what is solved otherwise.

    Args:
        console: what is found and what is left is said there; None for the log.
        reserve: bytes that will be written to the same disk before the block ends, as what is merged is saved.

    Raises StorageError where it cannot be made, is in use by another process, or holds what no merge has put there.
    """
    work, done = WorkDir(Path(os.path.realpath(folder)), console, reserve), False
    with folder_locked(work.folder):
        work.check_own()
        try:
            yield work
            done = True
        finally:
            work.close(done)
    storage.remove_if_empty(work.folder)


def held(work_dir: str | Path | WorkDir | None, console: Console | None) -> AbstractContextManager[WorkDir | None]:
    """`work_in` for a path; a WorkDir is taken as it is, and whoever made it takes it away."""
    return nullcontext(work_dir) if isinstance(work_dir, WorkDir | None) else work_in(work_dir, console)


def identity(model: PreTrainedModel, weights: Mapping[str, float], rows: Calibration, **options: Any) -> dict[str, Any]:
    """All that decides the bytes of a merge, as JSON values.

    Args:
        weights: the active adapters.
        rows: that the layers are solved on.
        options: of merge(), whichever matter.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return {
        "base": _digest(_numbers_of(model)),
        "config": _digest([json.dumps(config, sort_keys=True, default=str).encode()]),
        "adapters": {name: [weight, _digest(_numbers_of_adapter(model, name))] for name, weight in weights.items()},
        "rows": _digest(_tokens(model, rows)),
        "releases": {"qgraft": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
            "cpu": [_cpu_name(), torch.backends.cpu.get_cpu_capability(), *map(os.environ.get, _ISA_VARIABLES)],
            "kernels": native_status()[1],
            "kernels_variable": os.environ.get(KERNELS_VARIABLE, "auto"),
            "threads": torch.get_num_threads(),
            "attention": attention_of(model),
            "dtype": str(model.dtype),
        },
        **options,
    }


def _numbers_of(model: PreTrainedModel) -> Iterator[bytes | memoryview]:
    """Every tensor of the model that is none of an adapter, and what its layers compute in; no embedding, see _tokens."""
    parts = (part for each in adapters_of(model).values() for part in each.parts.values())
    apart = {module for part in parts for module in part.modules()} | {*_embedding(model).modules()}
    for path, module in model.named_modules():
        if module in apart:
            continue
        compute = module.compute if isinstance(module, QuantizedLinear | QuantizedExperts) else None
        yield json.dumps([path, type(module).__qualname__, compute]).encode()
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for name, tensor in named:
                yield from _described(name, tensor)


def _numbers_of_adapter(model: PreTrainedModel, name: str) -> Iterator[bytes | memoryview]:
    for path, part in find_adapter(model, name).parts.items():
        yield json.dumps([path, type(part).__qualname__, str(part.config)]).encode()
        for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
            yield from _described(key, tensor)


def _tokens(model: PreTrainedModel, rows: Calibration) -> Iterator[bytes | memoryview]:
    """The samples, and the embeddings of their tokens: to read all rows would bring a large file into memory for nothing."""
    for samples in (rows.fit, rows.judge):
        kinds = [
            [kinds] if (kinds := getattr(sample, "kinds", None)) else [] for sample in samples
        ]  # of a classifier's
        yield json.dumps([[s.input_ids, s.labels, *more] for s, more in zip(samples, kinds, strict=True)]).encode()
    ids = sorted({0, *(token for sample in [*rows.fit, *rows.judge] for token in sample.input_ids)})  # 0 pads
    with torch.no_grad():
        yield from _described("embedding", _embedding(model)(torch.tensor(ids, device=model.device)))


def _embedding(model: PreTrainedModel) -> Any:
    return model.get_input_embeddings()


def _cpu_name() -> str:
    """What Linux calls the CPU: libraries choose by it how they multiply. Empty elsewhere."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _described(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    yield json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
    yield _raw(tensor)
    release(tensor)


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    """Hex SHA-256 of the pieces and of where each ends."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _named(packed: PackedTensor) -> list[tuple[str, Tensor]]:
    """The parts with the names that the format gives them."""
    return [(part.name, tensor.cpu()) for part, tensor in zip(FORMATS[packed.format].parts, packed.parts, strict=True)]
