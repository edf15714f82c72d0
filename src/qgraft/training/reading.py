"""From the name of a dataset to conversations, with every row accounted for.

A row is either kept or counted under the reason why not, with the places ("self.jsonl:17") of the first ones. A file
that is broken as a file (not UTF-8, a line that is not JSON, no rows) is an error: its rows cannot be counted. What a
row is, its own keys tell, so that one file may mix these:

    alpaca   {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["q", "a"], ...]}
    pairs    {"prompt" | "query" | "question" | "content": "...",
              "response" | "answer" | "completion" | "target" | "summary": "..."}
    sharegpt {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    OpenAI   {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The user's text of alpaca is instruction + "\\n" + input, and answers in `history` are learned too, both as in
LLaMA-Factory. Files are read with the standard library and pyarrow, not with `datasets.load_dataset`: that reports a
bad row without its line, gives all rows the keys of all, and keeps a copy of each file in a cache.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import islice
from numbers import Number
from pathlib import Path

from qgraft.errors import DataError, OptionError, near_match

Row = tuple[object, str]  # what was found, and where: "self.jsonl:17"
Turns = list[tuple[str, str]]
Fill = Mapping[str, str | None]  # what stands for "name" and "author"

BUILT_IN = {
    "identity": ("identity_en", "identity_zh"),
    "identity_heldout": ("identity_en_heldout", "identity_zh_heldout"),
    **{name: (name,) for name in ("identity_en", "identity_zh", "identity_en_heldout", "identity_zh_heldout")},
}
COLUMNS = {  # part of a row: the columns that may hold it; the first one that is filled counts
    "prompt": ("instruction", "prompt", "query", "question", "content"),
    "query": ("input", "context"),
    "response": ("output", "response", "answer", "completion", "target", "summary"),
    "history": ("history",),
    "system": ("system",),
    "messages": ("messages", "conversations"),
}
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "function_tag": "assistant", "observation_tag": "tool"}
_FOLLOWS = {"system": {""}, "user": {"", "system", "assistant"}, "assistant": {"user", "tool"}}
_FOLLOWS["tool"] = {"assistant", "tool"}
_NOT_TEXT = {"images", "videos", "audios", "chosen", "rejected", "kto_tag"}  # columns of other kinds of training
_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_SCHEMAS = (
    "rows hold instruction + output (alpaca), a prompt and a response, conversations (sharegpt) or messages (OpenAI); "
    'other column names are told with columns={"prompt": ..., "response": ...}'
)
_FILL_HINT = "give --name ... --author ..."
_PLACEHOLDER = re.compile(r"\{\{(name|author|NAME|AUTHOR)\}\}|<(NAME|AUTHOR)>|\[(NAME|AUTHOR)\]")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(\S+))?")
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold one as \ud800; no tokenizer takes it


@dataclass(frozen=True)
class Conversation:
    """(role, content) turns, roles system, user, assistant or tool, ending in an assistant turn; and their place."""

    messages: tuple[tuple[str, str], ...]
    source: str


@dataclass
class Accounting:
    """Where every row went: kept + dropped = read. Truncated ones are kept, but lost tokens at the end."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    truncated_tokens: int = 0

    def drop(self, reason: str, source: str) -> None:
        """Count one row that is not learned from."""
        if reason not in self.dropped and len(self.dropped) >= 50:  # the unknown keys of a hostile file never end
            reason = "other reasons"
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples[reason] = [*self.examples.get(reason, []), source][:3]

    def check(self) -> None:
        """Raise DataError unless every row read is either kept or dropped."""
        if self.kept + sum(self.dropped.values()) != self.read:
            raise DataError(f"rows are unaccounted for: {self.summary()}", hint="please report this fault of qgraft")

    def as_dict(self) -> dict[str, object]:
        """For the saved run: a deep copy of all fields."""
        return asdict(self)

    def reasons(self) -> str:
        """Why rows were dropped, the most frequent reason first, each with its first place."""
        order = sorted(self.dropped.items(), key=lambda item: -item[1])
        return "; ".join(f"{reason}: {count} (first {self.examples[reason][0]})" for reason, count in order)

    def summary(self) -> str:
        """One or two lines to print."""
        dropped = sum(self.dropped.values())
        text = f"read {self.read} rows, kept {self.kept}, dropped {dropped}"
        if self.truncated:
            text += f", truncated {self.truncated} (by {self.truncated_tokens} tokens in all)"
        return f"{text}\ndropped: {self.reasons()}" if dropped else text


class RowError(Exception):
    """Why one row is dropped; never leaves this module."""


