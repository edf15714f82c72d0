"""Adapters trained once a session on tiny models, small against the quantization steps as real ones are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Q

import qgraft

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
    """Trains an adapter on a tiny model of an architecture; options are those of TrainArguments."""
    made: dict[str, Trained] = {}

    def get(architecture: str = "llama", **options: Any) -> Trained:
        key = repr((architecture, sorted(options.items())))
        if key not in made:
            base, folder = tiny_gguf(architecture, types=COARSE).path, tmp_path_factory.mktemp(architecture)
            model, tokenizer = qgraft.load(base)
            chosen = {"r": 8, "learning_rate": 1e-3, "max_steps": 30, "save_strategy": "no", "use_cpu": True, **options}
            arguments = qgraft.TrainArguments(output_dir=str(folder), per_device_train_batch_size=4, **chosen)
            qgraft.train(model, tokenizer, ROWS, arguments)
            made[key] = Trained(base, folder)
        return made[key]

    return get
