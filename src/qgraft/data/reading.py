"""From the name of a dataset to conversations, with every row accounted for.

A row is either kept or counted under the reason why not, with the places ("self.jsonl:17") of the first ones. A file
that is broken as a file (not UTF-8, a line that is not JSON, no rows) is an error: its rows cannot be counted. What a
row is, its own keys tell, so that one file may mix these:

    alpaca   {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["q", "a"], ...]}
    pairs    {"prompt" | "query" | "question" | "content": "...",
              "response" | "answer" | "completion" | "target" | "summary": "..."}
    sharegpt {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "images": [...]}
    OpenAI   {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}

The user's text of alpaca is instruction + "\\n" + input, and answers in `history` are learned too, both as in
LLaMA-Factory.   names -> files: this file   files -> rows: files.py   row -> messages: rows.py
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, cast

from qgraft.data.calls import RowError
from qgraft.data.files import check_suffix, file_rows, given_rows, hub_rows, names_rows, noting_absent, read_json
from qgraft.data.labelled import labelled_rows, read_labelled, read_tagged
from qgraft.data.messages import Conversation
from qgraft.data.preferences import PREFERENCES, read_judged, read_pair
from qgraft.data.rows import COLUMNS, Read, RowLayout, column_flags, read_row, schemas, with_images
from qgraft.data.spoken import SPOKEN, read_spoken
from qgraft.data.tables import Row
from qgraft.errors import DataError, OptionError, near_match, option
from qgraft.given import described

Dataset = str | os.PathLike[str] | Sequence[Mapping[str, object]]  # as_dataset takes tables, too
Fill = Mapping[str, str | None]  # what stands for "name" and "author"
Reader = Callable[[object, RowLayout], Sequence[Read]]  # from a row to its conversations

BUILT_IN = {
    "identity": ("identity_en", "identity_zh"),
    "identity_heldout": ("identity_en_heldout", "identity_zh_heldout"),
    **{name: (name,) for name in ("identity_en", "identity_zh", "identity_en_heldout", "identity_zh_heldout")},
}
_NOT_READ = {"videos", "audios"}  # columns of other kinds of training
_TOLD_BY = {"kto_tag": "label"}  # LLaMA-Factory's name of a part of a row
_PLACEHOLDER = re.compile(r"\{\{(name|author|NAME|AUTHOR)\}\}|<(NAME|AUTHOR)>|\[(NAME|AUTHOR)\]")
_HUB_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # the oldest datasets have no organisation
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(\S+))?")


@dataclass
class Accounting:
    """Where every row went: kept + dropped = read. Truncated ones are kept, but lost tokens at the end.

    `ignored` counts the rows that have a key without effect; `notes` are sentences about the rows that were kept; `sha256`
    is of what the conversations say, wherever they were read from.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    truncated_tokens: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sha256: str = ""

    def drop(self, reason: str, source: str) -> None:
        """Count one row that is not learned from."""
        if reason not in self.dropped and len(self.dropped) >= 50:  # the unknown keys of a hostile file never end
            reason = "other reasons"
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples[reason] = [*self.examples.get(reason, []), source][:3]

    def ignore(self, keys: Iterable[str]) -> None:
        """Count keys of one row that change nothing."""
        for key in keys:
            if key in self.ignored or len(self.ignored) < 50:
                self.ignored[key] = self.ignored.get(key, 0) + 1

    def said(self) -> list[str]:
        """What a reader of the run should know: `notes`, and the keys without effect."""
        keys = ", ".join(f"{key} ({count})" for key, count in self.ignored.items())
        return [*self.notes, *([f"keys of rows that have no effect: {keys}"] if keys else [])]

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
        """One or two lines to print; `said` has more to tell."""
        dropped = sum(self.dropped.values())
        text = f"read {self.read} rows, kept {self.kept}, dropped {dropped}"
        if self.truncated:
            text += f", truncated {self.truncated} (by {self.truncated_tokens} tokens in all)"
        return f"{text}\ndropped: {self.reasons()}" if dropped else text


@dataclass(frozen=True)
class _Item:
    """One entry of the comma list, resolved; `rows` is read lazily."""

    name: str
    rows: Iterator[Row]
    layout: RowLayout
    limit: int | None = None
    notes: list[str] = field(default_factory=list)  # of its files, once they are read
    home: Path | None = None  # the folder of its files


