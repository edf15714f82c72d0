"""The kinds of denoisers of diffusers that are trained here: what each is asked, and what its prompts become.

A denoiser is a U-Net or a transformer that is given a latent image with noise in it, a time step, and conditions (what the
text encoders say of a caption), and predicts what there is of noise in it:

    UNet2DConditionModel        Stable Diffusion 1.x, 2.x; SDXL, whose U-Net also takes pooled text and sizes
    SD3Transformer2DModel       Stable Diffusion 3, 3.5
    FluxTransformer2DModel      Flux.1, whose latents go in as a row of squares of 2x2
    PixArtTransformer2DModel    PixArt-alpha, PixArt-Sigma; predicts a variance too, which no loss is taken of
    DiTTransformer2DModel       DiT, whose captions are the labels of its classes

How each is called is what the training scripts of diffusers do (train_text_to_image_lora.py, ..._sdxl.py,
train_dreambooth_lora_sd3.py, ..._flux.py), and of the two others their pipelines. Encoding a caption is a pipeline's own
`encode_prompt`. Not chosen: one way for all denoisers of diffusers; what their arguments mean differs, and where it is not
known it is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.errors import DataError, UnsupportedError

Conditions = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One kind of denoiser.

    Attributes:
        part: its folder in a pipeline's, and what the names in a LoRA file of diffusers begin with.
        pipelines: classes of diffusers that have it.
        flow: whether it predicts the flow from an image to noise, and not the noise.
        encode: (pipeline, caption, options of its encode_prompt) -> conditions, each with a batch of one.
        predict: (denoiser, noisy latents [B, C, H, W], time steps [B], conditions, places [B, 6], guidance) -> [B, C, H, W].
            The places of an image are what SDXL is told: its size before, where it was cut, its size now; rows come first.
        reads: the tokenizer of the pipeline that a caption may be too long for.
        sized: whether the longest caption can be chosen (max_sequence_length).
        tokens: how long it is in diffusers' script; None for what the pipeline says, or its tokenizer.
        square: how many latent values of a row and a column the denoiser takes at once beyond its own patches.
        weighting: the scheme that its script draws time steps by; of flows alone.
        preconditioned: whether its script compares images instead of flows.
    """

    part: str
    pipelines: tuple[str, ...]
    encode: Callable[..., Conditions]
    predict: Callable[[Any, Tensor, Tensor, Conditions, Tensor, float], Tensor]
    flow: bool = False
    reads: str | None = "tokenizer"
    sized: bool = False
    tokens: int | None = None
    square: int = 1
    weighting: str = "none"
    preconditioned: bool = False


def family_of(denoiser: nn.Module) -> Family:
    """What kind of denoiser this is, by its class. Raises UnsupportedError for one that is none of these."""
    name, config = type(denoiser).__name__, getattr(denoiser, "config", None)
    if not type(denoiser).__module__.startswith("diffusers.") or name not in _FAMILIES:
        raise UnsupportedError(f"a {name} is no denoiser that is known here; known are {', '.join(_FAMILIES)}",
                               hint="qgraft.load() and qgraft.train() are for language models")  # fmt: skip
    if name != "UNet2DConditionModel":
        return _FAMILIES[name]
    odd = {key: value for key in _OTHER_CONDITIONS if (value := getattr(config, key, None)) is not None}
    added = getattr(config, "addition_embed_type", None)
    if odd or added not in (None, "text_time"):
        told = ", ".join(f"{key}={value}" for key, value in {**odd, "addition_embed_type": added}.items())
        raise UnsupportedError(f"UNet2DConditionModel with {told}: expected the U-Net of Stable Diffusion 1, 2 or XL")
    return _FAMILIES[name] if added is None else _SDXL


_OTHER_CONDITIONS = ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")


def family_named(name: str) -> Family:
    """The kind of the class of this name, as a folder says it. Raises UnsupportedError."""
    if name not in _FAMILIES:
        raise UnsupportedError(f"a {name} is no denoiser that is known here; known are {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def latent_channels(denoiser: Any) -> int:
    """How many channels the latents have that it takes."""
    family = family_of(denoiser)
    return int(denoiser.config.in_channels) // family.square**2


# ---------------------------------------------------------------- U-Nets


def _text(caption: str | int) -> str:
    if not isinstance(caption, str):
        raise DataError(f"a caption is {caption!r}, expected a text")
    return caption


def _encode_sd(pipeline: Any, caption: str | int, **options: int) -> Conditions:
    embeds, _ = pipeline.encode_prompt(_text(caption), pipeline.text_encoder.device, 1, False)
    return {"encoder_hidden_states": embeds}


def _predict_sd(unet: Any, noisy: Tensor, steps: Tensor, given: Conditions, places: Tensor, guidance: float) -> Tensor:
    return unet(noisy, steps, **given).sample


def _encode_sdxl(pipeline: Any, caption: str | int, **options: int) -> Conditions:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        _text(caption), device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def _predict_sdxl(
    unet: Any, noisy: Tensor, steps: Tensor, given: Conditions, places: Tensor, guidance: float
) -> Tensor:
    added = {"text_embeds": given["text_embeds"], "time_ids": places.to(noisy.dtype)}
    return unet(noisy, steps, given["encoder_hidden_states"], added_cond_kwargs=added).sample


# ---------------------------------------------------------------- flows


def _encode_sd3(pipeline: Any, caption: str | int, **options: int) -> Conditions:
    text = _text(caption)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        text, text, text, device=pipeline.text_encoder.device, do_classifier_free_guidance=False, **options,
    )  # fmt: skip
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _predict_sd3(
    model: Any, noisy: Tensor, steps: Tensor, given: Conditions, places: Tensor, guidance: float
) -> Tensor:
    return model(hidden_states=noisy, timestep=steps, **given).sample


