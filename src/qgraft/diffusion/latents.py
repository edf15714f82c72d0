"""What the VAE and the text encoders make of a folder of images: computed once, kept in one file, latents.safetensors.

    mean.N, std.N            of image N: the VAE's distribution, [C, h, w], scaled as the denoiser takes latents
    mirrored_mean.N, ...     the same of its mirror image, with random_flip
    caption.K.NAME           of caption K: what the denoiser is told under this name

A step draws latents from these distributions anew, as diffusers' scripts do with --cache_latents. The file says what it was
made of (images, captions, options, the pipeline's files): where that is the same, nothing is loaded but the file.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from torch import Tensor

from qgraft import storage
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.checkpoints.pickles import WORDS
from qgraft.checkpoints.shards import open_shard
from qgraft.diffusion.arguments import DiffusionArguments
from qgraft.diffusion.denoisers import INDEX
from qgraft.diffusion.families import Conditions, Family
from qgraft.diffusion.images import ImageRow, captions_of, pixels_of
from qgraft.errors import CheckpointError, DataError, StorageError, TrainingError, option
from qgraft.progress import bar_on, counted
from qgraft.training.output_dir import LATENTS

_MADE_OF, _CUT = "qgraft.made_of", "qgraft.cut"


@dataclass(frozen=True, eq=False)
class ImageSample:
    """An image as its latents' distribution, and what its caption says.

    Attributes:
        mean, std: [C, h, w]; of the mirror image beside them, if there is one.
        conditions: by their names, each with a batch of one.
        places: see ImageRow.
        lost: tokens of the caption that the text encoder does not read.
        input_ids, labels: what stands for it in the hash of a run's rows.
    """

    source: str
    mean: Tensor
    std: Tensor
    mirrored: tuple[Tensor, Tensor] | None
    conditions: Conditions
    places: tuple[int, ...]
    input_ids: str
    labels: str | int
    lost: int = 0
    part: ClassVar[int] = 0
    weights: ClassVar[None] = None
    desirable: ClassVar[None] = None

    @property
    def length(self) -> int:
        """How many places its latents have, which count as tokens."""
        return self.mean.shape[-1] * self.mean.shape[-2]

    @property
    def texts(self) -> "tuple[ImageSample, ...]":
        """What passes through the denoiser to learn it: itself."""
        return (self,)


def encoded(
    rows: Sequence[ImageRow],
    family: Family,
    args: DiffusionArguments,
    about: str,
    pipeline: Callable[[], Any],
    console: Console | None = None,
) -> list[ImageSample]:
    """The rows as samples, out of the file where it is of these rows.

    Args:
        about: what they are of, see made_of.
        pipeline: what makes it, called only where it is needed.
    """
    path = Path(args.latents_cache or Path(str(args.output_dir)) / LATENTS).expanduser()
    kept = _read(path, about)
    found, cut = kept or _encode(rows, pipeline(), family, args, console)
    if kept is None:
        storage.make_folder(path.parent)
        metadata = {_MADE_OF: about, _CUT: json.dumps(cut), "format": "pt"}
        write_safetensors(path, {name: (WORDS[each.dtype], each) for name, each in found.items()}, metadata)
    captions = {caption: number for number, caption in enumerate(captions_of(rows))}
    told: list[Conditions] = [{} for _ in captions]
    for name, tensor in found.items():
        if name.startswith("caption."):
            _, which, condition = name.split(".", 2)
            told[int(which)][condition] = tensor
    samples = []
    for number, row in enumerate(rows):
        mirrored = (found[f"mirrored_mean.{number}"], found[f"mirrored_std.{number}"]) if args.random_flip else None
        samples.append(ImageSample(
            str(row.path), found[f"mean.{number}"], found[f"std.{number}"], mirrored,
            told[captions[row.caption]], row.places, f"{row.sha256} {args.resolution}", row.caption,
            cut[captions[row.caption]],
        ))  # fmt: skip
    return samples


def made_of(rows: Sequence[ImageRow], args: DiffusionArguments, source: str, dtype: str) -> str:
    """A hash of all that the file depends on; of the pipeline its files' sizes and times, of a hub id the commit.

    Args:
        dtype: what captions are encoded in.
    """
    options = (args.resolution, args.random_flip, args.max_sequence_length, dtype)
    each = [(row.sha256, row.caption, row.places) for row in rows]
    return hashlib.sha256(json.dumps([_LAYOUT, source, _pipeline_files(source), options, each]).encode()).hexdigest()


def latents_sha256(samples: Sequence[ImageSample]) -> str:
    """A hash of all that the samples say beside their images and captions: latents, conditions, places."""
    digest = hashlib.sha256()
    for sample in samples:
        told = [tensor for _, tensor in sorted(sample.conditions.items())]
        for tensor in (sample.mean, sample.std, *(sample.mirrored or ()), *told):
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        digest.update(repr(sample.places).encode())
    return digest.hexdigest()


_LAYOUT = 2  # goes up where the same images would become other latents
_ENCODERS = ("vae", "text_encoder", "tokenizer")


def _pipeline_files(source: str) -> list[tuple[Any, ...]]:
    """What tells the pipeline's VAE, text encoders and labels from others; st_ctime is of every change, and cannot be set."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        found = try_to_load_from_cache(source, INDEX)
        return [(Path(found).parent.name,)] if isinstance(found, str) else []
    parts = [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name.startswith(_ENCODERS)]
    files = [folder / INDEX, *(path for part in parts for path in sorted(part.rglob("*")) if path.is_file())]
    about = [(path, path.stat()) for path in files]
    return [(str(path.relative_to(folder)), was.st_size, was.st_mtime_ns, was.st_ctime_ns) for path, was in about]


