"""Amounts of memory: as people write and read them (6GB, 512 MiB), and what this process holds."""

import re
import resource
import sys

import psutil
import torch

from qgraft.errors import OptionError

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes from a number and a unit: GB are 10^9, GiB 2^30. Raises OptionError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]+)\s*", str(text))
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match and re.fullmatch(r"\d+(\.\d+)?", match[1]) and match[2].lower() in units and float(match[1]):
        return int(float(match[1]) * units[match[2].lower()])
    raise OptionError(
        f"memory_limit={text!r} is no amount of memory: expected a number and a unit", hint="6GB, 800MB, 5.5GiB"
    )


def format_size(size: float) -> str:
    """Bytes in GB from 1 GB on, else in MB."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.0f} MB"


def memory_now() -> int:
    """What this process holds now, of the same memory as peak_memory_bytes."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The most memory this process has held: GPU memory where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
