"""Ranks and alphas of single layers: PEFT's rank_pattern and alpha_pattern, {regular expression: value}.

    rank_pattern {"layers.0.self_attn.q_proj": 32, ".*mlp.*": 4}    alpha_pattern {"down_proj": 32}

A key counts for a layer whose module path, or the last parts of it, it matches as a whole; of several the first one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qgraft.adapters.lora import LoraConfig
from qgraft.errors import OptionError, near_match
from qgraft.patterns import first_matching, is_ending
from qgraft.ranges import ABOVE_0, RANK


def check_layer_ranks(rank_pattern: Mapping[str, Any] | None, alpha_pattern: Mapping[str, Any] | None) -> None:
    """Raise OptionError for what is no table of regular expressions, or holds a number that cannot be, all at once."""
    problems = []
    for name, table, allowed in (("rank_pattern", rank_pattern, RANK), ("alpha_pattern", alpha_pattern, ABOVE_0)):
        if not isinstance(table, Mapping | None):
            problems.append(f"{name}={table!r}: expected {{regular expression: number}}")
            continue
        for key, value in (table or {}).items():
            if not is_ending(key):
                problems.append(f"{name}: {key!r} is no regular expression")
            if value not in allowed:
                problems.append(f"{name}: {key}={value!r}: expected {allowed}")
    if problems:
        raise OptionError("; ".join(problems))


def configs_of(
    paths: Iterable[str],
    config: LoraConfig,
    rank_pattern: Mapping[str, Any] | None = None,
    alpha_pattern: Mapping[str, Any] | None = None,
) -> dict[str, LoraConfig]:
    """The options of each layer: those of `config`, and what the tables say of it.

    Raises OptionError for tables that cannot be (check_layer_ranks), or a key that stands for none of these layers.
    """
    check_layer_ranks(rank_pattern, alpha_pattern)
    found, ranks, alphas = list(paths), rank_pattern or {}, alpha_pattern or {}
    for name, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if idle := [key for key in table if all(first_matching([key], path) is None for path in found)]:
            leaves = sorted({path.rpartition(".")[2] for path in found})
            raise OptionError(f"{name}: no layer of this LoRA matches {', '.join(idle)}; it is on {', '.join(leaves)}",
                              hint=near_match(idle[0], leaves))  # fmt: skip
    configs = {}
    for path in found:
        rank, alpha = first_matching(ranks, path), first_matching(alphas, path)
        configs[path] = replace(
            config,
            r=config.r if rank is None else ranks[rank],
            lora_alpha=config.lora_alpha if alpha is None else alphas[alpha],
        )
    return configs
