"""Modules that an adapter trains whole, in PEFT's files: `modules_to_save` of adapter_config.json, and their tensors.

    "task_type": "SEQ_CLS", "modules_to_save": ["bert.pooler", "classifier"]
    base_model.model.classifier.weight, base_model.model.classifier.bias, ...

They are read of classifiers alone: with other models PEFT has whole embeddings and output layers there, which are refused
(peft_config.check_kind). The seal tells the labels by their ids, which PEFT's files do not.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qgraft.adapters.holder import modules_outside_adapters
from qgraft.adapters.whole import WholeHolder
from qgraft.model_parts import CAUSAL, CLASSIFIERS, heads_of, is_within, labels_of, task_of

LABELS, PROBLEM = "labels", "problem_type"  # in the seal
Whole = dict[str, dict[str, Tensor]]  # module path -> its tensors by their names within it


def told_of(model: nn.Module) -> dict[str, Any]:
    """What the seal of an adapter of this model says of its labels; nothing where it has none."""
    labels, config = labels_of(model), getattr(model, "config", None)
    return {LABELS: list(labels), PROBLEM: getattr(config, PROBLEM, None)} if labels else {}


def stated_labels(seal: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The labels that a seal tells, if it does."""
    found = (seal or {}).get(LABELS)
    return tuple(found) if isinstance(found, list) and all(isinstance(each, str) for each in found) else None


def whole_problems(
    model: nn.Module, config: Mapping[str, Any], whole: Whole, seal: Mapping[str, Any] | None
) -> tuple[Whole, list[str]]:
    """(those that fit the model's head, what differs, the kind of the model and its labels included)."""
    task, asked = task_of(model), config.get("task_type")
    problems, fitting, heads = [], Whole(), heads_of(model)
    if asked != task and ({task, asked} & CLASSIFIERS.keys()) and asked is not None:
        problems.append(f"it was trained for task_type {asked}, and the model is loaded for {task}")
    labels = stated_labels(seal)
    if task != CAUSAL and labels is not None and labels != labels_of(model):
        problems.append(f"labels: it tells {', '.join(labels)} apart, and the model {', '.join(labels_of(model))}")
    modules = dict(modules_outside_adapters(model))
    for path, tensors in whole.items():
        module = modules.get(path)
        if module is None or not is_within(path, heads):
            problems.append(f"the model has no head {path}")
            continue
        own = (module.base if isinstance(module, WholeHolder) else module).state_dict()
        wrong = [f"{path}: missing tensor {leaf}" for leaf in own.keys() - tensors.keys()]
        wrong += [f"{path}: unexpected tensor {leaf}" for leaf in tensors.keys() - own.keys()]
        wrong += [f"{path}.{leaf}: got {tensor.dtype} {list(tensor.shape)}, expected floats {list(own[leaf].shape)}"
                  for leaf, tensor in tensors.items()
                  if leaf in own and (tensor.shape != own[leaf].shape or not tensor.is_floating_point())]  # fmt: skip
        problems += wrong
        if not wrong:
            fitting[path] = tensors
    if heads and not is_within(heads[-1], whole) and not any(is_within(path, heads[-1:]) for path in whole):
        problems.append(f"it brings no head ({heads[-1]}): the base's own would answer")
    return fitting, problems
