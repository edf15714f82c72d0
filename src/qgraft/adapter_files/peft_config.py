"""adapter_config.json: the options of a LoRA under PEFT's names, read into and written from one LoraConfig a layer.

PEFT keeps one `r`, `lora_alpha`, `lora_dropout` and `use_rslora` for all layers, and two tables for those that differ:

    rank_pattern, alpha_pattern    {regular expression: value}; the first key that matches counts, and a key matches a
                                   module path when (.*\\.)?(key) matches all of it
    scaling of a layer             alpha / r, or alpha / sqrt(r) with use_rslora, with the alpha and r of that layer

So the values that most layers have are written as the common ones and every other layer under its whole path; a `^`
before the path keeps it from matching a layer whose path ends in it. Layers that differ in rank stabilization cannot be
said; the alpha that gives them the same scaling can.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraft.adapters.lora import LoraConfig
from qgraft.errors import AdapterError, UnsupportedError

CONFIG = "adapter_config.json"

# PEFT options that change the arithmetic and that a plain LoRA does not have
_UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
    "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "ensure_weight_tying",
)  # fmt: skip
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base as well


def peft_config(
    layers: Mapping[str, LoraConfig],
    targets: list[str] | str,
    source: str | None,
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs to build the same adapter on the float model.

    Args:
        layers: module path -> options, at least one.
        targets: PEFT's target_modules that select exactly these layers, together with `numbers`.
        source: the base's file or name.
        numbers: PEFT's layers_to_transform; None for all layers of the decoder.
    """
    stabilized = _most_common(config.use_rslora for config in layers.values())
    r = _most_common(config.r for config in layers.values())
    alphas = {path: _alpha(config, stabilized) for path, config in layers.items()}
    alpha = _most_common(value for path, value in alphas.items() if layers[path].r == r)
    return {
        "alpha_pattern": {_key(path, layers): value for path, value in alphas.items() if value != alpha},
        "base_model_name_or_path": source,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **({} if numbers is None else {"layers_to_transform": list(numbers)}),
        "lora_alpha": alpha,
        "lora_dropout": max(config.lora_dropout for config in layers.values()),
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_key(path, layers): config.r for path, config in layers.items() if config.r != r},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": stabilized,
    }


def layer_config(config: Mapping[str, Any], path: str, r: int) -> LoraConfig:
    """The options of the layer at `path`, whose tensors have rank `r`."""
    alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return LoraConfig(r, alpha, config.get("lora_dropout", 0.0), bool(config.get("use_rslora")))


def stated_rank(config: Mapping[str, Any], path: str) -> int:
    """The rank that the configuration gives the layer at `path`."""
    return int(_pattern(config.get("rank_pattern"), path, config["r"]))


def check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for the configuration, read from `path`, of anything but a plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path.parent}: peft_type {config.get('peft_type')!r}; supported: LORA, PREFIX_TUNING")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGING_INITS):
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    if used:
        raise UnsupportedError(
            f"{path.parent}: a LoRA with {', '.join(used)}; supported: a plain one",
            hint="merge it into its float base with PEFT (merge_and_unload), and quantize the merged model",
        )


def check_values(path: Path, config: Mapping[str, Any]) -> None:
    """The options that loading computes with have the types they need, all of them checked at once."""
    number = (int, float)
    expected: dict[str, Any] = {"r": int, "lora_alpha": number, "lora_dropout": number, "use_rslora": bool}
    problems = [
        f"{key}: got {config.get(key)!r}, expected {'a number' if kind == number else kind.__name__}"
        for key, kind in expected.items()
        if not isinstance(config.get(key, {"lora_dropout": 0.0, "use_rslora": False}.get(key)), kind)
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        pairs = patterns.items() if isinstance(patterns, dict) else [("", None)]
        if not all(compiles(pattern) and isinstance(value, number) for pattern, value in pairs):
            problems.append(f"{key}: got {patterns!r}, expected numbers under regular expressions")
    numbers = config.get("layers_to_transform")
    if not isinstance(numbers, int | None) and not (isinstance(numbers, list) and all(type(n) is int for n in numbers)):
        problems.append(f"layers_to_transform: got {numbers!r}, expected a list of integers")
    names = config.get("layers_pattern") or []
    if not all(isinstance(name, str) and compiles(name) for name in ([names] if isinstance(names, str) else names)):
        problems.append(f"layers_pattern: got {names!r}, expected names of lists of layers")
    if problems:
        raise AdapterError(f"{path}:\n  " + "\n  ".join(problems))


def compiles(pattern: str) -> bool:
    """Whether it is a regular expression."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _alpha(config: LoraConfig, stabilized: bool) -> float:
    """The alpha that gives the layer its scaling, whether or not all layers are read as rank-stabilized."""
    if config.use_rslora == stabilized:
        return config.lora_alpha
    return config.scaling * (math.sqrt(config.r) if stabilized else config.r)


def _key(path: str, layers: Iterable[str]) -> str:
    return f"^{path}" if any(other.endswith(f".{path}") for other in layers) else path


def _pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that matches the end of the module path."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
