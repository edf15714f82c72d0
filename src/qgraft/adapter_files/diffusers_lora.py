"""LoRAs of diffusion models in one file, as diffusers and as kohya's sd-scripts have them. Written and read here.

    diffusers   unet.<module path>.lora_A.weight [r, in]   unet.<module path>.lora_B.weight [out, r]     (transformer. ...)
                metadata `lora_adapter_metadata`: PEFT's options as JSON, each name with `unet.` in front; read by diffusers
                from 0.33 on. Without it alpha is the rank of each layer
    kohya       lora_unet_<module path with _ for .>.lora_down.weight    .lora_up.weight    .alpha
                alpha is a tensor without dimensions; without it it is the rank. SDXL's are also called by the blocks of the
                original code, lora_unet_input_blocks_4_1_..., which is read

kohya's scaling is alpha / r, so a rank-stabilized LoRA is written with the alpha that gives the same one. diffusers (0.42)
takes one alpha for all layers of attention in such a file, so one is written, and what differs is in lora_up. Its names for
transformers (Flux, SD3) are of layers that diffusers has in three parts each (q, k, v in one): they are refused, both ways.
A file may hold LoRAs of text encoders too; they are not for this model and are told as what does not fit.

Read as well: names without the part in front (save_lora_adapter of diffusers), and those of diffusers before 0.26,
<module path>.lora.down.weight and <attention>.processor.to_q_lora.down.weight.

Sources: loaders/lora_base.py, lora_conversion_utils.py of diffusers; networks/lora.py of sd-scripts.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from qgraft import storage
from qgraft.adapter_files.lora import lora_content, refuse_minimums
from qgraft.adapter_files.peft_config import check_kind, checked_values
from qgraft.adapters.base import base_of, find_adapter
from qgraft.adapters.dora import DoraLora
from qgraft.adapters.peft_names import parse_name, tensor_name
from qgraft.adapters.states import loras_of, non_finite
from qgraft.adapters.targets import adaptable_layers
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.pickles import WORDS
from qgraft.checkpoints.shards import open_shard
from qgraft.errors import AdapterError, CheckpointError, OptionError, UnsupportedError, near_match
from qgraft.given import path_given
from qgraft.json_files import parse_json

WEIGHTS, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
LAYOUTS = ("diffusers", "kohya")
METADATA = "lora_adapter_metadata"
_STEM = "base_model.model."
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
_KOHYA = re.compile(r"lora_(?:unet|te|te1|te2|transformer)_")
_OLD = re.compile(r"\.(?:processor\.(to_[qkv]|to_out)_lora|lora)\.(down|up)\.weight$")
_OLD_LAYERS = {"": "", "to_q": "to_q.", "to_k": "to_k.", "to_v": "to_v.", "to_out": "to_out.0."}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_|middle_block_(\d)_")


def part_of(model: nn.Module) -> str:
    """What names in a file of diffusers begin with: unet or transformer. Raises UnsupportedError for other models."""
    if not type(model).__module__.startswith("diffusers.models."):
        raise UnsupportedError(f"a {type(model).__name__} is no model of diffusers, so it has no LoRA files of theirs")
    return "unet" if type(model).__module__.startswith("diffusers.models.unets.") else "transformer"


def save_lora_weights(
    model: nn.Module, path: str | Path, name: str | None = None, layout: str = "diffusers", dtype: str = "float32"
) -> Path:
    """Write the LoRA `name` (default: the only one) of a denoiser into one file, whole or not at all.

    Args:
        path: a .safetensors file, or a folder, in which it gets the name that diffusers looks for.
        layout: "diffusers", or "kohya" for what ComfyUI, A1111 and sd-scripts read; of U-Nets only.
        dtype: of the stored weights: float32, float16 or bfloat16.

    Returns the file. Raises AdapterError (no such LoRA, NaN), UnsupportedError for what the layout cannot say, OptionError,
    StorageError.
    """
    for given, known, called in ((layout, LAYOUTS, "layout"), (dtype, tuple(_DTYPES), "dtype")):
        if given not in known:
            raise OptionError(f"{called}={given!r}: expected {', '.join(known)}", hint=near_match(given, known))
    target, part = path_given("path", path), part_of(model)
    if target.suffix != ".safetensors":
        target = target / (WEIGHTS if layout == "diffusers" else KOHYA)
    tensors, metadata = (_diffusers if layout == "diffusers" else _kohya)(model, part, find_adapter(model, name).name)
    stored = {key: tensor.to("cpu", torch.float32 if key.endswith(".alpha") else _DTYPES[dtype]).contiguous()
              for key, tensor in tensors.items()}  # fmt: skip
    if broken := non_finite(stored):
        raise AdapterError(f"the LoRA is not saved: NaN or infinity in {len(broken)} tensors, {broken[0]} first")
    storage.make_folder(target.parent)
    write_safetensors(target, {key: (WORDS[each.dtype], each) for key, each in stored.items()}, metadata)
    return target


def _diffusers(model: nn.Module, part: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    adapter, info = find_adapter(model, name), base_of(model).info
    loras_of(adapter, "save_lora_weights")
    refuse_minimums(adapter)
    config, state = lora_content(model, adapter, None if info is None else info.source)
    told = {f"{part}.{key}": value for key, value in config.items() if value is not None}
    tensors = {f"{part}.{key.removeprefix(_STEM)}": tensor for key, tensor in state.items()}
    return tensors, {"format": "pt", METADATA: json.dumps(told, sort_keys=True)}


def _kohya(model: nn.Module, part: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if part != "unet":
        raise UnsupportedError(
            f"layout=kohya: its names for a {type(model).__name__} are of layers that diffusers has in three parts each",
            hint='layout="diffusers", which ComfyUI and diffusers read as well',
        )
    tensors: dict[str, Tensor] = {}
    adapter = find_adapter(model, name)
    refuse_minimums(adapter)
    state, loras = adapter.state_dict(), loras_of(adapter, "save_lora_weights")
    alphas = {path: lora.stored_config.scaling * lora.stored_config.r for path, lora in loras.items()}
    alpha = mode(alphas.values())
    for path, lora in loras.items():
        if isinstance(lora, DoraLora):
            raise UnsupportedError("layout=kohya: a DoRA has lengths of rows, which diffusers does not read from there")
        stem = "lora_unet_" + path.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = state[tensor_name(path, "A")]
        tensors[f"{stem}.lora_up.weight"] = state[tensor_name(path, "B")] * (alphas[path] / alpha)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors, {"format": "pt", "ss_network_module": "networks.lora"}


# ---------------------------------------------------------------- reading


def file_of(model: nn.Module, path: Path) -> Path | None:
    """The file of this kind that `path` is, or that lies in the folder `path` without an adapter of PEFT's; else None.

    For a model of diffusers every safetensors file is one that has no names of PEFT's.
    """
    ours = type(model).__module__.startswith("diffusers.models.")
    for found in (path, path / WEIGHTS, path / KOHYA):
        if found.suffix == ".safetensors" and found.is_file() and not (path / "adapter_config.json").is_file():
            with ExitStack() as stack:
                try:
                    names = open_shard(found, stack).names
                except CheckpointError as error:
                    raise AdapterError(error.message, hint=error.hint) from error
            if ours and not any(name.startswith(_STEM) for name in names):
                return found
            return found if any(name.startswith(_PARTS) or _KOHYA.match(name) for name in names) else None
    return None


def read_diffusers_lora(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(PEFT's options, tensors by PEFT's names) of the file, for this denoiser. What is not for it keeps its name.

    Raises AdapterError for a broken file, UnsupportedError for names that no layer can be told from.
    """
    part = part_of(model)
    with ExitStack() as stack:
        try:
            shard = open_shard(path, stack)
            stored = {name: shard.tensor(name).clone() for name in shard.names}
        except CheckpointError as error:
            raise AdapterError(error.message, hint=error.hint) from error
        metadata = shard.metadata
    if any(map(_KOHYA.match, stored)):
        return _from_kohya(model, path, part, stored)
    front = f"{part}." if any(key.startswith(_PARTS) for key in stored) else ""
    own = {key for key in stored if key.startswith(front)}
    state = {_peft_key(key.removeprefix(front)) if key in own else key: each for key, each in stored.items()}
    if len(state) < len(stored):
        raise AdapterError(f"{path}: {len(stored) - len(state)} tensors are there twice, by names of old and of now")
    told = _told(path, front, metadata) if own else None
    return (_bare(state) if told is None else told), state


