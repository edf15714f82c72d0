"""Models in several GGUF files, as llama-gguf-split writes them: NAME-00001-of-00003.gguf and those after it.

Each part is a GGUF file of its own with some of the tensors. Its keys say which one it is:

    split.no              its place, from 0; the name counts from 1
    split.count           how many there are
    split.tensors.count   tensors of all parts together

The first part holds all other keys, and may hold no tensors. Whatever part is given, all of them are read, from the same
folder. What does not fit is listed, all of it at once: parts that are missing, that carry another number than their name
says, or that belong to another model. Two models whose parts have the same names, counts and tensors, as the same weights
in two formats, cannot be told apart by what the files hold.

Source: `llama_split_path` and `LLM_KV_SPLIT_*` in llama.cpp's src/llama.cpp and src/llama-arch.cpp.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qgraft.checkpoints.gguf_file import GgufFile, read_gguf
from qgraft.errors import CheckpointError

COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"
MOST_NAMED = 8  # in a message
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_model(path: str | Path) -> GgufFile:
    """As read_gguf, but of a model in several files all of them: `parts` are its files, `tensors` those of all.

    Raises what read_gguf does, and CheckpointError for parts that are missing or do not belong together.
    """
    file = read_gguf(path)
    count = file.metadata.get(COUNT, 1)
    if count < 2:
        return file
    paths = part_paths(file.path, count)
    if missing := [each.name for each in paths if not each.is_file()]:
        raise CheckpointError(
            f"{file.path}: one of {count} files, of which {len(missing)} are missing in its folder: {_some(missing)}",
            hint="put all parts, under the names that they were published with, into one folder",
        )
    parts = [read_gguf(each) for each in paths]
    if problems := _problems(parts):
        listed = "\n  ".join(problems[:MOST_NAMED])
        raise CheckpointError(f"{file.path}: its {count} files are not the parts of one model:\n  {listed}")
    tensors = {name: info for part in parts for name, info in part.tensors.items()}
    return replace(parts[0], tensors=tensors, parts=tuple(parts))


def part_paths(path: Path, count: int) -> list[Path]:
    """The files of a model in `count` files, of which `path` is one or the name that their names begin with."""
    if count < 2:
        return [path]
    found = _NAME.fullmatch(path.name)
    stem = found["stem"] if found else path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]


def part_names(name: str) -> list[str]:
    """The names of all parts of a file with a name like theirs; of any other file its own."""
    found = _NAME.fullmatch(name)
    return [path.as_posix() for path in part_paths(Path(name), int(found["count"]))] if found else [name]


def _problems(parts: Sequence[GgufFile]) -> list[str]:
    first, problems = parts[0].metadata, []
    for number, part in enumerate(parts):
        expected = {NUMBER: number, COUNT: len(parts), TENSORS: first.get(TENSORS)}
        for key, value in expected.items():
            if (got := part.metadata.get(key)) != value or got is None:
                problems.append(f"{part.path.name}: key {key!r}: got {got}, expected {value}")
        for key in part.metadata.keys() & first.keys() - expected.keys():
            if part.metadata[key] != first[key]:
                problems.append(f"{part.path.name}: key {key!r} differs from that of the first part")
    counts = Counter(name for part in parts for name in part.tensors)
    if twice := [name for name, number in counts.items() if number > 1]:
        problems.append(f"{len(twice)} tensors are in several parts: {_some(twice)}")
    if len(counts) != first.get(TENSORS):
        problems.append(f"got {len(counts)} tensors in all, expected {first.get(TENSORS)}")
    return problems


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
