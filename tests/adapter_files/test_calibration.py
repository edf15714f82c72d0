"""calibration.safetensors: rows come back as they were learned, and a file that write_rows does not write is refused."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from peft.utils import load_peft_weights

from qgraft.adapter_files.calibration import (
    CALIBRATION,
    check_text,
    keep_samples,
    read_rows,
    samples_of,
    write_rows,
)
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import load_adapter, read_adapter, save_adapter
from qgraft.adapter_files.seal import SEAL, read_seal
from qgraft.adapters.attach import attach_lora, detach_lora
from qgraft.adapters.base import adapter_names, find_adapter, selection_of
from qgraft.adapters.combine import combine
from qgraft.adapters.kept_rows import HELD_TOKENS, KEPT_TOKENS, LONGEST, KeptRows
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.cli.main import main
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.errors import AdapterError, DataError

SEALED = {"files": {CALIBRATION: {}}}  # all that read_rows asks a seal


class Letters:
    """A tokenizer of one token a letter, the first one of which can be another."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(self.first + token) for token in ids]


def sample(length: int, number: int = 0, learned: int = 1, weights: list[float] | None = None) -> Sample:
    ids = [(7 * number + place) % 90 for place in range(length)]
    return Sample(
        ids, [token if place >= learned else IGNORED for place, token in enumerate(ids)], str(number), weights
    )


def kept_of(learned: list[Sample], held: list[Sample] | None = None, seed: int = 0) -> KeptRows:
    kept = keep_samples(Letters(), learned, held or [], seed)  # type: ignore[arg-type]
    assert kept is not None
    return kept


def plain(samples: list[Sample]) -> list[Any]:
    return [(each.input_ids, each.labels, each.weights) for each in samples]


# ---------------------------------------------------------------- which rows


def test_rows_come_back_as_they_were_learned(tmp_path: Path) -> None:
    learned = [sample(9, 1, 3), sample(5, 2, 1, [0.0, 0.5, 2.0, 0.0, 1.0]), sample(LONGEST + 40, 3)]
    learned[1].labels[3] = IGNORED
    held = [sample(6, 4)]
    write_rows(tmp_path / CALIBRATION, kept_of(learned, held))
    read = read_rows(tmp_path, SEALED)
    assert read is not None and read == kept_of(learned, held) and read.learned == 3
    cut = [*plain(learned[:2]), (learned[2].input_ids[:LONGEST], learned[2].labels[:LONGEST], None)]
    assert plain(samples_of(read.of(held_out=False))) == cut and plain(samples_of(read.of(held_out=True))) == plain(
        held
    )
    stored = safetensors.numpy.load_file(tmp_path / CALIBRATION)  # as anybody reads it
    assert stored["ids"].tolist() == [token for ids, _, _ in [*cut, *plain(held)] for token in ids]
    assert stored["lengths"].tolist() == [9, 5, LONGEST, 6] and stored["held_out"].tolist() == [0, 0, 0, 1]
    assert stored["weights"].tolist()[:14] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0.5, 2, 0, 1]


def test_rows_that_learn_nothing_within_the_longest_are_left_out() -> None:
    late, none = sample(LONGEST + 20, 1, learned=LONGEST), sample(4, 2, weights=[0.0, 1e-60, 0.0, 0.0])
    assert keep_samples(Letters(), [late, none], [], 0) is None  # type: ignore[arg-type]
    assert len(kept_of([late, none, sample(8)]).rows) == 1 and kept_of([late, sample(8)]).learned == 2


def test_of_a_large_set_rows_from_all_over_it_are_drawn() -> None:
    learned, held = ([sample(40, number) for number in range(count)] for count in (4000, 900))
    kept, again, other = (kept_of(learned, held, seed) for seed in (0, 0, 1))
    assert kept == again != other and kept.learned == 4000
    for part, budget, count in ((False, KEPT_TOKENS, 4000), (True, HELD_TOKENS, 900)):
        rows = kept.of(part)
        assert budget - 40 < sum(len(row.ids) for row in rows) <= budget
        numbers = [row.ids[0] for row in rows]
        assert len(set(numbers)) > 30  # of 90
        assert len(rows) < count
    small = kept_of(learned[:100])
    assert plain(samples_of(small.rows)) == plain(learned[:100])  # all of them, in their order


def test_the_file_of_a_full_choice_is_small(tmp_path: Path) -> None:
    write_rows(
        tmp_path / CALIBRATION, kept_of([sample(20, n) for n in range(999)], [sample(20, n) for n in range(999)])
    )
    assert (tmp_path / CALIBRATION).stat().st_size < 160_000


