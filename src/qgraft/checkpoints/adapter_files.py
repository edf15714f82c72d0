"""Adapter folders: PEFT's two files, sealed by a third.

    adapter_config.json          PEFT's options                                           readable by PEFT and by us
    adapter_model.safetensors    base_model.model.<path>.lora_A.weight / .lora_B.weight   readable by PEFT and by us
    qgraft.json                  the seal, written last: the base's fingerprint, SHA-256 of both files, what it was
                                 trained on and with, versions, metrics

PEFT loads an adapter for another base, with missing layers or NaN inside, without a word; such an adapter then does
nothing or harm. Here loading compares everything with the model, lists all that differs at once, and refuses;
`force=True` loads what fits and reports the rest. A folder without the seal (made by PEFT) loads as well; its base
cannot be verified and the report says so.
"""

import dataclasses
import datetime
import json
import pickle
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qgraft import storage
from qgraft.adapters.attach import (
    attach_layers,
    find_targets,
    is_named,
    lora_modules,
    lora_state_dict,
    non_finite,
    only_adapter,
)
from qgraft.checkpoints.assemble import BaseInfo
from qgraft.checkpoints.gguf_lora import read_gguf_lora
from qgraft.checkpoints.peft_config import (
    check_kind,
    check_values,
    compiles,
    layer_config,
    peft_config,
    stated_rank,
)
from qgraft.errors import AdapterError, OptionError, near_match

CONFIG, WEIGHTS, SEAL = "adapter_config.json", "adapter_model.safetensors", "qgraft.json"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_UNWRITTEN = {"bytes": -1, "sha256": ""}  # no file is like this