def named_columns(options: Mapping[str, Any]) -> dict[str, str] | None:
    """`columns` for read_dataset from the options prompt_column, response_column ...; None without any."""
    named = {part: options.get(f"{part}_column") for part in ("prompt", "response", "history", "label")}
    return {part: column for part, column in named.items() if column} or None


def read_dataset(
    names: Dataset,
    dataset_dir: str | None = None,
    *,
    name: str | None = None,
    author: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    allow_outside_files: bool = False,
    images: bool = False,
) -> tuple[list[Conversation], Accounting]:
    """Read datasets into conversations.

    Args:
        names: comma list of entries of `dataset_dir/dataset_info.json`, built-in sets, files or folders, and Hugging Face
            names "org/name[:split]", looked up in this order; or one path; or the rows themselves.
        dataset_dir: folder of dataset_info.json and of the files it names; "data" where that exists.
        name, author: what to put for {{name}}, <NAME>, [NAME] and {{author}}, <AUTHOR>, [AUTHOR].
        columns: which column holds "prompt", "query", "response", "history", "system", "tools" or "messages"; of
            preferences also "chosen", "rejected" and "label".
        max_samples, images: read only so many rows of each entry of `names`; whether any may hold images.
        allow_outside_files: whether dataset_info.json may name files outside of its folder. It often comes with somebody
            else's data, and a line of it would otherwise make any file of the machine the rows that are learned.
    """
    found, accounting = read_rows(
        _answered, names, dataset_dir, name=name, author=author, columns=columns, max_samples=max_samples,
        allow_outside_files=allow_outside_files, images=images,
    )  # fmt: skip
    return [conversation for (conversation,) in found], accounting


def read_preferences(
    names: Dataset, dataset_dir: str | None = None, *, labelled: bool = False, **reading: Any
) -> tuple[list[tuple[Conversation, ...]], Accounting]:
    """The same of rows of preferences: (chosen, rejected) of each; or, `labelled`, (answer,) with Conversation.desirable."""
    return read_rows(read_judged if labelled else read_pair, names, dataset_dir, **reading)


def read_labels(
    names: Dataset, dataset_dir: str | None = None, *, tokens: bool = False, **reading: Any
) -> tuple[list[Conversation], Accounting]:
    """The same of labelled texts; with `tokens` of words with a label each (labelled.py)."""
    found, accounting = read_rows(read_tagged if tokens else read_labelled, names, dataset_dir, **reading)
    return [conversation for (conversation,) in found], accounting


def _answered(row: object, layout: RowLayout) -> Sequence[Read]:
    return [read_row(row, layout)]


def read_rows(
    reader: Reader,
    names: Dataset,
    dataset_dir: str | None,
    *,
    name: str | None = None,
    author: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    allow_outside_files: bool = False,
    images: bool = False,
) -> tuple[list[tuple[Conversation, ...]], Accounting]:
    """See read_dataset(); `reader` says what a row is."""
    if unknown := [part for part in columns or {} if part not in COLUMNS]:
        raise OptionError(f"columns: {unknown[0]!r} is no part, expected {', '.join(COLUMNS)}")
    if max_samples is not None and max_samples < 1:
        raise OptionError(f"max_samples is {max_samples}, expected at least 1")
    names = as_dataset(names)
    layout, fill = RowLayout(columns=dict(columns or {})), {"name": name, "author": author}
    if not isinstance(names, str):
        items = [_Item("rows", ((row, f"rows:{number}") for number, row in enumerate(given_rows(names), 1)), layout)]
    else:
        folder = Path(dataset_dir or "data")
        if dataset_dir and not folder.is_dir():
            raise DataError(f"dataset_dir {dataset_dir} is not a folder")
        wanted = [part.strip() for part in names.split(",") if part.strip()]
        items = [_resolve(part, folder, layout, fill, allow_outside_files) for part in wanted]
    if not items:
        raise DataError("no dataset is named", hint=f"the built-in sets are {', '.join(BUILT_IN)}")
    accounting, seen = Accounting(), allow_outside_files if images else None
    rows = [found for item in items for found in _read_item(item, accounting, fill, max_samples, reader, seen)]
    accounting.check()
    accounting.sha256 = _sha256(conversation for row in rows for conversation in row)
    return rows, accounting


def _sha256(conversations: Iterable[Conversation]) -> str:
    digest = hashlib.sha256()
    for each in conversations:
        turns = [(m.role, m.content, m.reasoning, [(c.name, c.arguments, c.id) for c in m.calls], m.call_id, m.name, m.weight)
                 for m in each.messages]  # fmt: skip
        judged = [said for said in (each.desirable, each.label) if said is not None]
        judged += [image.said for message in each.messages for image in message.images]
        digest.update(json.dumps([turns, each.tools, *judged]).encode() + b"\n")
    return digest.hexdigest()


