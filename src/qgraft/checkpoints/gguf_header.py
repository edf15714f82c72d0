"""The metadata of a GGUF file, read by key: numbers are numbers, lists for each layer say one value, or it is an error.

Keys are written without their architecture: `Header(file).count("block_count")` reads `llama.block_count`. Where a key is
absent, the default is llama.cpp's.
"""

import math
import reprlib
from pathlib import Path
from typing import Any, TypeGuard

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.errors import CheckpointError, UnsupportedError

# Layers of the 27B models, whose attention is scaled by 1 / sqrt(width / heads) and not by 1 / sqrt(head_dim): no key
# states it, and llama.cpp knows them by that number too
_LARGEST = {"gemma2": 46, "gemma3": 62}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a metadata value is a finite number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Header:
    """The keys of one file that belong to its architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.path: Path = file.path
        self.metadata: dict[str, Any] = file.metadata
        self.architecture: str = file.metadata["general.architecture"]

    def get(self, key: str) -> Any:
        """The value as it is stored; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that cannot be."""
        got = reprlib.repr(self.get(key))
        return CheckpointError(f"{self.path}: {self.architecture}.{key}: got {got}, expected {expected}")

    def refused(self, key: str, expected: str, hint: str | None = None) -> UnsupportedError:
        """The error for a value that is meant and not served."""
        got = reprlib.repr(self.get(key))
        return UnsupportedError(f"{self.path}: {self.architecture}.{key}: got {got}, expected {expected}", hint=hint)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number, or zero where that is allowed; without a default the key must be there."""
        value = default if self.get(key) is None else self.get(key)
        if not is_number(value) or value < 0 or (value == 0 and not zero):
            raise self.wrong(key, "a number from 0 on" if zero else "a number greater than 0")
        return float(value)

    def count(self, key: str, default: int | None = None, most: int | None = None) -> int:
        """An integer from 1 to `most`; a list of one for each layer, where all layers have the same."""
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise self.refused(key, "the same number for all layers", "transformers' model has one for all layers")
            value = value[0]
        if type(value) is not int or value < 1 or (most is not None and value > most):
            raise self.wrong(key, "a positive integer" if most is None else f"an integer from 1 to {most}")
        return value

    def per_layer(self, key: str, default: int | None = None, most: int | None = None) -> list[int]:
        """An integer from 1 to `most` for each layer, of a list of them or of one."""
        value = default if self.get(key) is None else self.get(key)
        layers = self.count("block_count")
        values: list[Any] = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or not all(type(n) is int and 1 <= n <= (most or n) for n in values):
            limit = "a positive integer" if most is None else f"an integer from 1 to {most}"
            raise self.wrong(key, f"{limit}, or a list of one for each of {layers} layers")
        return values

    @property
    def width(self) -> int:
        """Elements of a hidden state."""
        return self.count("embedding_length")

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.count("attention.head_count")

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.count("attention.key_length", max(self.width // self.heads, 1))

    @property
    def rotated(self) -> int:
        """Elements of a head that are rotated."""
        return self.count("rope.dimension_count", self.head_dim)

    @property
    def attention_width(self) -> int:
        """Scores are divided by its root."""
        largest = self.count("block_count") == _LARGEST.get(self.architecture)
        return self.width // self.heads if largest else self.head_dim

    @property
    def layers(self) -> int:
        """Layers that compute the answer. Only Qwen 3.5 may have others behind them, which draft tokens."""
        drafts = self.get("nextn_predict_layers") or 0
        if type(drafts) is not int or not 0 <= drafts < self.count("block_count"):
            raise self.wrong("nextn_predict_layers", "an integer from 0 on, less than block_count")
        return self.count("block_count") - drafts

    @property
    def shared(self) -> int:
        """Of Gemma 4 the last layers, as many as this, which take keys and values from those before."""
        shared = self.get("attention.shared_kv_layers") or 0
        if type(shared) is not int or not 0 <= shared < self.layers:
            raise self.wrong("attention.shared_kv_layers", "an integer from 0 on, less than block_count")
        return shared

    def attends(self, layer: int) -> bool:
        """Whether a layer of Qwen 3.5 has attention instead of a gated delta net."""
        return layer >= self.layers or (layer + 1) % self.count("full_attention_interval", 4) == 0
