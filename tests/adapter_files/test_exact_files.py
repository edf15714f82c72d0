"""Exact LoRAs in files: on q4_1 they are PEFT's, on K-quants PEFT must refuse them; both come back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qgraft
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.exact import BlockLora, MinimumLora
from qgraft.adapters.lora import Lora
from qgraft.cli.main import main
from qgraft.errors import AdapterError, UnsupportedError

Maker = Callable[..., Any]
KIND = {"q4_1": BlockLora, "q4_k": MinimumLora}


def tiny_in(tiny_gguf: Maker, format: str) -> Any:
    """All matrices in the format, but for those of 128 inputs, which K-quants have no blocks for."""
    shape = {"hidden_size": 256, "head_dim": 64} if format.endswith("k") else {"intermediate_size": 128}
    return tiny_gguf("llama", types=(gguf.GGMLQuantizationType[format.upper()],), config=shape)


def made(tiny: Any, **options: Any) -> Any:
    model = qgraft.load(tiny.path)[0]
    attach_lora(model, **{"r": 3, "exact": True, **options})
    for number, part in enumerate(find_adapter(model).parts.values()):
        part.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("format", KIND)
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": r".*\.1\..*(up|q)_proj", "use_rslora": True}], ids=["all", "some"]
)
def test_it_comes_back_bit_for_bit(
    tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, format: str, options: Any
) -> None:
    tiny = tiny_in(tiny_gguf, format)
    model = made(tiny, **options)
    qgraft.save_adapter(model, tmp_path / "a")
    again = qgraft.load(tiny.path)[0]
    assert qgraft.load_adapter(again, tmp_path / "a").notes == ()
    ids = random_ids(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    mine, theirs = (dict(find_adapter(each).named_parameters()) for each in (model, again))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {type(part) for part in find_adapter(again).parts.values()} == {KIND[format]}
    assert all(part.config.exact for part in find_adapter(again).parts.values())


def test_peft_computes_the_same(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    tiny = tiny_in(tiny_gguf, "q4_1")
    model = made(tiny)
    qgraft.save_adapter(model, tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32).eval()
    ids = random_ids(model)
    plain = logits(base, ids)
    theirs = logits(peft.PeftModel.from_pretrained(base, tmp_path / "a").eval(), ids)
    got = logits(model, ids)
    assert float((got - theirs).abs().max() / (theirs - plain).abs().max()) < 1e-3
    export_gguf_lora(model, tmp_path / "a.gguf", dtype="float32")
    again = qgraft.load(tiny.path)[0]
    qgraft.load_adapter(again, tmp_path / "a.gguf")
    torch.testing.assert_close(logits(again, ids), got, rtol=1e-3, atol=1e-3)
    assert {each.steps for each in qgraft.merge(again).layers} == {("exact",)}


def test_what_others_cannot_compute_they_are_not_given(tiny_gguf: Maker, tmp_path: Path, capsys: Any) -> None:
    tiny = tiny_in(tiny_gguf, "q4_k")
    model, folder = made(tiny), tmp_path / "a"
    qgraft.save_adapter(model, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "QGRAFT_MINIMUMS"
    assert all(".minimum_" in name for name in load_file(folder / "adapter_model.safetensors"))
    with pytest.raises((KeyError, ValueError), match="QGRAFT_MINIMUMS"):
        peft.PeftModel.from_pretrained(torch.nn.Linear(2, 2), folder)
    with pytest.raises(
        AdapterError, match=r"an exact LoRA on a K-quant, which llama.cpp cannot compute[\s\S]*hint: merge it"
    ):
        export_gguf_lora(model, tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match=r"combine: .*exact LoRA on a K-quant"):
        combine_files({folder: 1.0}, tmp_path / "b")
    words = [
        "export",
        "--model",
        str(tiny.path),
        "--adapter",
        str(folder),
        "--to",
        "peft",
        "--output",
        str(tmp_path / "p"),
    ]
    assert main(words) != 0
    assert "is none of PEFT's" in capsys.readouterr().err
    assert not (tmp_path / "p" / "adapter_config.json").exists()
    torch.save(qgraft.lora_state_dict(model), tmp_path / "bare.pt")
    again = qgraft.load(tiny.path)[0]
    qgraft.load_adapter(again, tmp_path / "bare.pt", lora_alpha=16)
    assert all(torch.equal(a, b) for a, b in zip(qgraft.lora_state_dict(again).values(),
                                                 qgraft.lora_state_dict(model).values(), strict=True))  # fmt: skip


def test_layers_that_cannot_have_it_are_listed(tiny_gguf: Maker, tmp_path: Path) -> None:
    blocks, k_quants = tiny_in(tiny_gguf, "q4_1"), tiny_in(tiny_gguf, "q4_k")
    other = tiny_gguf("llama", types=(gguf.GGMLQuantizationType.Q8_0,), config={"intermediate_size": 128})
    qgraft.save_adapter(made(blocks), tmp_path / "blocks")
    qgraft.save_adapter(made(k_quants), tmp_path / "k")
    model = qgraft.load(other.path)[0]
    with pytest.raises(
        AdapterError, match=r"another base[\s\S]*q_proj: an exact LoRA, and the layer has no such minimums"
    ):
        qgraft.load_adapter(model, tmp_path / "blocks")
    report = qgraft.load_adapter(model, tmp_path / "blocks", force=True)
    assert any("it would be an ordinary one" in note for note in report.notes)
    assert {type(part) for part in find_adapter(model).parts.values()} == {Lora}
    with pytest.raises(AdapterError, match=r"a change of a K-quant's minimums, and the layer has none"):
        qgraft.load_adapter(qgraft.load(blocks.path)[0], tmp_path / "k")


def test_sums_of_files_are_exact_and_can_be_trained_as_such(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_in(tiny_gguf, "q4_1")
    for name, targets in (("a", "q_proj,up_proj"), ("b", "up_proj")):
        qgraft.save_adapter(made(tiny, target_modules=targets), tmp_path / name)
    combine_files({tmp_path / "a": 0.3, tmp_path / "b": 0.7}, tmp_path / "both")
    model = qgraft.load(tiny.path)[0]
    qgraft.load_adapter(model, tmp_path / "both")
    assert {type(part) for part in find_adapter(model).parts.values()} == {BlockLora}
    combine_files({tmp_path / "a": 0.3, tmp_path / "b": 0.7}, tmp_path / "cut", method="svd")
    model = qgraft.load(tiny.path)[0]
    qgraft.load_adapter(model, tmp_path / "cut")
    assert {type(part) for part in find_adapter(model).parts.values()} == {Lora}
