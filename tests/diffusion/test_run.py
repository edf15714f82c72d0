"""A whole run on a pipeline's folder: files, going on, caches, merging, the command; beside diffusers' own pieces."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from transformers import set_seed

import qgraft
from qgraft import diffusion
from qgraft.diffusion.images import pixels_of, read_images
from qgraft.errors import AdapterError, CheckpointError, DataError, OptionError, StorageError, UnsupportedError

diffusers = tiny.diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sd")
    tiny.pipeline(made / "sd")
    tiny.images(made / "images")
    return made


def options(folder, output, **more):
    told = {"resolution": 16, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "compute": "float32",
            "use_cpu": True, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", **more}  # fmt: skip
    return diffusion.DiffusionArguments(output_dir=str(output), dataset=str(folder / "images"), **told)


def losses(output):
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_is_that_of_diffusers_and_peft(folder, tmp_path):
    """From images to losses: VAE, text encoder, schedule, noise and AdamW as in train_text_to_image_lora.py."""
    unet = diffusion.load(folder / "sd")
    report = diffusion.train(unet, options(folder, tmp_path, max_steps=3, r=4))
    assert report.finished and report.steps == 3
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    torch.manual_seed(42)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=diffusion.ATTENTION.split(","), init_lora_weights=True)
    pipe.unet.requires_grad_(False)
    inject_adapter_in_model(config, pipe.unet)
    start = diffusion.load(folder / "sd")
    torch.manual_seed(42)
    qgraft.attach_lora(start, 4, 4, target_modules=diffusion.ATTENTION)
    theirs = dict(pipe.unet.named_parameters())
    for name, tensor in qgraft.lora_state_dict(start).items():
        theirs[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")].data.copy_(tensor)
    optimizer = torch.optim.AdamW(
        [each for each in pipe.unet.parameters() if each.requires_grad], lr=1e-4, weight_decay=0
    )
    rows, _ = read_images(str(folder / "images"), 16)
    schedule = diffusers.DDPMScheduler.from_pretrained(folder / "sd", subfolder="scheduler")
    expected = []
    set_seed(42)
    for step in range(3):
        chosen = rows[step % 2 * 2 :][:2]
        with torch.no_grad():
            latents = pipe.vae.encode(torch.stack([pixels_of(row) for row in chosen])).latent_dist.sample()
            ids = pipe.tokenizer(
                [row.caption for row in chosen], padding="max_length", truncation=True, return_tensors="pt"
            )
            text = pipe.text_encoder(ids.input_ids)[0]
        latents = (latents * pipe.vae.config.scaling_factor).contiguous()  # randn_like draws in the order of memory
        noise = torch.randn_like(latents)
        steps = torch.randint(0, schedule.config.num_train_timesteps, (2,))
        loss = mse_loss(pipe.unet(schedule.add_noise(latents, noise, steps), steps, text).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([each for each in pipe.unet.parameters() if each.requires_grad], 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    for name, tensor in qgraft.lora_state_dict(unet).items():
        trained = theirs[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
        assert (tensor - trained).abs().max() <= 1e-5, name


def sees(unet):
    torch.manual_seed(3)
    with torch.no_grad():
        return unet.eval()(torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), torch.randn(2, 5, 32)).sample


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "q8_0", "q4_1"])
def test_what_a_run_leaves_is_read_by_diffusers_and_by_us(folder, tmp_path, quantize):
    unet = diffusion.load(folder / "sd", quantize=quantize)
    args = options(folder, tmp_path / "out", output_kohya_format=True, learning_rate=1e-2, snr_gamma=5.0, val_size=1)
    report = diffusion.train(unet, args)
    held = {"adapter_config.json", "adapter_model.safetensors", "qgraft.json", "run.json", "metrics.jsonl", "loss.png",
            "latents.safetensors", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"}  # fmt: skip
    assert held <= {path.name for path in (tmp_path / "out").iterdir()}
    assert report.metrics["eval_loss"] != report.metrics["eval_loss_before"]
    expected = sees(unet)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    if quantize is not None:
        for path, layer in unet.named_modules():
            if isinstance(layer, qgraft.QuantizedLinear):
                pipe.unet.get_submodule(path.removesuffix(".base")).weight.data.copy_(layer.dequantize())
    for file in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        pipe.load_lora_weights(tmp_path / "out", weight_name=file)
        assert (sees(pipe.unet) - expected).abs().max() <= 1e-5
        pipe.unload_lora_weights()
    assert (sees(pipe.unet) - expected).abs().max() > 1e-3
    theirs = PeftModel.from_pretrained(pipe.unet, tmp_path / "out")
    assert (sees(theirs) - expected).abs().max() <= 1e-5
    again = diffusion.load(folder / "sd", quantize=quantize)
    qgraft.load_adapter(again, tmp_path / "out")  # sealed for this base
    assert torch.equal(sees(again), expected)
    other = diffusion.load(folder / "sd", quantize="q5_1")
    with pytest.raises(AdapterError, match="trained on another base"):
        qgraft.load_adapter(other, tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(folder, tmp_path):
    told = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1, "random_flip": True, "noise_offset": 0.1}
    whole = diffusion.load(folder / "sd", quantize="q8_0")
    diffusion.train(whole, options(folder, tmp_path / "whole", max_steps=5, save_total_limit=9, **told))
    part = diffusion.load(folder / "sd", quantize="q8_0")
    resumed = options(
        folder, tmp_path / "whole", max_steps=5, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), **told
    )
    diffusion.train(part, resumed)
    for name, tensor in qgraft.lora_state_dict(whole).items():
        assert torch.equal(tensor, qgraft.lora_state_dict(part)[name])
    again = diffusion.train(
        part, options(folder, tmp_path / "whole", max_steps=5, resume_from_checkpoint="auto", **told)
    )
    assert again.unchanged
    diffusion.train(part, options(folder, tmp_path / "whole", max_steps=5, resume_from_checkpoint="auto",
                                  output_kohya_format=True, **told))  # fmt: skip
    assert (tmp_path / "whole" / "pytorch_lora_weights_kohya.safetensors").is_file()


@pytest.mark.slow
def test_a_module_is_trained_as_it_is(folder, tmp_path):
    """Of diffusers, not frozen, packed in place."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "sd", subfolder="unet")
    qgraft.quantize(unet, "q8_0")
    with pytest.raises(OptionError, match="which pipeline"):
        diffusion.train(unet, options(folder, tmp_path / "one"))
    diffusion.train(unet, options(folder, tmp_path / "one", model_name_or_path=str(folder / "sd")))
    loaded = diffusion.load(folder / "sd", quantize="q8_0")
    torch.manual_seed(42)
    qgraft.attach_lora(loaded, 4, 4, target_modules=diffusion.ATTENTION)
    diffusion.train(loaded, options(folder, tmp_path / "two"))  # goes on with it
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert loaded.qgraft.info.fingerprint == unet.qgraft.info.fingerprint
    qgraft.attach_lora(loaded, 8, 6, target_modules="to_q", name="other")
    diffusion.train(loaded, options(folder, tmp_path / "three", adapter_name="other"))
    assert json.loads((tmp_path / "three" / "run.json").read_text())["adapter"]["lora_alpha"] == 6
    with pytest.raises(OptionError, match=r"lora_alpha=5.*, the adapter has 6"):
        diffusion.train(loaded, options(folder, tmp_path / "four", adapter_name="other", lora_alpha=5))


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_loss(folder, tmp_path):
    for name, on in (("off", False), ("on", True)):
        unet = diffusion.load(folder / "sd", quantize="q8_0")
        diffusion.train(unet, options(folder, tmp_path / name, gradient_checkpointing=on))
        assert not unet.is_gradient_checkpointing
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-6)


