"""What Python says of the C functions is what the C sources say: structures, arguments, numbers of formats."""

import ctypes
import re

import pytest
import torch

from qgraft.kernels import native_status
from qgraft.kernels.cpu import abi, library
from qgraft.kernels.cpu.library import FOLDER

needs_native = pytest.mark.skipif(not native_status()[0], reason=f"native kernels are {native_status()[1]}")

STRUCTURES = {  # by file: in its order, as the exported sizes are
    "linear": ("linear.c", [abi.LoraTerm, abi.LinearCall]),
    "attention": ("level.h", [abi.Strided, abi.Attention]),
    "decode": (
        "decode_thread.h",
        [
            abi.Linear,
            abi.Experts,
            abi.DecoderLayer,
            abi.Decoder,
            abi.Lora,
            abi.Loras,
            abi.DecoderPart,
            abi.DecoderRow,
        ],
    ),
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
    assert len(found) >= 14


def test_numbers_of_formats_are_those_of_c() -> None:
    body = re.search(r"enum \{([^}]*F32[^}]*)\}", c_text("formats.h"))[1]
    numbers = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}
    assert numbers.pop("F32") == abi.FLOATS not in abi.FORMAT_IDS.values()
    in_python = {name.upper(): number for name, number in abi.FORMAT_IDS.items()}
    for bits in (4, 8):
        in_python[f"ROW_INT{bits}"] = in_python.pop(f"CHATGLM-INT{bits}")
    assert in_python == numbers


@needs_native
def test_formats_with_8_bit_products_are_those_of_c() -> None:
    """Asked with a product of no tokens; what a level does not have is refused."""
    weight, panels = torch.zeros(1024, dtype=torch.uint8), library.has_int8_panels()

    def served(backward: bool) -> list[str]:
        call = [abi.LinearCall(number, 0, 256, 0, abi.ROUNDINGS.index("int8"), 0, weight.data_ptr())
                for number in abi.FORMAT_IDS.values()]  # fmt: skip
        codes = [library.loaded().qgraft_linear(ctypes.byref(each), 1, backward, 1) for each in call]
        assert set(codes) <= {0, -1}
        return sorted(name for name, code in zip(abi.FORMAT_IDS, codes, strict=True) if code == 0)

    assert served(backward=False) == sorted(abi.INT8_FORMATS)
    assert served(backward=True) == sorted(abi.INT8_GRADIENT_FORMATS if panels else ())
