"""config.json of a Hugging Face folder: what is in it, and the configuration of its model."""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from qgraft.checkpoints.foreign import FOREIGN, ForeignErrors, one_line
from qgraft.checkpoints.layouts import is_claimed
from qgraft.errors import CheckpointError, UnsupportedError, worded
from qgraft.json_files import read_object
from qgraft.models.find import find_architecture

ADAPTER = "adapter_config.json"  # PEFT's, of an adapter
MOST_LAYERS = 10_000  # a module is made for each, before any tensor is looked for
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # fields of configurations
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")  # of them for each token
_COUNTS_OF_LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises CheckpointError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        hint = "give a .gguf file or a folder saved by transformers"
        if (folder / ADAPTER).is_file():
            hint = "this is an adapter: give its base as the model, and this folder as the adapter"
        if (folder / "model_index.json").is_file():
            hint = f"this is a diffusion model: {worded(flags='qgraft diffuse', python='qgraft.diffusion.load()')} takes it"
        raise CheckpointError(f"{folder}: no config.json", hint=hint)
    raw = read_object(path, CheckpointError, finite=False)
    for part in [raw, *(each for each in raw.values() if isinstance(each, dict))]:  # text_config and the like
        for key in _COUNTS_OF_LAYERS & part.keys():
            if type(count := part[key]) is int and not 1 <= count <= MOST_LAYERS:  # other types transformers refuses
                raise CheckpointError(
                    f"{path}: {key}: got {str(count)[:80]}, expected a number from 1 to {MOST_LAYERS}"
                )
    return raw


def adapter_note(folder: Path) -> list[str]:
    """One sentence where an adapter lies beside the model: transformers would load that, too."""
    if not (folder / ADAPTER).is_file():
        return []
    asked = worded(flags=f"--adapter {folder}", python=f"load_adapter(model, {str(folder)!r})")
    return [f"the folder holds an adapter beside the model ({ADAPTER}), which is not loaded with it: {asked} does that"]


def folder_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder's model, without a look at its weights. Raises as load_folder."""
    return config_of(folder, read_config_json(folder))


def config_of(folder: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that read_config_json() read. Raises as load_folder."""
    path = folder / "config.json"
    quantization = raw.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config: got {quantization!r}, expected an object")
    if not is_claimed(raw):
        raise UnsupportedError(
            f"{folder} is already quantized with {quantization.get('quant_method')!r}",
            hint="load the float checkpoint with quantize=..., or a GGUF",
        )
    kind = raw.get("model_type")
    if not isinstance(kind, str | None):
        raise CheckpointError(f"{path}: model_type: got {str(kind)[:80]!r}, expected a name")
    architecture = find_architecture(raw)
    if architecture is not None:
        with ForeignErrors(str(path)):
            return architecture.config.from_dict(raw)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except FOREIGN as error:
        if kind in CONFIG_MAPPING:
            raise CheckpointError(f"{path}: {one_line(error)}") from error
        raise UnsupportedError(f"{folder}: model_type {kind!r} is unknown to transformers") from error
    if hasattr(
        config, "quantization_config"
    ):  # a layout of ours reads it; the model is not transformers' quantized one
        del config.quantization_config
    _check_chosen(config.get_text_config(), path)
    return config


def _check_chosen(config: PreTrainedConfig, path: Path) -> None:
    """Refuse more experts for each token than there are, or none, and a list of their numbers (Hunyuan's) that is not one for
    each layer: transformers would find out in the first pass."""
    experts = next((n for name in _EXPERTS if type(n := getattr(config, name, None)) is int), 0)
    for name in {config.attribute_map.get(name, name): None for name in _CHOSEN} if experts > 0 else ():
        chosen = getattr(config, name, None)
        if isinstance(chosen, list) and len(chosen) != (layers := config.num_hidden_layers):
            raise CheckpointError(f"{path}: {name}: got a list of {len(chosen)}, expected {layers}, one for each layer")
        for each in chosen if isinstance(chosen, list) else [chosen]:
            if type(each) is int and not 1 <= each <= experts:
                raise CheckpointError(f"{path}: {name}: got {each}, expected a number from 1 to {experts}, the experts")
