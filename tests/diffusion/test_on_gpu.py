"""Diffusion on a GPU that is pretended (tests/pretended_gpu.py): no tensor is on the wrong device, losses are the CPU's."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from pretended_gpu import pretended_gpu

from qgraft import diffusion


def losses(folder: Path, output: Path, device: str, **more: Any) -> list[float]:
    cpu = {"use_cpu": True} if device == "cpu" else {}
    args = diffusion.DiffusionArguments(
        output_dir=str(output), dataset=str(folder / "images"), resolution=16, per_device_train_batch_size=2, max_steps=3,
        logging_steps=1, learning_rate=1e-2, r=2, compute="float32", lr_scheduler_type="constant", **cpu, **more,
    )  # fmt: skip
    report = diffusion.train(diffusion.load(folder / "sd", device=device, dtype="float32"), args)
    assert report.finished
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"val_size": 1, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}]
)
def test_a_run(more: dict[str, Any], tmp_path: Path) -> None:
    tiny.pipeline(tmp_path / "sd")
    tiny.images(tmp_path / "images")
    expected = losses(tmp_path, tmp_path / "cpu", "cpu", **more)
    with pretended_gpu():
        got = losses(tmp_path, tmp_path / "gpu", "cuda", **more)
    assert got == pytest.approx(expected, rel=1e-3)
