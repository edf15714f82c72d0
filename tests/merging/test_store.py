"""A merge that is killed, interrupted or out of disk goes on from the layers that it had solved, to the same bytes."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import qgraft
from qgraft import progress
from qgraft.adapters.base import find_adapter
from qgraft.adapters.targets import lora_layers
from qgraft.data.tokenizing import Sample
from qgraft.errors import MergeError, OptionError, StorageError
from qgraft.formats import PackedTensor, quantize
from qgraft.merging import calibration, lockstep, measure, store
from qgraft.merging.calibration import Calibration
from qgraft.merging.layer import LayerReport
from qgraft.merging.merge import merge
from qgraft.merging.store import ABOUT, WorkDir, identity, work_in

LAYERS = 14  # of the tiny model that the adapters are on
QUICK: dict[str, Any] = {"method": "scales", "min_retained": -100.0}
REPORT = LayerReport("a", "q4_1", 0.1 + 0.2, 1e-30, float("inf"), ("fit_reals", "descend_codes"))
SOURCE = str(Path(qgraft.__file__).parents[1])


@pytest.fixture(autouse=True)
def _little_unrelated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 1000)
    monkeypatch.setattr(calibration, "DRIFT_TOKENS", 300)


def raw(packed: PackedTensor) -> tuple[Any, ...]:
    return packed.format, packed.shape, *(part.dtype for part in packed.parts), *map(as_bytes, packed.parts)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def bytes_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    modules = {path.removesuffix(".base"): module for path, module in model.named_modules()}
    return {path: raw(each.packed_weight.get()) for path, each in modules.items() if hasattr(each, "packed_weight")}


class Stop(Exception):
    pass


@contextmanager
def counted(
    monkeypatch: pytest.MonkeyPatch, most: int = 1000, error: BaseException | None = None
) -> Iterator[list[str]]:
    """The paths of the layers that are solved within the block; `error` comes instead of one more than `most`."""
    solved: list[str] = []
    real = lockstep.merge_layer

    def solve(path: str, *args: Any) -> Any:
        if len(solved) == most:
            raise error or Stop
        solved.append(path)
        return real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(lockstep, "merge_layer", solve)
        yield solved


# ---------------------------------------------------------------- the folder


def packed_layers() -> dict[str, PackedTensor]:
    generator = torch.Generator().manual_seed(0)
    formats = {"a": "q4_1", "b": "q6_k", "c": "chatglm-int4", "d": "f16", "e": "q4_1"}
    return {path: quantize(torch.randn(8, 256, generator=generator), each) for path, each in formats.items()}


def begun(folder: Path, about: Mapping[str, Any] | None = None, layers: Mapping[str, Any] | None = None) -> WorkDir:
    """What a merge finds in the folder."""
    work = WorkDir(folder, Console(file=io.StringIO()))
    work.begin(about or {"method": "auto"}, layers or packed_layers())
    return work


def said(work: WorkDir) -> str:
    return work._console.file.getvalue()  # type: ignore[union-attr]


def filled(folder: Path) -> dict[str, PackedTensor]:
    """Other weights than those of the base, kept in `folder`."""
    folder.mkdir()
    work = begun(folder)
    merged = {path: each.map(lambda part: part.flip(0)) for path, each in packed_layers().items()}
    for path, each in merged.items():
        work.keep(path, each, replace(REPORT, path=path, format=each.format))
    return merged


def test_what_is_kept_is_found_bit_for_bit(tmp_path):
    merged = filled(tmp_path / "work")
    work = begun(tmp_path / "work")
    assert list(work.found) == list(merged)
    for path, (packed, report) in work.found.items():
        assert raw(packed) == raw(merged[path])
        assert report == replace(REPORT, path=path, format=packed.format)
    assert said(work) == "all 5 layers are solved already\n"


def file_of(tensor: torch.Tensor) -> str:
    """The file whose mapping the tensor lies in; empty for other memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(each, 16) for each in line.split(" ", 1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5].removesuffix(" (deleted)") if len(line.split()) > 5 else ""
    raise AssertionError("the tensor is nowhere")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where a tensor lies")