@dataclass(frozen=True)
class Layout:
    """What somebody told about rows: "alpaca" or "sharegpt", the column of each part, the names of keys and roles."""

    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def find(self, row: Mapping[str, object], part: str) -> str | None:
        """The column of `row` that holds this part, or None."""
        told = self.columns.get(part)
        if told is None and "prompt" in self.columns and part in ("query", "history", "system"):
            return None  # as in LLaMA-Factory: who names the columns names all of them
        present = [key for key in ([told] if told else COLUMNS[part]) if key in row]
        if told and not present and part in ("prompt", "response", "messages"):
            raise RowError(f"no column {told!r}")
        # A table of mixed rows has all columns in each row: the present ones may be empty.
        return next((key for key in present if not _is_empty(row[key])), present[0] if present else None)

    def text(self, row: Mapping[str, object], part: str, called: str) -> str:
        """The text of this part, "" when the row has none."""
        key = self.find(row, part)
        return "" if key is None else _text(row[key], called)


@dataclass(frozen=True)
class _Item:
    """One entry of the comma list, resolved; `rows` is read lazily."""

    name: str
    rows: Iterator[Row]
    layout: Layout
    limit: int | None = None


def read_dataset(
    names: str | Sequence[Mapping[str, object]],
    dataset_dir: str | None = None,
    *,
    name: str | None = None,
    author: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
) -> tuple[list[Conversation], Accounting]:
    """Read datasets into conversations.

    Args:
        names: comma list of built-in sets, entries of `dataset_dir/dataset_info.json`, files or folders, and Hugging
            Face names "org/name[:split]", looked up in this order; or the rows themselves.
        dataset_dir: folder of dataset_info.json and of the files it names; "data" where that exists.
        name, author: what to put for {{name}}, <NAME>, [NAME] and {{author}}, <AUTHOR>, [AUTHOR].
        columns: which column holds "prompt", "query", "response", "history", "system" or "messages".
        max_samples: read only so many rows of each entry of `names`.
    """
    if unknown := [part for part in columns or {} if part not in COLUMNS]:
        raise OptionError(f"columns: {unknown[0]!r} is no part, expected {', '.join(COLUMNS)}")
    if max_samples is not None and max_samples < 1:
        raise OptionError(f"max_samples is {max_samples}, expected at least 1")
    layout, fill = Layout(columns=dict(columns or {})), {"name": name, "author": author}
    if not isinstance(names, str):
        items = [_Item("rows", ((row, f"rows:{number}") for number, row in enumerate(names, 1)), layout)]
    else:
        folder = Path(dataset_dir or "data")
        if dataset_dir and not folder.is_dir():
            raise DataError(f"dataset_dir {dataset_dir} is not a folder")
        items = [_resolve(part.strip(), folder, layout, fill) for part in names.split(",") if part.strip()]
    if not items:
        raise DataError("no dataset is named", hint=f"the built-in sets are {', '.join(BUILT_IN)}")
    accounting = Accounting()
    conversations = [found for item in items for found in _read_item(item, accounting, fill, max_samples)]
    accounting.check()
    return conversations, accounting


def _read_item(item: _Item, total: Accounting, fill: Fill, most: int | None) -> list[Conversation]:
    """The conversations of one entry; it must give some, whatever the other entries give."""
    found: list[Conversation] = []
    failed: list[tuple[str, str]] = []
    limit = min((limit for limit in (item.limit, most) if limit is not None), default=None)
    for row, source in islice(item.rows, limit):
        try:
            turns = _turns(row, item.layout)
        except RowError as error:
            failed.append((str(error), source))
        else:
            found.append(Conversation(tuple((role, _filled(text, fill, source)) for role, text in turns), source))
    counts = total if found else Accounting()
    counts.read += len(found) + len(failed)
    counts.kept += len(found)
    for reason, source in failed:
        counts.drop(reason, source)
    if not found:
        why = f"all {counts.read} rows are dropped; {counts.reasons()}" if counts.read else "holds no rows"
        raise DataError(f"{item.name}: {why}", hint=_SCHEMAS)
    return found


def _filled(text: str, fill: Fill, source: str) -> str:
    """`text` with name and author put in, in one pass: a name that looks like a placeholder stays."""

    def value(match: re.Match[str]) -> str:
        given = fill[(match[1] or match[2] or match[3]).lower()]
        if not given and match[1]:
            raise DataError(f"{source}: nothing is given to put for {match[0]}", hint=_FILL_HINT)
        return given or match[0]  # <NAME> and [NAME] also stand in anonymized text, nobody has to fill them

    return _PLACEHOLDER.sub(value, text)


# From here on: one row to turns.