def _peft_key(key: str) -> str:
    """The name in PEFT's files of what diffusers calls so below the part."""
    key = _OLD.sub(lambda found: f".{_OLD_LAYERS[found[1] or '']}lora_{'A' if found[2] == 'down' else 'B'}.weight", key)
    return _STEM + key.removesuffix(".weight") + (".weight" * ("lora_magnitude_vector" not in key))


def _told(path: Path, front: str, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's options in the file's metadata, which have `front` before their names; None for a file without."""
    if METADATA not in metadata:
        return None
    try:
        options = parse_json(metadata[METADATA])
    except ValueError as error:
        raise AdapterError(f"{path}: {METADATA} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise AdapterError(f"{path}: {METADATA}: got a {type(options).__name__}, expected an object")
    own = {key.removeprefix(front): value for key, value in options.items() if key.startswith(front)}
    if not own:
        raise AdapterError(f"{path}: {METADATA} has no option that begins with {front!r}: by which alpha is it scaled?",
                           hint="without any metadata the alpha is the rank")  # fmt: skip
    own = {"peft_type": "LORA", **own}
    check_kind(path / METADATA, own)
    return checked_values(path, own)


def _bare(state: Mapping[str, Tensor], alphas: Mapping[str, float] | None = None) -> dict[str, Any]:
    """PEFT's options of a LoRA without any: the alpha of a layer is its rank, but where it is told."""
    ranks = {name.path: tensor.shape[0] for key, tensor in state.items()
             if (name := parse_name(key)) is not None and name.part == "A" and tensor.dim()}  # fmt: skip
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    told = {f"^{re.escape(path)}": (alphas or {}).get(path, float(rank)) for path, rank in ranks.items()}
    dora = any("lora_magnitude_vector" in key for key in state)
    return {"peft_type": "LORA", "r": max(ranks.values(), default=1), "lora_alpha": 1, "rank_pattern": patterns,
            "alpha_pattern": told, "use_dora": dora}  # fmt: skip


def _from_kohya(
    model: nn.Module, path: Path, part: str, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if part != "unet":
        raise UnsupportedError(
            f"{path}: kohya's names of a {type(model).__name__} are of layers that diffusers has in three parts each",
            hint="pipeline.load_lora_weights() and save_lora_weights() of diffusers write it in their layout",
        )
    paths = {each.replace(".", "_"): each for each in adaptable_layers(model)}
    layers: Any = getattr(model, "config", {}).get("layers_per_block", 2)
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    said: dict[str, str] = {}
    for key, tensor in stored.items():
        stem, _, leaf = key.partition(".")
        name = _diffusers_block(stem.removeprefix("lora_unet_"), layers if isinstance(layers, int) else 2)
        layer = paths.get(name) if stem.startswith("lora_unet_") else None
        if layer is None or leaf not in ("alpha", "lora_down.weight", "lora_up.weight"):
            state[key] = tensor
        elif leaf == "alpha":
            if tensor.numel() != 1 or not bool(torch.isfinite(tensor.float()).all()):
                got = f"a tensor {list(tensor.shape)}" if tensor.numel() != 1 else float(tensor)
                raise AdapterError(f"{path}: {key}: got {got}, expected one finite number")
            alphas[layer], said[layer] = float(tensor), key
        else:
            state[tensor_name(layer, "A" if leaf.startswith("lora_down") else "B")] = tensor
    for layer, key in said.items():
        if not {tensor_name(layer, "A"), tensor_name(layer, "B")} & state.keys():
            state[key] = stored[key]  # an alpha of nothing does not fit
    return _bare(state, alphas), state


def _diffusers_block(name: str, layers: int) -> str:
    """What diffusers calls a layer of a U-Net that the original code has in input_blocks, middle_block and output_blocks."""
    found = _BLOCK.match(name)
    if found is None:
        return name
    rest = name[found.end() :]
    if found[4] is not None:
        return f"mid_block_attentions_0_{rest}" if found[4] == "1" else name
    number, inner = int(found[2]), found[3]
    if inner != "1":
        return name
    number -= found[1] == "input"
    block, layer = divmod(number, layers + 1)
    return f"{'down' if found[1] == 'input' else 'up'}_blocks_{block}_attentions_{layer}_{rest}"
