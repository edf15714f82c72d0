"""One random small run after another, each with a fault planted somewhere; python faults.py MODEL FOLDER SEED...

The model is loaded once, and every run is a fork of this process, which trains with one thread. A line of JSON a seed tells
what became of it; tests/training/test_faults.py says what may.
"""

import errno
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import qgraft

ROWS = [{"instruction": f"question {n}", "output": f"answer {n % 3} " * (1 + n % 4)} for n in range(9)]
FAULTS = ("kill", "full", "broken", "terminate")
KINDS = 15  # of runs
OPERATIONS = ("fsync", "replace", "unlink", "mkdir")  # of os, which all writing goes through


def options_of(draw: random.Random) -> dict[str, Any]:
    """A small run: 4 to 9 steps, some with held-out rows, a prefix, accumulation, another optimizer."""
    held_out = draw.random() < 0.4
    return {
        "per_device_train_batch_size": draw.choice([1, 2]), "gradient_accumulation_steps": draw.choice([1, 2]),
        "max_steps": draw.randint(3, 6), "save_steps": draw.choice([1, 2, 3]), "logging_steps": draw.choice([1, 4]),
        "save_total_limit": draw.choice([1, 2, None]), "seed": draw.randint(0, 9), "learning_rate": 1e-3,
        "lora_dropout": draw.choice([0.0, 0.1]), "r": draw.choice([1, 2]), "plot_loss": False, "use_cpu": True,
        "optim": draw.choice(["adamw_torch_fused", "sgd"]), "target_modules": draw.choice(["q_proj", "all-linear"]),
        **({"val_size": 2, "eval_strategy": "steps", "eval_steps": draw.choice([1, 2])} if held_out else {}),
        **({"pre_seq_len": 4} if draw.random() < 0.2 else {}),
    }  # fmt: skip


class Terminate(TrainerCallback):
    """SIGTERM to this process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def plant(fault: str, at: int) -> None:
    """Let the `at`-th operation on files end this process, or fail."""
    count = 0

    def spoiled(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == at or (count > at and fault == "full"):
                raise OSError(errno.ENOSPC if fault == "full" else errno.EIO, "planted")
            return real(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, spoiled(getattr(os, name)))


def run(model: Any, tokenizer: Any, folder: Path, options: dict[str, Any], fault: str = "", at: int = 0) -> str:
    """The same fixed command in a fork of this process, with a fault or without: how it ended."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            told = pipe.read()
        _, status = os.waitpid(pid, 0)
        return told or f"signal {os.WTERMSIG(status)}"
    os.close(reader)
    told = "traceback"
    try:
        args = qgraft.TrainArguments(output_dir=str(folder), resume_from_checkpoint="auto", **options)
        callbacks = [Terminate(at)] if fault == "terminate" else []
        if fault in ("kill", "full", "broken"):
            plant(fault, at)
        report = qgraft.train(model, tokenizer, ROWS, args, callbacks=callbacks, progress=False)
        told = "finished" if report.finished else "stopped"
    except qgraft.QgraftError as error:
        told = f"error: {type(error).__name__}: {error}"
    except BaseException as error:
        told = "traceback: " + "".join(traceback.format_exception(error)[-6:])
    finally:
        os.write(writer, told.encode()[:60_000])
        os._exit(0)


def state(folder: Path) -> dict[str, str]:
    """The adapter that a run ended in."""
    names = ("adapter_model.safetensors", "adapter_config.json", "prefix_encoder.safetensors")
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }


def main() -> None:
    """Each seed: a whole run, one with a fault, and the same command again until it is through."""
    torch.set_num_threads(1)
    model, tokenizer = qgraft.load(sys.argv[1])
    runs = Path(sys.argv[2])
    for seed in map(int, sys.argv[3:]):
        draw, kind = random.Random(seed), seed % KINDS
        options, fault, folder = options_of(random.Random(kind)), draw.choice(FAULTS), runs / str(seed)
        at = draw.randint(1, options["max_steps"]) if fault == "terminate" else draw.randint(1, 60)
        whole = "finished" if state(runs / f"whole-{kind}") else run(model, tokenizer, runs / f"whole-{kind}", options)
        first = run(model, tokenizer, folder / "part", options, fault, at)
        again = run(model, tokenizer, folder / "part", options)
        left = [p.name for p in (folder / "part").glob(".*")] if (folder / "part").is_dir() else []
        same = state(folder / "part") == state(runs / f"whole-{kind}") != {}
        print(json.dumps({"seed": seed, "fault": fault, "at": at, "options": options, "whole": whole, "first": first,
                          "again": again, "same": same, "left": left}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
