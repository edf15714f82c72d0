"""The options of training a denoiser: TrainArguments with what images need, and without what only texts have.

Names and defaults are those of diffusers' training scripts. Options of language models have no meaning here and are refused
where they are given, all at once.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from qgraft.errors import OptionError, option
from qgraft.ranges import ABOVE_0, AMOUNT, COUNT, FINITE, Range, check_ranges
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification_options import ClassificationOptions

ATTENTION = "to_q,to_k,to_v,to_out.0"
PREDICTIONS = ("epsilon", "v_prediction")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")
OF_NOISE = ("snr_gamma", "prediction_type", "noise_offset")
OF_FLOW = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs", "guidance_scale")

_TAKEN = {  # of what TrainArguments has beside transformers' options
    *("model_name_or_path", "quantize", "adapter_name_or_path", "adapter_name", "force", "finetuning_type"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "use_dora"),
    *("loraplus_lr_ratio", "dataset", "val_size", "max_samples", "compute", "overwrite_output_dir", "plot_loss"),
    *("learning_rate", "logging_steps", "save_total_limit", "eval_strategy", "load_best_model_at_end", "cuda_graphs"),
    *("early_stopping_patience", "early_stopping_threshold", "remove_unused_columns", "save_calibration"),
}
_OF_SETTING = (
    "finetuning_type",
    "cuda_graphs",
    "remove_unused_columns",
    "save_calibration",
    "force",
)  # nothing to choose
_OF_TEXTS = ("label_smoothing_factor", "neftune_noise_alpha", "do_eval", "do_predict", "per_device_eval_batch_size")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DiffusionArguments(TrainArguments):
    """Options of training a LoRA on a denoiser; those not listed here are TrainArguments' and transformers'."""

    command, public_name = "diffuse", "qgraft.diffusion.DiffusionArguments"

    resolution: int = _option(512, "Images are resized and cut at their middle to squares of so many pixels.")
    caption_column: str = _option("text", "Of metadata.jsonl: the caption; of a DiT the class.")
    instance_prompt: str | None = _option(None, "The caption of all images; no metadata.jsonl is read then.")
    random_flip: bool = _option(False, "Learn images mirrored, too, by chance.")
    latents_cache: str | None = _option(None, "File of latents and encoded captions; default: in output_dir.")
    max_sequence_length: int | None = _option(None, "SD3, Flux, PixArt: longest caption in tokens.")
    prediction_type: str | None = _option(None, "epsilon or v_prediction; default: the scheduler's.")
    snr_gamma: float | None = _option(None, "Min-SNR weighting of the loss, as 5.0.")
    noise_offset: float | None = _option(None, "Add so much of a noise that is one number for a channel, as 0.1.")
    weighting_scheme: str | None = _option(
        None, "Flows: sigma_sqrt, logit_normal, mode, cosmap or none; SD3 logit_normal, Flux none."
    )
    logit_mean: float | None = _option(None, "logit_normal: mean; 0.")
    logit_std: float | None = _option(None, "logit_normal: standard deviation; 1.")
    mode_scale: float | None = _option(None, "mode: its scale; 1.29.")
    precondition_outputs: bool | None = _option(None, "Flows: compare images instead of flows; true of SD3.")
    guidance_scale: float | None = _option(None, "Flux: the guidance that it is told; 3.5.")
    output_kohya_format: bool = _option(False, "U-Nets: write pytorch_lora_weights_kohya.safetensors, too.")

    # TrainArguments' with another meaning or default
    model_name_or_path: str | None = _option(None, "Folder of a pipeline of diffusers, or its hub id.")
    dataset: str | None = _option(None, "Folder of images, with metadata.jsonl.")
    quantize: str | None = _option(None, "Format to pack the linear layers in while loading, e.g. q8_0.")
    max_samples: int | None = _option(None, "Read at most so many images.")
    target_modules: str = _option(ATTENTION, "Comma list of layer names, all-linear, or a regular expression.")
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW.")
    r: int = _option(4, "Rank of the LoRA.")
    lora_alpha: float | None = _option(None, "The delta is scaled by lora_alpha / r; default: r.")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._refuse_texts()
        self.alpha_unsaid = self.lora_alpha is None
        if self.alpha_unsaid:
            self.lora_alpha = self.r
        super().__post_init__()
        self._check_diffusion()
        self.cuda_graphs, self.save_calibration = "no", False  # they are of texts

    def _refuse_texts(self) -> None:
        """Raise OptionError for options that a denoiser has no use for, all at once."""
        refused = refused_options()
        told = [each.name for each in dataclasses.fields(self)
                if each.name in refused and each.init and getattr(self, each.name) != _default(each)]  # fmt: skip
        if self.finetuning_type not in (None, "lora"):
            told.append("finetuning_type")
        if told:
            raise OptionError(f"{', '.join(told)}: a denoiser is trained on images, by a LoRA; leave them out",
                              hint="`qgraft diffuse --help` lists the options")  # fmt: skip

    def _check_diffusion(self) -> None:
        given = {
            "resolution": Range(8, 2**15, whole=True), "max_sequence_length": COUNT, "snr_gamma": ABOVE_0,
            "noise_offset": AMOUNT, "logit_mean": FINITE, "logit_std": ABOVE_0, "mode_scale": FINITE,
            "guidance_scale": AMOUNT,
        }  # fmt: skip
        check_ranges({name: (getattr(self, name), allowed) for name, allowed in given.items()
                      if getattr(self, name) is not None})  # fmt: skip
        for name, allowed in (("prediction_type", PREDICTIONS), ("weighting_scheme", WEIGHTINGS)):
            if getattr(self, name) not in (None, *allowed):
                raise OptionError(f"{name}={getattr(self, name)!r}: expected {', '.join(allowed)}")
        if self.instance_prompt is not None and self.caption_column != "text":
            raise OptionError("instance_prompt and caption_column both say where captions are; give one of them")

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise OptionError where any of these options is given."""
        if told := [name for name in names if getattr(self, name) is not None]:
            raise OptionError(f"{', '.join(told)}: {why}", hint=f"leave {option(told[0], getattr(self, told[0]))} out")


def shown_options() -> set[str]:
    """The options that are ours, for a short help."""
    return {*DiffusionArguments.__annotations__, *_TAKEN} - {*_OF_SETTING}


def refused_options() -> set[str]:
    """The options that have no meaning for a denoiser."""
    return {*TrainArguments.__annotations__, *ClassificationOptions.__annotations__} - _TAKEN | {*_OF_TEXTS}


def _default(each: "dataclasses.Field[Any]") -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
