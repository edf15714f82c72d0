"""What is trained from the page: presets, and the options that may differ from them; as a configuration file of `train`.

The file lies in the hidden folder, and `qgraft train FILE` does the same without the page. A request can set nothing but the
options below, each of its kind and in its range.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qgraft.ranges import ABOVE_0, COUNT, LENGTH, RANK, SEED, SHARE, Range
from qgraft.serving.fields import ApiError

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"num_train_epochs": 1.0, "r": 8, "lora_alpha": 16.0, "learning_rate": 5e-4},
    "standard": {"num_train_epochs": 3.0, "r": 8, "lora_alpha": 16.0, "learning_rate": 2e-4},
    "thorough": {"num_train_epochs": 6.0, "r": 16, "lora_alpha": 32.0, "learning_rate": 2e-4},
    "exact": {"num_train_epochs": 3.0, "r": 8, "lora_alpha": 16.0, "learning_rate": 2e-4, "exact": True},
    "prefix": {"num_train_epochs": 6.0, "pre_seq_len": 64, "learning_rate": 2e-2},
}
TEXT = 4000  # characters

Kind = Range | type[str] | type[bool]
OPTIONS: dict[str, Kind] = {
    "num_train_epochs": Range(0, 1000, open="least"),
    "max_steps": COUNT,
    "learning_rate": ABOVE_0,
    "r": RANK,
    "lora_alpha": ABOVE_0,
    "pre_seq_len": COUNT,
    "max_length": LENGTH,
    "val_size": SHARE,
    "per_device_train_batch_size": COUNT,
    "seed": SEED,
    "system": str,
    "name": str,
    "author": str,
    "prompt_column": str,
    "response_column": str,
    "mask_history": bool,
    "exact": bool,
}
ALWAYS = {"logging_steps": 1, "save_strategy": "epoch", "resume_from_checkpoint": "auto"}


def checked(given: object) -> dict[str, Any]:
    """The options of a request, those that are empty left out. Raises ApiError for one that cannot be."""
    if not isinstance(given, Mapping):
        raise ApiError(400, "options: expected an object", param="options")
    options = {str(name): value for name, value in given.items() if value not in (None, "")}
    for name, value in options.items():
        if name not in OPTIONS:
            raise ApiError(400, f"options: {name[:100]!r} cannot be set here", param="options")
        _check(name, value, OPTIONS[name])
    return options


def _check(name: str, value: object, kind: Kind) -> None:
    right: Callable[[Any], bool]
    if isinstance(kind, Range):
        right, expected = kind.__contains__, str(kind)
    elif kind is bool:
        right, expected = (lambda given: isinstance(given, bool)), "true or false"
    else:
        right, expected = (lambda given: isinstance(given, str) and len(given) <= TEXT), f"at most {TEXT} characters"
    if not right(value):
        raise ApiError(400, f"{name}: got {str(value)[:100]!r}, expected {expected}", param=name)


def configuration(
    model: str, quantize: str | None, dataset: Path, output: Path, preset: object, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `qgraft train` is given. Raises ApiError for a preset that there is not."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ApiError(400, f"preset: expected {', '.join(PRESETS)}", param="preset")
    base = {"model_name_or_path": model, **({"quantize": quantize} if quantize else {})}
    return {**base, "dataset": str(dataset), "output_dir": str(output), **ALWAYS, **PRESETS[preset], **options}
