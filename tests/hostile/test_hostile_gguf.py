"""Broken and hostile GGUF files: each is refused with one of our two exceptions, and its harmless twin is read.

The files are put together from raw bytes, because no writer would write them. No test measures time or waits: a reader
that trusted one of the counts here would run out of memory or never come back; `test_counts_are_not_believed`
measures what is allocated instead.
"""

import os
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qgraft.checkpoints.gguf_file import MAX_HEADER_BYTES, GgufFile, read_gguf
from qgraft.errors import CheckpointError, UnsupportedError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_F32, TYPE_Q4_0 = 0, 2
BAD, UNSERVED = CheckpointError, UnsupportedError


# ---- raw bytes of each part of the container


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string, with a `length` that may lie."""
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(element: int, items: Iterable[bytes] = (), count: int | None = None) -> bytes:
    """The value of an array, with a `count` that may lie."""
    items = list(items)
    return u32(element) + u64(len(items) if count is None else count) + b"".join(items)


def info(name: str | bytes = "t", dims: Iterable[int] = (8,), kind: int = TYPE_F32, offset: int = 0) -> bytes:
    """A tensor info; `dims` in the file's order, innermost first."""
    dims = list(dims)
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def container(
    pairs: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_pairs: int | None = None,
    n_infos: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; counts may lie, tensor data is added as it is."""
    pairs, infos = list(pairs), list(infos)
    counts = u64(len(infos) if n_infos is None else n_infos) + u64(len(pairs) if n_pairs is None else n_pairs)
    header = b"GGUF" + u32(version) + counts + b"".join(pairs) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


def one(*dims: int, **lies: int) -> bytes:
    """A file with one f32 tensor of these dims, 32 bytes of data."""
    return container(infos=[info(dims=dims, **lies)], data=bytes(32))


def two(**second: object) -> bytes:
    """A file with two f32 tensors "a" and "b" of 32 bytes each; `second` changes what is said about "b"."""
    said = {"name": "b", "dims": (8,), "kind": TYPE_F32, "offset": 32} | second
    return container(infos=[info("a"), info(**said)], data=bytes(64))  # type: ignore[arg-type]


def meta(*pairs: bytes) -> bytes:
    return container(pairs)


def vocabulary(*pairs: bytes) -> bytes:
    """Metadata with a vocabulary of three tokens."""
    return meta(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, map(text, ("a", "b", "c")))), *pairs)


def aligned(value: int, kind: int = U32, raw: bytes | None = None) -> bytes:
    return container(
        [pair("general.alignment", kind, u32(value) if raw is None else raw)],
        [info()],
        bytes(32),
        alignment=value if 0 < value <= 4096 else 32,
    )


SMALL = container(
    [
        pair("general.architecture", STRING, text("llama")),
        pair("general.alignment", U32, u32(32)),
        pair("flag", BOOL, b"\1"),
        pair("half", F32, struct.pack("<f", 0.5)),
        pair("ids", ARRAY, array(I32, map(u32, (1, 2, 3)))),
        pair("tokenizer.ggml.tokens", ARRAY, array(STRING, map(text, ("a", "é", "")))),
        pair("tokenizer.ggml.bos_token_id", U32, u32(2)),
    ],
    [info("w", (32, 3), TYPE_Q4_0, 0), info("n", (5,), TYPE_F32, 64)],
    bytes(range(54)) + bytes(10) + bytes(range(20)),
)
ENDLESS = b"GGUF" + u32(3) + u64(0) + u64(1) + pair("k", ARRAY, array(U8, count=2**60))  # gguf 0.19 loops 2^60 times

GOOD = {
    "small": SMALL,
    "nothing": container(),
    "nothing without padding": b"GGUF" + u32(3) + bytes(16),
    "version 2": container(version=2),
    "empty string": meta(pair("k", STRING, text(""))),
    "empty array": meta(pair("k", ARRAY, array(U64))),
    "array": meta(pair("k", ARRAY, array(U64, map(u64, (1, 2**64 - 1))))),
    "strings": meta(pair("k", ARRAY, array(STRING, map(text, ("", "é"))))),
    "long key": meta(pair("k" * 65535, U8, b"\0")),
    "bools": meta(pair("k", ARRAY, array(BOOL, (b"\0", b"\1")))),
    "two keys": meta(pair("k", U8, b"\0"), pair("l", U8, b"\0")),
    "alignment 8": aligned(8),
    "alignment 64": aligned(64),
    "architecture": meta(pair("general.architecture", STRING, text("gpt-2_x"))),
    "split 1": meta(pair("split.count", U16, b"\1\0")),
    "special token": vocabulary(pair("tokenizer.ggml.eos_token_id", I32, u32(2))),
    "scores and types": vocabulary(
        pair("tokenizer.ggml.scores", ARRAY, array(F32, map(u32, (0, 0, 0)))),
        pair("tokenizer.ggml.token_type", ARRAY, array(I32, map(u32, (1, 1, 1)))),
    ),
    "1 dim": one(8),
    "4 dims": one(2, 1, 2, 2),
    "block of 32": container(infos=[info(dims=(32,), kind=TYPE_Q4_0)], data=bytes(18)),
    "two tensors": two(),
    "infos not in the order of the data": container(infos=[info("a", offset=32), info("b")], data=bytes(64)),
    "padding at the end": container(infos=[info()], data=bytes(32 + 31)),
    "not padded at the end": container(infos=[info(dims=(1,))], data=bytes(4)),
}

CASES: dict[str, tuple[bytes, type[Exception], str]] = {
    # header
    "empty": (b"", BAD, "empty file"),
    "text": (b"This is a text about models.\n", BAD, "not a GGUF file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", BAD, "git lfs pull"),
    "magic alone": (b"GGUF", BAD, "version: 4 bytes expected, 0 left"),
    "magic lower case": (b"gguf" + SMALL[4:], BAD, "expected b'GGUF'"),
    "version 0": (container(version=0), UNSERVED, "GGUF version 0, expected 2 or 3"),
    "version 1": (container(version=1), UNSERVED, "GGUF version 1, expected 2 or 3"),
    "version 4": (container(version=4), UNSERVED, "GGUF version 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UNSERVED, "big-endian"),
    "2^63 tensors": (container(n_infos=2**63), BAD, "tensor count: got 9223372036854775808, expected at most 0"),
    "2^64-1 keys": (container(n_pairs=2**64 - 1), BAD, "key/value count: got 18446744073709551615"),
    "one key too many": (container(n_pairs=1), BAD, "key/value count: got 1, expected at most 0"),
    "one tensor too many": (container(infos=[info()], n_infos=2) + bytes(32), BAD, "1 of 2: got 0 bytes"),
    # key/value pairs
    "endless (49 bytes)": (ENDLESS, BAD, "byte 41: key 'k': got 1152921504606846976, expected at most 0"),
    "2^60 strings": (meta(pair("k", ARRAY, array(STRING, count=2**60))), BAD, "got 1152921504606846976"),
    "2^61 u64, wraps to 0 bytes": (meta(pair("k", ARRAY, array(U64, count=2**61))), BAD, "expected at most"),
    "2^63 bools": (meta(pair("k", ARRAY, array(BOOL, count=2**63))), BAD, "expected at most"),
    "u64 array longer than the file": (meta(pair("k", ARRAY, array(U64, count=3))), BAD, "bytes are missing"),
    "string of 2^63": (meta(pair("k", STRING, text("", 2**63))), BAD, "bytes are missing"),
    "string of 2^64-1": (meta(pair("k", STRING, text("abc", 2**64 - 1))), BAD, "bytes are missing"),
    "string in array of 2^64-8": (meta(pair("k", ARRAY, array(STRING, [text("", 2**64 - 8)]))), BAD, "string 0"),
    "key of 2^63": (container([text("k", 2**63) + u32(U8) + b"\0"]), BAD, "key 0 of 1"),
    "empty key": (meta(pair("", U8, b"\0")), BAD, "got 0 bytes, expected 1 to 65535"),
    "key too long": (meta(pair("k" * 65536, U8, b"\0")), BAD, "got 65536 bytes, expected 1 to 65535"),
    "key not UTF-8": (meta(pair(b"k\xff", U8, b"\0")), BAD, "got byte 0xff, expected valid UTF-8"),
    "string not UTF-8": (meta(pair("k", STRING, text(b"a\xc3"))), BAD, "key 'k', string 0: got byte 0xc3"),
    "surrogate": (meta(pair("k", STRING, text(b"\xed\xa0\x80"))), BAD, "expected valid UTF-8"),
    "token not UTF-8": (
        meta(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, map(text, (b"a", b"\x80"))))),
        BAD,
        "key 'tokenizer.ggml.tokens', string 1",
    ),
    "duplicate key": (meta(pair("k", U8, b"\0"), pair("k", U8, b"\1")), BAD, "key 'k': got it twice"),
    "value type 13": (meta(pair("k", 13, bytes(8))), BAD, "got value type 13"),
    "value type 2^32-1": (meta(pair("k", 2**32 - 1, bytes(8))), BAD, "got value type 4294967295"),
    "element type 13": (meta(pair("k", ARRAY, array(13, [bytes(8)]))), BAD, "got element type 13"),
    "element type 13 of 2^60": (meta(pair("k", ARRAY, array(13, count=2**60))), BAD, "got element type 13"),
    "nested array": (meta(pair("k", ARRAY, array(ARRAY, [array(U8, [b"\1"])]))), UNSERVED, "arrays of arrays"),
    "nested deep": (meta(pair("k", ARRAY, array(ARRAY, count=1) * 2000)), UNSERVED, "arrays of arrays"),
    "bool 2": (meta(pair("k", BOOL, b"\2")), BAD, "key 'k': got bool 2, expected 0 or 1"),
    "bool 255 in array": (meta(pair("k", ARRAY, array(BOOL, (b"\1", b"\xff")))), BAD, "got bool 255"),
    "control characters in a key": (meta(pair("\x1b[2J", BOOL, b"\2")), BAD, r"key '\x1b[2J'"),
    # what keys mean
    "alignment 0": (aligned(0), BAD, "key 'general.alignment': got 0"),
    "alignment 3": (aligned(3), BAD, "power of two"),
    "alignment 4": (aligned(4), BAD, "8 to 1048576"),
    "alignment 24": (aligned(24), BAD, "power of two"),
    "alignment 2^31": (aligned(2**31), BAD, "8 to 1048576"),
    "alignment u64": (aligned(32, U64, u64(32)), BAD, "expected a uint32"),
    "alignment string": (aligned(32, STRING, text("32")), BAD, "expected a uint32"),
    "alignment array": (aligned(32, ARRAY, array(U32, [u32(32)])), BAD, "expected a uint32"),
    "architecture empty": (meta(pair("general.architecture", STRING, text(""))), BAD, "a string of a-z"),
    "architecture a path": (meta(pair("general.architecture", STRING, text("../x"))), BAD, "got '../x'"),
    "architecture newline": (meta(pair("general.architecture", STRING, text("llama\n"))), BAD, "a string of a-z"),
    "architecture a number": (meta(pair("general.architecture", U32, u32(7))), BAD, "a string of a-z"),
    "split of -1": (meta(pair("split.count", 3, b"\xff\xff")), BAD, "an integer >= 0"),
    "split a string": (meta(pair("split.count", STRING, text("2"))), BAD, "an integer"),
    "token id 3 of 3": (vocabulary(pair("tokenizer.ggml.eos_token_id", U32, u32(3))), BAD, ">= 0 and < 3"),
    "token id -1": (vocabulary(pair("tokenizer.ggml.bos_token_id", I32, u32(2**32 - 1))), BAD, "got -1"),
    "token id -1 without tokens": (meta(pair("tokenizer.ggml.bos_token_id", I64, u64(2**64 - 1))), BAD, "got -1"),
    "token id a float": (vocabulary(pair("tokenizer.ggml.eos_token_id", F32, u32(0))), BAD, "an integer >= 0"),
    "token id a bool": (vocabulary(pair("tokenizer.ggml.eos_token_id", BOOL, b"\1")), BAD, "an integer >= 0"),
    "token id a list": (vocabulary(pair("tokenizer.ggml.eos_token_id", ARRAY, array(U8))), BAD, "an integer >= 0"),
    "tokens a string": (meta(pair("tokenizer.ggml.tokens", STRING, text("abc"))), BAD, "of value type in (8,)"),
    "tokens numbers": (meta(pair("tokenizer.ggml.tokens", ARRAY, array(U8, [b"a"]))), BAD, "an array of value type"),
    "merges numbers": (meta(pair("tokenizer.ggml.merges", ARRAY, array(U8, [b"a"]))), BAD, "an array of value type"),
    "scores too few": (
        vocabulary(pair("tokenizer.ggml.scores", ARRAY, array(F32, [u32(0)]))),
        BAD,
        "expected 3 elements, one for each token",
    ),
    "scores bytes": (vocabulary(pair("tokenizer.ggml.scores", ARRAY, array(U8, [b"a"] * 3))), BAD, "in (6, 12)"),
    "token types too many": (
        vocabulary(pair("tokenizer.ggml.token_type", ARRAY, array(I32, [u32(1)] * 4))),
        BAD,
        "expected 3 elements, one for each token",
    ),
    "token types strings": (
        vocabulary(pair("tokenizer.ggml.token_type", ARRAY, array(STRING, [text("a")] * 3))),
        BAD,
        "an array of value type",
    ),
    # tensor infos
    "no dims": (one(), BAD, "got 0 dims, expected 1 to 4"),
    "5 dims": (one(2, 1, 1, 1, 4), BAD, "got 5 dims, expected 1 to 4"),
    "2^32-1 dims": (container(infos=[text("t") + u32(2**32 - 1)], data=bytes(64)), BAD, "got 4294967295 dims"),
    "dim 0": (one(8, 0), BAD, "got shape (0, 8), expected every dim >= 1"),
    "dims wrap 2^64 to 4": (one(2**62 + 1, 4), BAD, "bytes of tensors are missing"),
    "dims wrap 2^64 to 0": (one(2**32, 2**32), BAD, "bytes of tensors are missing"),
    "dims negative as i64": (one(2**64 - 8), BAD, "bytes of tensors are missing"),
    "dims of 2^252": (one(*[2**63] * 4), BAD, "bytes of tensors are missing"),
    "empty tensor name": (container(infos=[info("")], data=bytes(32)), BAD, "got 0 bytes, expected 1 to 65535"),
    "tensor name not UTF-8": (container(infos=[info(b"\xfe")], data=bytes(32)), BAD, "got byte 0xfe"),
    "tensor name of 2^63": (container(infos=[text("t", 2**63) + bytes(32)]), BAD, "bytes are missing"),
    "duplicate tensor": (two(name="a"), BAD, "tensor 'a': got it twice"),
    "type 4 (removed)": (one(8, kind=4), UNSERVED, "type 4 (unknown): 1 tensors, the first 't'"),
    "type 2^32-1": (one(8, kind=2**32 - 1), UNSERVED, "type 4294967295 (unknown)"),
    "type q8_k": (one(256, kind=15), UNSERVED, "type 15 (q8_k): 1 tensors, the first 't'; expected"),
    "two unread types": (
        container(infos=[info("a", kind=99), info("b", kind=24), info("c", kind=24)]),
        UNSERVED,
        "type 24 (i8): 2 tensors, the first 'b'; type 99 (unknown): 1 tensors, the first 'a'; expected",
    ),
    "row not a multiple of the block": (one(33, kind=TYPE_Q4_0), BAD, "got rows of 33, expected a multiple of 32"),
    "row divides only as a whole": (one(16, 2, kind=TYPE_Q4_0), BAD, "got rows of 16, expected a multiple of 32"),
    # tensor data
    "offset misaligned": (two(offset=33), BAD, "tensor 'b': got offset 33, expected a multiple of the alignment 32"),
    "offset wraps 2^64": (two(offset=2**64 - 32), BAD, "tensor 'b': got byte"),
    "offset behind the file": (two(offset=2**40), BAD, "bytes in between"),
    "same offset": (two(offset=0), BAD, "(32 bytes overlap)"),
    "overlap": (container(infos=[info("a", (16,)), info("b", offset=32)], data=bytes(96)), BAD, "32 bytes overlap"),
    "hole": (container(infos=[info("a"), info("b", offset=64)], data=bytes(96)), BAD, "(32 bytes in between)"),
    "hole before the first": (one(8, offset=32) + bytes(32), BAD, "(32 bytes in between)"),
    "tensor longer than the file": (two(dims=(9,)), BAD, "4 bytes of tensors are missing"),
    "no data at all": (container(infos=[info()]), BAD, "32 bytes of tensors are missing"),
    "something behind the tensors": (one(8) + bytes(32), BAD, "got 32 bytes after the last tensor"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "model.gguf"


def touch_all(model: GgufFile) -> None:
    """Read every byte of every tensor: views that leave the mapping would crash here."""
    for tensor in model.tensors.values():
        view = model.tensor(tensor.name)
        assert view.nbytes == tensor.nbytes
        view.contiguous().view(torch.uint8).sum()


def read_or_refuse(path: Path, raw: bytes) -> bool:
    """Whether `raw` is read. Any exception but our two escapes and fails the test."""
    path.write_bytes(raw)
    refusal = None
    try:
        touch_all(read_gguf(path))
    except (CheckpointError, UnsupportedError) as error:
        refusal = str(error)
    assert refusal is None or str(path) in refusal
    return refusal is None


@pytest.mark.parametrize("raw", GOOD.values(), ids=GOOD.keys())
def test_harmless_twins_are_read(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    touch_all(read_gguf(path))


@pytest.mark.parametrize(("raw", "error", "part"), CASES.values(), ids=CASES.keys())
def test_bad_files_are_refused(path: Path, raw: bytes, error: type[Exception], part: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_gguf(path)
    assert type(caught.value) is error
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_counts_are_not_believed(path: Path) -> None:
    assert len(ENDLESS) == 49
    for raw, error, _ in CASES.values():
        if len(raw) > 4096:
            continue
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            with pytest.raises(error):
                read_gguf(path)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_cut_off_at_every_byte(path: Path) -> None:
    read = [size for size in range(len(SMALL)) if read_or_refuse(path, SMALL[:size])]
    assert read == []


def test_cut_off_in_the_data_says_what_is_missing(path: Path) -> None:
    for missing in range(1, 20):
        path.write_bytes(SMALL[:-missing])
        with pytest.raises(CheckpointError, match=f": {missing} bytes of tensors are missing"):
            read_gguf(path)


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_bit_of_the_header_flipped(path: Path, bits: int) -> None:
    """One bit of each byte, another one in each, or all of them."""
    path.write_bytes(SMALL)
    header = read_gguf(path).header_nbytes
    read = 0
    for at, bit in [(at, (at + more) % 8) for at in range(header) for more in range(bits)]:
        raw = bytearray(SMALL)
        raw[at] ^= 1 << bit
        read += read_or_refuse(path, bytes(raw))
    assert 0 < read < bits * header  # a changed letter of a name or a value is no error; a changed length is


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_word_of_the_header_set_to_extremes(path: Path, every: int) -> None:
    """Each value at every place, or each at one of seven."""
    path.write_bytes(SMALL)
    header = read_gguf(path).header_nbytes
    for start in range(4, header - 8):
        for value in (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)[start % every :: every]:
            read_or_refuse(path, SMALL[:start] + u64(value) + SMALL[start + 8 :])


def test_header_larger_than_its_limit(path: Path) -> None:
    """A sparse file: the string would fit in the file, but not in what a header may take."""
    start = b"GGUF" + u32(3) + u64(0) + u64(1) + text("k") + u32(STRING) + u64(MAX_HEADER_BYTES)
    path.write_bytes(start)
    os.truncate(path, 4 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="a header may take"):
        read_gguf(path)
    path.unlink()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf(tmp_path / "pipe.gguf")


def test_impossible_names(tmp_path: Path) -> None:
    for name in ("a\0b.gguf", "a" * 5000 + ".gguf"):
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path / name)


fuzz = settings(max_examples=200, deadline=None, database=None, derandomize=True)


@fuzz
@given(st.binary(max_size=300))
@example(ENDLESS[4:])
def test_random_bytes_after_the_magic(path: Path, raw: bytes) -> None:
    read_or_refuse(path, b"GGUF" + raw)


@fuzz
@given(st.integers(0, 3), st.integers(0, 3), st.binary(max_size=300))
def test_random_bytes_after_small_counts(path: Path, n_infos: int, n_pairs: int, raw: bytes) -> None:
    read_or_refuse(path, b"GGUF" + u32(3) + u64(n_infos) + u64(n_pairs) + raw)


@fuzz
@given(st.integers(0, len(SMALL)), st.integers(0, 40), st.binary(max_size=40))
def test_spliced_files(path: Path, start: int, removed: int, inserted: bytes) -> None:
    read_or_refuse(path, SMALL[:start] + inserted + SMALL[start + removed :])


@fuzz
@given(
    st.lists(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 8, 32, 2**62, 2**63])), max_size=5),
    st.sampled_from([TYPE_F32, TYPE_Q4_0, 12, 30]),
    st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 32, 64])),
)
def test_random_tensor_infos(path: Path, dims: list[int], kind: int, offset: int) -> None:
    read_or_refuse(path, container(infos=[info("a"), info("b", dims, kind, offset)], data=bytes(96)))
