"""From a file to rows, each with its place ("self.jsonl:17").

A file that is broken as a file (not UTF-8, a line that is not JSON, no rows) is an error: its rows cannot be counted.
Files are read with the standard library and pyarrow, not with `datasets.load_dataset`: that reports a bad row without
its line, gives all rows the keys of all, and keeps a copy of each file in a cache.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from qgraft.data.rows import COLUMNS, column_called
from qgraft.data.tables import Row, table_rows
from qgraft.errors import DataError
from qgraft.json_files import parse_json

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
_MAY_LACK = ("query", "history", "system", "tools", "images")  # parts of a row; others are missed at once
_SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
_SAVE_AS = 'open it and save it as "CSV UTF-8", with the names of the columns in the first line'
_ENCODINGS = (("UTF-16", (b"\xff\xfe", b"\xfe\xff")), ("a zip archive, such as an .xlsx", (b"PK\x03\x04",)))
_COMPRESSED = {  # suffix -> what unpacks it
    ".gz": "gunzip -k", ".zst": "unzstd", ".xz": "unxz -k", ".bz2": "bunzip2 -k", ".zip": "unzip", ".tgz": "tar xzf",
}  # fmt: skip
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ": ".xz", b"BZh": ".bz2"}


def file_rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of a .json, .jsonl, .csv, .tsv or .parquet file; DataError for a broken file or one without rows.

    `notes` gets what a reader should know about how the file was read.
    """
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _text_rows(read_text(path), path, notes)
    found = None
    for found in rows:
        yield found
    if found is None:
        raise DataError(f"{path} holds no rows")


def noting_absent(rows: Iterable[Row], columns: Mapping[str, str], notes: list[str]) -> Iterator[Row]:
    """The rows; behind the last one `notes` gets the columns named for parts that rows may lack, and that none has."""
    absent = {part: column for part, column in columns.items() if part in _MAY_LACK}
    for row, source in rows:
        if absent and isinstance(row, Mapping):
            absent = {part: column for part, column in absent.items() if column_called(row, column) is None}
        yield row, source
    notes += [f"no row has the column {column!r}, which is named for {part}" for part, column in absent.items()]


def names_rows(path: Path) -> bool:
    """Whether a file is called as those are that hold rows."""
    return path.suffix.lower() in SUFFIXES


def check_suffix(path: Path) -> None:
    """Raise DataError for a file whose name says that it holds no rows that are read here."""
    suffix = path.suffix.lower()
    if suffix in _SHEETS:
        raise DataError(f"{path}: a spreadsheet, expected text", hint=_SAVE_AS)
    if suffix in _COMPRESSED:
        raise DataError(
            f"{path}: a compressed file, expected rows", hint=f"unpack it: {_COMPRESSED[suffix]} {path.name}"
        )
    if not names_rows(path):
        lines = "call it .jsonl: that is what .ndjson is" if suffix == ".ndjson" else None
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES)} file or a folder of such files", hint=lines)


def _text_rows(text: str, path: Path, notes: list[str]) -> Iterator[Row]:
    if not text.strip():
        raise DataError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return table_rows(text, path, list(chain.from_iterable(COLUMNS.values())), notes)
    return {".json": _json_rows, ".jsonl": _jsonl_rows}[suffix](text, path)


