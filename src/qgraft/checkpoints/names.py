"""Which tensors of a folder's files make up each parameter of a model of transformers.

Mostly a parameter and its tensor have the same name. They do not where the files are older than the code, or were made of
the model without its output layer, or keep apart what the code keeps together:

    h.0.attn.c_attn.weight                  transformer.h.0.attn.c_attn.weight          gpt2 as published
    embed_out.weight                        lm_head.weight                              GPT-NeoX, Pythia
    mlp.experts.{0..7}.w1.weight, .w3.weight    mlp.experts.gate_up_proj [8, 2I, H]     Mixtral

transformers keeps these rules in a table, and loads by it; the same table, in the same order, is read here, so that a name
means what it means there. Only the rules are transformers': the tensors stay in their files until somebody asks.
Rules that only rename leave a matrix packed; what several tensors are computed into is floats.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qgraft.errors import CheckpointError

Tensors = Mapping[str, Callable[[], Tensor]]


@dataclass(eq=False)
class Names:
    """Where the parameters and buffers of a model come from.

    Attributes:
        stored: parameter -> the tensor that is its value.
        made: parameter -> the rule that computes it, with the tensors it takes; one rule may make several parameters.
        unexpected: tensors that the model has no place for.
    """

    stored: dict[str, str] = field(default_factory=dict)
    made: dict[str, "_Made"] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.stored or parameter in self.made


@dataclass(eq=False)
class _Made:
    """One rule of transformers' for some tensors of the files; it is applied once.

    Attributes:
        first: the parameter that the rule names, of those that it makes.
        sources: the tensors that it takes, each with the pattern of the rule that it fits.
    """

    first: str
    rule: WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)

    def value(self, parameter: str, model: PreTrainedModel, tensors: Tensors) -> Tensor:
        """The parameter, computed; each may be asked for once. Raises CheckpointError where the rule does not fit."""
        if not self.values:
            rule: Any = deepcopy(self.rule)
            for source, pattern in self.sources:
                rule.add_tensor(self.first, source, pattern, tensors[source])
            try:
                made = rule.convert(self.first, model=model, config=model.config)
            except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                self._check_shapes(tensors)
                raise CheckpointError(f"{parameter} cannot be made of {len(self.sources)} tensors: {error}") from error
            self.values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        if parameter not in self.values:
            raise CheckpointError(f"{parameter} is not among what is made of {self.sources[0][0]} and others")
        return self.values.pop(parameter)

    def _check_shapes(self, tensors: Tensors) -> None:
        """Raise CheckpointError for the first tensor whose shape is not that of most others of its pattern."""
        by_pattern: dict[str, dict[str, tuple[int, ...]]] = {}
        for source, pattern in self.sources:
            by_pattern.setdefault(pattern, {})[source] = tuple(tensors[source]().shape)
        for shapes in by_pattern.values():
            expected, count = Counter(shapes.values()).most_common(1)[0]
            if odd := next((source for source, shape in shapes.items() if shape != expected), None):
                got = f"{odd}: got {list(shapes[odd])}"
                raise CheckpointError(f"{got}, expected {list(expected)}, as {count} others of its kind have")

    def stacked(self) -> list[list[str]]:
        """The tensors that the rule stacks, for each of the stacks that it puts side by side; none where it does more."""
        operations: list[Any] = list(self.rule.operations)
        kinds = [type(each) for each in operations]
        plain = kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and len(self.rule.target_patterns) == 1
        if not plain or [each.dim for each in operations] != [0, 1][: len(operations)]:
            return []
        return [[name for name, each in self.sources if each == pattern] for pattern in self.rule.source_patterns]


def same_names(model: PreTrainedModel, tensors: Iterable[str]) -> Names:
    """For models of our own: every name is what it says."""
    places, names = model.state_dict(), Names()
    for name in sorted(tensors):
        if name in places:
            names.stored[name] = name
        else:
            names.unexpected.append(name)
    return names


def transformers_names(
    model: PreTrainedModel, tensors: Iterable[str], places: Mapping[str, Any] | None = None
) -> Names:
    """As transformers' from_pretrained would assign these tensors to the model's parameters and buffers.

    Args:
        places: these by their names, where the modules of the model are no longer transformers' own.
    """
    places, names = model.state_dict() if places is None else places, Names()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    about_base: dict[str, Any] = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": places}
    made: dict[str, _Made] = {}
    for name in sorted(tensors, key=dot_natural_key):
        place, pattern = rename_source_key(name, renamings, converters, **about_base)
        if place not in places and name in places:  # a rule for other files than this one
            place, pattern = rename_source_key(name, [], [], **about_base)
        if place not in places:
            names.unexpected.append(name)
        elif pattern is None:
            names.stored[place] = name
        else:
            made.setdefault(place, _Made(place, by_pattern[pattern])).sources.append((name, pattern))
    for place, each in made.items():
        first, *others = each.rule.target_patterns
        names.made |= dict.fromkeys([place, *(place.replace(first, other) for other in others)], each)
    return names


def layers_of_now(model: nn.Module, paths: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """Which of the model's `layers` these paths mean, of which it has none, where transformers' table knows one for each."""
    if not isinstance(model, PreTrainedModel):
        return {}
    names = transformers_names(model, [f"{path}.weight" for path in paths], {f"{path}.weight": True for path in layers})
    return {name.removesuffix(".weight"): place.removesuffix(".weight") for place, name in names.stored.items()}
