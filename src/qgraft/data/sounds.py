"""Recordings of rows: what a row may name, where it may lie, and the sound itself, read when it is needed.

    {"audio": X}   X is a path, a file:// or data: URL, the bytes of a file, {"bytes": ..., "path": ...},
                   {"array": [floats from -1 to 1], "sampling_rate": 16000}, as the Audio feature of `datasets` gives it, or
                   its decoder of newer releases (torchcodec's AudioDecoder)

Where a file may lie and what tells one from another is that of images (pictures.py). Several channels become their mean, as
`datasets` has it. Another rate than the model's is resampled by soxr; an array at that rate needs no library at all.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qgraft.data.calls import RowError
from qgraft.data.pictures import Picture, from_text
from qgraft.errors import DataError, UnsupportedError

INSTALL = "pip install 'qgraft[speech]'"
RATES = (1_000, 768_000)  # samples a second that a file may have
MOST_CHANNELS = 32
MISSING = 0.1  # seconds that a file may lack at its end
_UNKNOWN = 0x7F00_0000  # bytes: from here on nobody knew the length
_SHOULD_BE = re.compile(r"(?m)^ *(?!RIFF|FORM)[\w ]+: (\d+) \(should be (\d+)\)")  # as libsndfile logs it
LOUDEST = 4.0  # of floats; what is far above 1 are integers that nobody scaled


@dataclass(frozen=True)
class Wave:
    """Samples [n] of one channel, floats from -1 to 1, and how many there are in a second."""

    samples: np.ndarray[Any, Any]
    rate: int


@dataclass(frozen=True, eq=False)
class Sound(Picture):
    """A recording that is not read yet: a path, the bytes of a file, a Wave, or a decoder of torchcodec."""

    called: ClassVar[str] = "a recording"

    def open(self) -> Wave:
        """All of it. Raises DataError for what is none, UnsupportedError without soundfile."""
        return self.read(None)

    def read(self, seconds: float | None) -> Wave:
        """The same, but no more than is needed to see whether it is longer than so many seconds."""
        if isinstance(self.data, Wave):
            return self.data
        if hasattr(self.data, "get_all_samples"):
            found = self.data.get_all_samples()
            return Wave(np.asarray(found.data, dtype=np.float32).mean(0), int(found.sample_rate))
        return self._of_file(seconds)

    def _of_file(self, seconds: float | None) -> Wave:
        try:
            import soundfile
        except ImportError as error:
            raise UnsupportedError("recordings are read by soundfile, which is not installed", hint=INSTALL) from error
        source = BytesIO(self.data) if isinstance(self.data, bytes) else self.data
        try:
            with soundfile.SoundFile(source) as file:
                rate, channels = file.samplerate, file.channels
                if not RATES[0] <= rate <= RATES[1] or channels > MOST_CHANNELS:
                    raise DataError(f"has {channels} channels of {rate} samples a second")
                most = -1 if seconds is None else int(seconds * rate) + rate
                samples = file.read(most, dtype="float32", always_2d=True)
                _check_whole(file, len(samples), most, source)
        except DataError as error:
            raise DataError(f"{self.name} {error.message}") from error
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            why = str(getattr(error, "error_string", error))[:200]  # without the file, by which reasons would differ
            raise DataError(f"{self.name} is no recording that can be read: {why}") from error
        return Wave(samples.mean(1), rate)

    def heard(self, rate: int, seconds: float) -> np.ndarray[Any, Any]:
        """Its samples [n] at `rate`, float32.

        Raises DataError for one that is empty, silent, longer than `seconds`, or holds what are no samples.
        """
        wave = self.read(seconds)
        if not len(wave.samples):
            raise DataError(f"{self.called} is empty")
        if len(wave.samples) > seconds * wave.rate:
            raise DataError(f"{self.called} is longer than the {seconds:g} seconds that the model hears")
        if not np.isfinite(wave.samples).all():
            raise DataError(f"{self.called} holds samples that are no numbers")
        peak = float(np.abs(wave.samples).max())
        if not peak:
            raise DataError(f"{self.called} is silent")
        if peak > LOUDEST:
            raise DataError(f"{self.called} holds samples above {LOUDEST:g}, expected floats from -1 to 1")
        return resampled(wave, rate)

    @cached_property
    def said(self) -> str:
        """Tells it from others: a hash of its file's bytes, or of its samples."""
        if isinstance(self.data, Path | bytes):
            return super().said
        wave = self.open()
        return hashlib.sha256(repr(wave.rate).encode() + wave.samples.tobytes()).hexdigest()


