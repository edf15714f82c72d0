"""train(): a LoRA on a denoiser, from a folder of images to files that qgraft, PEFT, diffusers and kohya's tools read.

output_dir/
  adapter_config.json, adapter_model.safetensors, qgraft.json    the LoRA, sealed (adapter_files/folder.py)
  pytorch_lora_weights.safetensors          for diffusers: pipeline.load_lora_weights(output_dir)
  pytorch_lora_weights_kohya.safetensors    with output_kohya_format
  latents.safetensors                       what the VAE and the text encoders say of the images (latents.py)
  run.json, metrics.jsonl, loss.png, checkpoint-N/    as of every run (training/run.py)

The run is that of training/: the same loop, optimizers, schedules, checkpoints, signals; a run that was stopped goes on from
its checkpoint with the draws it would have had. What is its own is the objective, and where the samples come from.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from qgraft.adapter_files.diffusers_lora import part_of, save_lora_weights
from qgraft.adapters.base import adapter_names, base_of
from qgraft.data.held_out import hold_out
from qgraft.diffusion.arguments import DiffusionArguments
from qgraft.diffusion.denoisers import describe, frozen_parameter, load_pipeline, pipeline_index, scheduler_of
from qgraft.diffusion.families import Family, family_of, latent_channels
from qgraft.diffusion.images import read_images
from qgraft.diffusion.latents import ImageSample, encoded, latents_sha256, made_of
from qgraft.diffusion.noise import Denoising
from qgraft.errors import DataError, OptionError, UnsupportedError, option
from qgraft.linear import computing
from qgraft.locks import folder_locked
from qgraft.progress import shown
from qgraft.training.adapter import adapter_in_training
from qgraft.training.callbacks import StopOnSignal, Watch
from qgraft.training.events import Callback
from qgraft.training.given import ready_callbacks
from qgraft.training.output_dir import check_output_dir
from qgraft.training.plan import plan_of
from qgraft.training.prepare import Prepared, add_early_stopping
from qgraft.training.processes import Processes
from qgraft.training.report import TrainReport
from qgraft.training.run import Run
from qgraft.training.trainer_options import check_evaluation, tracking_callbacks


def train(
    denoiser: Any,
    args: DiffusionArguments,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool | Console | None = None,
) -> TrainReport:
    """Train a LoRA on a denoiser and save it in args.output_dir.

    Args:
        denoiser: from diffusion.load(), or a U-Net or transformer of diffusers, with layers packed by qgraft.quantize() or
            floats. The LoRA args.adapter_name is trained on if it has it, else attached with the options of `args`.
        args: `dataset` is a folder of images (images.py); `model_name_or_path` the pipeline whose VAE, text encoders and
            schedule are asked, where the denoiser did not come from there.
        callbacks, progress: as in qgraft.train().

    Raises DataError, OptionError, StorageError, TrainingError, UnsupportedError.
    """
    if not isinstance(args, DiffusionArguments):
        raise OptionError(f"args: got a {type(args).__name__}, expected DiffusionArguments")
    family, console = family_of(denoiser), shown(progress)
    if Processes.of(args).count > 1:
        raise UnsupportedError("a denoiser is trained in one process", hint="start it without torchrun")
    with folder_locked(Path(str(args.output_dir))):
        prepared = _prepare(denoiser, family, args, callbacks, console)
        args = cast(DiffusionArguments, prepared.args)
        with adapter_in_training(denoiser, args), computing(denoiser, args.compute):
            watch, stop = Watch(prepared.folder, console, unit="places"), StopOnSignal()
            run = Run(denoiser, prepared, watch, stop)
            try:
                run.start(0, {})
                if (report := run.ended_before) is None:
                    run.loop.take_steps()
                    report = run.finish()
            finally:
                run.close()
            if report.finished:
                save_lora_weights(denoiser, prepared.folder, args.adapter_name)
                if args.output_kohya_format:
                    save_lora_weights(denoiser, prepared.folder, args.adapter_name, "kohya")
            return report


def _prepare(
    denoiser: Any, family: Family, args: DiffusionArguments, callbacks: Sequence[Callback], console: Console | None
) -> Prepared:
    """All that can be wrong is found before anything is touched; the images as samples."""
    args = copy.copy(args)
    if args.alpha_unsaid and args.adapter_name in adapter_names(denoiser):
        args.lora_alpha = None  # that of the adapter
    source = _source(denoiser, args)
    _check(denoiser, family, args)
    every = [*tracking_callbacks(args), *ready_callbacks(callbacks)]
    earlier = check_output_dir(args)
    pipeline_index(source, denoiser)
    guided = bool(getattr(denoiser.config, "guidance_embeds", False))
    objective = Denoising(family, scheduler_of(source, family), args, guided)
    rows, accounting = read_images(
        str(args.dataset), args.resolution, caption_column=args.caption_column, instance_prompt=args.instance_prompt,
        most=args.max_samples,
    )  # fmt: skip
    about = made_of(rows, args, source, str(frozen_parameter(denoiser).dtype))
    samples = encoded(rows, family, args, about, lambda: load_pipeline(source, denoiser), console)
    lost = [each.lost for each in samples]
    accounting.truncated, accounting.truncated_tokens = sum(map(bool, lost)), sum(lost)
    _check_samples(denoiser, family, args, samples)
    bound = {
        "latents and conditions (SHA-256)": latents_sha256(samples),
        "noise schedule (SHA-256)": objective.schedule_sha256,
    }
    held: list[ImageSample] = []
    if args.val_size:
        samples, held = hold_out(cast(Any, samples), args.val_size, args.seed)
    check_evaluation(args, held)
    plan_of(args, len(samples), 1)
    add_early_stopping(args, every)
    info = base_of(denoiser).info
    describe(denoiser, source if info is None else info.source, () if info is None else info.notes)
    notes = [*args.notes, *earlier.passed_over, *accounting.notes]
    return Prepared(
        args, Path(str(args.output_dir)), earlier, list(samples), list(held), accounting, None, notes, None, every,
        args.adapter_name not in adapter_names(denoiser), objective=objective, bound=bound,
    )  # fmt: skip


def _source(denoiser: Any, args: DiffusionArguments) -> str:
    """The pipeline that the denoiser is of. Raises OptionError where nobody says which."""
    info = base_of(denoiser).info
    source = args.model_name_or_path or (None if info is None else info.source)
    if source is None:
        raise OptionError("which pipeline? its VAE and text encoders are asked about the images",
                          hint=option("model_name_or_path", "stable-diffusion-v1-5"))  # fmt: skip
    if args.dataset is None:
        raise DataError("no dataset is given", hint=option("dataset", "images/") + ", a folder with metadata.jsonl")
    return str(source)


def _check(denoiser: Any, family: Family, args: DiffusionArguments) -> None:
    """Raise for options that this denoiser has no use for."""
    if args.max_sequence_length is not None and not family.sized:
        raise OptionError(f"max_sequence_length: the text encoder of a {type(denoiser).__name__} reads one length",
                          hint="leave it out")  # fmt: skip
    if args.output_kohya_format and (part_of(denoiser) != "unet" or args.use_dora):
        what = "a DoRA" if args.use_dora else f"a {type(denoiser).__name__}"
        raise UnsupportedError(f"output_kohya_format: kohya's layout has no names for {what}")


def _check_samples(denoiser: Any, family: Family, args: DiffusionArguments, samples: Sequence[ImageSample]) -> None:
    """Raise for latents that the denoiser cannot cut into its patches, and classes that it does not have."""
    made, _, side = samples[0].mean.shape
    if made != (taken := latent_channels(denoiser)):
        raise UnsupportedError(f"the denoiser takes {taken} channels, and the VAE makes {made}: an inpainting or editing "
                               "model is told more than an image")  # fmt: skip
    blocks = getattr(denoiser.config, "block_out_channels", None)
    unit = family.square * (getattr(denoiser.config, "patch_size", None) or 1)
    unit = unit if blocks is None else 2 ** (len(blocks) - 1)
    if args.resolution % side:
        raise OptionError(f"resolution={args.resolution}: its latents are {side} wide, and the VAE leaves out what is over",
                          hint="a multiple of 64 fits all")  # fmt: skip
    if side % unit:
        raise OptionError(f"resolution: its latents are {side} wide, which the denoiser cannot divide by {unit}",
                          hint="a multiple of 64 fits all")  # fmt: skip
    if "class_labels" in samples[0].conditions:
        classes = denoiser.config.num_embeds_ada_norm
        wrong = [each for each in samples if not 0 <= int(each.conditions["class_labels"]) < classes]
        if wrong:
            raise DataError(f"{wrong[0].source}: class {wrong[0].labels}: expected a number from 0 to {classes - 1}")