def _turns(row: object, layout: Layout) -> Turns:
    if not isinstance(row, Mapping):
        raise RowError(f"row is a {type(row).__name__}, not an object")
    if None in row:
        raise RowError("more cells than the header")
    key = None if layout.formatting == "alpaca" else layout.find(row, "messages")
    if layout.formatting in ("sharegpt", "openai") or (key and not _is_empty(row[key])):
        turns = _turns_of_messages(row[key] if key else [], layout.tags)
    else:
        turns = _turns_of_pair(row, layout)
    system = layout.text(row, "system", "system")
    if system and turns[:1] and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return _checked([(role, text) for role, text in turns if role != "system" or text.strip()])


def _turns_of_pair(row: Mapping[str, object], layout: Layout) -> Turns:
    if not any(layout.find(row, part) for part in ("prompt", "query", "response")):
        raise RowError(f"unknown keys: {', '.join(sorted(str(key)[:40] for key in row)[:6]) or 'none'}")
    asked = [layout.text(row, part, "question") for part in ("prompt", "query")]
    key = layout.find(row, "history")
    turns: Turns = []
    for pair in _list(row[key], "history") if key else []:
        said = _list(pair, "history entry")
        if len(said) != 2:
            raise RowError("history is not a list of [question, answer]")
        turns += [("user", _text(said[0], "history question")), ("assistant", _text(said[1], "history answer"))]
    turns.append(("user", "\n".join(text for text in asked if text.strip())))
    return [*turns, ("assistant", layout.text(row, "response", "answer"))]


def _turns_of_messages(messages: object, tags: Mapping[str, str]) -> Turns:
    roles = _ROLES | {tags[tag]: role for tag, role in {**_TAGS, "system_tag": "system"}.items() if tag in tags}
    turns = []
    for message in _list(messages, "messages"):
        if not isinstance(message, Mapping):
            raise RowError(f"message is a {type(message).__name__}, not an object")
        role = message.get(tags.get("role_tag") or ("from" if "from" in message else "role"))
        content = message.get(tags.get("content_tag") or ("value" if "value" in message else "content"))
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"unknown role {str(role)[:40]!r}")
        if _is_empty(content) and message.get("tool_calls"):
            raise RowError("tool_calls without content are not read")
        parts = content if isinstance(content, list) else [content]
        turns.append((roles[role], "".join(_part(part) for part in parts)))
    return turns


def _part(part: object) -> str:
    """Text of one part of a content: a string or {"type": "text", "text": "..."}."""
    if isinstance(part, Mapping) and part.get("type", "text") != "text":
        raise RowError(f"content of type {str(part.get('type'))[:40]!r}")
    return _text(part.get("text") if isinstance(part, Mapping) else part, "content")


def _checked(turns: Turns) -> Turns:
    before = ""
    for role, text in turns:
        if before not in _FOLLOWS[role]:
            raise RowError(f"roles do not alternate: {role} after {before or 'the start'}")
        if role != "tool" and not text.strip():
            raise RowError("no answer" if role == "assistant" else "empty question")
        before = role
    if before != "assistant":
        raise RowError("does not end in an assistant turn" if turns else "no messages")
    return turns


def _is_empty(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN (as tables write it, never equal to itself) or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Number) and value != value)


def _text(value: object, called: str) -> str:
    if value is not None and not isinstance(value, (str, Number)):
        raise RowError(f"{called} is a {type(value).__name__}")
    text = "" if _is_empty(value) else str(value)
    if _HALF_PAIR.search(text):
        raise RowError(f"{called} holds half a surrogate pair")
    return text


def _list(value: object, called: str) -> Sequence[object]:
    if not isinstance(value, (list, tuple)) and not _is_empty(value):
        raise RowError(f"{called} is a {type(value).__name__}, not a list")
    return value if isinstance(value, (list, tuple)) else []


# From here on: files to rows.


def _file_rows(path: Path) -> Iterator[Row]:
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _text_rows(_read_text(path), path)
    found = None
    for found in rows:
        yield found
    if found is None:
        raise DataError(f"{path} holds no rows")


def _text_rows(text: str, path: Path) -> Iterator[Row]:
    if not text.strip():
        raise DataError(f"{path} is empty")
    return {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}[path.suffix](text, path)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"byte {error.start}, line {data.count(10, 0, error.start) + 1}"
        raise DataError(f"{path}: {where}: not UTF-8: {error.reason}", hint="save the file as UTF-8") from error


