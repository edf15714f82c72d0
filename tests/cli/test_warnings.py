"""What people see on stderr: no warning of ours, and none of a library's because of how it is called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys
from qgraft.cli.main import entry_point
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        entry_point()
    except SystemExit as error:
        assert error.code == 0, (words, error.code)
"""


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_nothing_that_people_do_every_day_prints_a_warning(architecture, tiny_gguf, tmp_path):
    model, rows = str(tiny_gguf(architecture).path), tmp_path / "rows.jsonl"
    lines = [{"prompt": f"hello {i} world the cat", "response": f"the cat {i % 3} sat " * 2} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter, common = str(tmp_path / "adapter"), ["--use_cpu", "--r", "2", "--max_length", "64"]
    answers = ["--do_predict", "--do_eval", "--predict_with_generate", "--max_new_tokens", "3", "--use_cpu"]
    commands = [
        ["demo", "--model", model, "--num_train_epochs", "0.05", "--output_dir", str(tmp_path / "demo"), "--device", "cpu"],
        ["train", "--model_name_or_path", model, "--dataset", str(rows), "--val_size", "4", "--output_dir", adapter,
         "--max_steps", "4", "--save_steps", "2", "--gradient_checkpointing", *common],
        ["train", "--model_name_or_path", model, "--dataset", str(rows), "--output_dir", adapter, "--max_steps", "6",
         "--val_size", "4", "--save_steps", "2", "--resume_from_checkpoint", "true", "--gradient_checkpointing", *common],
        ["train", "--model_name_or_path", model, "--adapter_name_or_path", adapter, "--test_dataset", str(rows),
         "--eval_dataset", str(rows), "--max_predict_samples", "2", "--max_eval_samples", "2",
         "--output_dir", str(tmp_path / "answers"), *answers],
        ["chat", "--model", model, "--adapter", adapter, "--device", "cpu", "--max_new_tokens", "3"],
        ["eval", "--model", model, "--adapter", adapter, "--dataset", str(rows), "--device", "cpu"],
        ["merge", "--model", model, "--adapter", adapter, "--dataset", str(rows), "--method", "nearest",
         "--min-retained=-1e9", "--output", str(tmp_path / "merged.gguf"), "--device", "cpu"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands)], input="hello\nthe cat\n", capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "warn" in line.lower()] == []
    assert Path(adapter, "adapter_model.safetensors").is_file() and (tmp_path / "merged.gguf").is_file()
