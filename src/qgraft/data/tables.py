"""Tables of text: .csv and .tsv files, as spreadsheets write them, to rows by the names in their first line.

A cell is the text that stands in the file: `None`, `nan`, `NA`, `007` and `true` are answers like others, and only an empty
cell is empty. Python's `csv` reads the quotes; it is strict, because otherwise an open quote swallows all rows after it in
silence. (`pandas` and `datasets` make numbers and missing values out of text, and were not chosen for that.)

What separates the columns is found, because half of the world's spreadsheets write `;`: the separator whose first line has
the most names that are known, then the one by which most rows have as many cells as the first line. Excel's own line
`sep=;` before the names counts before everything.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from qgraft.errors import DataError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LOOKED_AT = 50  # rows, to find the separator
_SEP_LINE = re.compile(r"\s*\"?sep=(?P<separator>.)\"?\s*\r?\n", re.IGNORECASE)
_NAMED_BY = {".csv": ",", ".tsv": "\t"}

Row = tuple[object, str]  # what was found, and where: "self.csv:17"


@lru_cache(1024)
def same_name(name: str) -> str:
    """What is left of a column's name without case, blanks and dashes: "Prompt Text" and "prompt_text" are one name."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def table_rows(text: str, path: Path, known: Collection[str], notes: list[str]) -> Iterator[Row]:
    """The rows of a table, {name of the column: text}, each with its line; a row with too many cells as {None: cells}.

    Args:
        path: for messages; .tsv expects tabs.
        known: names of columns that tell one separator from another.
        notes: gets a sentence about a separator that the file's name does not say.

    Raises DataError where the first line names no columns or one twice, or quotes are broken.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a whole document may lie in one cell
    skipped = 0
    if found := _SEP_LINE.match(text):
        text, skipped = text[found.end() :], 1
    separator = found["separator"] if found else _separator(text, _NAMED_BY[path.suffix.lower()], known)
    if separator != _NAMED_BY[path.suffix.lower()]:
        notes.append(f"{path.name}: its columns are separated by {SEPARATORS.get(separator, repr(separator))}")
    yield from _rows(text, path, separator, skipped)


def _rows(text: str, path: Path, separator: str, skipped: int) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if not any(header):
            raise DataError(f"{path}: line {1 + skipped} must name the columns", hint="for example: instruction,output")
        names = [same_name(cell) for cell in header]
        count = Counter(names)
        if twice := sorted({cell for cell, name in zip(header, names, strict=True) if name and count[name] > 1}):
            raise DataError(f"{path}: line {1 + skipped}: columns named twice: {', '.join(twice)}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                row: dict[str | None, object] = dict(zip(header, cells, strict=False))
                yield ({None: cells} if any(cells[len(header) :]) else row), f"{path.name}:{line + skipped}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num + skipped}: not CSV: {error}") from error


def _separator(text: str, expected: str, known: Collection[str]) -> str:
    names = {same_name(name) for name in known}

    def worth(separator: str) -> tuple[int, float, bool]:
        try:
            lines = list(islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), _LOOKED_AT))
        except csv.Error:
            return 0, 0.0, False
        header, rows = lines[0] if lines else [], [cells for cells in lines[1:] if cells]
        whole = sum(len(cells) == len(header) for cells in rows) / max(len(rows), 1)
        several = len(header) > 1
        return sum(same_name(cell) in names for cell in header), whole if several else 0.0, several

    # max() takes the first of equals, so that the expected one goes before the others
    return max([expected, *(each for each in SEPARATORS if each != expected)], key=worth)
