"""fingerprint: what it must notice, what it must not depend on, and which bytes it reads."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qgraft.checkpoints.fingerprint import WHOLE_BYTES, fingerprint, sampled_ranges

Entry = tuple[str, tuple[int, ...], str, Tensor]


def entries() -> list[Entry]:
    make = torch.Generator().manual_seed(0)
    large = torch.randint(0, 256, (64, 1000), dtype=torch.uint8, generator=make)
    return [
        ("blk.0.weight", (64, 1600), "q4_1", large),
        ("norm.weight", (16,), "f32", torch.randn(16, generator=make)),
        ("blk.1.weight", (2, 32), "chatglm-int8", torch.ones(2, 32, dtype=torch.int8)),
    ]


def flipped(index: int, byte: int) -> list[Entry]:
    """The entries, with one bit of byte `byte` of tensor `index` flipped."""
    changed = entries()
    changed[index][3].view(-1).view(torch.uint8)[byte] ^= 1
    return changed


def test_form_and_value_are_pinned() -> None:
    assert re.fullmatch("qg1:[0-9a-f]{32}", fingerprint(entries()))
    assert fingerprint([("a", (2,), "f32", torch.tensor([1.0, 2.0]))]) == "qg1:ac323aceae31940638271bda3da5b6bd"


def test_independent_of_order_and_of_iterators() -> None:
    def stream() -> Iterator[Entry]:
        yield from reversed(entries())

    assert fingerprint(stream()) == fingerprint(entries())


def test_independent_of_path_and_mapping(tmp_path: Path) -> None:
    name, shape, fmt, tensor = entries()[0]
    prints = set()
    for path in (tmp_path / "a.bin", tmp_path / "b.bin"):
        path.write_bytes(tensor.numpy().tobytes())
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=torch.uint8)
        prints.add(fingerprint([(name, shape, fmt, mapped)]))
    assert prints == {fingerprint([(name, shape, fmt, tensor)])}


def test_independent_of_how_the_same_bytes_are_viewed() -> None:
    whole = entries()
    whole[1] = (*whole[1][:3], whole[1][3].view(torch.uint8))
    strided = entries()
    strided[0] = (*strided[0][:3], strided[0][3].t().contiguous().t())
    assert fingerprint(whole) == fingerprint(strided) == fingerprint(entries())


@pytest.mark.parametrize(("field", "value"), [(0, "blk.9.weight"), (1, (32, 3200)), (2, "q4_0")])
def test_name_shape_and_format_count(field: int, value: object) -> None:
    changed = entries()
    entry = list(changed[0])
    entry[field] = value
    changed[0] = tuple(entry)  # type: ignore[assignment]
    assert fingerprint(changed) != fingerprint(entries())


def test_swapped_tensors_and_missing_tensors_count() -> None:
    (a, *rest_a), (b, *rest_b), *others = entries()
    swapped = [(b, *rest_a), (a, *rest_b), *others]
    assert len({fingerprint(swapped), fingerprint(entries()), fingerprint(entries()[:2]), fingerprint([])}) == 4


def test_every_byte_of_a_small_tensor_counts() -> None:
    for byte in range(64):
        assert fingerprint(flipped(1, byte)) != fingerprint(entries())


def test_every_sampled_byte_of_a_large_tensor_counts() -> None:
    for start, stop in sampled_ranges(64_000):
        for byte in (start, (start + stop) // 2, stop - 1):
            assert fingerprint(flipped(0, byte)) != fingerprint(entries())


def test_bytes_between_the_samples_do_not_count() -> None:
    sampled = {byte for start, stop in sampled_ranges(64_000) for byte in range(start, stop)}
    unseen = next(byte for byte in range(64_000) if byte not in sampled)
    assert fingerprint(flipped(0, unseen)) == fingerprint(entries())


@pytest.mark.parametrize("nbytes", [0, 1, WHOLE_BYTES - 1, WHOLE_BYTES])
def test_small_tensors_are_read_whole(nbytes: int) -> None:
    assert sampled_ranges(nbytes) == [(0, nbytes)]


@pytest.mark.parametrize("nbytes", [WHOLE_BYTES + 1, 5000, 10**6, 10**10 + 7])
def test_samples_lie_inside_spread_out_and_stay_few(nbytes: int) -> None:
    ranges = sampled_ranges(nbytes)
    assert all(0 <= start < stop <= nbytes for start, stop in ranges)
    assert min(ranges)[0] == 0
    assert max(stop for _, stop in ranges) == nbytes
    assert sum(stop - start for start, stop in ranges) <= 8 * 1024
    starts = sorted(start for start, _ in ranges)
    assert max(later - earlier for earlier, later in itertools.pairwise(starts)) <= nbytes // 5 + 1024


def test_empty_and_scalar_tensors() -> None:
    assert fingerprint([("e", (0,), "f32", torch.empty(0))]) != fingerprint([("s", (), "f32", torch.tensor(1.0))])
