"""Denoisers out of folders and hub ids, and what else of a pipeline is needed once: VAE, text encoders, noise schedule.

    pipeline's folder    model_index.json, unet/ or transformer/, vae/, text_encoder/, tokenizer/, scheduler/
    denoiser's folder    config.json, diffusion_pytorch_model.safetensors

Nothing of a folder is executed: classes go by name, and only those of families.py are taken; weights are read from
safetensors files alone.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.base import BaseInfo, base_of
from qgraft.adapters.holder import modules_outside_adapters
from qgraft.adapters.targets import adaptable_layers
from qgraft.checkpoints.assemble import weight_formats
from qgraft.checkpoints.fingerprint import fingerprint
from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.checkpoints.load import choose_device, choose_dtype
from qgraft.checkpoints.quantize import quantize as pack
from qgraft.diffusion.families import Family, family_named, family_of
from qgraft.errors import CheckpointError, InstallationError, UnsupportedError
from qgraft.experts import PackedLayer
from qgraft.formats import get_format
from qgraft.given import path_given
from qgraft.json_files import read_object

INDEX, CONFIG = "model_index.json", "config.json"
PARTS = ("unet", "transformer")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of a pipeline, for training


def diffusers() -> Any:
    """The library. Raises InstallationError where it is not there."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise InstallationError(
            f"diffusion models are read with the package diffusers, and it cannot be imported: {error}",
            hint="pip install 'qgraft[diffusion]'",
        ) from error


def load(
    source: str | Path, *, quantize: str | None = None, dtype: str | torch.dtype = "auto", device: str = "auto"
) -> Any:
    """The denoiser of a diffusion model: U-Net or transformer, frozen, in evaluation mode.

    Args:
        source: folder of a pipeline of diffusers, the folder of its unet or transformer, or a pipeline's hub id.
        quantize: packs its linear layers in this format ("q8_0", "q4_1", ...); convolutions and norms stay floats.
        dtype, device: as in qgraft.load().

    Returns the module of diffusers with `model.qgraft` on it. Raises InstallationError without diffusers, CheckpointError,
    UnsupportedError (another kind of model), OptionError.
    """
    library, where = diffusers(), choose_device(device)
    source, subfolder, name = find_denoiser(path_given("source", source))
    if quantize is not None:
        get_format(quantize)
    family_named(name)
    about = {} if subfolder is None else {"subfolder": subfolder}
    with ForeignErrors(f"{source}: its {name} cannot be read"):
        denoiser = getattr(library, name).from_pretrained(
            source, dtype=choose_dtype(dtype, where), use_safetensors=True, **about
        )
    family_of(denoiser)  # or an error: there are U-Nets with other conditions
    denoiser.requires_grad_(False)
    notes = pack(denoiser, quantize) if quantize is not None else ()
    denoiser.to(where).eval()
    describe(denoiser, source, notes)
    return denoiser


def find_denoiser(source: Path) -> tuple[str, str | None, str]:
    """(folder or hub id, its subfolder, class) of a denoiser. Raises CheckpointError, UnsupportedError."""
    if not source.expanduser().exists():
        if source.is_absolute() or str(source).count("/") != 1:
            raise CheckpointError(f"{source}: no such folder, and no hub id, which is org/name")
        with ForeignErrors(f"{source} cannot be fetched"):
            index = diffusers().DiffusionPipeline.load_config(str(source))
        return str(source), *_part_of(str(source), index)
    folder = source.expanduser()
    if (folder / INDEX).is_file():
        return str(folder), *_part_of(str(source), read_object(folder / INDEX, CheckpointError))
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{source} is no folder of diffusers: it holds neither {INDEX} nor {CONFIG}",
                              hint="pipeline.save_pretrained() of diffusers makes one of a single file")  # fmt: skip
    name = read_object(folder / CONFIG, CheckpointError).get("_class_name")
    if not isinstance(name, str):
        raise UnsupportedError(f"{source}: its {CONFIG} names no class of diffusers",
                               hint="language models are trained by `qgraft train`")  # fmt: skip
    return str(folder), None, name


def _part_of(source: str, index: Any) -> tuple[str, str]:
    """(subfolder, class) of the denoiser of a pipeline."""
    for part in PARTS:
        entry = index.get(part)
        if (
            isinstance(entry, list | tuple)
            and len(entry) == 2
            and entry[0] == "diffusers"
            and isinstance(entry[1], str)
        ):
            return part, entry[1]
    raise UnsupportedError(f"{source}: a {index.get('_class_name')} has neither a unet nor a transformer of diffusers")


def describe(denoiser: Any, source: str, notes: tuple[str, ...] = ()) -> None:
    """Let the denoiser know which base it is: its fingerprint is that of its weights as they are now."""
    base_of(denoiser).info = BaseInfo(
        source, "folder", type(denoiser).__name__, fingerprint(_entries(denoiser)), weight_formats(denoiser), notes
    )


