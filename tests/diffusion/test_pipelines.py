"""Whole pipelines of each kind: what their captions become, and a run of two steps."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

import qgraft
from qgraft import diffusion
from qgraft.errors import DataError

pytestmark = pytest.mark.slow
KINDS = ("sdxl", "sd3", "sd3 without t5", "flux", "pixart", "dit")


def clip_of(encoder, tokenizer, text):
    """(states before the last layer, what is pooled), as diffusers' scripts take them."""
    ids = tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    found = encoder(ids, output_hidden_states=True)
    return found.hidden_states[-2], found[0]


def t5_of(encoder, tokenizer, text, length):
    return encoder(
        tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    )[0]


@torch.no_grad()
def expected(kind, pipe, text):
    """What a caption becomes in train_text_to_image_lora_sdxl.py, train_dreambooth_lora_sd3.py and ..._flux.py."""
    if kind == "sdxl":
        one, _ = clip_of(pipe.text_encoder, pipe.tokenizer, text)
        two, pooled = clip_of(pipe.text_encoder_2, pipe.tokenizer_2, text)
        return {"encoder_hidden_states": torch.cat([one, two], -1), "text_embeds": pooled}
    if kind.startswith("sd3"):
        (one, first), (two, second) = (
            clip_of(encoder, pipe.tokenizer, text) for encoder in (pipe.text_encoder, pipe.text_encoder_2)
        )
        both = torch.cat([one, two], -1)
        if kind == "sd3":
            three = t5_of(pipe.text_encoder_3, pipe.tokenizer_3, text, 77)
            width = three.shape[-1]
            both = torch.nn.functional.pad(both, (0, width - both.shape[-1]))
            return {
                "encoder_hidden_states": torch.cat([both, three], 1),
                "pooled_projections": torch.cat([first, second], -1),
            }
        return {"pooled_projections": torch.cat([first, second], -1)}
    if kind == "pixart":
        ids = pipe.tokenizer(text, padding="max_length", max_length=300, truncation=True, return_tensors="pt")
        states = pipe.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": ids.attention_mask}
    if kind == "flux":
        ids = pipe.tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        states, pooled = t5_of(pipe.text_encoder_2, pipe.tokenizer_2, text, 512), pipe.text_encoder(ids).pooler_output
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    return {}


@pytest.mark.parametrize("quantize", [None, "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_each_kind_of_pipeline(kind, quantize, tmp_path):
    pipe, folder = tiny.whole(kind, tmp_path / "model"), tiny.images(tmp_path / "images", count=3)
    if kind == "dit":
        lines = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(["crimson", "green", 3])]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    denoiser = diffusion.load(tmp_path / "model", quantize=quantize)
    args = diffusion.DiffusionArguments(output_dir=str(tmp_path / "out"), dataset=str(folder), resolution=16, max_steps=2,
                                        per_device_train_batch_size=2, compute="float32", use_cpu=True)  # fmt: skip
    report = diffusion.train(denoiser, args)
    assert report.finished and report.accounting.kept == 3
    # "a photo of a green square" is 20 letters and two marks of CLIP's; T5 has blanks as well, and reads more
    assert report.accounting.truncated == (3 if kind in ("sdxl", "sd3 without t5") else 0)
    stored = load_file(tmp_path / "out" / "latents.safetensors")
    caption = "a photo of a red square"
    for name, tensor in expected(kind, pipe, caption).items():
        assert (stored[f"caption.0.{name}"] - tensor).abs().max() <= 1e-6, name
    if kind == "dit":
        assert [int(stored[f"caption.{number}.class_labels"]) for number in range(3)] == [1, 2, 3]
    if kind in ("sd3", "flux"):
        shift, scale = 0.0609, pipe.vae.config.scaling_factor
        from qgraft.diffusion.images import pixels_of, read_images

        with torch.no_grad():
            mean = pipe.vae.encode(pixels_of(read_images(str(folder), 16)[0][0])[None]).latent_dist.mean[0]
        assert (stored["mean.0"] - (mean - shift) * scale).abs().max() <= 1e-6
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(tmp_path / "out")
    again = diffusion.load(tmp_path / "model", quantize=quantize)
    qgraft.load_adapter(again, tmp_path / "out")


def test_a_class_that_is_not_there_is_refused(tmp_path):
    tiny.whole("dit", tmp_path / "model")
    folder = tiny.images(tmp_path / "images", count=1)
    for caption, told in (
        ("purple", r"0.png: caption 'purple': expected .* or its name"),
        (10, "from 0 to 9"),
        (-1, "from 0 to 9"),
    ):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": caption}) + "\n")
        args = diffusion.DiffusionArguments(
            output_dir=str(tmp_path / "out"), dataset=str(folder), resolution=16, use_cpu=True
        )
        with pytest.raises(DataError, match=told):
            diffusion.train(diffusion.load(tmp_path / "model"), args)