def as_dataset(given: Any) -> str | Sequence[Mapping[str, object]]:
    """What was given for a dataset as names or as rows: a path is a name, a table of pandas its rows.

    What is missing there is NaN; in a row it is None, or a column that only some rows have would be text of nothing else.

    Raises DataError for what is neither.
    """
    given = os.fspath(given) if isinstance(given, os.PathLike) else given
    if isinstance(given, str):
        return given
    if all(hasattr(given, name) for name in ("columns", "notna", "to_dict")):
        table = given.astype(object)
        rows: list[Mapping[str, object]] = table.where(table.notna(), None).to_dict("records")
        return rows
    if isinstance(given, Mapping) and given and all(hasattr(part, "column_names") for part in given.values()):
        raise DataError(
            f"dataset: got several, {', '.join(map(str, given))}", hint=f"give one: dataset[{next(iter(given))!r}]"
        )
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        hint = "a row stands in a list: [row]" if isinstance(given, Mapping) else None
        raise DataError(f"dataset: got {described(given)}, expected names of files, or a list of rows", hint=hint)
    return cast(Sequence[Mapping[str, object]], given)


def _read_item(
    item: _Item, total: Accounting, fill: Fill, most: int | None, reader: Reader, seen: bool | None
) -> list[tuple[Conversation, ...]]:
    """The conversations of each row of one entry, which must give some; `seen`: see with_images."""
    found, failed = list[tuple[Conversation, ...]](), list[tuple[str, str]]()
    unread: object = None
    limit = min((limit for limit in (item.limit, most) if limit is not None), default=None)
    for row, source in noting_absent(islice(item.rows, limit), item.layout.columns, item.notes):
        try:
            given = with_images(reader(row, item.layout), row, item.layout, item.home, seen)
        except RowError as error:
            failed.append((str(error), source))
            unread = row
        else:
            found.append(tuple(_filled_in(each, fill, source) for each in given))
            total.ignore(given[0].ignored)
    counts = total if found else Accounting()
    counts.read += len(found) + len(failed)
    counts.kept += len(found)
    for reason, source in failed:
        counts.drop(reason, source)
    if not found:
        why = f"all {counts.read} rows are dropped; {counts.reasons()}" if counts.read else "holds no rows"
        hints: dict[Reader, str] = {_answered: schemas(), read_spoken: SPOKEN}
        hints |= {read_judged: PREFERENCES, read_pair: PREFERENCES}
        one = reader in (_answered, read_judged)  # of others no column is the answer
        told = column_flags(unread, item.layout) if one else None
        raise DataError(f"{item.name}: {why}", hint=told or hints.get(reader) or labelled_rows())
    total.notes += item.notes
    return found


def _filled_in(read: Read, fill: Fill, source: str) -> Conversation:
    """A conversation with name and author put in."""
    messages = (replace(each, content=_filled(each.content, fill, source),
                        reasoning=_filled(each.reasoning, fill, source)) for each in read.messages)  # fmt: skip
    return Conversation(tuple(messages), source, read.tools, read.desirable, read.label)


def _filled(text: str, fill: Fill, source: str) -> str:
    """`text` with name and author put in, in one pass: a name that looks like a placeholder stays."""

    def value(match: re.Match[str]) -> str:
        given = fill[(match[1] or match[2] or match[3]).lower()]
        if not given and match[1]:
            raise DataError(f"{source}: nothing is given to put for {match[0]}", hint=_fill_hint())
        return given or match[0]  # <NAME> and [NAME] also stand in anonymized text, nobody has to fill them

    return _PLACEHOLDER.sub(value, text)


def _fill_hint() -> str:
    return f"give {option('name', 'Tulip')} and {option('author', 'Ada')}"