def test_what_is_kept_lies_in_its_file_from_then_on(tmp_path):
    (tmp_path / "work").mkdir()
    work, layers = begun(tmp_path / "work"), packed_layers()
    kept = {path: work.keep(path, each, replace(REPORT, path=path)) for path, each in layers.items()}
    found = {path: packed for path, (packed, _) in begun(tmp_path / "work").found.items()}
    work.close(done=True)  # a file that is mapped lives on without its name
    assert not list((tmp_path / "work").glob("*.safetensors"))
    for number, (path, packed) in enumerate(layers.items(), 1):
        for each in (kept[path], found[path]):
            assert raw(each) == raw(packed)
            file = tmp_path / "work" / f"{number:05d}.safetensors"
            assert {file_of(part) for part in each.parts} == {str(file)}, path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of a weight": lambda file: flip(file, -1),
    "a bit of the report": lambda file: flip(file, file.read_bytes().index(b"fit_reals")),
    "half of it": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "no safetensors": lambda file: file.write_bytes(b"\xff" * 400),
    "another layer's": lambda file: file.write_bytes((file.parent / "00005.safetensors").read_bytes()),
    "another format's": lambda file: file.write_bytes((file.parent / "00002.safetensors").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_solved_again_and_the_others_are_not(tmp_path, damage):
    merged = filled(tmp_path / "work")
    file = tmp_path / "work" / "00001.safetensors"
    DAMAGES[damage](file)
    work = begun(tmp_path / "work")
    assert list(work.found) == ["b", "c", "d", "e"]
    assert said(work) == "going on from layer 5 of 5; damaged, so solved again: 1\n"
    work.keep("a", merged["a"], REPORT)
    assert list(begun(tmp_path / "work").found) == ["a", "b", "c", "d", "e"]


def test_a_file_of_another_merge_is_not_taken(tmp_path):
    """One that a kill has left between two merges, or that was copied here."""
    filled(tmp_path / "one")
    (tmp_path / "two").mkdir()
    assert begun(tmp_path / "two", {"method": "scales"}).found == {}
    shutil.copy(tmp_path / "one" / "00003.safetensors", tmp_path / "two")
    work = begun(tmp_path / "two", {"method": "scales"})
    assert work.found == {} and "damaged, so solved again: 1" in said(work)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda about: about.write_text(about.read_text().replace("auto", "none")), "was changed since it was written"),
        (lambda about: about.write_text(about.read_text()[:40]), "is not JSON"),
        (lambda about: about.write_text("[]"), "got a JSON list, expected an object"),
        (lambda about: about.write_text('{"merge": 1}'), "was changed since it was written"),
    ],
)
def test_a_folder_that_says_nothing_reliable_is_begun_anew(tmp_path, change, told):
    filled(tmp_path / "work")
    change(tmp_path / "work" / ABOUT)
    work = begun(tmp_path / "work")
    assert work.found == {} and [path.name for path in (tmp_path / "work").iterdir()] == [ABOUT]
    assert told in said(work) and said(work).endswith("; beginning anew\n") and said(work).count("\n") == 1
    assert said(begun(tmp_path / "work")) == "going on from layer 1 of 5\n"


def test_another_merge_is_named_by_what_differs(tmp_path):
    filled(tmp_path / "work")
    work = begun(tmp_path / "work", {"method": "scales", "seed": 0})
    assert said(work) == f"{tmp_path / 'work'} is of another merge (other method, seed); beginning anew\n"
    assert [path.name for path in (tmp_path / "work").iterdir()] == [ABOUT]
    layers = packed_layers()
    del layers["e"]
    assert "(other layers)" in said(begun(tmp_path / "work", {"method": "scales", "seed": 0}, layers))


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "sub"])
def test_what_no_merge_has_written_is_never_touched(tmp_path, name):
    filled(tmp_path / "work")
    foreign = tmp_path / "work" / name
    foreign.mkdir() if name == "sub" else foreign.write_text("mine")
    before = sorted(path.name for path in (tmp_path / "work").iterdir())
    with (
        pytest.raises(StorageError, match=rf"it holds {name}\nhint: give work_dir= another folder"),
        work_in(tmp_path / "work", None),
    ):
        raise AssertionError("entered")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == before


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "work").write_text("mine")
    with pytest.raises(StorageError, match="is a file, expected a folder"), work_in(tmp_path / "work", None):
        raise AssertionError("entered")
    assert (tmp_path / "work").read_text() == "mine"


def test_two_merges_do_not_share_a_folder(tmp_path):
    def enter() -> None:
        with work_in(tmp_path / "work", None):
            raise AssertionError("entered")

    told = pytest.raises(StorageError, match="in use by another thread")
    with work_in(tmp_path / "work", None), ThreadPoolExecutor(1) as pool, told:
        pool.submit(enter).result()
    assert not list(tmp_path.iterdir())