def test_a_vocabulary_that_is_another_one_is_refused() -> None:
    rows = kept_of([sample(8, 1), sample(8, 2)])
    check_text(Letters(), rows, 90)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"row 1 was written with another tokenizer.*"):
        check_text(Letters(5), rows, 90)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 2 holds the token 21, and the model has 20 of them") as caught:
        check_text(Letters(), rows, 20)  # type: ignore[arg-type]
    assert "calibration=rows" in str(caught.value.hint)


# ---------------------------------------------------------------- files that are no such file

GOOD = {
    "ids": np.array([1, 2, 3, 4, 5], np.int32),
    "weights": np.array([0, 1, 1, 0, 1], np.float32),
    "lengths": np.array([3, 2], np.int32),
    "held_out": np.array([0, 1], np.uint8),
    "text": np.array([1, 2], np.int64),
}
META = {"qgraft_calibration": "1", "learned": "7"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "told"),
    [
        ({"ids": GOOD["ids"].astype(np.int64)}, {}, "got tensors .*'I64'.*expected"),
        ({"ids": GOOD["ids"].astype(np.float32)}, {}, "got tensors"),
        ({"ids": GOOD["ids"].reshape(1, 5)}, {}, "with one axis each"),
        ({"more": GOOD["ids"]}, {}, "got tensors"),
        ({"text": None}, {}, "got tensors"),
        ({"ids": np.array([1, 2, 3, 4, -5], np.int32)}, {}, "got the token -5"),
        ({"weights": np.array([0, 1, np.nan, 0, 1], np.float32)}, {}, "negative or no numbers"),
        ({"weights": np.array([0, 1, np.inf, 0, 1], np.float32)}, {}, "negative or no numbers"),
        ({"weights": np.array([0, 1, -1, 0, 1], np.float32)}, {}, "negative or no numbers"),
        ({"weights": np.array([0, 1, 1, 1, 0], np.float32)}, {}, "row 2 learns no token"),
        ({"weights": np.ones(4, np.float32)}, {}, "5 ids and 4 weights"),
        ({"lengths": np.array([3, 3], np.int32)}, {}, "rows of 6 tokens, 5 ids"),
        ({"lengths": np.array([4, 1], np.int32)}, {}, "rows of 1 to 4 tokens"),
        ({"lengths": np.array([2**31 - 1, -(2**31)], np.int32)}, {}, "rows of -2147483648 to"),
        ({"lengths": np.zeros(0, np.int32)}, {}, "got 0 lengths"),
        ({"lengths": np.array([5], np.int32)}, {}, "got 1 lengths, 2 marks"),
        ({"held_out": np.array([0, 2], np.uint8)}, {}, "expected 0 or 1"),
        ({"held_out": np.array([1, 1], np.uint8)}, {}, "at least one that was learned"),
        ({}, {"qgraft_calibration": "2"}, "got version 2 of the file, expected 1"),
        ({}, {"learned": "0"}, "got '0' under learned"),
        ({}, {"learned": "9" * 5000}, "under learned"),
        ({}, {"learned": "\u0661"}, "under learned"),
    ],
)  # fmt: skip
def test_what_write_rows_does_not_write_is_refused(
    tensors: dict[str, Any], metadata: dict[str, str], told: str, tmp_path: Path
) -> None:
    safetensors.numpy.save_file(GOOD, tmp_path / CALIBRATION, META)
    assert read_rows(tmp_path, SEALED) is not None
    changed = {name: value for name, value in (GOOD | tensors).items() if value is not None}
    safetensors.numpy.save_file(changed, tmp_path / CALIBRATION, META | metadata)
    with pytest.raises(AdapterError, match=told) as caught:
        read_rows(tmp_path, SEALED)
    assert str(tmp_path / CALIBRATION) in str(caught.value) and f"delete {CALIBRATION}" in str(caught.value.hint)


def test_bytes_that_are_no_such_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / CALIBRATION
    safetensors.numpy.save_file(GOOD, path, META)
    whole = path.read_bytes()
    huge = struct.pack("<Q", 1 << 60) + whole[8:]
    for broken in (b"", whole[:4], whole[:60], whole[:-1], huge, whole + bytes(2 << 20)):
        path.write_bytes(broken)
        with pytest.raises(AdapterError, match=r"calibration\.safetensors cannot be read"):
            read_rows(tmp_path, SEALED)


# ---------------------------------------------------------------- beside an adapter


