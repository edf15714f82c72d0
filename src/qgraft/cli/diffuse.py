"""qgraft diffuse: a diffusion model and a folder of images in, a LoRA out that diffusers reads."""

from collections.abc import Sequence

DESCRIPTION = """usage: qgraft diffuse --model_name_or_path PIPELINE --dataset FOLDER
                      --output_dir FOLDER [options]
       qgraft diffuse CONFIG.yaml [option=value ...]

Train a LoRA on the U-Net or transformer of a diffusion model (Stable Diffusion,
SDXL, SD3, Flux, PixArt, DiT): PIPELINE is a folder of diffusers or a hub id.
--quantize q8_0 packs its linear layers. The dataset is a folder of images with
metadata.jsonl, a line {"file_name": ..., "text": ...} for each, or any folder
of images with --instance_prompt.

FOLDER then holds the LoRA for qgraft and PEFT, and
pytorch_lora_weights.safetensors for pipeline.load_lora_weights(FOLDER).

"""


def run(words: Sequence[str]) -> int:
    """Parse, load, train, say what came of it."""
    from pathlib import Path

    from rich.console import Console

    from qgraft.cli.options import print_note, print_notes
    from qgraft.cli.train import UNSAID
    from qgraft.diffusion.arguments import DiffusionArguments, refused_options, shown_options
    from qgraft.errors import DataError, OptionError
    from qgraft.locks import folder_locked
    from qgraft.training.arguments import parse_options
    from qgraft.training.option_help import full_help, short_help
    from qgraft.training.output_dir import check_output_dir
    from qgraft.training.trainer_options import MOST_USED

    if not words or words[0] in ("-h", "--help", "--help_all"):
        refused = refused_options()
        used = {name: text for name, text in MOST_USED.items() if name not in {*refused, "do_train"}}
        all_of_them = "--help_all" in words
        told = (
            full_help(DiffusionArguments, refused)
            if all_of_them
            else short_help(DiffusionArguments, shown_options(), used)
        )
        print(DESCRIPTION + told, end="")
        return 0
    arguments = parse_options(words, DiffusionArguments)
    for note in arguments.notes:
        print_note(f"note: {note}")
    if not arguments.model_name_or_path:
        raise OptionError("no model is given", hint="--model_name_or_path stable-diffusion-v1-5")
    if arguments.output_dir == UNSAID:
        raise OptionError("no output_dir is given", hint="--output_dir out")
    if not arguments.dataset:
        raise DataError("no dataset is given", hint="--dataset images, a folder with metadata.jsonl")

    from qgraft import diffusion
    from qgraft.adapter_files.folder import load_adapter
    from qgraft.training.report import describe_signal

    with folder_locked(Path(str(arguments.output_dir))):
        check_output_dir(arguments)
        denoiser = diffusion.load(
            arguments.model_name_or_path, quantize=arguments.quantize, dtype=arguments.compute_dtype,
            device="cpu" if arguments.use_cpu else "auto",
        )  # fmt: skip
        print_notes(denoiser)
        if arguments.adapter_name_or_path:
            print_note(str(load_adapter(denoiser, arguments.adapter_name_or_path, arguments.adapter_name,
                                        force=arguments.force)))  # fmt: skip
    report = diffusion.train(denoiser, arguments, progress=Console(stderr=True))
    for note in report.notes[len(arguments.notes) :]:
        print_note(note if note.startswith("warning: ") else f"note: {note}")
    if report.unchanged:
        return 0
    print_note(report.accounting.summary())
    if report.signal is not None:
        print_note(describe_signal(report))
        return report.exit_code
    metrics = report.metrics
    held = (
        f", held-out {metrics['eval_loss_before']:.4f} -> {metrics['eval_loss']:.4f}" if "eval_loss" in metrics else ""
    )
    print(f"trained {report.parameters:,} parameters in {report.steps} steps, {metrics['seconds']:.0f} s")
    print(f"loss {metrics['train_loss']:.4f}{held}, peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB")
    print(f"adapter, pytorch_lora_weights.safetensors, run.json and loss.png are in {report.output_dir}")
    return report.exit_code
