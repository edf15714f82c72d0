"""What a base has to be loaded for, as its folder and an adapter's say it: of a classifier its task and its labels."""

from pathlib import Path
from typing import Any

from qgraft.adapter_files.folder import read_peft_config, read_tensors
from qgraft.adapter_files.peft_config import CONFIG
from qgraft.adapter_files.seal import read_seal
from qgraft.adapter_files.whole import PROBLEM, stated_labels
from qgraft.checkpoints.folder_config import read_config_json
from qgraft.errors import AdapterError
from qgraft.model_parts import CAUSAL, CLASSIFIERS, stated_task

_LAST = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def told_task(model: str | Path, adapter: str | Path | None = None) -> str | None:
    """SEQ_CLS or TOKEN_CLS, where the adapter's folder says so, or else the model's; None where neither does."""
    if adapter is not None and (Path(adapter) / CONFIG).is_file():
        task = read_peft_config(Path(adapter)).get("task_type")
        return task if task in CLASSIFIERS else None
    folder = Path(model).expanduser()
    task = stated_task(read_config_json(folder).get("architectures")) if (folder / "config.json").is_file() else CAUSAL
    return None if task == CAUSAL else task


def told_labels(model: str | Path, adapter: str | Path) -> dict[str, Any]:
    """What load() has to be given so that the adapter fits: task_type, labels and problem_type; nothing for one of a model
    that writes.

    PEFT's files tell no labels: then they are the base's own, or numbered, as many as the head has. Raises AdapterError.
    """
    task, folder = told_task(model, adapter), Path(adapter)
    if task is None or not (folder / CONFIG).is_file():
        return {}
    seal = read_seal(folder)
    labels = stated_labels(seal)
    problem = (seal or {}).get(PROBLEM)
    if labels is None:
        state = read_tensors(folder)
        heads = [tensor for name, tensor in state.items() if name.endswith(_LAST) and tensor.dim() == 2]
        if not heads and told_task(model) == task:
            return {"task_type": task}
        if not heads:
            raise AdapterError(f"{folder}: it is of a classifier, and brings no head",
                               hint="load its base with task_type and labels in Python")  # fmt: skip
        labels = tuple(f"LABEL_{number}" for number in range(len(heads[-1])))
        if told_task(model) == task and len(read_config_json(Path(model)).get("id2label") or ()) == len(labels):
            return {"task_type": task}
    return {"task_type": task, "labels": labels, "problem_type": problem if isinstance(problem, str) else None}
