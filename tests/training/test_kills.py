"""A run that is killed 40 times, at any moment, goes on each time and ends in the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS, STEPS = 40, 400
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
PROGRAM = """
import sys, pathlib, qgraft
from qgraft.training.checkpoints import checkpoints
model, out = sys.argv[1], pathlib.Path(sys.argv[2])
rows = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(23)]
base, tokenizer = qgraft.load(model)
args = qgraft.TrainArguments(
    output_dir=str(out), max_steps=int(sys.argv[3]), per_device_train_batch_size=2, save_steps=1, logging_steps=7,
    use_cpu=True,
    learning_rate=1e-3, r=2, lora_dropout=0.1, plot_loss=False, val_size=3, eval_strategy="steps", eval_steps=11,
    metric_for_best_model="loss", overwrite_output_dir=True,
    resume_from_checkpoint="true" if checkpoints(out) else None,
)
qgraft.train(base, tokenizer, rows, args)
"""


def start(model, folder):
    words = [sys.executable, "-c", PROGRAM, str(model), str(folder), str(STEPS)]
    return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def newest(folder):
    """The step of the newest checkpoint."""
    return max((int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.mark.slow
def test_forty_kills_leave_no_trace(tiny_gguf, tmp_path):
    model, whole, part = tiny_gguf("llama").path, tmp_path / "whole", tmp_path / "part"
    said, _ = (begun := start(model, whole)).communicate(timeout=600)
    assert begun.returncode == 0, said
    kills, moments = 0, random.Random(1)
    while kills < KILLS:
        begun = start(model, part)
        wanted = newest(part) + moments.randint(1, STEPS // KILLS - 2)
        while begun.poll() is None and newest(part) < wanted:
            time.sleep(0.003)
        time.sleep(moments.random() * 0.03)
        if begun.poll() is not None:
            break
        begun.send_signal(signal.SIGKILL)
        begun.communicate()
        kills += 1
    said, _ = (begun := start(model, part)).communicate(timeout=600)
    assert begun.returncode == 0, said
    assert kills == KILLS, f"only {kills} kills before the run was over"
    assert (part / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, part)]
    logs = [[line.partition(', "tokens_per_second"')[0] for line in lines if "train_" not in line] for lines in logs]
    assert logs[0] == logs[1]
    assert not [path for path in part.iterdir() if path.name.startswith(".")]