def test_no_room_for_all_layers_is_found_out_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 5000))
    (tmp_path / "work").mkdir()
    total = sum(packed.nbytes for packed in packed_layers().values())
    with pytest.raises(StorageError, match=f"No space left on device, {total} bytes to write, 5000 bytes free"):
        begun(tmp_path / "work")


def test_room_is_asked_for_beside_what_will_be_saved_there(tmp_path, monkeypatch):
    total = sum(packed.nbytes for packed in packed_layers().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, total + 99))
    with work_in(tmp_path / "work", None, 99) as work:
        work.begin({"method": "auto"}, packed_layers())
    with (
        pytest.raises(StorageError, match=f"{total + 100} bytes to write, {total + 99} bytes free"),
        work_in(tmp_path / "work", None, 100) as work,
    ):
        work.begin({"method": "auto"}, packed_layers())


# ---------------------------------------------------------------- which merge it is


def samples(*rows: list[int]) -> list[Sample]:
    return [Sample(row, [-100, *row[1:]], "row") for row in rows]


ROWS = Calibration(samples([5, 6, 7], [8, 9]), samples([10, 11]), [], [], False)


def add_to(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] += 1


def change_base(model: Any) -> None:
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    changed = layer.packed.map(torch.Tensor.clone)
    changed.parts[0][0, -1] ^= 1
    layer.replace(changed)


def change_embedding(model: Any, token: int = 6) -> None:
    weight = model.get_input_embeddings().packed_weight
    changed = weight.get().map(torch.Tensor.clone)
    changed.parts[0][token, -1] ^= 1
    weight.set(changed)


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a bit of a wrapped layer": ("base", change_base),
    "a row of the embedding": ("rows", change_embedding),
    "a norm": ("base", lambda model: add_to(model.model.norm.weight)),
    "an option of the model": ("config", lambda model: setattr(model.config, "rms_norm_eps", 1e-3)),
    "a LoRA": ("adapters", lambda model: add_to(next(find_adapter(model).named_parameters())[1])),
    "a weight": ("adapters", lambda model: qgraft.use_adapter(model, {"default": 0.5})),
    "threads": ("machine", lambda model: torch.set_num_threads(torch.get_num_threads() + 1)),
}


def about(model: Any, rows: Calibration = ROWS) -> dict[str, Any]:
    found = identity(model, qgraft.active_adapters(model), rows, method="auto")
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_bytes_is_in_the_identity(trained, change):
    model, _ = trained().load()
    before, threads = about(model), torch.get_num_threads()
    assert about(trained().load()[0]) == before
    key, apply = CHANGES[change]
    try:
        apply(model)
        after = about(model)
    finally:
        torch.set_num_threads(threads)
    assert {each for each in before if after[each] != before[each]} == {key}


def test_of_the_embedding_only_the_rows_that_are_read_count(trained):
    model, _ = trained().load()
    before = about(model)
    change_embedding(model, 50)
    assert about(model) == before


def test_rows_are_in_the_identity_and_what_they_are_for(trained):
    model, _ = trained().load()
    other_ids = replace(ROWS, fit=samples([5, 6, 7], [8, 8]))
    other_labels = replace(ROWS, judge=[replace(ROWS.judge[0], labels=[10, 11])])
    moved = replace(ROWS, fit=ROWS.fit[:1], judge=[ROWS.fit[1], *ROWS.judge])
    found = [about(model, rows)["rows"] for rows in (ROWS, other_ids, other_labels, moved)]
    assert len(set(found)) == 4
    assert about(model, replace(ROWS, measure=samples([1, 2])))["rows"] == found[0]  # which no layer sees


# ---------------------------------------------------------------- merges


