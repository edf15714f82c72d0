"""Weight files of folders: pickled ones read as safetensors are, and hostile ones refused before anything runs."""

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qgraft.checkpoints.shards import BIN_INDEX, INDEX, WORDS, open_shard, open_shards, shard_paths
from qgraft.errors import CheckpointError


def tensors() -> dict[str, Tensor]:
    """One tensor of every kind that is read."""
    torch.manual_seed(0)
    floats = torch.randn(6, 4)
    return {str(dtype): (floats * 50).to(dtype) for dtype in WORDS}


def read(folder: Path) -> dict[str, Tensor]:
    with ExitStack() as stack:
        return {name: tensor() for name, tensor in open_shards(folder, stack).items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]) for name in expected
    )


def test_a_pickle_holds_what_safetensors_hold(tmp_path: Path) -> None:
    state = tensors()
    for name in ("bin", "safetensors"):
        (tmp_path / name).mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    save_file(state, tmp_path / "safetensors" / "model.safetensors")
    assert same(read(tmp_path / "bin"), state)
    assert same(read(tmp_path / "safetensors"), state)
    with ExitStack() as stack:
        for folder in (tmp_path / "bin", tmp_path / "safetensors"):
            shard = open_shard(shard_paths(folder)[0], stack)
            described = {name: shard.describe(name) for name in shard.names}
            assert described == {str(dtype): ((6, 4), word) for dtype, word in WORDS.items()}


def test_tensors_of_a_pickle_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    """8 MB are read twice without 8 MB of memory that is the process's own."""
    import psutil

    torch.save({"a": torch.ones(2, 1 << 20)}, tmp_path / "pytorch_model.bin")
    before = psutil.Process().memory_info()
    kept = [read(tmp_path)["a"] for _ in range(2)]
    assert float(sum(part.sum() for part in kept)) == 4 << 20
    after = psutil.Process().memory_info()
    assert (after.rss - after.shared) - (before.rss - before.shared) < 4 << 20


def test_transposed_and_shared_tensors(tmp_path: Path) -> None:
    a = torch.arange(12.0).view(3, 4)
    torch.save({"a": a, "again": a, "turned": a.T, "part": a[1:]}, tmp_path / "pytorch_model.bin")
    assert same(read(tmp_path), {"a": a, "again": a, "turned": a.T.contiguous(), "part": a[1:]})


def test_shards_with_an_index(tmp_path: Path) -> None:
    state = tensors()
    names = list(state)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model_old.bin")  # not in the index
    (tmp_path / BIN_INDEX).write_text(json.dumps({"weight_map": files}))
    assert same(read(tmp_path), state)
    (tmp_path / BIN_INDEX).write_text(
        json.dumps({"weight_map": {**files, "gone": files[names[0]], "too": files[names[0]]}})
    )
    with pytest.raises(CheckpointError, match="lists 2 tensors that its files do not hold: gone, too"):
        read(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"missing pytorch_model-00002-of-00002\.bin"):
        read(tmp_path)


def test_safetensors_come_first(tmp_path: Path) -> None:
    """A folder with both is read from safetensors, whichever index lies in it; other .bin files are no weights."""
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / BIN_INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    assert read(tmp_path)["a"] == 1
    for name in ("model.safetensors", "pytorch_model.bin", BIN_INDEX):
        (tmp_path / name).unlink()
    torch.save({"lr": torch.zeros(1)}, tmp_path / "optimizer.bin")
    with pytest.raises(CheckpointError, match="no weights"):
        read(tmp_path)
    assert not (tmp_path / INDEX).exists()


class Runs:
    """A pickle of this calls `function(argument)` wherever it is unpickled without care."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.call


def plain_pickle(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value))


def zipped(path: Path, value: Any) -> None:
    torch.save(value, path)


def legacy(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [zipped, legacy, plain_pickle])
@pytest.mark.parametrize("function", [os.system, eval, exec, open])
def test_hostile_pickles_are_refused(tmp_path: Path, write: Callable[..., None], function: Callable[..., Any]) -> None:
    canary = tmp_path / "executed"
    argument = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w')"
    write(tmp_path / "pytorch_model.bin", {"a": Runs(function, str(canary) if function is open else argument)})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as caught:
        read(tmp_path)
    if write is zipped:
        assert re.search(rf"asks for (\w+\.)?{function.__name__},", str(caught.value))
        assert "commands on your machine" in str(caught.value.hint)
    assert not canary.exists()


def truncated(path: Path) -> None:
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:-200])


def storage_cut(path: Path) -> None:
    """The archive is whole, but a storage in it is shorter than its tensor."""
    whole = io.BytesIO()
    torch.save({"a": torch.ones(1000)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            copy.writestr(name, data[: len(data) // 2] if name.endswith("data/0") else data)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "cannot read"),
    "text": (lambda p: p.write_text("weights"), "cannot read"),
    "truncated": (truncated, "cannot read"),
    "a storage cut": (storage_cut, "cannot read"),
    "a tensor alone": (lambda p: torch.save(torch.ones(2), p), "expected a mapping of names to tensors, got Tensor"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "got list"),
    "nested": (lambda p: torch.save({"state_dict": {"a": torch.ones(2)}}, p), "got 'state_dict': dict"),
    "complex numbers": (lambda p: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, p), "'a': torch.complex64"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pickles(tmp_path: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)
