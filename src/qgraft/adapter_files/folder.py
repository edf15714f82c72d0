"""Adapter folders: PEFT's two files, sealed by a third. LoRAs (lora.py) and prefixes (prefix.py).

    adapter_config.json          PEFT's options            readable by PEFT and by us
    adapter_model.safetensors    PEFT's tensors            readable by PEFT and by us
    prefix_encoder.safetensors   of prefixes with a projection: what is trained
    tokenizer.json, ...          of LoRAs with new tokens: the tokenizer that has them
    calibration.safetensors      of LoRAs: rows of the training, to be merged with (calibration.py); may be deleted
    qgraft.json                  the seal: the base's fingerprint, SHA-256 of the other files, what it was trained on and
                                 with, versions, metrics. It takes its name before them, see storage.publish_files

PEFT loads an adapter for another base, with missing layers or NaN inside, without a word; such an adapter then does
nothing or harm. Here loading compares everything with the model, lists all that differs at once, and refuses;
`force=True` loads what fits and reports the rest. A folder without the seal (made by PEFT) loads as well; its base
cannot be verified and the report says so.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qgraft import storage
from qgraft.adapter_files.calibration import CALIBRATION, read_rows, write_rows
from qgraft.adapter_files.diffusers_lora import file_of, read_diffusers_lora
from qgraft.adapter_files.gguf_lora import read_gguf_lora
from qgraft.adapter_files.lora import (
    bare_options,
    fit_layers,
    fit_rows,
    holds_lora,
    inexact_layers,
    lora_content,
    made_of_pairs,
    parse_state,
)
from qgraft.adapter_files.older_names import by_names_of_now
from qgraft.adapter_files.peft_config import CONFIG, check_kind, checked_values, folder_hint, unknown_note
from qgraft.adapter_files.prefix import (
    ENCODER,
    check_prefix_config,
    is_prefix_config,
    prefix_content,
    stored_prefix,
)
from qgraft.adapter_files.seal import (
    EXACT,
    SEAL,
    is_exact,
    read_seal,
    remembered_arguments,
    seal_notes,
    sealed_files,
    write_seal,
)
from qgraft.adapter_files.sealed_base import base_hint, base_problems
from qgraft.adapter_files.thudm import is_thudm, read_thudm_prefix
from qgraft.adapter_files.tokens import new_tokens_of, stored_tokens
from qgraft.adapter_files.whole import told_of, whole_problems
from qgraft.adapters.attach import check_new_name, put_loras
from qgraft.adapters.base import base_of, find_adapter, selection_of
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.fit_prefix import StoredPrefix, fit_prefix
from qgraft.adapters.kept_rows import KeptRows
from qgraft.adapters.states import non_finite
from qgraft.adapters.token_rows import grows_vocabulary, token_ids
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.pickles import WORDS, load_tensors
from qgraft.checkpoints.shards import check_header
from qgraft.checkpoints.thudm_prefix import is_weight_file
from qgraft.data.new_tokens import take_new_tokens, write_tokenizer
from qgraft.errors import AdapterError, OptionError, near_match, option, worded
from qgraft.given import path_given
from qgraft.json_files import read_object

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedAdapter:
    """What load_adapter did: `applied` of `total` layers, what a reader should know, and of a prefix, what it is."""

    name: str
    applied: int
    total: int
    notes: tuple[str, ...] = ()
    about: str = ""

    def __str__(self) -> str:
        applied = f"{self.about}applied to {self.applied}/{self.total} layers"
        return "\n".join([f"adapter {self.name}: {applied}", *self.notes])


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    details: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    save_calibration: bool = False,
) -> None:
    """Write the adapter `name` (default: the only one), LoRA or prefix, into `folder`: all of its files, or none.

    An adapter that the folder holds is written over, as by save_pretrained of PEFT and transformers: this is what a loop of
    training calls again and again. The commands that write adapters (export, combine) ask for --overwrite.

    Args:
        details: what qgraft.json shall remember beside the base: "dataset", "arguments", "metrics", any JSON.
        dtype: of the stored weights; "float16" or "bfloat16" halve the file. They load as float32.
        save_calibration: the rows of its training that it keeps go with it, to be merged with; readable ones.

    Raises AdapterError when there is no such adapter or its weights hold NaN or do not fit into `dtype`, OptionError
    for another dtype, StorageError when it cannot be written.
    """
    folder, adapter = path_given("folder", folder), find_adapter(model, name)
    info = base_of(model).info
    source = None if info is None else info.source
    seal = {**(details or {}), "base": None if info is None else dataclasses.asdict(info)}
    if adapter.is_prefix:
        content = prefix_content(adapter, source)
        files = {WEIGHTS: content.served, **({ENCODER: content.trained} if content.trained else {})}
        write_adapter(folder, adapter.name, files, content.options, {**seal, "prefix": content.about}, dtype)
    else:
        config, state = lora_content(model, adapter, source)
        seal |= {EXACT: all(config.exact for config in adapter.configs.values()), **told_of(model)}
        kept = adapter.kept if save_calibration else None
        speaks = base_of(model).tokenizer if new_tokens_of(model, adapter) else None
        write_adapter(folder, adapter.name, {WEIGHTS: state}, config, seal, dtype, kept, speaks)
    selection_of(model).change(adapter.name, trained=remembered_arguments(seal))


def write_adapter(
    folder: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    details: Mapping[str, Any],
    dtype: str = "float32",
    kept: KeptRows | None = None,
    tokenizer: Any = None,
) -> None:
    """Write an adapter that is on no model; see save_adapter.

    Args:
        name: for messages.
        tensors: of each file of weights, by their names in it; the last file holds what is trained.
        config: what adapter_config.json holds.
        details: what the seal holds beside versions and checksums; "base" among it.
        kept: rows that go with it.
        tokenizer: of an adapter with new tokens; its files go with it.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}", hint=near_match(dtype, DTYPES))
    stored = {file: _converted(name, state, dtype) for file, state in tensors.items()}
    kind, files = "prefix" if is_prefix_config(config) else "lora", [CONFIG, *tensors, *([CALIBRATION] if kept else [])]
    parameters = sum(tensor.numel() for tensor in list(tensors.values())[-1].values())
    with storage.publish_files(folder, first=SEAL) as staging:
        for file, state in stored.items():
            write_safetensors(staging / file, {key: (WORDS[t.dtype], t) for key, t in state.items()}, {"format": "pt"})
        if kept is not None:
            write_rows(staging / CALIBRATION, kept)
        storage.write_json(staging / CONFIG, config)
        files += [] if tokenizer is None else write_tokenizer(staging, tokenizer)
        write_seal(staging, files, {**details, "kind": kind, "parameters": parameters})
    for file in {ENCODER, CALIBRATION} - {*files}:
        (folder / file).unlink(missing_ok=True)  # of an adapter that was here before


