"""What the original code of the releases computed for tiny models, as tests/golden keeps it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"

Golden = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """golden("chatglm2_fp32") -> (config.json, weights, inputs and outputs), each tensor in the dtype it is stored in."""
    return read_golden


def read_golden(name: str) -> Golden:
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "weights.safetensors"
    return config, load_file(weights) if weights.exists() else {}, load_file(folder / "io.safetensors")