def _check_whole(file: Any, read: int, most: int, source: Any) -> None:
    """Raise DataError for a file that breaks off before its end, of which libsndfile reads what there is.

    WAV and its kin say how many bytes there should be (which writers into pipes leave at the most that fits), MP3 how many
    samples; of Ogg the last page is marked. Less than MISSING of a second is no matter.
    """
    total = float(file.frames)
    for declared, there in _SHOULD_BE.findall(file.extra_info):
        if int(there) < int(declared) < _UNKNOWN:
            total = max(total, read * int(declared) / max(int(there), 1))
    cut = total - read > MISSING * file.samplerate or (file.format == "OGG" and not _ends(source))
    if cut and not 0 <= most <= read:
        raise DataError("breaks off before its end: the file is not whole")


def _ends(source: Any) -> bool:
    """Whether the last page of an Ogg file is marked as the end, and is whole."""
    data = source.getvalue() if isinstance(source, BytesIO) else Path(source).read_bytes()
    page = data[data.rfind(b"OggS") :]
    return len(page) >= 27 and bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def resampled(wave: Wave, rate: int) -> np.ndarray[Any, Any]:
    """The samples at another rate, float32. Raises UnsupportedError where that needs soxr, and it is not installed."""
    samples = wave.samples.astype(np.float32, copy=False)
    if wave.rate == rate:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise UnsupportedError(
            f"a recording has {wave.rate} samples a second, the model hears {rate}, and soxr, which resamples, is not "
            "installed", hint=INSTALL,
        ) from error  # fmt: skip
    found: np.ndarray[Any, Any] = soxr.resample(samples, wave.rate, rate)
    return found


def sound_of(value: Any) -> Sound:
    """What a row names as its recording. Raises RowError for what is none."""
    if isinstance(value, Sound):
        return value
    if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], int | float):
        value = value[0]
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            return Sound(_wave(value["array"], value.get("sampling_rate")))
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, str) and value.strip():
        return Sound(from_text(value, Sound.called))
    if isinstance(value, bytes | bytearray):
        return Sound(bytes(value))
    if isinstance(value, Path) or hasattr(value, "get_all_samples"):
        return Sound(value)
    if isinstance(value, list | tuple) and any(isinstance(part, str | bytes | Mapping | Path) for part in value):
        raise RowError(f"names {len(value)} recordings, expected one")
    if isinstance(value, list | np.ndarray):
        raise RowError("a recording is an array without its sampling_rate")
    raise RowError(
        f"a recording is a {type(value).__name__}, expected a path, bytes, or an array with its sampling_rate"
    )


def _wave(array: Any, rate: Any) -> Wave:
    """Samples of one channel. Raises RowError for what are none."""
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not rate >= 1 or rate != int(rate):
        raise RowError(f"a recording is an array with sampling_rate {str(rate)[:20]!r}, expected a number")
    try:
        samples = np.asarray(array)
    except ValueError as error:
        raise RowError("a recording is an array of unequal rows") from error
    if samples.ndim != 1:
        raise RowError(f"a recording is an array of {samples.ndim} dimensions, expected one channel")
    if len(samples) and samples.dtype.kind != "f":
        raise RowError("a recording is an array of what are no floats, expected floats from -1 to 1")
    return Wave(samples.astype(np.float32, copy=False), int(rate))