def _resolve(name: str, folder: Path, layout: RowLayout, fill: Fill, outside: bool) -> _Item:
    info_path = folder / "dataset_info.json"
    info = read_json(info_path) if info_path.is_file() else {}
    if not isinstance(info, dict):
        raise DataError(f"{info_path}: expected an object, got a {type(info).__name__}")
    if name in info:
        return _info_item(name, info[name], folder, layout, outside)
    if name in BUILT_IN:
        if not fill["name"] or not fill["author"]:
            raise DataError(f"{name} needs the name of the model and of its author", hint=_fill_hint())
        return _Item(name, _built_in_rows(name), RowLayout())
    for path in (Path(name).expanduser(), folder / name):
        if path.exists():
            return _path_item(name, path, layout)
    nearby = [*Path(name).parent.glob("*"), *folder.glob("*")]
    known = [*BUILT_IN, *sorted(info), *sorted({str(path) for path in nearby if names_rows(path)})]
    hint = near_match(name, known) or f"there are {', '.join(known[:20])}"
    hub = _HUB_NAME.fullmatch(name)
    if hub and not names_rows(Path(name)):
        return _Item(name, hub_rows(hub[1], hint, split=hub[2]), layout)
    raise DataError(f"{name}: no built-in set, no entry of {info_path}, no file or folder", hint=hint)


def _built_in_rows(name: str) -> Iterator[Row]:
    for part in BUILT_IN[name]:
        with resources.as_file(resources.files("qgraft.data") / "examples" / f"{part}.jsonl") as path:
            yield from file_rows(path, [])


def _path_item(name: str, path: Path, layout: RowLayout, limit: int | None = None) -> _Item:
    """A file, or all files of a folder in the order of their names."""
    files = _files_at(path)
    for file in files or [path]:
        check_suffix(file)
    notes: list[str] = []
    home = path if path.is_dir() else path.parent
    return _Item(name, (row for file in files for row in file_rows(file, notes)), layout, limit, notes, home)


def _files_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if names_rows(file) and file.name != "dataset_info.json")


def _check_inside(where: str, folder: Path, path: Path) -> None:
    """Raise DataError unless the file, or all files of the folder, at `path` lie in `folder`, links followed."""
    home = folder.resolve()
    try:
        outside = [file for file in (path, *_files_at(path)) if not file.resolve().is_relative_to(home)]
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero in it, links in a circle
        raise DataError(f"{where}: {str(path)[:200]!r} is no file: {error}") from error
    if outside:
        raise DataError(
            f"{where}: {outside[0]} lies outside of {folder}",
            hint=f"name the file itself as the dataset, or trust dataset_info.json with {option('allow_outside_files')}",
        )


def _info_item(name: str, entry: object, folder: Path, layout: RowLayout, outside: bool) -> _Item:
    """What an entry of LLaMA-Factory's dataset_info.json stands for."""
    where = f"{folder / 'dataset_info.json'}: {name}"
    told = entry if isinstance(entry, dict) else {}
    formatting, columns, tags = told.get("formatting"), told.get("columns", {}), told.get("tags", {})
    if not all(isinstance(part, dict) for part in (entry, columns, tags)):
        raise DataError(f"{where}: the entry, its columns and its tags must be objects")
    if _NOT_READ & columns.keys():
        raise DataError(f"{where}: holds video or sound beside texts; for Whisper name the recording as prompt")
    columns = {_TOLD_BY.get(part, part): column for part, column in columns.items()}
    if formatting not in (None, "alpaca", "sharegpt", "openai"):
        raise DataError(f"{where}: formatting is {formatting!r}, expected alpaca or sharegpt")
    layout = RowLayout(formatting, columns, tags) if columns else RowLayout(formatting, layout.columns, tags)
    limit = told.get("num_samples")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError(f"{where}: num_samples is {limit!r}, expected a number above 0")
    if isinstance(file_name := told.get("file_name"), str):
        if not outside:
            _check_inside(where, folder, folder / file_name)
        return _path_item(name, folder / file_name, layout, limit)
    if isinstance(hub := told.get("hf_hub_url"), str):
        places = {"name": told.get("subset"), "split": told.get("split"), "data_dir": told.get("folder")}
        if odd := [part for part in places.values() if not isinstance(part, str | None)]:
            raise DataError(f"{where}: got {odd[0]!r}, expected text for subset, split and folder")
        if not _HUB_DATASET.fullmatch(hub):
            raise DataError(f"{where}: hf_hub_url is {hub[:200]!r}, expected the name of a dataset, as in org/name")
        if not outside and Path(hub).exists():  # `datasets` would take it for the one that is meant
            raise DataError(
                f"{where}: hf_hub_url {hub} is a folder here",
                hint=f"name the folder itself as the dataset, or give {option('allow_outside_files')}",
            )
        return _Item(name, hub_rows(hub, f"see {where}", **places), layout, limit)
    raise DataError(f"{where}: names no file_name and no hf_hub_url (scripts and other hubs are not read)")