@dataclass(frozen=True)
class LoadedAdapter:
    """What load_adapter did: `applied` of `total` layers, and what a reader should know."""

    name: str
    applied: int
    total: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"adapter {self.name}: applied to {self.applied}/{self.total} layers", *self.notes])


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    details: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write the LoRA `name` (default: the only one) into `folder`, each file whole, the seal last.

    Args:
        details: what qgraft.json shall remember beside the base: "dataset", "arguments", "metrics", any JSON.
        dtype: of the stored weights; "float16" or "bfloat16" halve the file. They load as float32.

    Raises AdapterError when there is no such adapter or its weights hold NaN or do not fit into `dtype`, OptionError
    for another dtype, StorageError when it cannot be written.
    """
    name = only_adapter(model, name)
    layers = {path: lora.config for path, lora in lora_modules(model, name)}
    base: BaseInfo | None = getattr(model, "qgraft_base", None)
    config = peft_config(layers, _target_names(model, list(layers)), base.source if base else None)
    seal = {**(details or {}), "base": None if base is None else dataclasses.asdict(base)}
    write_adapter(Path(folder), name, lora_state_dict(model, name), config, seal, dtype)
    _remember(model, name, seal)


def write_adapter(
    folder: Path,
    name: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    details: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Write an adapter that is on no model; see save_adapter.

    Args:
        name: for messages.
        state: the tensors by PEFT's names.
        config: what adapter_config.json holds.
        details: what the seal holds beside versions and checksums; "base" among it.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}", hint=near_match(dtype, DTYPES))
    stored = {key: tensor.to("cpu", DTYPES[dtype]).contiguous() for key, tensor in state.items()}
    if broken := non_finite(stored):
        too_large = dtype != "float32" and not non_finite(state)
        raise AdapterError(
            f"adapter {name!r} is not saved: NaN or infinity in {len(broken)} tensors, {broken[0]} first",
            hint=f"its values are too large for {dtype}: save it as float32" if too_large else None,
        )
    weights = safetensors.torch.save(stored, metadata={"format": "pt"})
    if not (folder / SEAL).is_file():  # a kill must not leave new weights beside another adapter's options, unnoticed
        storage.write_json(folder / SEAL, {"kind": "lora", "files": dict.fromkeys((CONFIG, WEIGHTS), _UNWRITTEN)})
    storage.write_file(folder / WEIGHTS, weights)
    storage.write_json(folder / CONFIG, config)
    seal = {
        **details,
        "kind": "lora",
        "base": details.get("base"),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "files": {file: storage.describe_file(folder / file) for file in (CONFIG, WEIGHTS)},
    }
    storage.write_json(folder / SEAL, seal)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", force: bool = False) -> LoadedAdapter:
    """Attach the adapter in `folder` to the model as `name`, and make it the active one.

    Args:
        folder: adapter folder, or a GGUF-LoRA file (gguf_lora.py).
        force: load what fits although something differs; the report's notes say what.

    Raises AdapterError that lists everything that differs: another base, missing or unexpected tensors, other shapes,
    NaN, files that changed since they were sealed; UnsupportedError for a kind of adapter that is not a plain LoRA.
    """
    folder = Path(folder)
    config, state, seal = read_gguf_lora(model, folder) if folder.is_file() else read_adapter(folder)
    loras, problems = parse_state(state)
    problems += _base_problems(model, folder, seal) + _target_problems(model, config, loras)
    problems += [f"{key}: NaN or infinity" for key in non_finite(state)]
    if problems and not force:
        raise AdapterError(
            f"{folder} does not fit this model:\n  " + "\n  ".join(problems),
            hint="load it on the base that it was trained on, or use force (--force) to load what fits",
        )
    fitting = {path: pair for path, pair in loras.items() if _shape_problem(model, path, pair) is None}
    if not fitting:
        raise AdapterError(f"{folder}: none of its {len(loras)} layers exists in this model")
    _attach(model, name, config, fitting)
    _remember(model, name, seal)
    notes = [f"forced although: {problem}" for problem in problems]
    if seal is None:
        notes.append(f"no {SEAL} beside it: which base it was trained on cannot be verified")
    return LoadedAdapter(name, len(fitting), len(loras), tuple(notes))


def trained_with(model: nn.Module, name: str) -> dict[str, Any]:
    """The arguments that the adapter `name` was trained with, as its seal has them; empty where they are not known."""
    return dict(getattr(model, "qgraft_trained", {}).get(name, {}))


def _remember(model: nn.Module, name: str, seal: Mapping[str, Any] | None) -> None:
    arguments = (seal or {}).get("arguments")
    known = {**getattr(model, "qgraft_trained", {}), name: arguments if isinstance(arguments, dict) else {}}
    model.qgraft_trained = known  # type: ignore[assignment]


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The contents of qgraft.json, or None where there is none. Raises AdapterError when it is not JSON."""
    return _read_json(folder / SEAL) if (folder / SEAL).is_file() else None


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The contents of adapter_config.json. Raises AdapterError when it is missing or not JSON."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} holds no {CONFIG}", hint="give the folder that save_adapter or PEFT wrote")
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """(options, tensors, seal or None) of the adapter in `folder`, which is a plain LoRA and as it was sealed.

    Raises AdapterError, UnsupportedError; whether it fits a model is load_adapter's question.
    """
    config, seal = read_peft_config(folder), read_seal(folder)
    check_kind(folder / CONFIG, config)
    check_values(folder / CONFIG, config)
    if seal is not None and (changed := storage.check_files(folder, sealed_files(folder / SEAL, seal))):
        raise AdapterError(f"{folder} changed since it was saved:\n  " + "\n  ".join(changed))
    return config, read_tensors(folder), seal