@pytest.mark.slow
def test_the_example_runs_without_a_network(tmp_path):
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parents[2] / "examples" / "diffusion.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--tiny", "--steps", "2", "--output", str(tmp_path)]).size == (16, 16)


@pytest.mark.slow
def test_latents_are_computed_once(folder, tmp_path, monkeypatch):
    args = options(folder, tmp_path / "one", latents_cache=str(tmp_path / "cache.safetensors"), random_flip=True)
    diffusion.train(diffusion.load(folder / "sd"), args)
    stored = load_file(tmp_path / "cache.safetensors")
    row = read_images(str(folder / "images"), 16)[0][0]
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "sd", subfolder="vae")
    for stem, pixels in (("", pixels_of(row)), ("mirrored_", pixels_of(row).flip(-1))):
        with torch.no_grad():
            found = vae.encode(pixels[None]).latent_dist
        assert torch.allclose(stored[f"{stem}mean.0"], found.mean[0] * vae.config.scaling_factor, atol=1e-6)
        assert torch.allclose(stored[f"{stem}std.0"], found.std[0] * vae.config.scaling_factor, atol=1e-6)
    monkeypatch.setattr("qgraft.diffusion.run.load_pipeline", None)  # would raise
    args.output_dir = str(tmp_path / "two")
    diffusion.train(diffusion.load(folder / "sd"), args)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    args.output_dir, args.resolution = str(tmp_path / "three"), 32
    with pytest.raises(TypeError):  # other latents: it is asked for
        diffusion.train(diffusion.load(folder / "sd"), args)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_pipeline(folder, tmp_path):
    """Latents and schedule are the pipeline's, and are no options."""
    shutil.copytree(folder / "sd", tmp_path / "sd")
    told = {"model_name_or_path": str(tmp_path / "sd"), "save_strategy": "steps", "save_steps": 2}
    diffusion.train(diffusion.load(tmp_path / "sd"), options(folder, tmp_path / "out", **told))
    told["resume_from_checkpoint"] = str(tmp_path / "out" / "checkpoint-2")
    for path, change, match in [
        ("scheduler/scheduler_config.json", ('"beta_end": 0.02', '"beta_end": 0.03'), "noise schedule"),
        ("vae/config.json", ('"scaling_factor": 0.18215', '"scaling_factor": 0.2'), "latents and conditions"),
    ]:
        before = (tmp_path / "sd" / path).read_text()
        assert change[0] in before
        (tmp_path / "sd" / path).write_text(before.replace(*change))
        with pytest.raises(CheckpointError, match=match):
            diffusion.train(diffusion.load(tmp_path / "sd"), options(folder, tmp_path / "out", **told))
        (tmp_path / "sd" / path).write_text(before)
    diffusion.train(diffusion.load(tmp_path / "sd"), options(folder, tmp_path / "out", **told))