def _loads(text: str, path: Path, line: int = 1) -> object:
    """JSON text that begins at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        hint = "each line of a .jsonl file is one object" if path.suffix == ".jsonl" else None
        raise DataError(f"{path}: {where}: not JSON: {error.msg}", hint=hint) from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5000 digits
        raise DataError(f"{path}: line {line}: not JSON: {error}") from error


def _jsonl_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside a string
        if line.strip():
            yield _loads(line, path, number), f"{path.name}:{number}"


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    try:
        value = _loads(text, path)
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
    """Rows of valid JSON text that is a list, decoded one by one: that tells the line of each."""
    decoder, line, seen = json.JSONDecoder(), 1, 0
    start = text.index("[") + 1
    while start := next((at for at in range(start, len(text)) if text[at] not in " \t\r\n,"), 0):
        if text[start] == "]":
            return
        line, seen = line + text.count("\n", seen, start), start
        row, start = decoder.raw_decode(text, start)
        yield row, f"{path.name}:{line}"


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    # Not strict, the csv module lets an open quote swallow all rows after it in silence.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader)]
        if not any(header):
            raise DataError(f"{path}: line 1 must name the columns", hint=_SCHEMAS)
        if twice := sorted({cell for cell in header if header.count(cell) > 1}):
            raise DataError(f"{path}: line 1: columns named twice: {twice}")
        line = reader.line_num + 1
        for cells in reader:
            row = dict(zip(header, [None if c in ("NaN", "nan", "None") else c for c in cells], strict=False))
            if cells:
                yield ({None: cells} if any(cells[len(header) :]) else row), f"{path.name}:{line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet is read with pyarrow: {error}", hint="pip install datasets") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path.name}:{number}"
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read after row {number}: {error}") from error


# From here on: names to files.


def _resolve(name: str, folder: Path, layout: Layout, fill: Fill) -> _Item:
    if name in BUILT_IN:
        if not fill["name"] or not fill["author"]:
            raise DataError(f"{name} needs the name of the model and of its author", hint=_FILL_HINT)
        return _Item(name, _built_in_rows(name), Layout())
    info_path = folder / "dataset_info.json"
    info = _loads(_read_text(info_path), info_path) if info_path.is_file() else {}
    if not isinstance(info, dict):
        raise DataError(f"{info_path}: expected an object, got a {type(info).__name__}")
    if name in info:
        return _info_item(name, info[name], folder, layout)
    for path in (Path(name).expanduser(), folder / name):
        if path.exists():
            return _Item(name, _path_rows(path), layout)
    nearby = [*Path(name).parent.glob("*"), *folder.glob("*")]
    known = [*BUILT_IN, *sorted(info), *sorted({str(path) for path in nearby if path.suffix in _SUFFIXES})]
    hint = near_match(name, known) or f"there are {', '.join(known[:20])}"
    hub = _HUB_NAME.fullmatch(name)
    if hub and Path(name).suffix not in _SUFFIXES:
        return _Item(name, _hub_rows(hub[1], hint, split=hub[2]), layout)
    raise DataError(f"{name}: no built-in set, no entry of {info_path}, no file or folder", hint=hint)


def _built_in_rows(name: str) -> Iterator[Row]:
    for part in BUILT_IN[name]:
        with resources.as_file(resources.files("qgraft.training") / "examples" / f"{part}.jsonl") as path:
            yield from _file_rows(path)


def _path_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, or of all files of a folder in the order of their names."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.name != "dataset_info.json")
    if not files or files[0].suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(_SUFFIXES)} file or a folder of such files")
    for file in files:
        yield from _file_rows(file)


def _info_item(name: str, entry: object, folder: Path, layout: Layout) -> _Item:
    """What an entry of LLaMA-Factory's dataset_info.json stands for."""
    where = f"{folder / 'dataset_info.json'}: {name}"
    told = entry if isinstance(entry, dict) else {}
    formatting, columns, tags = told.get("formatting"), told.get("columns", {}), told.get("tags", {})
    if not all(isinstance(part, dict) for part in (entry, columns, tags)):
        raise DataError(f"{where}: the entry, its columns and its tags must be objects")
    if told.get("ranking") or _NOT_TEXT & columns.keys():
        raise DataError(f"{where}: holds preferences or images; qgraft learns answers in text only")
    if formatting not in (None, "alpaca", "sharegpt", "openai"):
        raise DataError(f"{where}: formatting is {formatting!r}, expected alpaca or sharegpt")
    layout = Layout(formatting, columns, tags) if columns else Layout(formatting, layout.columns, tags)
    limit = told.get("num_samples")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError(f"{where}: num_samples is {limit!r}, expected a number above 0")
    if isinstance(file_name := told.get("file_name"), str):
        return _Item(name, _path_rows(folder / file_name), layout, limit)
    if isinstance(hub := told.get("hf_hub_url"), str):
        places = {"name": told.get("subset"), "split": told.get("split"), "data_dir": told.get("folder")}
        return _Item(name, _hub_rows(hub, f"see {where}", **places), layout, limit)
    raise DataError(f"{where}: names no file_name and no hf_hub_url (scripts and other hubs are not read)")


def _hub_rows(hub: str, hint: str, **places: str | None) -> Iterator[Row]:
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
    for number, row in enumerate(rows, 1):
        yield row, f"{hub}:{number}"
