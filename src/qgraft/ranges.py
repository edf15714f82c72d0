"""Which numbers an option may be: looked at before anything is loaded, on the command line, in files and in Python alike.

A number out of its range is refused by name. torch and transformers refuse some of them, each in its own words and after
minutes; others they take, and compute NaN, or something that nobody asked for.
"""

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from qgraft.errors import OptionError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; without them where they are `open`; 0 as well, if so. Whole numbers only, if so."""

    least: float = 0
    most: float = math.inf
    open: str = ""  # "least", "most" or both
    whole: bool = False
    zero: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value  # compared as it is: no float holds every int
        if self.zero and number == 0:
            return True
        above = number > self.least if "least" in self.open else number >= self.least
        below = number < self.most if "most" in self.open else number <= self.most
        return above and below and abs(number) <= sys.float_info.max

    def __str__(self) -> str:
        number = ("0, or " if self.zero else "") + ("a whole number" if self.whole else "a number")
        if self.least == -math.inf:
            return f"a finite {number[2:]}" + ("" if self.most == math.inf else f", at most {self.most:.15g}")
        least = f"above {self.least:g}" if "least" in self.open else f"from {self.least:g} on"
        if self.most == math.inf:
            return f"{number} {least}"
        if not self.open:
            return f"{number} from {self.least:g} to {self.most:.15g}"
        return f"{number} {least}, {'below' if 'most' in self.open else 'at most'} {self.most:.15g}"


COUNT = Range(1, 2**31 - 1, whole=True)
SEED = Range(0, 2**32 - 1, whole=True)
SHARE = Range(0, 1, open="most")
SHARE_ABOVE_0 = Range(0, 1, open="least")
AMOUNT = Range()
ABOVE_0 = Range(open="least")
FINITE = Range(-math.inf)
AT_MOST_1 = Range(-math.inf, 1)  # a share of what was gained, of which more than all may be lost
RANK = Range(1, 32768, whole=True)
LENGTH = Range(2, 2**31 - 1, whole=True)  # of a sample: a token, and the one that it predicts
# Scores are divided by a temperature: by one below, the largest of float32 are infinite, and drawing from them an error.
TEMPERATURE = Range(1e-5, 1e5, zero=True)


def check_ranges(options: dict[str, tuple[Any, Range]]) -> None:
    """Raise OptionError for all numbers that are out of their ranges, at once. `options` are {name: (value, range)}."""
    wrong = [
        f"{name}={value!r}: expected {allowed}" for name, (value, allowed) in options.items() if value not in allowed
    ]
    if wrong:
        raise OptionError("; ".join(wrong))
