"""One small run after another, each hurt at a random moment and then given again with the same command.

A program of its own (test_faults.py starts it): everything is imported and read once, and each run is a fork of that, so a
run that is killed costs what a step costs, not what starting Python costs.

    reference   the command, unhurt                                       -> its bytes, and how often it touches the disk
    hurt        the command in another folder, with a fault at one of these moments: killed, told to end, the disk full
                from then on, one error of the disk; every fourth time twice in a row
    again       the command once more

What must hold: a hurt run that was not killed ends with the code of its signal, or with 2 and a sentence; everything that
then stands under its own name is whole; an earlier adapter in the folder can still be read; and the last run ends well, in
the bytes of the reference, with nothing left over.
"""

import builtins
import errno
import gc
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

import qgraft
from qgraft import storage
from qgraft.cli.main import entry_point
from qgraft.cli.main import main as command
from qgraft.storage import check_folder, sha256
from qgraft.training.checkpoints import checkpoints

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import write_tiny

Q = gguf.GGMLQuantizationType
FORMATS = {"q4_1": (Q.Q4_1,), "q8_0": (Q.Q8_0,), "mixed": (Q.Q4_0, Q.Q5_1, Q.F16), "f32": (Q.F32,)}
COMMON = "--max_length 64 --per_device_train_batch_size 2 --logging_steps 1 --r 2 --plot_loss false --use_cpu true \
--learning_rate 1e-2 --resume_from_checkpoint auto"
RUNS = {  # what the runs are like; all have the options above
    "steps": "--max_steps 3 --save_steps 1",
    "dropout": "--max_steps 3 --save_steps 2 --lora_dropout 0.2 --gradient_accumulation_steps 2",
    "best": "--max_steps 3 --save_steps 2 --val_size 2 --eval_strategy steps --eval_steps 1 --learning_rate 0.3",
    "patience": "--max_steps 9 --save_steps 2 --val_size 2 --eval_strategy steps --eval_steps 1 --learning_rate 0.5 "
    "--early_stopping_patience 1",
    "epochs": "--num_train_epochs 2 --per_device_train_batch_size 4 --save_strategy epoch --val_size 2 --save_total_limit 1",
    "nothing_saved": "--max_steps 2 --save_strategy no",
    "prefix": "--max_steps 2 --save_steps 1 --pre_seq_len 3 --prefix_projection true",
    "sgd": "--max_steps 3 --save_steps 2 --optim sgd --lr_scheduler_type cosine --warmup_steps 1",
    "more": "--max_steps 4 --save_steps 1",  # in a folder where the first two steps are a run that has ended
}
SIGNALS = {"term": signal.SIGTERM, "interrupt": signal.SIGINT}
MORE = ("", "", "--save_total_limit 1", "--logging_steps 2", "--seed 7", "--optim adafactor", "--save_only_model true",
        "--gradient_accumulation_steps 2", "--target_modules q_proj,down_proj", "--dataloader_drop_last true")  # fmt: skip
FEW = 60  # seeds of the tests that run by default
FAULTS = ("kill", "kill", "full", "broken", *SIGNALS)


@dataclass
class Fault:
    """What goes wrong when the disk is touched for the `at`-th time."""

    kind: str
    at: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.at}"