def read_text(path: Path) -> str:
    """UTF-8 text without a byte order mark; DataError names the place of what is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"byte {error.start}, line {data.count(10, 0, error.start) + 1}"
        raise DataError(f"{path}: {where}: not UTF-8: {error.reason}", hint=_encoding_hint(data, path)) from error


def _encoding_hint(data: bytes, path: Path) -> str:
    """What the file seems to be instead, and how to make UTF-8 of it."""
    if suffix := next((suffix for start, suffix in _PACKED.items() if data.startswith(start)), None):
        return f"it is compressed: call it {path.name}{suffix} and unpack it with {_COMPRESSED[suffix]}"
    for name, starts in _ENCODINGS:
        if data.startswith(starts):
            return (
                f"it is {name}: {_SAVE_AS}"
                if path.suffix.lower() in (".csv", ".tsv")
                else f"it is {name}: save it as UTF-8"
            )
    guess = "CP1252"  # of Windows in Western Europe: any text is readable in it, if not always right
    try:
        chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in data.decode("gb18030"))
        guess = "GB18030" if chinese > 2 else guess
    except UnicodeDecodeError:
        pass
    again = f"iconv -f {guess} -t UTF-8 {path.name} > utf8{path.suffix}"
    return f"save the file as UTF-8; it may be {guess}, as spreadsheets on Windows write it: {again}"


def load_json(text: str, path: Path, line: int = 1) -> object:
    """JSON text that begins at `line` of the file."""
    try:
        return parse_json(text, finite=False)  # NaN in some column that nobody asks for is no fault
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        hint = "each line of a .jsonl file is one object" if path.suffix.lower() == ".jsonl" else None
        raise DataError(f"{path}: {where}: not JSON: {error.msg}", hint=hint) from error
    except ValueError as error:  # nested too deep, a key twice, a number of 5000 digits
        raise DataError(f"{path}: line {line}: not JSON: {error}") from error


def read_json(path: Path) -> object:
    """What a file of JSON holds."""
    return load_json(read_text(path), path)


def _jsonl_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside a string
        if line.strip():
            yield load_json(line, path, number), f"{path.name}:{number}"


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    try:
        value = load_json(text, path)
    except DataError as error:
        if "Extra data" in error.message and text.lstrip().startswith("{"):
            return _jsonl_rows(text, path)  # JSON lines under this name are common: AdvertiseGen/train.json
        raise
    if isinstance(value, list):
        return _list_rows(text, path)
    if isinstance(value, dict):
        if value.keys() & {*COLUMNS["messages"], *COLUMNS["response"]}:
            return iter([(value, f"{path.name}:1")])  # a single row
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1:
            return ((row, f"{path.name}[{index}]") for index, row in enumerate(lists[0]))
    raise DataError(f"{path}: expected a list of rows or an object with one list, got {text.strip()[:60]!r}")


def _list_rows(text: str, path: Path) -> Iterator[Row]:
    """Rows of valid JSON text that is a list, decoded one by one: that tells the line of each.

    One that does not begin its line has its number in the list behind it: what held a row out knows it by its name.
    """
    decoder, line, seen, number, taken = json.JSONDecoder(), 1, 0, 0, 0
    start = text.index("[") + 1
    while start := next((at for at in range(start, len(text)) if text[at] not in " \t\r\n,"), 0):
        if text[start] == "]":
            return
        line, seen = line + text.count("\n", seen, start), start
        row, start = decoder.raw_decode(text, start)
        yield row, f"{path.name}:{line}" + (f"[{number}]" if line == taken else "")
        number, taken = number + 1, line


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet is read with pyarrow: {error}", hint="pip install datasets") from error
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if twice := [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]:
            raise DataError(f"{path}: columns named twice: {', '.join(twice)}")
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield {field.name: _of_arrow(row[field.name], field) for field in batch.schema}, f"{path.name}:{number}"
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
    ) as error:  # ValueError: JSON that is none, text that is no UTF-8
        raise DataError(f"{path}: cannot be read after row {number}: {error}") from error


def _of_arrow(value: Any, field: Any) -> Any:
    """A value of Arrow's as the row meant it: JSON read, and without the keys that only rows beside it have.

    An object of a table has the keys of all objects in its column, null where it has none of its own. So a tool would get
    the parameters of all others, and a call their arguments.
    """
    kind, inner = field.type, getattr(field.type, "value_field", None)
    told = getattr(kind, "extension_name", "") or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if told == "arrow.json" and isinstance(value, str):
        return parse_json(value, finite=False)
    if isinstance(value, dict):
        return {each.name: _of_arrow(value[each.name], each) for each in kind if value[each.name] is not None}
    return [_of_arrow(each, inner) for each in value] if isinstance(value, list) and inner is not None else value


def given_rows(rows: Any) -> Iterator[Any]:
    """Rows in memory; those of the package `datasets` without the keys that only rows beside them have, see _of_arrow."""
    features = getattr(rows, "features", None) or {}
    for row in rows:
        yield {key: _of_feature(row[key], features.get(key)) for key in row} if features else row


def _of_feature(value: Any, feature: Any) -> Any:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _of_feature(each, feature.get(key)) for key, each in value.items() if each is not None}
    return [_of_feature(each, inner) for each in value] if isinstance(value, list) and inner is not None else value


def hub_rows(hub: str, hint: str, **places: str | None) -> Iterator[Row]:
    """Rows of a dataset on the Hugging Face Hub, from its cache where there is no network."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{hub}: no such file, and the Hub needs datasets", hint="pip install datasets") from error
    try:
        rows = datasets.load_dataset(hub, **{**places, "split": places.get("split") or "train"})
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        offline = "no connection to the Hub" if isinstance(error, ConnectionError) else "the Hub gives none"
        raise DataError(f"{hub}: no such file here, and {offline} ({error})", hint=hint) from error
    for number, row in enumerate(given_rows(undecoded(rows)), 1):
        yield row, f"{hub}:{number}"


def undecoded(rows: Any) -> Any:
    """Rows of the package `datasets` with recordings as the bytes of their files: to decode them it needs torchcodec."""
    for column, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ == "Audio" and type(feature).__module__.startswith("datasets."):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows
