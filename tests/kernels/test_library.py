"""The C library and its Python mirror: made from the same sources, of the same layout; and which level of CPU runs."""

import ctypes
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qgraft.cli import main as command_line
from qgraft.errors import InstallationError, OptionError
from qgraft.formats import quantize
from qgraft.kernels import choose, decode, library, linear, native, native_status, samples
from qgraft.kernels.choice import has_fast_bf16
from qgraft.kernels.library import FOLDER, LEVELS
from qgraft.kernels.sources import sources_hash
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
        lambda: (tmp_path / "k/int8.h").write_text((FOLDER / "int8.h").read_text() + "\n"),
        lambda: (tmp_path / "k/native.c").write_text((FOLDER / "native.c").read_text() + "\n"),
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


# --- the same layout

STRUCTURES = {  # by file: in its order, as the exported sizes are
    "linear": ("linear.c", [native.Term, native.Layer]),
    "attention": ("native.h", [samples.Strided, samples.Attention]),
    "decode": ("decode.c", [decode.Lora, decode.Linear, decode.Layer, decode.Model]),
}
RENAMED = {"in": "input", "out": "output"}  # `in` is a word of Python
TYPES = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "double": ctypes.c_double, "float": ctypes.c_float}


def c_text(name: str) -> str:
    return re.sub(r"/\*.*?\*/", "", (FOLDER / name).read_text(), flags=re.DOTALL)


def c_fields(text: str, structure: str) -> list[tuple[str, str]]:
    """(name, type) of each field of a typedef; "*" for pointers."""
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {structure};", text)[1]
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)\s+(.*)", declaration, flags=re.DOTALL).groups()
        for name in map(str.strip, names.split(",")):
            fields.append((RENAMED.get(name.lstrip("*"), name.lstrip("*")), "*" if "*" in name else kind))
    return fields


@pytest.mark.parametrize("file", STRUCTURES)
def test_structures_have_the_fields_of_c_in_their_order(file: str) -> None:
    source, structures = STRUCTURES[file]
    for structure in structures:
        fields = [
            (name, "*" if kind is ctypes.c_void_p or hasattr(kind, "contents") else kind)
            for name, kind in structure._fields_
        ]
        known = {**TYPES, **{each.__name__: each for each in structures}}
        expected = [(name, known.get(kind, kind)) for name, kind in c_fields(c_text(source), structure.__name__)]
        assert fields == expected, structure.__name__


@needs_native
@pytest.mark.parametrize("file", STRUCTURES)
def test_structures_have_the_sizes_of_c(file: str) -> None:
    structures = STRUCTURES[file][1]
    sizes = (ctypes.c_int64 * len(structures)).in_dll(library.loaded(), f"qgraft_{file}_sizes")
    assert list(sizes) == [ctypes.sizeof(each) for each in structures]


@needs_native
def test_functions_take_the_arguments_of_c() -> None:
    """Every qgraft_ function of the C files but those that take nothing."""
    found = {}
    for path in sorted(FOLDER.glob("*.c")):
        for result, name, arguments in re.findall(
            r"^(int|void|const char \*)\s*(qgraft_\w+)\(([^)]*)\) \{", c_text(path.name), flags=re.MULTILINE
        ):
            if arguments == "void":
                continue
            types = ["*" if "*" in each else each.split()[-2] for each in arguments.split(",")]
            found[name] = [ctypes.c_void_p if each == "*" else TYPES[each] for each in types]
            function = getattr(library.loaded(), name)
            assert function.argtypes == found[name], name
            assert function.restype == (ctypes.c_char_p if "char" in result else ctypes.c_int), name
    assert len(found) >= 15


def test_numbers_of_formats_are_those_of_c() -> None:
    body = re.search(r"enum \{([^}]*F32[^}]*)\}", c_text("native.h"))[1]
    numbers = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}
    assert numbers.pop("F32") not in native.FORMAT_IDS.values()
    in_python = {name.upper(): number for name, number in native.FORMAT_IDS.items()}
    for bits in (4, 8):
        in_python[f"ROW_INT{bits}"] = in_python.pop(f"CHATGLM-INT{bits}")
    assert in_python == numbers


@needs_native
def test_formats_with_8_bit_products_are_those_of_c() -> None:
    no_rows = (None, None, 0, 256, None, 0, None, 1)
    served = [
        f for f, number in native.FORMAT_IDS.items() if library.loaded().qgraft_linear_int8(number, *no_rows) == 0
    ]
    assert sorted(served) == sorted(native.INT8_FORMATS)


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
        assert native.has_panels() == (level != "plain")


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
        assert (has_fast_bf16(), native.has_bf16()) == (fast, level == "avx512-bf16")
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