class Disk:
    """Counts what a run does to the disk, and lets a fault happen there."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault, self.touched = fault, 0

    def touch(self, takes_room: bool = False, half: Callable[[], Any] | None = None) -> None:
        """Before each operation. `half` does a part of it, for a process that is killed within."""
        self.touched += 1
        fault = self.fault
        if fault is None or self.touched < fault.at:
            return
        if fault.kind == "full" and takes_room:
            if half is not None:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.touched > fault.at:
            return
        if fault.kind == "kill":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])

    def watch(self, folder: Path) -> None:
        """Stand before all that storage does from now on, in this process."""
        disk = self

        class Watched(io.FileIO):
            def write(self, data: Any) -> int:
                disk.touch(True, lambda: super(Watched, self).write(bytes(data)[: len(data) // 2]))
                return super().write(data)

        def watched_open(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wa+"):
                return builtins.open(path, mode, *args, **options)
            disk.touch(True)
            raw = Watched(path, mode.replace("b", ""))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8", write_through=True)

        def before(function: Any, takes_room: bool) -> Any:
            def counted(*args: Any, **options: Any) -> Any:
                disk.touch(takes_room)
                return function(*args, **options)

            return counted

        storage.open = watched_open
        os.fsync = lambda descriptor: None  # no power is cut here
        for name, takes_room in (
            ("mkdir", True),
            ("fsync", True),
            ("replace", False),
            ("unlink", False),
            ("rmdir", False),
        ):
            setattr(os, name, before(getattr(os, name), takes_room))


def forked(words: list[str], fault: Fault | None, folder: Path) -> tuple[int, str, int]:
    """(exit code, what was said, how often the disk was touched) of the command in a process of its own."""
    told, pipe = folder.with_suffix(".txt"), os.pipe()
    if (child := os.fork()) == 0:
        with open(told, "w", buffering=1) as out:
            code = 97
            try:
                os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
                sys.stdout = sys.stderr = out
                disk = Disk(fault)
                disk.watch(folder)
                sys.argv = ["qgraft", *words]
                entry_point()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            os.write(pipe[1], str(disk.touched).encode())
            os._exit(code)
    os.close(pipe[1])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    touched = int(os.read(pipe[0], 20) or 0)
    os.close(pipe[0])
    return status, told.read_text(), touched


def what_came_of(folder: Path) -> dict[str, Any]:
    """All that is in the folder, without clocks and versions."""
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("qgraft.json", "manifest.json") or path.is_dir():
            found[name] = None
        elif path.name == "run.json":
            run = json.loads(path.read_text())
            run["metrics"] = {key: value for key, value in run["metrics"].items() if key not in timed}
            found[name] = {key: run[key] for key in ("finished", "steps", "metrics", "dataset", "bound")}
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            timed_too = (*timed, "memory_bytes", "train_runtime")
            found[name] = [{key: value for key, value in line.items() if key not in timed_too} for line in lines]
        elif path.name == "trainer_state.json":
            state = path.read_text().replace(str(folder), "FOLDER")
            found[name] = [
                {k: v for k, v in e.items() if k != "train_runtime"} for e in json.loads(state)["log_history"]
            ]
        elif path.suffix == ".pt":  # the same numbers are pickled in other bytes where strings are other objects
            found[name] = _hashed(torch.load(path, weights_only=True))
        elif path.name == "progress.json":
            found[name] = json.loads(path.read_text())["progress"]
        else:
            found[name] = sha256(path)
    return found


def _hashed(value: Any) -> str:
    """A hash of what was pickled, without torch's own count of calls."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for key, each in value.items():
                if key != "_step_count":
                    add(key), add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        else:
            total.update(repr(value).encode())

    add(value)
    return total.hexdigest()


def wrong_after(code: int, said: str, fault: Fault, folder: Path, base: Any) -> str | None:
    """What is wrong with how a hurt run ended."""
    codes = {"kill": {-9, 0}, "full": {2, 0}, "broken": {2, 0}}
    codes |= {name: {128 + number, 0} for name, number in SIGNALS.items()}
    if code not in codes[fault.kind]:
        return f"ended with {code}:\n{said}"
    if code == 2 and ("error: " not in said or "Traceback" in said):
        return f"said otherwise than in a sentence:\n{said}"
    for each in checkpoints(folder):
        if problems := check_folder(each):
            return f"{each.name} is not whole: {problems}"
    if fault.kind == "full" and (folder / "qgraft.json").is_file():
        try:
            qgraft.load_adapter(base, folder)
        except qgraft.QgraftError as error:
            return f"the adapter in the folder cannot be read: {error}"
        finally:
            qgraft.detach_lora(base)
    return None


