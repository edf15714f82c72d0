"""Tiny random denoisers with the libraries' own configurations, and a whole pipeline's folder."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")


def unet(cross: int = 32, **more):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross, norm_num_groups=8, attention_head_dim=8, **more,
    ).requires_grad_(False)  # fmt: skip


def sdxl():
    return unet(64, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
                use_linear_projection=True, transformer_layers_per_block=1)  # fmt: skip


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16,
    ).requires_grad_(False)  # fmt: skip


def flux(guidance: bool = True):
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    ).requires_grad_(False)  # fmt: skip


def pixart():
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=False,
    ).requires_grad_(False)  # fmt: skip


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).requires_grad_(False)  # fmt: skip


def vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16), in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16,
    )  # fmt: skip


def clip(folder: Path, projected: bool = False):
    """(text encoder, tokenizer) of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *[chr(c) for c in range(97, 123)],
        *[chr(c) + "</w>" for c in range(97, 123)],
    ]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(2 + 10 * projected)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        projection_dim=32,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval(), tokenizer


def pipeline(folder: Path, **schedule):
    """A Stable Diffusion pipeline, saved in `folder`."""
    encoder, tokenizer = clip(folder.parent / "words")
    schedule = {"num_train_timesteps": 100, "beta_schedule": "scaled_linear", **schedule}
    made = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder, tokenizer=tokenizer, unet=unet(), scheduler=diffusers.DDPMScheduler(**schedule),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def images(folder: Path, count: int = 4, size: tuple[int, int] = (20, 16)) -> Path:
    """Squares of one colour with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = ("red", "green", "blue")[number % 3]
        Image.new("RGB", size, name).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a photo of a {name} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def t5():
    """(text encoder, tokenizer) of letters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *[(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"],
    ]
    torch.manual_seed(3)
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)


def whole(kind: str, folder: Path):
    """A pipeline of this kind, saved in `folder`."""
    if kind == "unet":
        return pipeline(folder)
    encoder, tokenizer = clip(folder.parent / "words")
    noise = {"scheduler": diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="scaled_linear"), "vae": vae()}
    flow = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": vae()}
    flow["vae"].register_to_config(shift_factor=0.0609)
    pooled, _ = clip(folder.parent / "words", projected=True)
    if kind == "sdxl":
        made = diffusers.StableDiffusionXLPipeline(
            text_encoder=encoder,
            text_encoder_2=pooled,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=sdxl(),
            **noise,
        )
    elif kind.startswith("sd3"):
        encoder_3, tokenizer_3 = t5() if kind == "sd3" else (None, None)
        made = diffusers.StableDiffusion3Pipeline(
            transformer=sd3(), text_encoder=clip(folder.parent / "words", projected=True)[0], text_encoder_2=pooled,
            tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=encoder_3, tokenizer_3=tokenizer_3, **flow,
        )  # fmt: skip
    elif kind == "flux":
        encoder_2, tokenizer_2 = t5()
        made = diffusers.FluxPipeline(
            transformer=flux(), text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
            **flow,
        )  # fmt: skip
    elif kind == "pixart":
        encoder, tokenizer = t5()
        made = diffusers.PixArtSigmaPipeline(transformer=pixart(), text_encoder=encoder, tokenizer=tokenizer, **noise)
    else:
        made = diffusers.DiTPipeline(transformer=dit(), **noise)
    made.save_pretrained(folder)
    if kind == "dit":  # where the released folders have it, and save_pretrained forgets it
        path = folder / "model_index.json"
        labels = {"id2label": {"1": "red, crimson", "2": "green", "3": "blue"}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **labels}))
    return made