def sealed_files(path: Path, seal: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the seal at `path` says of the files beside it, for storage.check_files. Raises AdapterError for no seal."""
    files = seal.get("files")
    if not isinstance(files, dict) or not isinstance(seal.get("base") or {}, dict):
        raise AdapterError(f"{path} is not a seal: expected objects under `files` and `base`")
    return dict(files)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names, from safetensors or a pickle of tensors only. Raises AdapterError."""
    pickled = folder / "adapter_model.bin"
    try:
        if (folder / WEIGHTS).is_file():
            return safetensors.torch.load_file(folder / WEIGHTS)
        if pickled.is_file():
            loaded = torch.load(pickled, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise AdapterError(f"{pickled}: expected a dict of tensors")
            return loaded
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{folder}: the weights cannot be read: {error}") from error
    raise AdapterError(f"{folder} holds no {WEIGHTS}", hint="give the folder that save_adapter or PEFT wrote")


def parse_state(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({module path: {"A": [r, in], "B": [out, r]}}, what is wrong with the keys)."""
    loras: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"unexpected tensor {key}")
        else:
            loras.setdefault(match["path"], {})[match["part"]] = tensor
    for path, pair in list(loras.items()):
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            problems.append(f"missing tensor base_model.model.{path}.lora_{missing}.weight")
            del loras[path]
    return loras, problems


def _base_problems(model: nn.Module, folder: Path, seal: dict[str, Any] | None) -> list[str]:
    base: BaseInfo | None = getattr(model, "qgraft_base", None)
    trained = (seal or {}).get("base") or {}
    if base is None or not trained or trained.get("fingerprint") == base.fingerprint:
        return []
    return [
        f"trained on another base: {trained.get('fingerprint')} ({trained.get('source')}), "
        f"this one is {base.fingerprint} ({base.source})"
    ]


def _target_problems(model: nn.Module, config: dict[str, Any], loras: dict[str, dict[str, Tensor]]) -> list[str]:
    problems = []
    for path, pair in loras.items():
        if problem := _shape_problem(model, path, pair):
            problems.append(problem)
        elif pair["A"].shape[0] != (rank := stated_rank(config, path)):
            problems.append(f"{path}: rank {pair['A'].shape[0]}, but {CONFIG} says r={rank}")
    targets = config.get("target_modules")
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if targets and loras and not narrowed:
        expected = _targets_of(model, targets)
        problems += [f"missing tensors of {path}" for path in sorted(expected - loras.keys())]
    return problems


def _targets_of(model: nn.Module, targets: str | list[str]) -> set[str]:
    """The linear layers that PEFT's target_modules names: last parts or whole paths, or one regular expression."""
    linears = find_targets(model, r"(?s).*")
    if isinstance(targets, str):
        return {path for path in linears if compiles(targets) and re.fullmatch(targets, path)}
    return {path for path in linears for target in targets if is_named(path, target)}


def _shape_problem(model: nn.Module, path: str, pair: dict[str, Tensor]) -> str | None:
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        return f"the model has no layer {path}"
    if not hasattr(layer, "in_features"):
        return f"{path} is a {type(layer).__name__}, not a linear layer"
    A, B = pair["A"], pair["B"]
    if A.dim() != 2 or not A.is_floating_point() or not B.is_floating_point():
        got = f"A {list(A.shape)} {A.dtype}, B {list(B.shape)} {B.dtype}"
        return f"{path}: got {got}, expected two floating point matrices"
    expected = [A.shape[0], layer.in_features], [layer.out_features, A.shape[0]]
    if (list(A.shape), list(B.shape)) != expected:
        return f"{path}: got A {list(A.shape)}, B {list(B.shape)}, expected {expected[0]}, {expected[1]}"
    return None


def _attach(model: nn.Module, name: str, config: dict[str, Any], loras: dict[str, dict[str, Tensor]]) -> None:
    """Attach each layer with the rank of its tensors and the alpha of its pattern."""
    layers = {path: layer_config(config, path, pair["A"].shape[0]) for path, pair in loras.items()}
    attach_layers(model, name, layers, {path: (pair["A"], pair["B"]) for path, pair in loras.items()})


def _target_names(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The shortest names that select exactly these layers in PEFT: their last parts, or else their whole paths."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    for names in (leaves, sorted(paths)):
        if set(find_targets(model, names)) == set(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))  # one of them is the end of another layer's path


def _versions() -> dict[str, str]:
    packages = ("qgraft", "torch", "transformers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
