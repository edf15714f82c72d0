"""Adapters trained once a session on tiny models, small against the quantization steps as real ones are."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Q

import qgraft

sys.path.insert(0, str(Path(__file__).parent.parent))

from disks import failing_after

__all__ = ["failing_after"]

ROWS: list[dict[str, object]] = [
    {"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(20)
]
COARSE = (Q.Q4_1, Q.Q4_0, Q.Q5_1, Q.Q4_1, Q.F16)


@dataclass(frozen=True)
class Trained:
    """A base's file and the folder of an adapter that was trained on it with ROWS."""

    base: Path
    folder: Path

    def load(self, name: str = "default") -> tuple[Any, Any]:
        """(model with the adapter active, tokenizer)."""
        model, tokenizer = qgraft.load(self.base)
        qgraft.load_adapter(model, self.folder, name)
        return model, tokenizer


TrainedMaker = Callable[..., Trained]


@pytest.fixture(scope="session")
def rows() -> list[dict[str, object]]:
    """What the adapters of `trained` were trained on."""
    return ROWS


@pytest.fixture(scope="session")
def trained(tiny_gguf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> TrainedMaker:
    """Trains an adapter on a tiny model of an architecture, once a session."""
    made: dict[str, Trained] = {}

    def get(architecture: str = "llama") -> Trained:
        if architecture not in made:
            base, folder = tiny_gguf(architecture, types=COARSE).path, tmp_path_factory.mktemp(architecture)
            model, tokenizer = qgraft.load(base)
            arguments = qgraft.TrainArguments(
                output_dir=str(folder), r=8, learning_rate=2e-3, max_steps=15, per_device_train_batch_size=4,
                save_strategy="no", plot_loss=False, use_cpu=True, compute="float32",  # the same adapter on every CPU
                save_calibration=False,  # tests give rows, or see that there are none
            )  # fmt: skip
            qgraft.train(model, tokenizer, ROWS, arguments)
            made[architecture] = Trained(base, folder)
        return made[architecture]

    return get
