"""LoRAs in files: what diffusers reads of ours and we of its, and kohya's layout."""

import json
import re

import peft
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_oracle import TOLD

import qgraft
from qgraft import diffusion
from qgraft.adapter_files.diffusers_lora import METADATA
from qgraft.errors import AdapterError, OptionError, UnsupportedError

diffusers = tiny.diffusers
pytestmark = pytest.mark.slow
KINDS = {"unet": tiny.unet, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}


def trained(model, name="default", **options):
    told = {"r": 4, "lora_alpha": 6, "target_modules": diffusion.ATTENTION, **options}
    qgraft.attach_lora(model, name=name, **told)
    for number, tensor in enumerate(qgraft.lora_state_dict(model, name).values()):
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return model


def output(model, kind):
    args, kwargs = TOLD[kind][1]()
    torch.manual_seed(0)  # img_ids of Flux
    args, kwargs = TOLD[kind][1]()
    with torch.no_grad():
        return model.eval()(*args, **kwargs).sample


OPTIONS = [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"to_q": 2}}, {"dtype": "float16"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_computes_the_same(kind, options, tmp_path):
    dtype = options.get("dtype", "float32")
    ours = trained(KINDS[kind](), **{key: value for key, value in options.items() if key != "dtype"})
    path = diffusion.save_lora_weights(ours, tmp_path, dtype=dtype)
    assert path.name == "pytorch_lora_weights.safetensors"
    theirs = KINDS[kind]()
    part = "unet" if kind in ("unet", "sdxl") else "transformer"
    theirs.load_lora_adapter(tmp_path, prefix=part, weight_name=path.name, adapter_name="default")
    expected = output(theirs, kind)
    assert (output(ours, kind) - expected).abs().max() <= (1e-5 if dtype == "float32" else 1e-3)
    assert (expected - output(KINDS[kind](), kind)).abs().max() > 1e-3
    again = KINDS[kind]()
    qgraft.load_adapter(again, path)
    if dtype == "float32":
        assert torch.equal(output(again, kind), output(ours, kind))
    assert (output(again, kind) - expected).abs().max() <= 1e-5
    saved = tmp_path / "theirs"
    theirs.save_lora_adapter(saved)  # without the part in front
    stored = {f"{part}.{key}": tensor for key, tensor in load_file(saved / path.name).items()}
    with safe_open(saved / path.name, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    save_file(stored, tmp_path / "peft.safetensors",
              {"lora_adapter_metadata": json.dumps({f"{part}.{key}": value for key, value in told.items()})})  # fmt: skip
    last = KINDS[kind]()
    qgraft.load_adapter(last, tmp_path / "peft.safetensors")
    assert (output(last, kind) - expected).abs().max() <= 1e-5


def test_convolutions_of_1x1_are_those_of_peft_and_kohya(tmp_path):
    """proj_in and proj_out of Stable Diffusion 1, and shortcuts: saved, read, loaded by diffusers, trained, merged."""
    targets = ["to_q", "proj_in", "proj_out", "conv_shortcut"]
    layers = {path: layer for path, layer in tiny.unet().named_modules() if path.endswith(tuple(targets))}
    assert sum(type(layer) is torch.nn.Conv2d for layer in layers.values()) >= 8
    ours = trained(tiny.unet(), target_modules=targets)
    base, said = output(tiny.unet(), "unet"), output(ours, "unet")
    assert (said - base).abs().max() > 1e-2
    theirs = peft.get_peft_model(tiny.unet(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    state = qgraft.lora_state_dict(ours)
    assert {key: each.shape for key, each in peft.get_peft_model_state_dict(theirs).items()} == {
        key: each.shape for key, each in state.items()
    }
    peft.set_peft_model_state_dict(theirs, state)
    for model in (ours, theirs):  # gradients, of the same sum of squares
        args, kwargs = TOLD["unet"][1]()
        model.train()(*args, **kwargs).sample.square().sum().backward()
    grads = [each.grad for each in ours.parameters() if each.grad is not None]
    expected = [each.grad for each in theirs.parameters() if each.grad is not None]
    for one, other in zip(grads, expected, strict=True):
        assert (one - other.view_as(one)).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))
    assert (output(theirs, "unet") - said).abs().max() <= 1e-5
    for layout in ("diffusers", "kohya"):
        path = diffusion.save_lora_weights(ours, tmp_path / layout, layout=layout)
        again, read = tiny.unet(), tiny.unet()
        qgraft.load_adapter(again, path)
        assert (output(again, "unet") - said).abs().max() <= 1e-6
        lora, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(load_file(path), unet_config=read.config)
        if layout == "diffusers":
            read.load_lora_adapter(tmp_path / layout, prefix="unet", weight_name=path.name)
        else:
            diffusers.StableDiffusionPipeline.load_lora_into_unet(lora, network_alphas=alphas, unet=read)
        assert (output(read, "unet") - said).abs().max() <= 1e-5
    qgraft.save_adapter(ours, tmp_path / "peft")
    wrapped = peft.PeftModel.from_pretrained(tiny.unet(), tmp_path / "peft").eval()
    assert (output(wrapped, "unet") - said).abs().max() <= 1e-5
    wrapped.save_pretrained(tmp_path / "theirs")
    again = tiny.unet()
    qgraft.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(output(again, "unet"), said)
    diffusion.merge(ours)
    assert (output(ours, "unet") - said).abs().max() <= 1e-5
    assert (output(wrapped.merge_and_unload(), "unet") - output(ours, "unet")).abs().max() <= 1e-5
    with pytest.raises(UnsupportedError, match="convolutions have no DoRA"):
        qgraft.attach_lora(tiny.unet(), target_modules=targets, use_dora=True)


def test_without_metadata_alpha_is_the_rank(tmp_path):
    """Of files of diffusers before 0.33."""
    ours = trained(tiny.unet(), r=4, lora_alpha=4, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    state = load_file(diffusion.save_lora_weights(ours, tmp_path))
    save_file(state, tmp_path / "old.safetensors")
    theirs, again = tiny.unet(), tiny.unet()
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="old.safetensors")
    qgraft.load_adapter(again, tmp_path / "old.safetensors")
    assert (output(ours, "unet") - output(theirs, "unet")).abs().max() <= 1e-5
    assert torch.equal(output(ours, "unet"), output(again, "unet"))


@pytest.mark.parametrize("kind", ["unet", "sdxl"])
def test_kohyas_layout_is_read_by_diffusers_and_by_us(kind, tmp_path):
    ours = trained(KINDS[kind](), lora_alpha=6, use_rslora=True)
    path = diffusion.save_lora_weights(ours, tmp_path, layout="kohya")
    assert all(key.startswith("lora_unet_") for key in load_file(path))
    loader = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    state, alphas = loader.lora_state_dict(load_file(path), unet_config=ours.config)
    theirs = KINDS[kind]()
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    assert (output(ours, kind) - output(theirs, kind)).abs().max() <= 1e-5
    again = KINDS[kind]()
    qgraft.load_adapter(again, tmp_path)  # the folder
    assert (output(ours, kind) - output(again, kind)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_reads_kohyas_layout_where_layers_differ(dtype, tmp_path):
    """It takes one alpha for all layers of attention."""
    told = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"mid_block.*to_q": 12, "to_k": 3}}
    ours = trained(tiny.unet(), lora_alpha=257, **told)  # no bfloat16
    path = diffusion.save_lora_weights(ours, tmp_path / "k.safetensors", layout="kohya", dtype=dtype)
    state = load_file(path)
    assert {float(tensor) for key, tensor in state.items() if key.endswith("alpha")} == {257.0}
    state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(state, unet_config=ours.config)
    theirs, again = tiny.unet(), tiny.unet()
    diffusers.StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    qgraft.load_adapter(again, path)
    if dtype == "float32":
        assert (output(ours, "unet") - output(theirs, "unet")).abs().max() <= 1e-4
    assert (output(again, "unet") - output(theirs, "unet")).abs().max() <= 1e-4


def test_older_names_and_names_without_the_part_are_read(tmp_path):
    ours = trained(tiny.unet(), r=4, lora_alpha=4)
    state, expected = load_file(diffusion.save_lora_weights(ours, tmp_path / "now.safetensors")), output(ours, "unet")
    plain = {key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up") for key in state}
    of_processor = {
        key: re.sub(r"\.(to_.*?)(\.0)?\.lora\.", r".processor.\1_lora.", called) for key, called in plain.items()
    }
    assert all("processor.to_" in called for called in of_processor.values())
    for names in (plain, of_processor):
        save_file({called: state[key] for key, called in names.items()}, tmp_path / "old.safetensors")
        again, theirs = tiny.unet(), tiny.unet()
        qgraft.load_adapter(again, tmp_path / "old.safetensors")
        assert torch.equal(output(again, "unet"), expected)
        theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="old.safetensors")
        assert (output(theirs, "unet") - expected).abs().max() <= 1e-5
    scaled = tiny.unet()
    scaled.load_lora_adapter(
        diffusion.save_lora_weights(trained(tiny.unet()), tmp_path).parent, prefix="unet",
        weight_name="pytorch_lora_weights.safetensors", adapter_name="default",
    )  # fmt: skip
    scaled.save_lora_adapter(tmp_path / "theirs")  # without the part, in tensors and options
    again = tiny.unet()
    qgraft.load_adapter(again, tmp_path / "theirs")
    assert (output(again, "unet") - output(scaled, "unet")).abs().max() <= 1e-5
    twice = dict(state)
    twice[next(iter(plain.values()))] = next(iter(state.values())).clone()
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(AdapterError, match="1 tensors are there twice"):
        qgraft.load_adapter(tiny.unet(), tmp_path / "twice.safetensors")


def test_nothing_of_a_file_is_passed_over_in_silence(tmp_path):
    kohya = load_file(diffusion.save_lora_weights(trained(tiny.unet()), tmp_path / "k.safetensors", layout="kohya"))
    path = diffusion.save_lora_weights(trained(tiny.unet()), tmp_path / "d.safetensors")
    alpha = next(key for key in kohya if key.endswith("alpha"))
    layer = alpha.removesuffix("alpha")
    of_encoder = {METADATA: json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 9})}
    for state, metadata, match in [
        ({**kohya, alpha: torch.tensor(float("nan"))}, None, "alpha: got nan, expected one finite number"),
        ({**kohya, alpha: torch.ones(2)}, None, r"alpha: got a tensor \[2\], expected"),
        ({key: each for key, each in kohya.items() if key == alpha or layer not in key}, None, f"unexpected tensor {alpha}"),
        ({**kohya, layer + "dora_scale": torch.ones(32, 1)}, None, "unexpected tensor .*dora_scale"),
        ({layer + "hada_w1_a": torch.ones(32, 4)}, None, "unexpected tensor .*hada_w1_a"),
        ({key.replace("lora_unet", "lycoris"): each for key, each in kohya.items()}, None, "a weight of lycoris_down"),
        (load_file(path), of_encoder, "no option that begins with 'unet.'"),
    ]:  # fmt: skip
        save_file(state, tmp_path / "odd.safetensors", metadata)
        with pytest.raises(AdapterError, match=match):
            qgraft.load_adapter(tiny.unet(), tmp_path / "odd.safetensors")