@pytest.mark.slow
@pytest.mark.parametrize("quantize, dora", [(None, False), (None, True), ("q8_0", False), ("q4_1", False)])
def test_merging_and_saving(folder, tmp_path, quantize, dora):
    unet = diffusion.load(folder / "sd" / "unet", quantize=quantize)
    assert unet.qgraft.info.fingerprint == diffusion.load(folder / "sd", quantize=quantize).qgraft.info.fingerprint
    qgraft.attach_lora(unet, 4, 8, target_modules=diffusion.ATTENTION, use_dora=dora)
    for number, tensor in enumerate(qgraft.lora_state_dict(unet).values()):
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    expected, before = sees(unet), unet.qgraft.info.fingerprint
    with qgraft.adapters_off(unet):
        base = sees(unet)
    with pytest.raises(AdapterError, match="not merged"):
        diffusion.save(unet, tmp_path / "early")
    report = diffusion.merge(unet)
    assert len(report.floats) == (0 if quantize else 32) and len(report.packed) == (32 if quantize else 0)
    assert 0 < report.error < 0.6 if quantize else report.error == 0
    lost = float((sees(unet) - expected).norm() / (base - expected).norm())
    assert lost <= {None: 1e-5, "q8_0": 0.05, "q4_1": 0.6}[quantize]
    assert unet.qgraft.info.fingerprint != before and qgraft.adapter_names(unet) == []
    diffusion.save(unet, tmp_path / "merged")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    assert (sees(theirs) - sees(unet)).abs().max() <= 1e-5
    with pytest.raises(StorageError, match="exists"):
        diffusion.save(unet, tmp_path / "merged")
    with pytest.raises(AdapterError, match="no adapter is active"):
        diffusion.merge(unet)