def _entries(denoiser: nn.Module) -> Iterator[tuple[str, tuple[int, ...], str, Tensor]]:
    """All tensors of the base, adapters left out."""
    layers = adaptable_layers(denoiser)
    for path, module in modules_outside_adapters(denoiser):
        held: Any = getattr(module, "base", module) if path in layers else module
        for name, tensor in held.named_parameters(recurse=False):
            yield f"{path}.{name}", tuple(tensor.shape), str(tensor.dtype), tensor.detach()
        if isinstance(held, PackedLayer):
            packed = held.packed_weight.get()
            for number, part in enumerate(packed.parts):
                yield f"{path}.weight.{number}", packed.shape, packed.format, part


def pipeline_index(source: str, denoiser: Any) -> dict[str, Any]:
    """What the pipeline's model_index.json says. Raises CheckpointError, UnsupportedError where it is of another denoiser."""
    library, family, path = diffusers(), family_of(denoiser), Path(source).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise CheckpointError(f"{source} holds no {INDEX}: training needs the VAE and text encoders of the pipeline",
                                  hint="give the pipeline's folder, above unet or transformer")  # fmt: skip
        index: dict[str, Any] = read_object(path / INDEX, CheckpointError)
    else:
        with ForeignErrors(f"{source} cannot be fetched"):
            index = library.DiffusionPipeline.load_config(source)
    if (name := index.get("_class_name")) not in family.pipelines:
        expected = " or ".join(family.pipelines)
        raise UnsupportedError(f"{source} is a {name}, expected {expected} for a {type(denoiser).__name__}")
    return index


def load_pipeline(source: str, denoiser: Any) -> Any:
    """The pipeline around `denoiser`, on its device: the VAE in float32, the text encoders in the denoiser's dtype.

    Raises CheckpointError, UnsupportedError where it is another pipeline, or its latents are scaled in another way.
    """
    index, family = pipeline_index(source, denoiser), family_of(denoiser)
    kind = getattr(diffusers(), index["_class_name"])
    base, path = frozen_parameter(denoiser), Path(source).expanduser()
    taken = inspect.signature(kind.__init__).parameters
    empty = [name for name, entry in index.items() if entry == [None, None]]  # SD3 without its T5
    absent: dict[str, Any] = dict.fromkeys(each for each in (*empty, *_UNUSED) if each in taken)
    if "requires_safety_checker" in taken:
        absent["requires_safety_checker"] = False
    with ForeignErrors(f"{source} cannot be read"):
        pipeline = kind.from_pretrained(
            str(path) if path.is_dir() else source, dtype={"vae": torch.float32, "default": base.dtype},
            use_safetensors=True, **{family.part: denoiser}, **absent,
        )  # fmt: skip
    vae = pipeline.vae
    if type(vae).__name__ != "AutoencoderKL" or vae.config.get("latents_mean") is not None:
        raise UnsupportedError(f"{source}: a {type(vae).__name__} whose latents are scaled by channels, expected "
                               "AutoencoderKL")  # fmt: skip
    return pipeline.to(base.device)


def frozen_parameter(denoiser: nn.Module) -> nn.Parameter:
    """One of the base's floats: which device and dtype it computes in. There always is one: a convolution, a table."""
    inside = (each for _, module in modules_outside_adapters(denoiser) for each in module.parameters(recurse=False))
    return next(each for each in inside if each.is_floating_point())


def scheduler_of(source: str, family: Family) -> Any:
    """The noise schedule that the pipeline is trained with: one of noise prediction as the DDPMScheduler of its betas.

    Raises CheckpointError, UnsupportedError.
    """
    flow, library = "FlowMatchEulerDiscreteScheduler", diffusers()
    local = Path(source).expanduser()
    with ForeignErrors(f"{source}: its scheduler cannot be read"):
        config = library.DDPMScheduler.load_config(str(local) if local.exists() else source, subfolder="scheduler")
    name = config.get("_class_name")
    if name not in ((flow,) if family.flow else _OF_BETAS):
        expected = (
            flow if family.flow else "one of noise prediction, as DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler"
        )
        raise UnsupportedError(f"{source}: its scheduler is a {name}, expected {expected}")
    if odd := [
        f"{key}={config[key]!r}" for key, usual in _USUAL.items() if config.get(key, usual) not in (usual, None)
    ]:
        raise UnsupportedError(
            f"{source}: its scheduler has {odd[0]}: the denoiser is asked in a way that is not known here"
        )
    own, made = getattr(library, name), getattr(library, flow if family.flow else "DDPMScheduler")
    defaults = {each.name: each.default for each in inspect.signature(own.__init__).parameters.values()}
    config, taken = {**defaults, **config}, inspect.signature(made.__init__).parameters
    with ForeignErrors(f"{source}: its scheduler cannot be made"):
        scheduler = made.from_config({key: value for key, value in config.items() if key in taken and key != "self"})
    table, steps = scheduler.sigmas if family.flow else scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    if len(table) < steps or not bool(((table >= 0) & (table <= 1)).all()):
        raise CheckpointError(
            f"{source}: the numbers of its scheduler give no schedule of {steps} steps between 0 and 1"
        )
    return scheduler


_USUAL = {"use_flow_sigmas": False, "invert_sigmas": False, "timestep_type": "discrete"}
_OF_BETAS = (  # by which x_t = sqrt(a_t) x + sqrt(1 - a_t) n with the a_t of DDPM, however they then take their steps
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *(
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    *("DDPMParallelScheduler", "DDIMParallelScheduler"),
)