def _encode_flux(pipeline: Any, caption: str | int, **options: int) -> Conditions:
    text = _text(caption)
    embeds, pooled, _ = pipeline.encode_prompt(text, text, device=pipeline.text_encoder.device, **options)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _predict_flux(
    model: Any, noisy: Tensor, steps: Tensor, given: Conditions, places: Tensor, guidance: float
) -> Tensor:
    """The squares of 2x2 latents are tokens with a row and a column; time is counted from 0 to 1."""
    batch, channels, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    squares = noisy.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places_of_squares = torch.zeros(rows, columns, 3, dtype=noisy.dtype, device=noisy.device)
    places_of_squares[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
    places_of_squares[..., 2] = torch.arange(columns, device=noisy.device)[None]
    guided = torch.full((batch,), guidance, device=noisy.device) if model.config.guidance_embeds else None
    found = model(
        hidden_states=squares.reshape(batch, rows * columns, channels * 4), timestep=steps / 1000, guidance=guided,
        txt_ids=noisy.new_zeros(given["encoder_hidden_states"].shape[1], 3), img_ids=places_of_squares.flatten(0, 1),
        **given,
    ).sample  # fmt: skip
    found = found.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return found.reshape(batch, channels, height, width)


# ---------------------------------------------------------------- transformers that predict noise and its variance


def _encode_pixart(pipeline: Any, caption: str | int, **options: int) -> Conditions:
    embeds, mask, _, _ = pipeline.encode_prompt(
        _text(caption), do_classifier_free_guidance=False, device=pipeline.text_encoder.device, **options
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _predict_pixart(
    model: Any, noisy: Tensor, steps: Tensor, given: Conditions, places: Tensor, guidance: float
) -> Tensor:
    """Of images of 1024 it is told the size and the ratio of the sides, which is 1."""
    sizes, told = places[:, 4:6].to(noisy.dtype), model.use_additional_conditions
    added = {"resolution": sizes if told else None, "aspect_ratio": torch.ones_like(sizes[:, :1]) if told else None}
    return _noise_of(model, noisy, model(noisy, timestep=steps, added_cond_kwargs=added, **given).sample)


def _encode_dit(pipeline: Any, caption: str | int, **options: int) -> Conditions:
    number = caption if isinstance(caption, int) else pipeline.labels.get(caption)
    if number is None:
        raise DataError(f"caption {caption!r}: expected the number of a class, or its name",
                        hint="the names stand in id2label of the pipeline's model_index.json")  # fmt: skip
    return {"class_labels": torch.tensor([number])}


def _predict_dit(
    model: Any, noisy: Tensor, steps: Tensor, given: Conditions, places: Tensor, guidance: float
) -> Tensor:
    return _noise_of(model, noisy, model(noisy, timestep=steps, **given).sample)


def _noise_of(model: Any, noisy: Tensor, found: Tensor) -> Tensor:
    """The half of the channels that is the noise, where the other one is its variance."""
    return found if found.shape[1] == noisy.shape[1] else found[:, : noisy.shape[1]]


_SDXL = Family("unet", ("StableDiffusionXLPipeline",), _encode_sdxl, _predict_sdxl)
_FAMILIES = {
    "UNet2DConditionModel": Family("unet", ("StableDiffusionPipeline",), _encode_sd, _predict_sd),
    "SD3Transformer2DModel": Family(
        "transformer", ("StableDiffusion3Pipeline",), _encode_sd3, _predict_sd3, flow=True, reads="tokenizer_3", sized=True,
        tokens=77, weighting="logit_normal", preconditioned=True,
    ),
    "FluxTransformer2DModel": Family(
        "transformer", ("FluxPipeline",), _encode_flux, _predict_flux, flow=True, reads="tokenizer_2", sized=True, square=2,
    ),
    "PixArtTransformer2DModel": Family(
        "transformer", ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), _encode_pixart, _predict_pixart, sized=True,
    ),
    "DiTTransformer2DModel": Family("transformer", ("DiTPipeline",), _encode_dit, _predict_dit, reads=None),
}  # fmt: skip
