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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from qgraft.adapters.layer_choice import list_pattern
from qgraft.adapters.lora import LoraConfig
from qgraft.errors import AdapterError, UnsupportedError, worded
from qgraft.model_parts import CAUSAL, CLASSIFIERS
from qgraft.patterns import first_matching, is_ending, is_pattern

CONFIG = "adapter_config.json"
MINIMUMS = "QGRAFT_MINIMUMS"  # peft_type of an exact LoRA with layers in K-quants: PEFT refuses it, as it should

# PEFT options that change the arithmetic and that a plain LoRA does not have
_UNSUPPORTED = (
    "lora_bias", "modules_to_save", "layer_replication",
    "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "ensure_weight_tying",
)  # fmt: skip
_WITHOUT_EFFECT = (  # on what a trained LoRA computes
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
)  # fmt: skip
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base as well


def peft_config(
    layers: Mapping[str, LoraConfig],
    targets: list[str] | str,
    source: str | None,
    numbers: Sequence[int] | None = None,
    peft_type: str = "LORA",
    task_type: str | None = CAUSAL,
    tokens: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs to build the same adapter on the float model.

    Args:
        layers: module path -> options, at least one.
        targets: PEFT's target_modules that select exactly these layers, together with `numbers`.
        source: the base's file or name.
        numbers: PEFT's layers_to_transform; None for all layers of the decoder.
        peft_type: MINIMUMS for what PEFT cannot compute.
        task_type: which class of PEFT wraps the model; None for the one without a task.
        tokens: PEFT's trainable_token_indices, by names of layers.
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
        "peft_type": peft_type,
        "r": r,
        "rank_pattern": {_key(path, layers): config.r for path, config in layers.items() if config.r != r},
        "target_modules": targets,
        "task_type": task_type,
        **({"use_dora": True} if any(config.use_dora for config in layers.values()) else {}),
        **({} if not tokens else {"trainable_token_indices": {name: list(ids) for name, ids in tokens.items()}}),
        "use_rslora": stabilized,
    }


def layer_config(config: Mapping[str, Any], path: str, r: int, exact: bool = False) -> LoraConfig:
    """The options of the layer at `path`, whose tensors have rank `r`."""
    alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    dropout, dora = config.get("lora_dropout", 0.0), bool(config.get("use_dora"))
    return LoraConfig(r, alpha, dropout, bool(config.get("use_rslora")), exact=exact, use_dora=dora)


def stated_rank(config: Mapping[str, Any], path: str) -> int:
    """The rank that the configuration gives the layer at `path`."""
    return int(_pattern(config.get("rank_pattern"), path, config["r"]))


def folder_hint() -> str:
    """The hint where a folder holds no adapter."""
    return worded(flags="give the output_dir of `qgraft train`, or a folder that PEFT wrote",
                  python="give the folder that save_adapter or PEFT wrote")  # fmt: skip


def check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for the configuration, read from `path`, of anything but a LoRA or DoRA."""
    if config.get("peft_type") not in ("LORA", MINIMUMS):
        raise UnsupportedError(f"{path.parent}: peft_type {config.get('peft_type')!r}; supported: LORA, PREFIX_TUNING")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("task_type") in CLASSIFIERS:
        used = [key for key in used if key != "modules_to_save"]  # its head, see whole.py
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGING_INITS):
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    if used:
        raise UnsupportedError(
            f"{path.parent}: a LoRA with {', '.join(used)}; supported: a plain one",
            hint="merge it into its float base with PEFT (merge_and_unload), and quantize the merged model",
        )


def checked_values(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options, which loading computes with: of the types they need and in range, all of them checked at once.

    A null of one that may be left out means that it is, and is gone from what is returned.
    """
    given = {key: value for key, value in config.items() if value is not None or key not in _LEFT_OUT}
    found = {**_LEFT_OUT, **given}
    problems = [
        f"{key}: got {shown(found.get(key))}, expected {what}"
        for key, (right, what) in _VALUES.items()
        if not right(found.get(key))
    ]
    if problems:
        raise AdapterError(f"{path}:\n  " + "\n  ".join(problems))
    return given


def unknown_note(config: Mapping[str, Any]) -> list[str]:
    """One sentence where a configuration says what no release of PEFT that is known here says; PEFT passes over it, too."""
    known = {*_VALUES, *_UNSUPPORTED, *_WITHOUT_EFFECT}
    found = [key for key, value in config.items() if key not in known and value not in (None, False, "", [], {})]
    listed = ", ".join(found[:8]) + ", ..." * (len(found) > 8)
    return [f"{CONFIG}: unknown options, which are not gone by: {listed}"] if found else []


def shown(value: object) -> str:
    """A value of a file as an error shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        text = "a number of very many digits"
    return text if len(text) <= 120 else text[:117] + "..."


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MOST


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST  # NaN is not


def _is_share(value: object) -> bool:
    return _is_alpha(value) and 0 <= cast(float, value) < 1


def _is_table(value: object, right: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(is_ending(key) and right(each) for key, each in value.items())


def _are_names(value: object) -> bool:
    return is_pattern(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_patterns(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(
        isinstance(name, str) and is_pattern(name) and is_pattern(list_pattern(name), groups=1) for name in names
    )


def _are_numbers(value: object) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(number) is int for number in value))


def _are_tokens(value: object) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids) for ids in lists)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


MOST = 10**9  # of ranks and alphas; far beyond any use, and well within float32
_LEFT_OUT: dict[str, Any] = {
    "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {}, "layers_to_transform": [], "layers_pattern": [], "target_modules": [], "exclude_modules": [],
    "modules_to_save": [], "target_parameters": [], "trainable_token_indices": [],
}  # fmt: skip
_VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "a whole number from 1 on"),
    "lora_alpha": (_is_alpha, "a number"),
    "lora_dropout": (_is_share, "a number from 0 to below 1"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),  # how the base keeps its weight: nothing that a LoRA computes with
    "rank_pattern": (lambda value: _is_table(value, _is_rank), "whole numbers under regular expressions"),
    "alpha_pattern": (lambda value: _is_table(value, _is_alpha), "numbers under regular expressions"),
    "layers_to_transform": (_are_numbers, "a list of integers"),
    "layers_pattern": (_are_patterns, "names of lists of layers"),
    "target_modules": (_are_names, "a list of names, or one regular expression"),
    "exclude_modules": (_are_names, "a list of names, or one regular expression"),
    "trainable_token_indices": (_are_tokens, "a list of token ids, or such lists by names of layers"),
    "target_parameters": (lambda value: isinstance(value, list) and _are_names(value), "a list of names"),
    "modules_to_save": (_is_list, "a list of names"),
}


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
    key = first_matching(patterns or {}, path)
    return default if patterns is None or key is None else patterns[key]
