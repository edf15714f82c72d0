"""A prefix (P-Tuning v2) between a model and the files of its adapter folder.

    adapter_config.json          peft_type "PREFIX_TUNING", num_virtual_tokens P, num_layers L, num_attention_heads (those
                                 of the keys), token_dim (heads · head dim), prefix_projection, encoder_hidden_size
    adapter_model.safetensors    prompt_embeddings [P, 2 · L · token_dim]: all keys and values, laid out as in
                                 adapters/prefix.py; what the projection makes of the embedding, where there is one
    prefix_encoder.safetensors   with projection only: embedding.weight, trans.{0,2}.{weight,bias}, to go on training
    qgraft.json                  the seal; `prefix` in it holds what PEFT has no word for (layout, dropout, which layers)

PEFT evaluates the projection when it saves and throws it away: from its folder a prefix is served, and trained on only as
the bare values. So the projection has a file of its own, which counts only when the seal lists it. Not chosen: the
projection in adapter_model.safetensors. PEFT passes over tensors that it does not know, but reads all of them, and
ChatGLM-6B's projection is 30 times as large as what it makes.

Source: PEFT 0.21, tuners/prefix_tuning and peft_model.py (get_prompt).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgraft.adapter_files.peft_config import CONFIG, shown
from qgraft.adapters.adapter import Adapter
from qgraft.adapters.fit_prefix import LONGEST, ROWS, StoredPrefix, is_size
from qgraft.adapters.prefix import LAYOUTS, Geometry, PrefixEncoder, encoder_of
from qgraft.errors import AdapterError, UnsupportedError

ENCODER, PROMPT = "prefix_encoder.safetensors", "prompt_embeddings"
_SIZES = {"num_virtual_tokens": LONGEST, "num_layers": 10_000, "num_attention_heads": LONGEST, "token_dim": LONGEST}
_SEALED: dict[str, Callable[[Any], bool]] = {  # key of `prefix` in the seal -> whether its value can be one
    "prefix_dropout": lambda share: type(share) in (int, float) and 0 <= share < 1,
    "prefix_hidden_size": lambda width: width is None or is_size(width),
    "layout": LAYOUTS.__contains__,
    "layers": lambda layers: isinstance(layers, list) and all(type(layer) is int for layer in layers),
}


@dataclass(frozen=True, eq=False)
class PrefixContent:
    """What the files of a prefix hold.

    Attributes:
        options: adapter_config.json.
        served: adapter_model.safetensors.
        trained: prefix_encoder.safetensors; empty where there is no such file.
        about: `prefix` in the seal.
    """

    options: dict[str, Any]
    served: dict[str, Tensor]
    trained: dict[str, Tensor]
    about: dict[str, Any]


def prefix_content(adapter: Adapter, source: str | None) -> PrefixContent:
    """What save_adapter writes of a prefix on the base that came from `source`."""
    encoder = encoder_of(adapter)
    with torch.no_grad():
        values_PW = encoder.trans(encoder.embedding.weight).detach()  # without dropout, also in training
    return PrefixContent(
        _options(encoder, source),
        {PROMPT: values_PW},
        adapter.state_dict() if encoder.config.prefix_projection else {},
        dataclasses.asdict(encoder.config) | dataclasses.asdict(encoder.geometry),
    )


def _options(encoder: PrefixEncoder, source: str | None) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs to serve the prefix on the float model."""
    geometry, bias = encoder.geometry, dict(encoder.named_parameters()).get("trans.0.bias")
    return {
        "base_model_name_or_path": source,
        "encoder_hidden_size": geometry.width if bias is None else len(bias),
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_attention_heads": geometry.kv_heads,
        "num_layers": len(geometry.layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": encoder.config.pre_seq_len,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": encoder.config.prefix_projection,
        "task_type": "CAUSAL_LM",
        "token_dim": geometry.width,
    }


def is_prefix_config(config: Mapping[str, Any]) -> bool:
    """Whether PEFT's options are those of a prefix."""
    return config.get("peft_type") == "PREFIX_TUNING"


def check_prefix_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise AdapterError for options of a wrong type, all of them, UnsupportedError for what is more than a prefix."""
    problems = [
        f"{key}: got {shown(config.get(key))}, expected a whole number from 1 to {most}"
        for key, most in _SIZES.items()
        if not is_size(config.get(key), most)
    ]
    if not isinstance(config.get("prefix_projection", False), bool):
        problems.append(f"prefix_projection: got {shown(config['prefix_projection'])}, expected true or false")
    if not problems and config["token_dim"] % config["num_attention_heads"]:
        problems.append(f"token_dim: got {config['token_dim']}, expected a multiple of num_attention_heads")
    if problems:
        raise AdapterError(f"{path}:\n  " + "\n  ".join(problems))
    if (config.get("num_transformer_submodules") or 1) != 1 or config.get("modules_to_save"):
        raise UnsupportedError(f"{path.parent}: a prefix of an encoder-decoder, or with modules_to_save")


def stored_prefix(
    config: Mapping[str, Any], state: Mapping[str, Tensor], seal: Mapping[str, Any] | None
) -> StoredPrefix:
    """The prefix of an adapter folder.

    Args:
        config: PEFT's options, checked.
        state: the tensors of adapter_model.safetensors, and of prefix_encoder.safetensors where the seal lists it.
    """
    encoder = {key: tensor for key, tensor in state.items() if key == ROWS or key.startswith("trans.")}
    problems = [f"unexpected tensor {key}" for key in sorted(state.keys() - encoder.keys() - {PROMPT})]
    if encoder and PROMPT not in state:
        problems.append(f"missing tensor {PROMPT}")
    values = encoder or ({ROWS: state[PROMPT]} if PROMPT in state else {})
    about, wrong = _sealed_options(seal)
    heads = config["num_attention_heads"]
    notes = []
    if config.get("prefix_projection") and not encoder:
        notes.append("its projection is not in the folder: the values that it made are what would be trained on")
    return StoredPrefix(
        values,
        config["num_virtual_tokens"],
        f"{CONFIG} says num_virtual_tokens",
        prefix_projection=bool(encoder),
        prefix_hidden_size=about.get("prefix_hidden_size"),
        prefix_dropout=about.get("prefix_dropout", 0.0),  # PEFT has none
        layout=about.get("layout"),
        geometry=Geometry(tuple(about.get("layers", range(config["num_layers"]))), heads, config["token_dim"] // heads),
        layers_known="layers" in about,
        problems=(*problems, *wrong),
        rows=None if encoder else PROMPT,
        notes=tuple(notes),
    )


def _sealed_options(seal: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """(`prefix` of a seal, what is wrong in it); nothing where there is none."""
    about = (seal or {}).get("prefix")
    if about is None:
        return {}, []
    held = about if isinstance(about, dict) else {}
    if odd := [key for key, right in _SEALED.items() if key not in held or not right(held[key])]:
        return {}, [f"qgraft.json: `prefix` is not as save_adapter writes it: {', '.join(odd)}"]
    return dict(held), []
