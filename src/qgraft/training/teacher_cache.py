"""What a teacher says of the rows of a run, on the disk: it is asked once, whatever learns from it how often.

    teacher/                   in output_dir, or where teacher_cache says
        teacher.json           what it is of (`about`), which is compared; and what that was made with, to be read
        00001.safetensors      of some samples one after another, at each of their N labels: ids [N, k] int32, log_probs
                               [N, k] and rest [N] float32; in its metadata a SHA-256 of these, of `about` and the number

A block is written whole as soon as it is there, so a teacher that was killed goes on with the next; one that is damaged is
asked for again. Blocks are mapped into memory and read as they are needed. A folder that is of anything else, other rows,
another teacher, another temperature, is never used: it is refused, or replaced where output_dir may be overwritten.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from qgraft import storage
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.pickles import WORDS
from qgraft.checkpoints.shards import open_shard
from qgraft.errors import CheckpointError, StorageError, option
from qgraft.json_files import OWN, covered_text, is_covered, read_object
from qgraft.mapped import release
from qgraft.passes.divergence import Said

TEACHER, ABOUT = "teacher", "teacher.json"
WIDTH = "ids that both have"
OF_TEACHER = ("teacher", "teacher_adapter", "compute")  # what is not known where the folder alone is given


class TeacherCache:
    """A folder of blocks.

    Args:
        about: what decides the numbers, as JSON values.
        counts: labels of each block.
        k: tokens that the teacher names.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], counts: Sequence[int], k: int) -> None:
        self.folder, self.about, self._counts, self.k = folder, dict(about), counts, k
        self._hashes = dict[int, str]()

    def begin(self, made_with: Mapping[str, Any], *, overwrite: bool) -> None:
        """Go on with what is there, or begin; the folder exists.

        Raises StorageError for a folder of anything else, unless it may be overwritten, and where the disk has no room.
        """
        if not (self.folder / ABOUT).exists():
            if others := sorted(path.name for path in self.folder.iterdir() if path.name[0] != "."):
                raise StorageError(
                    f"{self.folder} is not empty, and no teacher's: {', '.join(others[:4])}", hint=_another()
                )
        elif differ := _differences(read_about(self.folder), self.about):
            if not overwrite:
                raise StorageError(
                    f"{self.folder} holds what is of another teacher, or of other rows:\n  " + "\n  ".join(differ),
                    hint=f"{_another()}, or delete it",
                )
            self._clear()
        if not (self.folder / ABOUT).exists():
            text = covered_text({"about": self.about, "made_with": dict(made_with)})
            storage.write_file(self.folder / ABOUT, text.encode())
        left = sum(8 * self.k * count + 4 * count for number, count in enumerate(self._counts)
                   if not self._file(number).exists())  # fmt: skip
        storage.require_room(self.folder / ABOUT, left)

    @property
    def sha256(self) -> str:
        """Of all blocks, once each was read or kept."""
        return hashlib.sha256("".join(self._hashes[number] for number in sorted(self._hashes)).encode()).hexdigest()

    def keep(self, number: int, said: Said) -> None:
        """Write a block. Raises StorageError."""
        tensors = {name: (WORDS[part.dtype], part.contiguous()) for name, part in vars(said).items()}
        write_safetensors(self._file(number), tensors, {OWN: self._sha256(number, said)})

    def read(self, number: int) -> Said | None:
        """The block, mapped; None where it is not there, damaged or none of these."""
        file, count = self._file(number), self._counts[number]
        shapes = {"ids": (count, self.k), "log_probs": (count, self.k), "rest": (count,)}
        if not file.is_file():
            return None
        with ExitStack() as stack:
            try:
                shard = open_shard(file, stack)
                if {*shard.names} != shapes.keys() or any(shard.describe(n)[0] != shape for n, shape in shapes.items()):
                    return None
                said = Said(**{name: shard.tensor(name) for name in shapes})
            except CheckpointError:
                return None
        if said.ids.dtype != torch.int32 or {said.log_probs.dtype, said.rest.dtype} != {torch.float32}:
            return None
        found = self._sha256(number, said)
        if shard.metadata.get(OWN) != found or not 0 <= int(said.ids.min()) <= int(said.ids.max()) < self.about[WIDTH]:
            return None
        release(said.ids, said.log_probs, said.rest)
        self._hashes[number] = found
        return said

    def _file(self, number: int) -> Path:
        return self.folder / f"{number + 1:05d}.safetensors"

    def _sha256(self, number: int, said: Said) -> str:
        digest = hashlib.sha256(json.dumps([self.about, number], sort_keys=True).encode())
        for part in vars(said).values():
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def _clear(self) -> None:
        with storage.named_errors(self.folder):
            (self.folder / ABOUT).unlink()
            for path in self.folder.glob("[0-9]*.safetensors"):
                path.unlink()


def read_about(folder: Path) -> dict[str, Any]:
    """What the folder says that it is of. Raises StorageError where it says nothing, or was changed."""
    path = folder / ABOUT
    if not path.is_file():
        raise StorageError(f"{folder} holds nothing of a teacher: it has no {ABOUT}", hint=_give())
    found = read_object(path, StorageError)
    about = found.get("about")
    covered = is_covered(path.read_text(encoding="utf-8"), found.get(OWN))
    if not isinstance(about, dict) or type(about.get(WIDTH)) is not int or not covered:
        raise StorageError(f"{path} changed since it was written", hint=f"delete {folder}: the teacher is asked again")
    return about


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{key}: was {_shown(before.get(key))}, now {_shown(now.get(key))}"
            for key in sorted({*before, *now}) if before.get(key) != now.get(key)]  # fmt: skip


def _shown(value: Any) -> str:
    """A value in a line: of the adapters by their names the first digits of their hashes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} ({str(sha256)[:12]})" for name, sha256 in value.items()) or "none"
    return "none" if value is None else str(value)[:60]


def _another() -> str:
    return f"give another folder: {option('teacher_cache', 'FOLDER')}"


def _give() -> str:
    return f"{option('teacher_model_name_or_path', 'teacher.gguf')} asks the teacher"