def test_an_interrupted_merge_goes_on_to_the_same_bytes(trained, rows, tmp_path, monkeypatch):
    model, tokenizer = trained().load()
    merge(model, tokenizer, calibration=rows, **QUICK)
    expected, work = bytes_of(model), tmp_path / "work"

    model, tokenizer = trained().load()
    before = bytes_of(model)
    with counted(monkeypatch, 5, KeyboardInterrupt()) as first, pytest.raises(KeyboardInterrupt):
        merge(model, tokenizer, calibration=rows, work_dir=work, **QUICK)
    assert bytes_of(model) == before and qgraft.active_adapters(model) == {"default": 1.0}
    assert len(list(work.glob("*.safetensors"))) == 5
    with pytest.raises(OptionError):  # before anything is looked at
        merge(model, tokenizer, calibration=rows, work_dir=work, method="scale")
    with pytest.raises(OptionError):
        merge(model, tokenizer, calibration=rows, work_dir=work, temperature=1, **QUICK)
    assert len(list(work.glob("*.safetensors"))) == 5

    flip(work / "00002.safetensors", -1)
    with counted(monkeypatch) as second:
        report = merge(model, tokenizer, calibration=rows, work_dir=work, **QUICK)
    assert bytes_of(model) == expected
    assert second[0] == first[1] and not {*second[1:]} & {*first} and len(second) == LAYERS - 4
    assert report.notes[-1] == "4 of 14 layers were solved by an earlier call, which is not in the seconds"
    assert [each.path for each in report.layers] == [first[0], first[1], *first[2:], *second[1:]]
    assert not list(tmp_path.iterdir())


def test_layers_that_the_pass_is_through_with_are_given_back(trained, rows, tmp_path, monkeypatch):
    """Also those that are found, and before all of the base, which was hashed and measured."""
    model, tokenizer = trained().load()
    given_back: list[int] = []
    for module in (lockstep, measure, store):
        monkeypatch.setattr(module, "release", lambda *tensors: given_back.extend(each.data_ptr() for each in tensors))
    base = {path: each.packed.parts[0].data_ptr() for path, each in lora_layers(model)}
    with counted(monkeypatch, 5), pytest.raises(Stop):
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    assert {*given_back} >= {*base.values()}
    with counted(monkeypatch) as solved:
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    assert len(solved) == LAYERS - 5
    for path, address in base.items():
        merged = model.get_submodule(path).packed.parts[0].data_ptr()
        assert given_back.count(address) >= 4, path  # hashed, and passed by the base, the adapter's model, in step
        assert given_back.count(merged) >= 2, path  # in step, and by the merged model


def test_too_little_kept_can_be_taken_without_solving_again(trained, rows, tmp_path, monkeypatch):
    model, tokenizer = trained().load()
    with counted(monkeypatch) as solved, pytest.raises(MergeError):
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", method="scales", min_retained=1.0)
    assert len(solved) == LAYERS
    with counted(monkeypatch) as solved:
        report = merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    assert solved == [] and report.retained_gain < 1
    assert not list(tmp_path.iterdir())


def test_another_merge_in_the_same_folder_begins_anew(trained, rows, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "qgraft")
    model, tokenizer = trained().load()
    with counted(monkeypatch, 3) as solved, pytest.raises(Stop):
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    assert caplog.messages[-1].startswith(f"3 of 14 layers are solved and kept in {tmp_path / 'work'}: the same call")
    with counted(monkeypatch, 1), pytest.raises(Stop):
        merge(model, tokenizer, calibration=rows[:-1], seed=1, work_dir=tmp_path / "work", **QUICK)
    assert f"{tmp_path / 'work'} is of another merge (other rows, seed); beginning anew" in caplog.messages
    with counted(monkeypatch) as solved:
        merge(model, tokenizer, calibration=rows[:-1], seed=1, work_dir=tmp_path / "work", **QUICK)
    assert len(solved) == LAYERS - 1
    assert "going on from layer 2 of 14" in caplog.messages


