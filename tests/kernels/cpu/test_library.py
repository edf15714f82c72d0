"""The C library: made from the sources that lie here, or an error; and which level of CPU runs."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qgraft.cli import main as command_line
from qgraft.errors import InstallationError, OptionError
from qgraft.formats import quantize
from qgraft.kernels import choose, linear, native_status
from qgraft.kernels.choice import has_fast_bf16
from qgraft.kernels.cpu import library
from qgraft.kernels.cpu.library import FOLDER, LEVELS
from qgraft.kernels.cpu.sources import sources_hash
from qgraft.training.arguments import TrainArguments

Reload = Callable[..., None]

needs_native = pytest.mark.skipif(not native_status()[0], reason=f"native kernels are {native_status()[1]}")


@pytest.fixture
def other_library(tmp_path: Path) -> Path:
    """The library with another hash in it, as one from before a `git pull` has."""
    path = tmp_path / "_native.so"
    here = sources_hash(FOLDER).encode()
    content = Path(library.loaded()._name).read_bytes()
    assert content.count(here) == 1
    path.write_bytes(content.replace(here, here[::-1]))
    return path


# --- the same sources


def test_the_hash_is_of_every_source_by_name_and_content(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k")
    hashes = [sources_hash(FOLDER), sources_hash(tmp_path / "k")]
    assert hashes[0] == hashes[1]
    for change in (
        lambda: (tmp_path / "k/vec.h").write_text((FOLDER / "vec.h").read_text() + "\n"),
        lambda: (tmp_path / "k/packed.c").write_text((FOLDER / "packed.c").read_text() + "\n"),
        lambda: (tmp_path / "k/linear.c").rename(tmp_path / "k/linear2.c"),
        lambda: (tmp_path / "k/new.h").touch(),
    ):
        change()
        hashes.append(sources_hash(tmp_path / "k"))
    assert len(set(hashes)) == 5


@needs_native
def test_a_library_of_other_sources_is_an_error_instead_of_a_call(
    other_library: Path, reload: Reload, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = quantize(torch.randn(3, 32), "q4_1"), torch.randn(2, 32)
    expected = linear(x, packed)
    reload(QGRAFT_NATIVE_LIBRARY=str(other_library), QGRAFT_KERNELS=None)
    for ask in (native_status, lambda: choose("linear", "q4_1", "cpu"), lambda: linear(x, packed)):
        with pytest.raises(InstallationError, match="made from other C sources") as caught:
            ask()
        here = sources_hash(FOLDER)
        assert f"got hash {here[::-1]}, expected {here}" in caught.value.message
        assert str(other_library) in caught.value.message
        assert caught.value.hint == "unset QGRAFT_NATIVE_LIBRARY; or do without it: QGRAFT_KERNELS=reference"
    monkeypatch.setattr(library, "_path", lambda: other_library)
    reload(QGRAFT_NATIVE_LIBRARY=None)  # as where it lies in the package
    with pytest.raises(InstallationError, match=r"hint: (build again: pip install -e|install qgraft again)"):
        linear(x, packed)
    reload(QGRAFT_KERNELS="reference")  # does without it
    torch.testing.assert_close(linear(x, packed), expected)


@needs_native
def test_doctor_shows_a_library_of_other_sources(
    other_library: Path, reload: Reload, capsys: pytest.CaptureFixture[str]
) -> None:
    reload(QGRAFT_NATIVE_LIBRARY=str(other_library), QGRAFT_KERNELS=None)
    assert command_line.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "error: " in out and "made from other C sources" in out and "hint: " in out
    assert command_line.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] and not found["native_kernels"]["available"] and found["kernels"] == []
    reload(QGRAFT_KERNELS="reference")  # no command would stop
    assert command_line.main(["doctor"]) == 0
    assert "made from other C sources" in capsys.readouterr().out


def test_what_is_no_library_of_ours_is_an_error(tmp_path: Path, reload: Reload) -> None:
    (tmp_path / "text.so").write_text("hello")
    reload(QGRAFT_KERNELS="native", QGRAFT_NATIVE_LIBRARY=str(tmp_path / "text.so"))
    with pytest.raises(InstallationError, match=r"text\.so: cannot be loaded"):
        choose("linear", "q4_1", "cpu")
    python_module = importlib.util.find_spec("_ctypes").origin
    reload(QGRAFT_NATIVE_LIBRARY=python_module)
    with pytest.raises(InstallationError, match="got hash none"):
        choose("linear", "q4_1", "cpu")
    reload(QGRAFT_NATIVE_LIBRARY=str(tmp_path / "missing.so"))
    with pytest.raises(OptionError, match=r"missing\.so: no such file"):
        choose("linear", "q4_1", "cpu")


# --- the level


@pytest.mark.usefixtures("native_kernels")
def test_the_highest_level_runs_unless_another_is_asked_for(reload: Reload) -> None:
    reload(QGRAFT_CPU_LEVEL=None)
    here = library.levels(library.loaded())
    assert here[0] == "plain" and here == [level for level in LEVELS if level in here]
    assert library.level() == here[-1]
    assert native_status()[1].startswith(f"built, runs as {here[-1]}")
    for level in here:
        reload(QGRAFT_CPU_LEVEL=level)
        assert native_status() == (True, f"built, runs as {level}: QGRAFT_CPU_LEVEL={level}, of {', '.join(here)}")
        assert choose("linear", "q4_1", "cpu").why == native_status()[1]
        assert library.has_panels() == (level != "plain")


def test_an_unknown_level_is_an_error_with_a_hint(reload: Reload, capsys: pytest.CaptureFixture[str]) -> None:
    reload(QGRAFT_CPU_LEVEL="avx", QGRAFT_KERNELS=None)
    packed = quantize(torch.randn(3, 32), "q4_1")
    with pytest.raises(OptionError, match="QGRAFT_CPU_LEVEL='avx': expected one of plain, avx2, avx512") as caught:
        linear(torch.randn(2, 32), packed)
    assert "avx2" in caught.value.hint
    assert command_line.main(["doctor"]) == 1
    assert "QGRAFT_CPU_LEVEL='avx'" in capsys.readouterr().out


@needs_native
def test_a_level_that_this_cpu_has_not_is_an_error(reload: Reload, monkeypatch: pytest.MonkeyPatch) -> None:
    reload(QGRAFT_CPU_LEVEL=None)
    here = library.levels(library.loaded())
    monkeypatch.setattr(library, "levels", lambda _: here[:1])
    reload(QGRAFT_CPU_LEVEL="avx512-bf16")
    with pytest.raises(OptionError, match="QGRAFT_CPU_LEVEL=avx512-bf16: not here, expected one of plain") as caught:
        native_status()
    assert "leave it out" in caught.value.hint


@needs_native
def test_the_level_decides_whether_bfloat16_is_chosen(reload: Reload, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPUs that have it as well: what they would choose is off below that level."""
    monkeypatch.setattr(library, "levels", lambda _: list(LEVELS))
    monkeypatch.setattr(library, "use_level", lambda *_: None)
    for level in LEVELS:
        reload(QGRAFT_CPU_LEVEL=level, QGRAFT_KERNELS=None)
        fast = level in ("avx512-bf16", "amx")
        assert (has_fast_bf16(), library.has_bf16()) == (fast, level == "avx512-bf16")
        assert TrainArguments(output_dir="out", use_cpu=True).compute == ("bf16" if fast else "float32")
    reload(QGRAFT_KERNELS="reference")  # which has no products of bfloat16 numbers
    assert not has_fast_bf16()


@needs_native
def test_bfloat16_is_fast_where_torch_sees_such_hardware(reload: Reload) -> None:
    capable = torch.cpu.get_capabilities()
    if "avx512_bf16" not in capable:
        pytest.skip("this release of torch does not say what the CPU has")
    reload(QGRAFT_CPU_LEVEL=None, QGRAFT_KERNELS=None)
    assert has_fast_bf16() == bool(capable["avx512_bf16"] or capable.get("amx_tile"))
