"""Prefixes as THUDM's P-Tuning scripts for ChatGLM store them, read and written; see checkpoints/thudm_prefix.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgraft import storage, targets
from qgraft.adapter_files.peft_config import CONFIG, folder_hint
from qgraft.adapter_files.seal import SEAL
from qgraft.adapters.attach_prefix import layout_of
from qgraft.adapters.base import base_of, find_adapter
from qgraft.adapters.fit_prefix import StoredPrefix
from qgraft.adapters.prefix import encoder_of
from qgraft.adapters.states import non_finite
from qgraft.checkpoints.origin import Origin
from qgraft.checkpoints.thudm_prefix import KEY, has_weights, is_weight_file, read_thudm
from qgraft.errors import AdapterError, CheckpointError, OptionError, UnsupportedError, near_match, worded
from qgraft.json_files import read_object

LAYOUTS = ("chatglm", "chatglm2")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
BIN = "pytorch_model.bin"


def thudm_problem(model: nn.Module) -> str | None:
    """Why the model can have no prefix of this kind; None for a ChatGLM."""
    return None if layout_of(model) in LAYOUTS else f"it is of a ChatGLM, and this is a {type(model).__name__}"


def is_thudm(path: Path) -> bool:
    """Whether to look for a prefix of THUDM's scripts there: a weight file, or a folder of them that is no adapter's."""
    return is_weight_file(path) or (not (path / CONFIG).exists() and not (path / SEAL).exists() and has_weights(path))


def read_thudm_prefix(model: nn.Module, path: Path) -> StoredPrefix:
    """The prefix that THUDM's scripts left there. Raises AdapterError where there is none, or it cannot be read."""
    try:
        stored = read_thudm(path)
    except CheckpointError as error:
        raise AdapterError(error.message, hint=error.hint) from error
    if stored is None:
        missing = f"{path} holds no {CONFIG}, and no" if path.is_dir() else f"{path} holds no"
        raise AdapterError(f"{missing} {KEY}* among its tensors", hint=folder_hint())
    problem = thudm_problem(model)
    return replace(stored, problems=(*stored.problems, problem)) if problem else stored


def export_thudm(
    model: nn.Module, folder: str | Path, name: str | None = None, dtype: str = "float32", overwrite: bool = False
) -> int:
    """Write the prefix `name` (default: the only adapter) as THUDM's scripts do; returns the bytes of the weights.

    Args:
        folder: it is there whole or not at all.
        dtype: "float32", as the scripts save it, or "float16".
        overwrite: replace the folder where an earlier export wrote all that is in it.

    Raises AdapterError for a LoRA or NaN, UnsupportedError for a model that is no ChatGLM, OptionError, StorageError.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: expected {' or '.join(DTYPES)}", hint=near_match(dtype, DTYPES))
    folder, adapter = Path(folder), find_adapter(model, name)
    encoder = encoder_of(adapter)
    if problem := thudm_problem(model):
        raise UnsupportedError(
            f"a prefix in THUDM's layout: {problem}",
            hint=worded(flags="--to peft", python="save_adapter()") + " writes it for other programs",
        )
    targets.check_new(folder, overwrite)
    targets.check_folder_target(folder)
    state = {f"{KEY}{key}": p.detach().cpu().to(DTYPES[dtype]).contiguous() for key, p in encoder.named_parameters()}
    if broken := non_finite(state):
        raise AdapterError(f"prefix {adapter.name!r} is not written: NaN or infinity as {dtype} in {', '.join(broken)}")
    config = encoder.config
    options: dict[str, Any] = {**_base_config(model), "pre_seq_len": config.pre_seq_len}
    with storage.publish_folder(folder) as staging:
        with open(staging / BIN, "wb") as file:  # given a path, torch raises something else for a full disk
            torch.save(state, file)
        storage.write_json(staging / "config.json", {**options, "prefix_projection": config.prefix_projection})
    return (folder / BIN).stat().st_size


def _base_config(model: Any) -> dict[str, Any]:
    """config.json of the base, as it is in its folder."""
    origin = base_of(model).origin
    if isinstance(origin, Origin) and (origin.path / "config.json").is_file():
        return read_object(origin.path / "config.json", CheckpointError, finite=False)
    return dict(model.config.to_dict())
