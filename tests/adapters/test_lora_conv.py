"""LoRAs on convolutions of 1x1 against PEFT's Conv2d: outputs, gradients, files, several adapters, rows of a batch."""

import copy

import peft
import pytest
import torch
from torch import nn

import qgraft
from qgraft.adapter_files.combine import combine_files
from qgraft.adapters.lora_conv import LoraConv, is_pointwise
from qgraft.errors import AdapterError, OptionError, UnsupportedError


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in, self.mix, self.proj_out = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.strided, self.grouped = nn.Conv2d(6, 6, 1, stride=2), nn.Conv2d(6, 6, 1, groups=2)
        self.to_q = nn.Linear(5, 4)

    def forward(self, x):
        return self.to_q(self.proj_out(self.mix(self.proj_in(x)).tanh()).movedim(1, -1))


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    return Pixels().requires_grad_(False)


def drawn(model, name="default"):
    for number, tensor in enumerate(qgraft.lora_state_dict(model, name).values()):
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return model


def test_only_those_of_single_pixels_take_one(pixels):
    assert [name for name, layer in pixels.named_modules() if is_pointwise(layer)] == ["proj_in", "proj_out"]
    with pytest.raises(OptionError, match="no linear layer is named mix, strided, grouped"):
        qgraft.attach_lora(pixels, target_modules=["mix", "strided", "grouped", "proj_in"])
    qgraft.attach_lora(pixels)  # all-linear
    assert not any(isinstance(layer, LoraConv) for layer in pixels.modules())
    with pytest.raises(UnsupportedError, match="convolutions have no DoRA"):
        qgraft.attach_lora(pixels, target_modules="proj_in", use_dora=True, name="b")
    with pytest.raises(UnsupportedError, match="convolutions have no such start"):
        qgraft.attach_lora(pixels, target_modules="proj_in", r=2, init_lora_weights="pissa", name="c")
    with pytest.raises(UnsupportedError):
        qgraft.attach_lora(pixels, target_modules="proj_in", exact=True, name="d")


def test_outputs_gradients_and_files_are_those_of_peft(pixels, tmp_path):
    theirs = peft.get_peft_model(
        copy.deepcopy(pixels), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["proj_in", "proj_out", "to_q"])
    )
    qgraft.attach_lora(pixels, r=2, lora_alpha=3, target_modules="proj_in,proj_out,to_q")
    state = qgraft.lora_state_dict(drawn(pixels))
    assert {key: each.shape for key, each in state.items()} == {
        key: each.shape for key, each in peft.get_peft_model_state_dict(theirs).items()
    }
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(3, 6, 4, 5, requires_grad=True)
    other_x = x.detach().clone().requires_grad_(True)
    y, expected = pixels(x), theirs(other_x)
    assert (y - expected).abs().max() <= 1e-6
    (y**2).sum().backward()
    (expected**2).sum().backward()
    pairs = [
        (x, other_x),
        *zip(*([p for p in m.parameters() if p.requires_grad] for m in (pixels, theirs)), strict=True),
    ]
    for one, other in pairs:
        assert (one.grad - other.grad.view_as(one)).abs().max() <= 1e-5 * max(1.0, float(other.grad.abs().max()))
    qgraft.save_adapter(pixels, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(theirs).unload(), tmp_path / "ours").eval()
    assert (read(x) - y).abs().max() <= 1e-6
    read.save_pretrained(tmp_path / "theirs")
    qgraft.load_adapter(pixels, tmp_path / "theirs", "second")
    qgraft.use_adapter(pixels, "second")
    assert torch.equal(pixels(x), y)
    qgraft.use_adapter(pixels, {"default": 0.5, "second": 0.5})
    assert (pixels(x) - y).abs().max() <= 1e-6
    qgraft.use_adapter(pixels, None)
    assert (pixels(x) - read.unload()(x)).abs().max() <= 1e-6


def test_dropout_and_matrices_that_fit_nothing(pixels, tmp_path):
    qgraft.attach_lora(pixels, r=2, target_modules="proj_in", lora_dropout=0.5)
    drawn(pixels)
    x, layer = torch.randn(2, 6, 4, 5), pixels.proj_in
    torch.manual_seed(3)
    once = layer.train()(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), once) and not torch.equal(layer(x), once)
    assert (once - layer.base(x)).abs().max() > 1e-3
    qgraft.save_adapter(pixels, tmp_path / "saved")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "saved" / "adapter_model.safetensors"
    save_file({key: tensor[..., 0, 0].contiguous() for key, tensor in load_file(path).items()}, path)
    (tmp_path / "saved" / "qgraft.json").unlink()
    with pytest.raises(AdapterError, match="expected two floating point matrices"):
        qgraft.load_adapter(pixels, tmp_path / "saved", "other")


def test_files_are_combined_as_the_adapters_are(pixels, tmp_path):
    weights = {"a": 0.5, "b": -1.0}
    for name, r in (("a", 2), ("b", 3)):
        qgraft.attach_lora(pixels, r=r, target_modules="proj_in,to_q", use_rslora=r == 3, name=name)
        qgraft.save_adapter(drawn(pixels, name), tmp_path / name, name)
    qgraft.use_adapter(pixels, weights)
    x = torch.randn(2, 6, 4, 5)
    expected = pixels(x)
    combine_files({tmp_path / name: weight for name, weight in weights.items()}, tmp_path / "ab", force=True)
    qgraft.load_adapter(pixels, tmp_path / "ab", "ab")
    assert (pixels(x) - expected).abs().max() <= 1e-6
    theirs = peft.PeftModel.from_pretrained(Pixels().requires_grad_(False), tmp_path / "ab")
    assert theirs.base_model.model.proj_in.lora_A["default"].weight.shape == (5, 6, 1, 1)


def test_images_without_a_batch_and_batches_without_images(pixels):
    qgraft.attach_lora(pixels, r=2, target_modules="proj_in")
    x, layer = torch.randn(3, 6, 4, 5), drawn(pixels).proj_in
    assert torch.equal(layer(x[1]), layer(x)[1]) and not torch.equal(layer(x), layer.base(x))
    assert layer(x[:0]).shape == (0, 8, 4, 5)


def test_a_merge_of_language_models_leaves_none_out(tiny_gguf):
    model = qgraft.load(tiny_gguf("llama").path, device="cpu")[0]
    model.model.neck = nn.Conv2d(4, 4, 1)
    qgraft.attach_lora(model, r=2, target_modules="neck,q_proj")
    with pytest.raises(UnsupportedError, match=r"model\.neck is a convolution"):
        qgraft.merge(drawn(model))