def test_the_original_names_of_sdxls_blocks_are_read(tmp_path):
    """A U-Net of SDXL's shape: kohya calls its blocks as the original code does, diffusers maps them."""

    def make():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=2, block_out_channels=(32, 32, 32), cross_attention_dim=64, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=80, use_linear_projection=True,
        ).requires_grad_(False)  # fmt: skip

    ours = trained(make())
    state, called = load_file(diffusion.save_lora_weights(ours, tmp_path / "own", layout="kohya")), {}
    for key, tensor in state.items():
        for block in range(3):
            for layer in range(3):
                key = key.replace(
                    f"down_blocks_{block}_attentions_{layer}_", f"input_blocks_{3 * block + layer + 1}_1_"
                )
                key = key.replace(f"up_blocks_{block}_attentions_{layer}_", f"output_blocks_{3 * block + layer}_1_")
        called[key.replace("mid_block_attentions_0_", "middle_block_1_")] = tensor
    assert not called.keys() & state.keys()
    save_file(called, tmp_path / "sgm.safetensors")
    again, theirs = make(), make()
    qgraft.load_adapter(again, tmp_path / "sgm.safetensors")
    converted, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(called, unet_config=theirs.config)
    diffusers.StableDiffusionXLPipeline.load_lora_into_unet(converted, network_alphas=alphas, unet=theirs)
    assert torch.equal(output(ours, "sdxl"), output(again, "sdxl"))
    assert (output(again, "sdxl") - output(theirs, "sdxl")).abs().max() <= 1e-5