@pytest.fixture
def folders(tiny_gguf: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    """(a model without adapters, a folder of two adapters that keep rows: a and b)."""
    model = load_gguf(tiny_gguf().path, torch.float32)[0]
    for name, numbers, held in (("a", range(6), range(20, 22)), ("b", range(3, 9), range(1, 2))):
        attach_lora(model, r=2, name=name)
        torch.manual_seed(len(name))
        for each, parameter in find_adapter(model, name).named_parameters():
            torch.nn.init.normal_(parameter, std=0.01) if "lora_B" in each else None
        kept = kept_of([sample(8, n) for n in numbers], [sample(8, n) for n in held])
        selection_of(model).change(name, kept=kept)
        save_adapter(model, tmp_path / name, name, save_calibration=True)
        detach_lora(model, name)
    return model, tmp_path


def test_rows_are_sealed_and_come_back_with_the_adapter(folders: tuple[Any, Path]) -> None:
    model, folder = folders
    load_adapter(model, folder / "a", "a")
    kept = find_adapter(model, "a").kept
    assert kept is not None and kept == kept_of([sample(8, n) for n in range(6)], [sample(8, 20), sample(8, 21)])
    save_adapter(model, folder / "copy", "a")  # readable rows go nowhere without a word
    assert not (folder / "copy" / CALIBRATION).exists() and find_adapter(model, "a").kept == kept
    save_adapter(model, folder / "a", "a")
    assert not (folder / "a" / CALIBRATION).exists() and CALIBRATION not in read_adapter(folder / "a")[2]["files"]  # type: ignore[index]


def test_one_bit_is_noticed_and_without_the_file_the_adapter_is_whole(folders: tuple[Any, Path]) -> None:
    model, folder = folders
    path = folder / "a" / CALIBRATION
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match=f"{CALIBRATION}: SHA-256 differs"):
        load_adapter(model, folder / "a", "a")
    assert adapter_names(model) == []
    path.unlink()
    load_adapter(model, folder / "a", "a")
    assert find_adapter(model, "a").kept is None
    (folder / "b" / SEAL).unlink()  # rows that nothing vouches for are nobody's
    load_adapter(model, folder / "b", "b")
    assert find_adapter(model, "b").kept is None


def test_a_sealed_file_that_holds_nonsense_leaves_the_model_as_it_was(folders: tuple[Any, Path]) -> None:
    model, folder = folders
    kept = kept_of([sample(8, 1)])
    load_adapter(model, folder / "b", "b")
    broken = replace(kept, rows=(replace(kept.rows[0], ids=kept.rows[0].ids[:-2]),))
    selection_of(model).change("b", kept=broken)
    save_adapter(model, folder / "b", "b", save_calibration=True)
    with pytest.raises(AdapterError, match="rows of 6 tokens, 6 ids and 8 weights"):
        load_adapter(model, folder / "b", "again")
    assert adapter_names(model) == ["b"]


def test_combined_adapters_keep_the_rows_of_all_or_none(folders: tuple[Any, Path]) -> None:
    """A row that both learned is there once; one that b held out and a learned is no held-out row."""
    model, folder = folders
    combine_files({folder / "a": 0.5, folder / "b": 0.5}, folder / "both")
    both = read_rows(folder / "both", read_seal(folder / "both"))
    assert both is not None and both.learned == 9
    assert plain(samples_of(both.of(held_out=False))) == plain([sample(8, n) for n in range(9)])
    assert plain(samples_of(both.of(held_out=True))) == plain([sample(8, 20), sample(8, 21)])
    for name in ("a", "b"):
        load_adapter(model, folder / name, name)
    combine(model, {"a": 0.5, "b": 0.5}, "sum")
    assert find_adapter(model, "sum").kept == both
    (folder / "b" / CALIBRATION).unlink()
    combine_files({folder / "a": 0.5, folder / "b": 0.5}, folder / "one")
    assert not (folder / "one" / CALIBRATION).exists()


def test_what_is_exported_holds_no_rows(
    folders: tuple[Any, Path], tiny_gguf: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = folders
    for kind, name in (("peft", "peft"), ("gguf-lora", "x.gguf")):
        words = [
            "export",
            "--model",
            tiny_gguf().path,
            "--adapter",
            folder / "a",
            "--to",
            kind,
            "--output",
            folder / name,
        ]
        assert main([str(word) for word in words]) == 0
    assert not (folder / "peft" / CALIBRATION).exists() and len(list((folder / "peft").iterdir())) == 3
    assert (
        load_peft_weights(str(folder / "a")).keys() == load_peft_weights(str(folder / "peft")).keys()
    )  # nor PEFT sees any
    ids = np.array(sample(8, 5).input_ids, np.int32).tobytes()
    assert ids in (folder / "a" / CALIBRATION).read_bytes() and ids not in (folder / "x.gguf").read_bytes()
    words = ["combine", "--adapter", folder / "a", "--adapter", folder / "b", "--output", folder / "both"]
    assert main([str(word) for word in words]) == 0
    assert "delete it before you give the adapter away" in capsys.readouterr().err
    assert json.loads((folder / "both" / SEAL).read_text())["files"].keys() > {CALIBRATION}
