"""load(): one door for every kind of base: a GGUF file, a folder, a hub id, or the name of a known model."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import base_of
from qgraft.adapters.transformers_names import Method, speak_transformers
from qgraft.checkpoints.folder_config import folder_config, read_config_json
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.folder_write import CONTAINER as FOLDER
from qgraft.checkpoints.gguf_from_folder import why_not_gguf
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.checkpoints.heads import Task
from qgraft.checkpoints.layouts.chatglm import stated_bits
from qgraft.checkpoints.pull import from_hub, known_names, pull
from qgraft.checkpoints.save import save_pretrained
from qgraft.checkpoints.thudm_prefix import attach_own_prefix
from qgraft.data.ends import end_token_ids
from qgraft.data.scripted import WritesPrompts
from qgraft.data.templates import ChatTemplate, tokenizers_own
from qgraft.errors import CheckpointError, OptionError, UnsupportedError, option
from qgraft.given import path_given
from qgraft.model_parts import CAUSAL, is_encoder_decoder, pairs_unsupported
from qgraft.models.find import architecture_of, find_architecture
from qgraft.releases import check_releases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    *,
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a base with its weights packed.

    Args:
        model: path of a .gguf file, a Hugging Face folder, a hub id ("org/name", or "org/name:file.gguf"), or the name
            of a known model ("smollm2-135m", fetched once).
        quantize: packs the linear layers of a float checkpoint in this format while loading.
        dtype: what activations are computed in; "auto" is float32 on a CPU and bfloat16 on a GPU that has it.
        device: where the packed weights go; "auto" is a GPU where there is one.
        task_type: SEQ_CLS or TOKEN_CLS makes a classifier of a folder (heads.py), IMAGE_TEXT_TO_TEXT loads also what sees
            images; None for what its config.json says.
        labels: names of what it tells apart, by their ids; None for the folder's own.
        problem_type: single_label_classification, multi_label_classification or regression, as in transformers.

    Returns an ordinary transformers model in evaluation mode, frozen, with `model.qgraft` on it (adapters/base.py; what was
    loaded is its `info`), and its tokenizer (None for a folder without one). A ChatGLM's folder that holds a prefix
    (P-Tuning v2) beside the weights loads with it attached and active, named "default". Warns, once, of releases of
    transformers and others that qgraft was not tested with. Raises CheckpointError, UnsupportedError or OptionError.
    """
    check_releases()
    device = choose_device(device)
    compute_dtype = choose_dtype(dtype, device)
    path_given("model", model)
    task = Task(task_type, labels, problem_type)
    path = _resolve(os.fspath(model))  # as it is spelt: ./org/name is no name of the hub
    if path.is_dir():
        loaded, tokenizer = load_folder(path, compute_dtype, quantize, task)
    elif task not in (Task(), Task(CAUSAL)):
        raise UnsupportedError(
            f"task_type={task_type!r}: {path.name} is a GGUF file, whose models read and write text; classifiers and models "
            "of images come from folders",
            hint="give the folder of the float checkpoint",
        )
    elif quantize is not None:
        raise UnsupportedError(
            f"quantize={quantize!r} with {path.name}: a GGUF file's weights are loaded as they are stored",
            hint="leave quantize out, or give the float checkpoint's folder",
        )
    else:
        loaded, tokenizer = load_gguf(path, compute_dtype)
    base_of(loaded).tokenizer = tokenizer  # merging reads rows with it
    _note_no_way_out(loaded, quantize)
    if tokenizer is not None and not isinstance(tokenizer, WritesPrompts) and not is_encoder_decoder(loaded.config):
        _set_end_tokens(loaded, tokenizer)
    loaded = loaded.to(device)  # type: ignore[arg-type]
    if path.is_dir() and architecture_of(loaded.config):
        attach_own_prefix(loaded, path)
    speak_transformers(loaded)
    loaded.save_pretrained = Method(loaded, "save_pretrained", save_pretrained)
    return loaded, tokenizer


def refuse_encoder_decoder(model: str | Path, action: str) -> None:
    """Raise UnsupportedError where `model` is a local folder of an encoder-decoder, whose config.json alone is read."""
    path = Path(model).expanduser()
    if path.is_dir() and is_encoder_decoder(folder_config(path)):
        raise pairs_unsupported(action)


def _note_no_way_out(model: PreTrainedModel, quantize: str | None) -> None:
    """Say now, not after a training and a merge, where packed weights could be written nowhere."""
    base = base_of(model)
    if quantize is None or quantize in FOLDER.held or base.info is None or (why := why_not_gguf(model)) is None:
        return
    note = f"a merge into {quantize} weights could not be saved (an adapter can): {why}"
    base.info = replace(base.info, notes=(*base.info.notes, note))


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generate() stop where a turn ends, also where the file names only the end of a text; see data/ends.py."""
    generation = model.generation_config
    if generation is not None:
        own, _ = tokenizers_own(tokenizer)
        template = ChatTemplate(own, "tokenizer") if own else None
        generation.eos_token_id = end_token_ids(tokenizer, generation.eos_token_id, template) or None


def chatglm_format(model: str | Path, bits: int) -> str | None:
    """What load() must quantize a ChatGLM in to have its weights in so many bits, 4 or 8; None if they are already.

    It is what model.quantize(bits) of the release makes of a float16 checkpoint. Raises UnsupportedError for weights of
    another width, which were rounded before, and for what is no folder of a ChatGLM.
    """
    path = _resolve(str(model))
    raw = read_config_json(path) if path.is_dir() else {}
    if find_architecture(raw) is None:
        hint = (
            f"{option('quantize', 'q4_1')} packs other float checkpoints"
            if path.is_dir()
            else "a GGUF is loaded as it is: leave it out"
        )
        raise UnsupportedError(f"quantization_bit={bits}: {model} is no folder of a ChatGLM", hint=hint)
    stored = stated_bits(raw)
    if stored not in (None, bits):
        raise UnsupportedError(
            f"quantization_bit={bits}: the weights in {model} are in {stored} bits already",
            hint=f"give quantization_bit={stored}, leave it out, or give the float checkpoint's folder",
        )
    return None if stored else f"chatglm-int{bits}"


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in. On a CPU "auto" is always float32: exact, and bfloat16 is many times slower on most."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise OptionError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def choose_device(device: str | torch.device) -> torch.device:
    """The device to use. Raises OptionError for an unknown or missing one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device={device!r}: expected cpu, cuda, cuda:1 or the like") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device={str(device)!r}: torch finds no GPU here", hint="use cpu, or a torch build with CUDA"
        )
    return chosen


def _resolve(model: str) -> Path:
    """The local path of what the user named, fetched first where it is a name."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model in known_names():
        return pull(model)
    name, _, file = model.partition(":")
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    if is_hub_id and (not file or file.endswith(".gguf")):
        return from_hub(name, file)
    raise CheckpointError(
        f"{model}: no such file or folder",
        hint=f"give a .gguf file, a folder, a hub id (org/name) or one of: {', '.join(known_names())}",
    )