def _converted(name: str, state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors in `dtype` on the CPU. Raises AdapterError when they hold NaN or infinity there."""
    stored = {key: tensor.to("cpu", DTYPES[dtype]).contiguous() for key, tensor in state.items()}
    if broken := non_finite(stored):
        too_large = dtype != "float32" and not non_finite(state)
        raise AdapterError(
            f"adapter {name!r} is not saved: NaN or infinity in {len(broken)} tensors, {broken[0]} first",
            hint=f"its values are too large for {dtype}: save it as float32" if too_large else None,
        )
    return stored


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    force: bool = False,
    *,
    lora_alpha: float | None = None,
) -> LoadedAdapter:
    """Attach the adapter in `folder` to the model as `name`, and make it the active one.

    Args:
        folder: adapter folder (LoRA or prefix), a GGUF-LoRA file (gguf_lora.py), a LoRA of a diffusion model in one file
            (diffusers_lora.py), a prefix of THUDM's scripts, folder or file (checkpoints/thudm_prefix.py), or a file of a
            LoRA's tensors alone, which torch.save(lora_state_dict(model), "lora.pt") writes.
        force: load what fits although something differs; the report's notes say what.
        lora_alpha: that of a file of tensors alone, which holds none.

    Raises AdapterError that lists everything that differs: another base, missing or unexpected tensors, other shapes,
    another number of tokens, NaN, files that changed since they were sealed; UnsupportedError for a kind of adapter
    that is neither a plain LoRA nor a prefix, and for a model that takes no prefix.
    """
    loaded = stage_adapter(model, folder, name, force, lora_alpha=lora_alpha).put(name)
    use_adapter(model, name)
    return loaded


@dataclass(frozen=True, eq=False)
class StagedAdapter:
    """An adapter that was read, and is on no model yet.

    Attributes:
        alone: whether `put` needs the model for itself: the first prefix asks its attention for shapes, and changes it.
            LoRAs come between two calls or during one, which goes on without them, but those with new tokens: the model and
            its tokenizer get a longer vocabulary.
        put: puts it on the model under a name, inactive, and says what that did. Raises as load_adapter.
        grows: whether it brings tokens that the model and its tokenizer do not have.
    """

    alone: bool
    put: Callable[[str], LoadedAdapter]
    grows: bool = False


def stage_adapter(
    model: nn.Module, folder: str | Path, name: str, force: bool = False, *, lora_alpha: float | None = None
) -> StagedAdapter:
    """All of load_adapter that changes nothing of the model, and may be done while others call it; see there.

    A LoRA is compared with the model here, a prefix when it is put on.
    """
    folder = path_given("folder", folder)
    if folder.name in (WEIGHTS, PICKLED) and folder.with_name(CONFIG).is_file():
        folder = folder.parent
    check_new_name(model, name)
    if not folder.exists():
        raise AdapterError(f"{folder}: no such file or folder", hint=folder_hint())
    of_denoiser = file_of(model, folder)
    bare = of_denoiser is None and is_weight_file(folder) and holds_lora(folder)
    if lora_alpha is not None and not bare:
        raise OptionError(f"lora_alpha={lora_alpha}: {folder} has options of its own", hint="leave lora_alpha out")
    if bare:
        config, state, seal = read_bare_lora(folder, lora_alpha)
    elif of_denoiser is not None:
        config, state = read_diffusers_lora(model, of_denoiser)
        return _staged_lora(model, of_denoiser, config, state, None, name, force)
    elif is_thudm(folder):
        prefix = read_thudm_prefix(model, folder)
        return StagedAdapter(True, partial(_put_prefix, model, folder, prefix, None, force))
    else:
        config, state, seal = read_gguf_lora(model, folder) if folder.is_file() else read_adapter(folder)
    if is_prefix_config(config):
        prefix = stored_prefix(config, state, seal)
        return StagedAdapter(True, partial(_put_prefix, model, folder, prefix, seal, force))
    return _staged_lora(model, folder, config, state, seal, name, force)


def _staged_lora(
    model: nn.Module, folder: Path, config: dict[str, Any], state: dict[str, Tensor], seal: Mapping[str, Any] | None,
    name: str, force: bool,
) -> StagedAdapter:  # fmt: skip
    """The LoRA, compared with the model, and made."""
    config, state, renamed = by_names_of_now(model, config, state)
    stored = parse_state(state, config.get("modules_to_save"))
    rows, others = fit_rows(model, config, stored)
    fitting, misfits = fit_layers(model, config, stored, rows)
    whole, unlike = whole_problems(model, config, stored.whole, seal)
    inexact = inexact_layers(model, stored, fitting) if is_exact(seal) else {}
    problems = stored.problems + base_problems(model, seal) + misfits + others + unlike + list(inexact.values())
    problems += [f"{key}: NaN or infinity" for key in non_finite(state)]
    if problems and not force:
        raise _unfit(folder, problems, base_hint(model, seal) or f"load it on the base that it was trained on, or use "
                     f"{option('force')} to load what fits")  # fmt: skip
    if not fitting:
        raise AdapterError(f"{folder}: none of its {len(stored.pairs)} layers exists in this model")
    exact = fitting.keys() - inexact.keys() if is_exact(seal) else stored.minimums
    adapter = dataclasses.replace(
        made_of_pairs(model, name, config, fitting, exact, rows, whole), trained=remembered_arguments(seal),
        kept=read_rows(folder, seal),
    )  # fmt: skip
    tokens, told = stored_tokens(model, folder, adapter)
    notes = (*_notes(problems, seal), *renamed, *unknown_note(config), *told)
    about = f"rows of {len(token_ids(adapter))} tokens, " if rows else ""
    loaded = LoadedAdapter(name, len(fitting), len(stored.pairs), notes, about)

    def put(name: str) -> LoadedAdapter:
        if tokens:
            take_new_tokens(base_of(model).tokenizer, base_of(model).tokens, tokens)
        put_loras(model, dataclasses.replace(adapter, name=name))
        return dataclasses.replace(loaded, name=name)

    grows = any(token.text not in base_of(model).tokens for token in tokens) or grows_vocabulary(model, adapter)
    return StagedAdapter(bool(rows), put, grows)


def _put_prefix(
    model: nn.Module, folder: Path, stored: StoredPrefix, seal: Mapping[str, Any] | None, force: bool, name: str
) -> LoadedAdapter:
    """See StagedAdapter.put."""
    fitted = fit_prefix(model, stored)
    doubts = base_problems(model, seal) + fitted.doubts
    if fitted.misfits:
        raise _unfit(folder, [*fitted.misfits, *doubts], "a prefix fits only models with the same layers and key heads")
    if doubts and not force:
        raise _unfit(folder, doubts, base_hint(model, seal) or f"load it on the base that it was trained on, or use "
                     f"{option('force')} to load it anyhow")  # fmt: skip
    fitted.put(model, name)
    selection_of(model).change(name, trained=remembered_arguments(seal))
    config, layers = fitted.encoder.config, len(fitted.encoder.geometry.layers)
    about = f"prefix of {config.pre_seq_len} tokens{' with projection' * config.prefix_projection}, "
    return LoadedAdapter(name, layers, layers, (*stored.notes, *_notes(doubts, seal)), about)


def _unfit(folder: Path, problems: list[str], hint: str) -> AdapterError:
    return AdapterError(f"{folder} does not fit this model:\n  " + "\n  ".join(problems), hint=hint)


def _notes(problems: list[str], seal: Mapping[str, Any] | None) -> tuple[str, ...]:
    return (*(f"forced although: {problem}" for problem in problems), *seal_notes(seal))


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The contents of adapter_config.json. Raises AdapterError when it is missing or not JSON."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} holds no {CONFIG}", hint=folder_hint())
    return read_object(folder / CONFIG, AdapterError)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """(options, tensors, seal or None) of the adapter in `folder`, a plain LoRA or a prefix, as it was sealed.

    The tensors of a prefix are PEFT's and, where it has a projection, those of prefix_encoder.safetensors. Raises
    AdapterError, UnsupportedError; whether it fits a model is load_adapter's question.
    """
    config, seal = read_peft_config(folder), read_seal(folder)
    if is_prefix_config(config):
        check_prefix_config(folder / CONFIG, config)
    else:
        check_kind(folder / CONFIG, config)
        config = checked_values(folder / CONFIG, config)
    if changed := changed_files(folder, seal):
        raise AdapterError(f"{folder} changed since it was saved:\n  " + "\n  ".join(changed))
    state = read_tensors(folder)
    with_encoder = seal is not None and ENCODER in seal["files"]
    return config, state | read_safetensors(folder / ENCODER) if with_encoder else state, seal


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The tensors that a sealed adapter was trained in, by the names of Adapter.state_dict. Raises as read_adapter."""
    config, state, seal = read_adapter(folder)
    return dict(stored_prefix(config, state, seal).values) if is_prefix_config(config) else state


def changed_files(folder: Path, seal: Mapping[str, Any] | None) -> list[str]:
    """What differs from the seal, a line for each file; nothing where there is no seal. Raises AdapterError for no seal."""
    if seal is None:
        return []
    there = [name for name in (WEIGHTS, PICKLED, ENCODER) if (folder / name).is_file()]
    needed = [CONFIG, *(there or [WEIGHTS])]
    return storage.check_files(folder, sealed_files(folder / SEAL, seal, needed))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names, from safetensors or a pickle of tensors only. Raises AdapterError."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / PICKLED).is_file():
        raise AdapterError(f"{folder} holds no {WEIGHTS}", hint=folder_hint())
    return load_tensors(folder / PICKLED, AdapterError)


def read_bare_lora(path: Path, lora_alpha: float | None) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """(PEFT's options, tensors, no seal) of a file that holds the tensors of a LoRA and nothing else."""
    if lora_alpha is None:
        raise AdapterError(
            f"{path} holds a LoRA's tensors and none of its options: by which lora_alpha is it scaled?",
            hint=worded(flags="in Python: ", python="")
            + f"load_adapter(model, {path.name!r}, lora_alpha=16), with what "
            "attach_lora() was given (16 where nothing was); save_adapter() writes a folder that says it",
        )
    state = read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path, AdapterError)
    return checked_values(path, bare_options(state, lora_alpha)), state, None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file. Raises AdapterError."""
    check_header(path, AdapterError)
    try:
        state = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(f"{path}: the weights cannot be read: {error}") from error
    if odd := [f"{name}: {tensor.dtype}" for name, tensor in state.items() if tensor.dtype not in WORDS]:
        raise AdapterError(f"{path}: tensors of a kind that is not read: {', '.join(odd[:8])}")
    return state
