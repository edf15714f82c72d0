"""Amounts of memory as people write and read them: 6GB, 512 MiB."""

import re

from qgraft.errors import OptionError

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes from a number and a unit: GB are 10^9, GiB 2^30. Raises OptionError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]+)\s*", str(text))
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match and re.fullmatch(r"\d+(\.\d+)?", match[1]) and match[2].lower() in units and float(match[1]):
        return int(float(match[1]) * units[match[2].lower()])
    raise OptionError(f"{text!r} is no amount of memory: expected a number and a unit", hint="6GB, 800MB, 5.5GiB")


def format_size(size: float) -> str:
    """Bytes in GB from 1 GB on, else in MB."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.0f} MB"