def test_what_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="three parts each"):
        diffusion.save_lora_weights(trained(tiny.flux()), tmp_path, layout="kohya")
    with pytest.raises(OptionError, match="layout='peft'"):
        diffusion.save_lora_weights(trained(tiny.unet()), tmp_path, layout="peft")
    with pytest.raises(UnsupportedError, match="DoRA"):
        diffusion.save_lora_weights(trained(tiny.unet(), use_dora=True), tmp_path, layout="kohya")
    path = diffusion.save_lora_weights(trained(tiny.unet()), tmp_path)
    state = load_file(path)
    with pytest.raises(AdapterError, match="does not fit"):
        qgraft.load_adapter(tiny.sd3(), path)
    save_file({**state, "text_encoder.layers.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "te.safetensors")
    with pytest.raises(AdapterError, match="unexpected tensor text_encoder"):
        qgraft.load_adapter(tiny.unet(), tmp_path / "te.safetensors")
    notes = qgraft.load_adapter(tiny.unet(), tmp_path / "te.safetensors", force=True).notes
    assert any("text_encoder" in note for note in notes)
    kept = {key: tensor for key, tensor in state.items() if "lora_B" not in key or "to_q" not in key}
    save_file(kept, tmp_path / "half.safetensors")
    with pytest.raises(AdapterError, match="missing tensor"):
        qgraft.load_adapter(tiny.unet(), tmp_path / "half.safetensors")
    told = {"unet.r": 4, "unet.lora_alpha": 6, "unet.bias": "all"}
    save_file(state, tmp_path / "bias.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(UnsupportedError, match="a LoRA with bias"):
        qgraft.load_adapter(tiny.unet(), tmp_path / "bias.safetensors")
    save_file({f"lora_unet_{key}": torch.zeros(2, 2) for key in ("double_blocks_0_img_attn_qkv.lora_up.weight",)},
              tmp_path / "flux.safetensors")  # fmt: skip
    with pytest.raises(UnsupportedError, match="three parts each"):
        qgraft.load_adapter(tiny.flux(), tmp_path / "flux.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterError):
        qgraft.load_adapter(tiny.unet(), tmp_path / "broken.safetensors")
