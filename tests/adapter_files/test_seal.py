"""The seal covers every byte of an adapter, itself included."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qgraft.adapter_files.folder import changed_files, load_adapter, save_adapter
from qgraft.adapter_files.peft_config import CONFIG
from qgraft.adapter_files.seal import SEAL, read_seal, remembered_arguments
from qgraft.adapters.attach import attach_lora
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import AdapterError
from qgraft.json_files import OWN, covered_text

Maker = Callable[..., Any]


@pytest.fixture
def adapter(tiny_gguf: Maker, tmp_path: Path) -> Path:
    model, _ = load_gguf(tiny_gguf("llama").path, torch.float32)
    attach_lora(model, r=2, target_modules="q_proj")
    save_adapter(model, tmp_path / "adapter", details={"arguments": {"system": "你好", "lr": 1e-05}})
    return tmp_path / "adapter"


def notices(folder: Path) -> bool:
    try:
        return bool(changed_files(folder, read_seal(folder)))
    except AdapterError:
        return True


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_bit_of_the_seal_counts(adapter: Path, bits: int) -> None:
    """One bit of each byte, another one in each, or all of them."""
    assert not notices(adapter)
    whole = (adapter / SEAL).read_bytes()
    unnoticed = []
    for at in range(len(whole)):
        for bit in [(at + more) % 8 for more in range(bits)]:
            (adapter / SEAL).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            if not notices(adapter):
                unnoticed.append((at, bit))
    assert unnoticed == []


@pytest.mark.parametrize("file", [CONFIG, "adapter_model.safetensors"])
def test_bits_of_the_other_files_count(adapter: Path, file: str) -> None:
    whole, draw = (adapter / file).read_bytes(), random.Random(0)
    for _ in range(100):
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        (adapter / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        assert notices(adapter), (at, bit)


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("dataset", [1], "rows.jsonl"), ("enable_thinking", 1, True), ("max_length", 2**70, 512), ("max_length", True, 2),
        ("max_samples", -1, 3), ("seed", -1, 0), ("seed", 2**32, 42), ("val_size", -0.5, 0.1), ("val_size", "x", 4),
        ("max_train_samples", None, 1),
    ],
)  # fmt: skip
def test_what_no_run_can_have_had_is_not_remembered(key: str, wrong: Any, right: Any) -> None:
    assert remembered_arguments({"arguments": {key: right}}) == {key: right}
    assert remembered_arguments({"arguments": {key: wrong, "r": 8}}) == {"r": 8}


def test_an_earlier_seal_loads_and_says_what_it_lacks(adapter: Path, tiny_gguf: Maker) -> None:
    seal = json.loads((adapter / SEAL).read_text())
    del seal[OWN]
    (adapter / SEAL).write_text(json.dumps(seal))
    model, _ = load_gguf(tiny_gguf("llama").path, torch.float32)
    assert load_adapter(model, adapter).notes == (
        f"{SEAL} is of an earlier qgraft, whose seals did not cover themselves",
    )


def test_a_seal_without_a_base_is_said(adapter: Path, tiny_gguf: Maker) -> None:
    seal = json.loads((adapter / SEAL).read_text())
    (adapter / SEAL).write_text(covered_text({**seal, "base": None}))
    model, _ = load_gguf(tiny_gguf("llama").path, torch.float32)
    assert load_adapter(model, adapter).notes == (
        f"{SEAL} names no base: which one it was trained on cannot be verified",
    )
