"""load(): one door for every kind of base: a GGUF file, a folder, a hub id, or the name of a known model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.checkpoints.pull import KNOWN_MODELS, pull
from qgraft.errors import CheckpointError, OptionError, UnsupportedError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    *,
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a base with its weights packed.

    Args:
        model: path of a .gguf file, a Hugging Face folder, a hub id ("org/name", or "org/name:file.gguf"), or the name of
            a known model ("smollm2-135m", fetched once).
        quantize: packs the linear layers of a float checkpoint in this format while loading.
        dtype: what activations are computed in; "auto" is float32 on a CPU and bfloat16 on a GPU that has it.
        device: where the packed weights go.

    Returns an ordinary transformers model in evaluation mode, frozen, with `model.qgraft_base` (BaseInfo) on it, and its
    tokenizer (None for a folder without one). Raises CheckpointError, UnsupportedError or OptionError.
    """
    device = torch.device(device)
    compute_dtype = choose_dtype(dtype, device)
    path = _resolve(str(model))
    if path.is_dir():
        loaded, tokenizer = load_folder(path, compute_dtype, quantize)
    elif quantize is not None:
        raise UnsupportedError(
            f"quantize={quantize!r} with {path.name}: a GGUF file's weights are loaded as they are stored",
            hint="leave quantize out, or give the float checkpoint's folder",
        )
    else:
        loaded, tokenizer = load_gguf(path, compute_dtype)
    return loaded.to(device), tokenizer  # type: ignore[arg-type]


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


def _resolve(model: str) -> Path:
    """The local path of what the user named, fetched first where it is a name."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model in KNOWN_MODELS:
        return pull(model)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".gguf"):
        return _from_hub(model)
    raise CheckpointError(
        f"{model}: no such file or folder",
        hint=f"give a .gguf file, a folder, a hub id (org/name) or one of: {', '.join(KNOWN_MODELS)}",
    )


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, file = model.partition(":")
    try:
        if file:
            return Path(hf_hub_download(name, file))
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no *.py, no *.bin
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: neither a local path nor to be had from the hub: {str(error).splitlines()[0]}",
            hint="check the spelling and the network, or give a local path",
        ) from error
