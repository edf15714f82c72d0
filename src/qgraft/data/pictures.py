"""Images of rows: what a row may name, where it may lie, and the image itself, opened when it is needed.

    {"type": "image", "image": X}   also "path", "url" and {"type": "image_url", "image_url": {"url": X}}
    X                               a path, a file:// or data: URL, the bytes of a file, an image of Pillow,
                                    {"bytes": ..., "path": ...}

A path is taken from the folder of the file that its row stands in, and may not lead out of it unless somebody allows that:
rows are often somebody else's, and what they name is learned. Nothing is fetched from the net. A message keeps its images
beside its text, which has MARK in their places.
"""

import base64
import binascii
import hashlib
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote, urlsplit

from qgraft.data.calls import RowError
from qgraft.errors import DataError, UnsupportedError, option

MARK = "\ufdd2"  # a noncharacter of Unicode: the place of an image in a text
PLACEHOLDER = "<image>"  # the same in rows with a column of images, as LLaMA-Factory has it
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # that Pillow is let open
INSTALL = "pip install 'qgraft[images]'"


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that is not open yet: a path, the bytes of a file, or an image of Pillow."""

    data: Any
    called: ClassVar[str] = "an image"

    def open(self) -> Any:
        """The image in RGB, upright, as transformers' load_image has it.

        Raises DataError for what is none, UnsupportedError without Pillow.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise UnsupportedError("images need Pillow, which is not installed", hint=INSTALL) from error
        source = BytesIO(self.data) if isinstance(self.data, bytes) else self.data
        try:
            if isinstance(self.data, Image.Image):
                return upright(self.data)
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(source, formats=FORMATS) as image:
                    return upright(image)
        except (
            OSError,
            SyntaxError,
            ValueError,
            struct.error,  # of EXIF that is cut off
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise DataError(f"{self.name} is no image that can be read: {str(error)[:200]}") from error

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return str(self.data)[:200] if isinstance(self.data, Path) else self.called

    @cached_property
    def said(self) -> str:
        """Tells it from others: a hash of its file's bytes, or of its pixels. Raises DataError where there is no file."""
        try:
            raw = self.data.read_bytes() if isinstance(self.data, Path) else self.data
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error}") from error
        return hashlib.sha256(raw if isinstance(raw, bytes) else repr(raw.size).encode() + raw.tobytes()).hexdigest()


def upright(image: Any) -> Any:
    """An image of Pillow, turned as its EXIF says, in RGB; of 16 bits the upper 8, as Pillow itself reads them in colour.

    Raises ValueError for numbers of 32 bits, which say nowhere what white is; Pillow's convert() clips them, and 16 bits too.
    """
    from PIL import ImageOps

    in_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not in_16_bits:
        raise ValueError(f"its pixels are numbers of 32 bits ({image.mode}), of which no white is known")
    turned = ImageOps.exif_transpose(image)
    if in_16_bits:
        turned = turned.convert("I").point(lambda value: value / 256).convert("L")
    return turned.convert("RGB")


def picture_of(value: Any) -> Picture:
    """What a row names as an image. Raises RowError for what is none."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, str) and value.strip():
        return Picture(from_text(value))
    if isinstance(value, Path):
        return Picture(value)
    if isinstance(value, bytes | bytearray):
        return Picture(bytes(value))
    if hasattr(value, "convert") and hasattr(value, "tobytes"):
        return Picture(value)
    raise RowError(f"an image is a {type(value).__name__}, expected a path, bytes or an image of Pillow")


def from_text(text: str, called: str = Picture.called) -> Path | bytes:
    """What a path or an address names: a file, or its bytes. Raises RowError for an address that is neither."""
    parts = urlsplit(text) if "://" in text[:12] or text.startswith("data:") else None
    if parts is None:
        return Path(text)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if parts.scheme != "data":
        raise RowError(f"{called} is named by a {parts.scheme}: address, and nothing is fetched from the net")
    about, _, content = text.partition(",")
    try:
        return base64.b64decode(content, validate=True) if about.endswith(";base64") else unquote(content).encode()
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{called} is a data: address that is not base64") from error


def pictures_of(value: Any) -> list[Picture]:
    """The images in a column of a row: one, or a list of them."""
    if value is None or (isinstance(value, float) and value != value):
        return []
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    return [picture_of(each) for each in (value if listed else [value])]


def part_picture(part: Mapping[str, object]) -> Picture | None:
    """The image of a part of a content; None where it is named elsewhere in the row."""
    named = next((part[key] for key in ("image", "image_url", "path", "url", "bytes", "base64") if part.get(key)), None)
    if part.get("base64") is named and isinstance(named, str):
        named = f"data:image;base64,{named}"
    return None if named is None else picture_of(named)


Named = TypeVar("Named", bound=Picture)


def located(picture: Named, home: Path | None, outside: bool) -> Named:
    """The image, or what else a row names, of a row in a file of the folder `home`; None for rows that come from no file.

    Raises RowError for a path that leads out of it, unless `outside` allows that, or to no file.
    """
    if not isinstance(picture.data, Path):
        return picture
    path = picture.data.expanduser() if home is None else home / picture.data
    try:
        if home is not None and not outside and not path.resolve().is_relative_to(home.resolve()):
            raise RowError(
                f"{picture.called} lies outside of the folder of its file ({option('allow_outside_files')} allows it)"
            )
        if not path.is_file():
            raise RowError(f"{picture.called} is named that is not there")
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero in it, links in a circle
        raise RowError(f"{picture.called} is named that can be no file") from error
    return replace(picture, data=path)