def test_merges_that_solve_nothing_leave_nothing(trained, rows, tmp_path):
    model, tokenizer = trained().load()
    merge(model, tokenizer, calibration=rows, method="nearest", min_retained=-100.0, work_dir=tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_what_was_kept_stays(trained, rows, tmp_path, failing_after, monkeypatch):
    model, tokenizer = trained().load()
    before = bytes_of(model)
    with failing_after("fsync", 8), pytest.raises(StorageError, match=r"work/0000\d\.safetensors: Input/output error"):
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    assert bytes_of(model) == before
    left = len(list((tmp_path / "work").glob("*.safetensors")))
    assert left >= 3 and not list((tmp_path / "work").glob(".*"))
    with counted(monkeypatch) as solved:
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    assert len(solved) == LAYERS - left


def test_lines_without_a_terminal_count_what_was_found(trained, rows, tmp_path, monkeypatch):
    model, tokenizer = trained().load()
    with counted(monkeypatch, 9), pytest.raises(Stop):
        merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", **QUICK)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), width=80)
    merge(model, tokenizer, calibration=rows, work_dir=tmp_path / "work", progress=console, **QUICK)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert " ".join(lines[0]) == "going on from layer 10 of 14"
    counts = [line[1] for line in lines if line[:1] == ["layers"]]
    assert counts == [f"{n}/14" for n in range(9, 15)]


# ---------------------------------------------------------------- the command, killed

PROGRAM = """
    import os, signal, sys
    from qgraft.cli import main
    from qgraft.merging import calibration, lockstep

    calibration.NEUTRAL_TOKENS, calibration.DRIFT_TOKENS = 1000, 300
    solve, left = lockstep.merge_layer, int(sys.argv[1])

    def killed(*args):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return solve(*args)

    lockstep.merge_layer = killed
    sys.exit(main.main(sys.argv[2:]))
"""


def start(words: list[str], layers: int) -> subprocess.Popen[str]:
    """A process that merges and is killed, by itself, when it has solved so many layers."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": SOURCE}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(layers), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def command(trained, rows, tmp_path) -> Callable[..., list[str]]:
    """`qgraft merge` of the tiny model into a file of this name."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "out").mkdir()

    def words(name: str, method: str = "scales") -> list[str]:
        made = trained()
        all_words = ["merge", "--device", "cpu", "--model", made.base, "--adapter", made.folder, "--dataset",
                     tmp_path / "rows.json", "--output", tmp_path / "out" / name, "--min-retained", "-100",
                     "--method", method]  # fmt: skip
        return [str(word) for word in all_words]

    return words


def run(words: list[str]) -> int:
    from qgraft.cli import main

    return main.main(words)


def test_a_command_that_was_killed_goes_on_to_the_same_file(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(command("whole.gguf")) == 0
    capsys.readouterr()
    _, errors = (process := start(command("part.gguf"), 6)).communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    work = out / "part.gguf.merging"
    assert not (out / "part.gguf").exists() and len(list(work.glob("*.safetensors"))) == 6

    with counted(monkeypatch, 3, KeyboardInterrupt()) as solved:
        assert run(command("part.gguf")) == 130
    printed = capsys.readouterr().err
    assert len(solved) == 3 and "going on from layer 7 of 14\n" in printed
    assert f"9 of 14 layers are solved and kept in {work}: the same command goes on from there" in printed

    with monkeypatch.context() as patch:  # a kill or a full disk while the model is written loses nothing either
        patch.setattr("qgraft.checkpoints.save.save", unwritable)
        assert run(command("part.gguf")) == 2
    assert "14 of 14 layers are solved" in capsys.readouterr().err and work.is_dir()

    with counted(monkeypatch) as solved:
        assert run(command("part.gguf")) == 0
    assert solved == [] and "all 14 layers are solved already" in capsys.readouterr().err
    assert (out / "part.gguf").read_bytes() == (out / "whole.gguf").read_bytes()
    names = {f"{stem}.{end}" for stem in ("part", "whole") for end in ("gguf", "merge.json", "merge.png")}
    assert {path.name for path in out.iterdir()} == names


def unwritable(*args: Any, **kwargs: Any) -> None:
    raise StorageError("cannot write: No space left on device")


def test_a_foreign_folder_stops_the_command_before_it_solves(command, tmp_path, monkeypatch, capsys):
    foreign = tmp_path / "out" / "part.gguf.merging" / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with counted(monkeypatch) as solved:
        assert run(command("part.gguf")) == 2
    assert solved == [] and foreign.read_text() == "mine"
    assert "holds thesis.txt\nhint: move it away, or choose another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_kills_at_any_moment_leave_no_trace(command, tmp_path):
    """From outside, a few layers after the last kill each time, whatever the process is just doing."""
    out = tmp_path / "out"
    _, errors = (process := start(command("whole.gguf", "auto"), -1)).communicate(timeout=300)
    assert process.returncode == 0, errors
    work, kept, kills = out / "part.gguf.merging", 0, 0
    while True:
        process = start(command("part.gguf", "auto"), -1)
        while process.poll() is None and len(list(work.glob("[0-9]*"))) < kept + 2:
            time.sleep(0.002)
        process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break  # no two layers were left, or it was faster than the kill
        assert process.returncode == -signal.SIGKILL, errors
        kept, kills = len(list(work.glob("[0-9]*"))), kills + 1
    assert kills >= 2
    assert (out / "part.gguf").read_bytes() == (out / "whole.gguf").read_bytes()
    assert not [path for path in out.iterdir() if "merging" in path.name or path.name.startswith(".")]