class Trials:
    """Runs in a folder of their own, with what unhurt ones came to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models, self.bases = folder, dict[str, Path](), dict[str, Any]()
        self.references: dict[tuple[str, ...], tuple[dict[str, Any], int]] = {}
        self.earlier: dict[str, Path] = {}
        rows = [{"instruction": f"question {n}", "output": f"answer {n % 3} " * (1 + n % 3)} for n in range(10)]
        (folder / "rows.json").write_text(json.dumps(rows))
        tiny = {"num_hidden_layers": 1}
        for name, types in FORMATS.items():
            self.models[name] = folder / f"{name}.gguf"
            write_tiny(self.models[name], config=tiny, types=types)
            self.bases[name], _ = qgraft.load(self.models[name])
        for run in ("best", "prefix"):  # whatever is imported on the way, before processes are forked off
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                assert command(self.words(run, "mixed", folder / f"first-{run}")) == 0
        gc.freeze()
        gc.disable()

    def words(self, run: str, format: str, folder: Path, more: str = "") -> list[str]:
        """The command."""
        place = ["--model_name_or_path", str(self.models[format]), "--dataset", str(self.folder / "rows.json")]
        return ["train", *place, "--output_dir", str(folder), *COMMON.split(), *RUNS[run].split(), *more.split()]

    def begin(self, run: str, format: str, folder: Path) -> None:
        """What is in the folder before."""
        if run != "more":
            return
        if format not in self.earlier:
            self.earlier[format] = self.folder / f"earlier-{format}"
            words = [*self.words(run, format, self.earlier[format]), "--max_steps", "2"]
            assert forked(words, None, self.earlier[format])[0] == 0
        shutil.copytree(self.earlier[format], folder)

    def reference(self, run: str, format: str, more: str) -> tuple[dict[str, Any], int]:
        """What the command comes to unhurt, and how often it touches the disk."""
        if (run, format, more) not in self.references:
            folder = self.folder / f"whole-{len(self.references)}"
            self.begin(run, format, folder)
            code, said, touched = forked(self.words(run, format, folder, more), None, folder)
            assert code == 0, said
            self.references[run, format, more] = what_came_of(folder), touched
        return self.references[run, format, more]

    def trial(self, seed: int) -> str:
        """What came of one: "same bytes", with how it ended before; or raises AssertionError."""
        choose = random.Random(seed)
        run = choose.choice(list(RUNS))
        usual = list(FORMATS)[list(RUNS).index(run) % len(FORMATS)]  # so that few references are needed
        format = usual if seed < FEW else choose.choice(list(FORMATS))
        more = choose.choice(MORE) if seed >= FEW and run != "more" else ""
        want, touched = self.reference(run, format, more)
        folder, endings = self.folder / f"hurt-{seed}", []
        self.begin(run, format, folder)
        words, name = self.words(run, format, folder, more), f"seed {seed}, {run} {more}, {format}"
        for _ in range(1 if choose.random() < 0.75 else 2):
            fault = Fault(choose.choice(FAULTS), choose.randint(1, touched))
            code, said, _ = forked(words, fault, folder)
            wrong = wrong_after(code, said, fault, folder, self.bases[format])
            assert wrong is None, f"{name}, {fault}: {wrong}"
            endings.append({0: "unharmed", 2: "error", -9: "killed"}.get(code, "signalled"))
        code, said, _ = forked(words, None, folder)
        assert code == 0, f"{name}, {fault}, then again: ended with {code}\n{said}"
        got = what_came_of(folder)
        differ = [name for name in {*got, *want} if got.get(name, 0) != want.get(name, 0)]
        shown = {name: (got.get(name, "absent"), want.get(name, "absent")) for name in sorted(differ)}
        assert not differ, f"{name}, {fault}: not what an unhurt run comes to: {shown}\n{said}"
        shutil.rmtree(folder)
        return "same bytes after: " + ", ".join(endings)


def main(first: int, count: int) -> int:
    """Print how many trials ended in which way, and what was wrong."""
    torch.set_num_threads(1)
    counts, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory() as place:
        trials = Trials(Path(place))
        for seed in range(first, first + count):
            try:
                counts[trials.trial(seed)] += 1
            except AssertionError as error:
                wrong.append(str(error))
                counts["wrong"] += 1
    print(json.dumps({"counts": counts, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