@pytest.mark.slow
def test_the_command_trains_and_says_so(folder, tmp_path, capsys):
    from qgraft.cli.main import main

    words = ["diffuse", "--model_name_or_path", str(folder / "sd"), "--dataset", str(folder / "images"), "--resolution", "16",
             "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--quantize", "q8_0", "--use_cpu"]  # fmt: skip
    assert main(words) == 0
    assert "pytorch_lora_weights.safetensors" in capsys.readouterr().out
    assert main(words) == 2 and "not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_what_has_no_meaning_is_refused(folder, tmp_path):
    unet = diffusion.load(folder / "sd")
    for told, error, match in [
        ({"weighting_scheme": "mode"}, OptionError, "it is of flow matching"),
        ({"guidance_scale": 3.5}, OptionError, "told none"),
        ({"max_sequence_length": 20}, OptionError, "reads one length"),
        ({"resolution": 10}, OptionError, "cannot divide"),
        ({"resolution": 17}, OptionError, "leaves out what is over"),
        ({"target_modules": "to_x"}, OptionError, "no linear layer is named to_x"),
        ({"model_name_or_path": str(folder / "sd" / "unet")}, CheckpointError, "needs the VAE"),
        ({"model_name_or_path": str(folder / "images")}, CheckpointError, "needs the VAE"),
        ({"eval_strategy": "steps", "eval_steps": 1}, OptionError, "no held-out rows"),
        ({"latents_cache": str(folder / "images" / "0.png")}, StorageError, "no whole file of latents"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            diffusion.train(unet, options(folder, tmp_path / "no", **told))
    args = options(folder, tmp_path / "no")
    args.dataset = None
    with pytest.raises(DataError, match="no dataset"):
        diffusion.train(unet, args)
    with pytest.raises(UnsupportedError, match=r"AutoencoderKL is no denoiser"):
        diffusion.load(folder / "sd" / "vae")
    with pytest.raises(CheckpointError, match="neither model_index"):
        diffusion.load(folder / "images")
    with pytest.raises(CheckpointError, match="no such folder"):
        diffusion.load("/none/at/all")
    nine = diffusers.UNet2DConditionModel.from_config({**unet.config, "in_channels": 9})
    with pytest.raises(UnsupportedError, match="takes 9 channels"):
        diffusion.train(nine, options(folder, tmp_path / "no", model_name_or_path=str(folder / "sd")))
    with pytest.raises(UnsupportedError, match="expected StableDiffusion3Pipeline"):
        diffusion.train(tiny.sd3(), options(folder, tmp_path / "no", model_name_or_path=str(folder / "sd")))
    with pytest.raises(UnsupportedError, match="is a StableDiffusionPipeline"):
        diffusion.train(tiny.pixart(), options(folder, tmp_path / "no", model_name_or_path=str(folder / "sd")))
    with pytest.raises(UnsupportedError, match="no names for a PixArtTransformer2DModel"):
        told = {"model_name_or_path": str(folder / "sd"), "output_kohya_format": True}
        diffusion.train(tiny.pixart(), options(folder, tmp_path / "no", **told))
    index = json.loads((folder / "sd" / "model_index.json").read_text())
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "StableDiffusion3Pipeline"})
    )
    shutil.copytree(folder / "sd" / "scheduler", tmp_path / "flow" / "scheduler")
    with pytest.raises(UnsupportedError, match="is a DDPMScheduler, expected FlowMatchEulerDiscreteScheduler"):
        diffusion.train(tiny.sd3(), options(folder, tmp_path / "no", model_name_or_path=str(tmp_path / "flow")))
