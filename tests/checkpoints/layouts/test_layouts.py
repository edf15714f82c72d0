"""A layout that qgraft does not have, to prove that one file and one line are enough; what the table's own refuse.

    toy8   X.qweight int8 [in, out], X.scales float16 [out, in / 32]; config.json says quantization_config.quant_method

It is kept as GPTQ keeps its matrices: under other names than X.weight, the codes transposed, a scale for each group.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qgraft.checkpoints import folder_write, layouts, save
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.layouts import Layout, StoredMatrix, owners
from qgraft.cli.inspect import examine
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.formats import FORMATS, Format, Grid, PackedTensor, Part, dequantize, quantize
from qgraft.linear import QuantizedLinear

GROUP = 32
LAYERS = 14


def quantize_toy(w_OI: Tensor) -> PackedTensor:
    groups = w_OI.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / 127).half()
    codes = (groups / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8).flatten(1)
    return PackedTensor("toy8", (w_OI.shape[0], w_OI.shape[1]), (codes, scales))


def unpack_toy(packed: PackedTensor) -> Grid:
    return Grid(packed.parts[0].clone(), packed.parts[1].float(), low=-127, high=127)


TOY_FORMAT = Format(
    "toy8",
    GROUP,
    (
        Part("data", (torch.int8,), lambda rows, columns: (rows, columns)),
        Part("scales", (torch.float16,), lambda rows, columns: (rows, columns // GROUP)),
    ),
    lambda packed, dtype: unpack_toy(packed).weight(dtype),
    quantize_toy,
    unpack_toy,
)


def claims(config: Mapping[str, Any]) -> bool:
    return (config.get("quantization_config") or {}).get("quant_method") == "toy"


def read(matrix: StoredMatrix, shape: tuple[int, int], _: bool) -> PackedTensor:
    codes, scales = matrix.tensor(".qweight"), matrix.tensor(".scales")
    if codes is None or scales is None:
        raise CheckpointError(f"{matrix.name}: no scales")
    return PackedTensor("toy8", shape, (codes.T.contiguous(), scales))


def write(packed: PackedTensor, _: bool) -> dict[str, Tensor]:
    return {".qweight": packed.parts[0].T.contiguous(), ".scales": packed.parts[1]}


def configure(config: Mapping[str, Any], formats: Sequence[str]) -> Mapping[str, Any]:
    others = {key: value for key, value in config.items() if key != "quantization_config"}
    wanted = others | ({"quantization_config": {"quant_method": "toy"}} if "toy8" in formats else {})
    return config if wanted == config else wanted


TOY = Layout(
    ("toy8",), (".qweight", ".scales"), "toy codes", claims, lambda matrix: matrix.tensor(".qweight") is not None,
    read, write, configure,
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy8", TOY_FORMAT)
    monkeypatch.setattr(layouts, "LAYOUTS", [TOY, *layouts.LAYOUTS])
    held = replace(folder_write.CONTAINER, held=folder_write.CONTAINER.held | {"toy8"})  # made of the table on import
    monkeypatch.setitem(save.CONTAINERS, "folder", held)


def tiny(folder: Path, **options: Any) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **{**shape, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False, **options}
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def load(folder: Path, quantized: str | None = None) -> Any:
    return load_folder(folder, torch.float32, quantized)[0]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def stated(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@pytest.mark.usefixtures("toy")
def test_a_new_layout_is_read_written_and_converted(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    model = load(source)
    expected = {
        path: quantize(layer.dequantize(), "toy8")
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear) and path != "lm_head"
    }
    assert len(expected) == LAYERS
    save.save(model, tmp_path / "toy", to="toy8")
    written, floats = weights(tmp_path / "toy"), weights(source)
    for path, packed in expected.items():
        assert torch.equal(written[f"{path}.qweight"], packed.parts[0].T)
        assert torch.equal(written[f"{path}.scales"], packed.parts[1])
    assert written.keys() == {n for n in floats if "proj" not in n} | {
        f"{path}.{part}" for path in expected for part in ("qweight", "scales")
    }
    assert stated(tmp_path / "toy") == {"quant_method": "toy"}

    again = load(tmp_path / "toy")
    assert again.qgraft.info.notes == ()
    for path, packed in expected.items():
        held = again.get_submodule(path).packed
        assert held.format == "toy8" and all(torch.equal(*pair) for pair in zip(held.parts, packed.parts, strict=True))
    assert again.qgraft.info.fingerprint == save.current_fingerprint(again)
    assert save.save(again, tmp_path / "third").changed == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "toy" / name).read_bytes()
    found = examine(tmp_path / "toy")["formats"]["toy8"]
    assert found == {
        "tensors": LAYERS,
        "weights": sum(packed.shape[0] * packed.shape[1] for packed in expected.values()),
        "bytes": sum(packed.nbytes for packed in expected.values()),
    }

    save.save(again, tmp_path / "half", to="f16")
    assert weights(tmp_path / "half").keys() == floats.keys() and stated(tmp_path / "half") is None
    for path, packed in expected.items():
        assert torch.equal(weights(tmp_path / "half")[f"{path}.weight"], dequantize(packed, torch.float16))
    with pytest.raises(UnsupportedError, match=r"quantize='q4_1': .*proj\.weight is stored in toy codes already"):
        load(tmp_path / "toy", "q4_1")


def test_what_no_layout_claims_is_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "toy"}}))
    with pytest.raises(UnsupportedError, match="is already quantized with 'toy'"):
        load(source)


def test_scales_beside_plain_numbers_have_no_place(tmp_path: Path) -> None:
    """What they mean nobody said, so they are named; the matrix can be written in another layout."""
    source = tiny(tmp_path / "source")
    path = "model.layers.0.mlp.up_proj"
    save_file({**weights(source), f"{path}.weight_scale": torch.ones(128)}, source / "model.safetensors")
    model = load(source)
    assert model.qgraft.info.notes == (f"1 tensors of the folder have no place in the model: {path}.weight_scale",)
    save.save(model, tmp_path / "same")
    assert torch.equal(weights(tmp_path / "same")[f"{path}.weight_scale"], torch.ones(128))
    save.save(model, tmp_path / "int8", to="chatglm-int8")
    expected = quantize(weights(source)[f"{path}.weight"], "chatglm-int8")
    assert torch.equal(weights(tmp_path / "int8")[f"{path}.weight_scale"], expected.parts[1])


def test_codes_alike_with_other_scales_are_not_tied(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", tie_word_embeddings=True)
    packed = quantize(weights(source)["model.embed_tokens.weight"], "chatglm-int8")
    names = {"model.embed_tokens": packed.parts[1], "lm_head": 2 * packed.parts[1]}
    for change, tied in ((1, False), (2, True)):
        tensors = {
            key: tensor
            for name, scale in names.items()
            for key, tensor in ((f"{name}.weight", packed.parts[0].clone()), (f"{name}.weight_scale", scale / change))
        }
        if tied:
            tensors["lm_head.weight_scale"] = tensors["model.embed_tokens.weight_scale"].clone()
        save_file({**weights(source), **tensors}, source / "model.safetensors")
        model = load(source)
        assert (model.lm_head.packed_weight is model.model.embed_tokens.packed_weight) == tied
        ratio = model.lm_head.dequantize() / dequantize(model.model.embed_tokens.packed_weight.get(), torch.float32)
        assert torch.equal(ratio.nan_to_num(2 - tied), torch.full_like(ratio, 2 - tied))


def test_packed_matrices_that_no_layer_holds_are_refused(tmp_path: Path) -> None:
    """Read as numbers, the codes would be weights a hundred times too large."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4)
    model = transformers.MambaForCausalLM(config)
    model.save_pretrained(tmp_path / "source")
    name = "backbone.layers.0.mixer.out_proj.weight"
    packed = quantize(weights(tmp_path / "source")[name], "chatglm-int8")
    tensors = {name: packed.parts[0], f"{name}_scale": packed.parts[1]}
    save_file({**weights(tmp_path / "source"), **tensors}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(
        UnsupportedError, match=r"out_proj.weight is stored in int8 with scales, which is read for linear"
    ):
        load(tmp_path / "source")
    assert isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear)


def test_which_tensors_are_part_of_which_matrix() -> None:
    names = ["a.weight", "a.weight_scale", "b.weight_scale", "b.bias", "norm.weight", "c.qweight"]
    assert owners(names) == {"a.weight": "a.weight", "a.weight_scale": "a.weight", "norm.weight": "norm.weight"}
