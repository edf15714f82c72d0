"""A folder of images with captions: rows -> squares of pixels. The layout is that of `imagefolder` of datasets:

    metadata.jsonl      {"file_name": "0001.png", "text": "a photo of a cat"}, a line for each image
    0001.png ...        may lie in folders below

Without captions, one text stands for all images (instance_prompt, as DreamBooth has it); then all images of the folder count.
An image is turned as its EXIF says, made RGB, resized until its shorter side is `resolution` and cut at its middle, with the
roundings of torchvision's Resize and CenterCrop, which diffusers' scripts use. A cut at a random place, their other choice,
would need new latents in every epoch. Of 16 bits the upper 8 count, as Pillow has it of RGB; what Pillow would clip (numbers
of 32 bits, whose white is said nowhere) is dropped. As in the scripts, transparency is passed over, and of several pictures
in one file the first is taken: the accounting says of how many.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from qgraft.data.files import file_rows
from qgraft.data.pictures import FORMATS, upright
from qgraft.data.reading import Accounting
from qgraft.errors import DataError, option

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_LIKE_IMAGES = (*SUFFIXES, ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".tga", ".ppm", ".dng")
_BROKEN = (OSError, UnidentifiedImageError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageRow:
    """An image and what it shows.

    Attributes:
        caption: a text; of a DiT the number or the name of a class.
        places: what SDXL is told: (height, width) before, (top, left) of the cut, (height, width) now.
        sha256: of the file.
        odd: what is not learned of it, in words that stand behind a number of images; empty for most.
    """

    path: Path
    caption: str | int
    places: tuple[int, int, int, int, int, int]
    sha256: str
    odd: str = ""


def read_images(
    folder: str, resolution: int, *, caption_column: str = "text", instance_prompt: str | None = None,
    most: int | None = None,
) -> tuple[list[ImageRow], Accounting]:  # fmt: skip
    """The rows of a folder whose images can be read. Raises DataError for a folder without them.

    Args:
        most: rows that are read; None for all.
    """
    root, accounting = Path(folder).expanduser(), Accounting()
    if not root.is_dir():
        raise DataError(f"dataset {folder}: no such folder; expected one with images and {METADATA}",
                        hint="datasets of the hub: save their images in a folder, with a metadata.jsonl")  # fmt: skip
    pairs = _all_images(root, instance_prompt) if instance_prompt is not None else _named(root, caption_column)
    rows = []
    for source, name, caption in pairs[:most]:
        accounting.read += 1
        row = _row(root, name, caption, resolution)
        if isinstance(row, str):
            accounting.drop(row, source)
            continue
        accounting.kept += 1
        rows.append(row)
    accounting.check()
    if not rows:
        raise DataError(f"dataset {folder} holds no image that can be learned: {accounting.summary()}")
    for odd in sorted({row.odd for row in rows} - {""}):
        of = [row.path.name for row in rows if row.odd == odd]
        accounting.notes.append(f"{len(of)} images {odd}, {of[0]} first")
    if left := _left(root, {(root / name).resolve() for _, name, _ in pairs if isinstance(name, str)}):
        why = (
            f"have no line in {METADATA}"
            if instance_prompt is None
            else "are none that are read, or lie in folders below"
        )
        accounting.notes.append(f"{len(left)} files of the folder {why}, {left[0]} first")
    return rows, accounting


def _named(root: Path, column: str) -> list[tuple[str, Any, Any]]:
    """(place, name, caption) of each line of metadata.jsonl."""
    path = root / METADATA
    if not path.is_file():
        raise DataError(f"{root} holds no {METADATA}, a line {{\"file_name\": ..., \"text\": ...}} for each image",
                        hint=f"{option('instance_prompt', 'a photo of sks dog')} is one caption for all images")  # fmt: skip
    rows = [(values if isinstance(values, dict) else {}, place) for values, place in file_rows(path, [])]
    if not any(column in values for values, _ in rows):
        names = ", ".join(sorted({name for values, _ in rows for name in values} - {"file_name"})) or "none"
        raise DataError(f"{path}: no line has {column!r}; there are: {names}", hint=option("caption_column", "NAME"))
    return [(place, values.get("file_name"), values.get(column)) for values, place in rows]


def _all_images(root: Path, caption: str) -> list[tuple[str, Any, Any]]:
    names = sorted(path.name for path in root.iterdir() if path.suffix.lower() in SUFFIXES)
    if not names:
        raise DataError(f"{root} holds no images: expected {', '.join(SUFFIXES)}")
    return [(name, name, caption) for name in names]


def _left(root: Path, named: set[Path]) -> list[str]:
    """The other files of the folder and of those below, but for hidden ones and those that are no images by their names."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix.lower() in _LIKE_IMAGES)
    names = ((path, path.relative_to(root)) for path in files)
    return [str(name) for path, name in names if path.resolve() not in named and not str(name).startswith(".")]


def _row(root: Path, name: Any, caption: Any, resolution: int) -> ImageRow | str:
    """The row, or why it is dropped."""
    if not isinstance(name, str) or not name.strip():
        return "no file_name"
    if (
        isinstance(caption, bool)
        or not isinstance(caption, str | int)
        or (isinstance(caption, str) and not caption.strip())
    ):
        return "no caption"
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        return "the image is outside of the folder"
    if not path.is_file():
        return "no such image"
    try:
        turned, odd = _opened(path)
    except _BROKEN as error:
        return "its pixels have 32 bits" if "32 bits" in str(error) else "the image cannot be read"
    width, height = turned.size
    wide, high = _resized(width, height, resolution)
    if wide * high > (Image.MAX_IMAGE_PIXELS or math.inf):
        return f"too long for its width at resolution {resolution}"
    top, left = (round((side - resolution) / 2.0) for side in (high, wide))
    places = (height, width, top, left, resolution, resolution)
    return ImageRow(path, caption, places, hashlib.sha256(path.read_bytes()).hexdigest(), odd)


def _opened(path: Path) -> tuple[Image.Image, str]:
    """(the image in RGB, turned as its EXIF says; what of it is not learned). Raises one of _BROKEN."""
    with Image.open(path, formats=FORMATS) as image:
        moves = getattr(image, "is_animated", False)
        clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        turned = upright(image)
    if moves:
        return turned, "hold several pictures, the first of which is learned"
    return turned, "are transparent in places, and what lies beneath is learned" if clear else ""


def _resized(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) when the shorter side is `resolution`."""
    shorter, longer = min(width, height), max(width, height)
    long = int(resolution * longer / shorter)
    return (resolution, long) if width <= height else (long, resolution)


def pixels_of(row: ImageRow) -> Tensor:
    """[3, resolution, resolution] float32 from -1 to 1."""
    _, _, top, left, side, _ = row.places
    turned, _ = _opened(row.path)
    resized = turned.resize(_resized(*turned.size, side), Image.Resampling.BILINEAR)
    cut = resized.crop((left, top, left + side, top + side))
    bytes_HWC = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return bytes_HWC.permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def captions_of(rows: Sequence[ImageRow]) -> list[str | int]:
    """Each caption once, in the order of the rows."""
    return list(dict.fromkeys(row.caption for row in rows))