def _read(path: Path, about: str) -> tuple[dict[str, Tensor], list[int]] | None:
    """(tensors, tokens cut off each caption) of the file where it is made of the same; None where there is none such.

    Raises StorageError where something else lies there.
    """
    if not path.exists():
        return None
    with ExitStack() as stack:
        try:
            shard = open_shard(path, stack)
            metadata: Mapping[str, str] = shard.metadata
        except CheckpointError:
            metadata = {}
        if not {_MADE_OF, _CUT} <= metadata.keys():
            another = option("latents_cache", "latents.safetensors")
            raise StorageError(f"{path} is there, and is no whole file of latents", hint=f"give another, as {another}")
        if metadata[_MADE_OF] != about:
            return None
        return {name: shard.tensor(name).clone() for name in shard.names}, json.loads(metadata[_CUT])


@torch.no_grad()
def _encode(
    rows: Sequence[ImageRow], pipeline: Any, family: Family, args: DiffusionArguments, console: Console | None
) -> tuple[dict[str, Tensor], list[int]]:
    """(tensors, tokens cut off each caption). Raises TrainingError for latents that are no numbers."""
    found: dict[str, Tensor] = {}
    captions = captions_of(rows)
    length = _longest(pipeline, family, args)
    options = {} if length is None else {"max_sequence_length": length}
    with bar_on(console) as bar:
        said = counted(bar, "captions and images")
        for number, caption in enumerate(captions):
            try:
                with ForeignErrors(f"caption {caption!r} cannot be encoded"):
                    conditions = family.encode(pipeline, caption, **options)
            except DataError as error:
                of = next(row.path.name for row in rows if row.caption == caption)
                raise DataError(f"{of}: {error.message}", hint=error.hint) from error
            found |= {f"caption.{number}.{name}": told.cpu().contiguous() for name, told in conditions.items()}
            said(number + 1, len(captions) + len(rows))
        for number, row in enumerate(rows):
            pixels = pixels_of(row)[None]
            for stem, image in (("", pixels), ("mirrored_", pixels.flip(-1)))[: 1 + args.random_flip]:
                mean, std = _distribution(pipeline.vae, image)
                found[f"{stem}mean.{number}"], found[f"{stem}std.{number}"] = mean, std
            said(len(captions) + number + 1, len(captions) + len(rows))
    if broken := [name for name, each in found.items() if each.is_floating_point() and not bool(each.isfinite().all())]:
        raise TrainingError(f"NaN or infinity in what the pipeline encodes: {broken[0]} of {len(broken)}",
                            hint="its VAE or text encoders are broken, or overflow")  # fmt: skip
    return found, _too_long(pipeline, family, captions, length)


def _distribution(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C, h, w] of the latents, shifted and scaled as the denoiser takes them."""
    distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    mean, std = (distribution.mean[0] - shift) * scale, distribution.std[0] * scale
    return mean.float().cpu().contiguous(), std.float().cpu().contiguous()


def _longest(pipeline: Any, family: Family, args: DiffusionArguments) -> int | None:
    """How many tokens of a caption are read, where that can be chosen: as asked for, or the script, or the pipeline."""
    if not family.sized:
        return None
    unsaid = inspect.signature(pipeline.encode_prompt).parameters["max_sequence_length"].default
    return args.max_sequence_length or family.tokens or int(unsaid)


def _too_long(pipeline: Any, family: Family, captions: Sequence[str | int], length: int | None) -> list[int]:
    """By how many tokens each caption is longer than what is read of it."""
    if family.reads is None:
        return [0] * len(captions)
    reader = getattr(pipeline, family.reads)
    if reader is None:  # SD3 without its T5
        reader, length = pipeline.tokenizer, None
    most = reader.model_max_length if length is None else length
    return [max(0, len(reader(caption, verbose=False).input_ids) - most) for caption in captions]
