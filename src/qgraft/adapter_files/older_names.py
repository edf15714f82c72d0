"""Adapters whose layers are called otherwise here: by another release of transformers, or with a tower beside them.

    model.layers.0.                  Qwen2-VL and its kind until transformers 4.51     model.language_model.layers.0.
    language_model.model.layers.0.   LLaVA, Gemma 3 and their kind until then          model.language_model.layers.0.
    vision_tower. ...                their towers                                      model.vision_tower. ...
    model.language_model.layers.0.   trained with the tower, and the base is a GGUF    model.layers.0.

What a layer of an older release is called now, transformers' own table says, by which folders are loaded
(checkpoints/names.py) and PEFT loads adapters. That a model with a tower and one without it have the same decoder of text,
it does not say: there the path of that decoder is exchanged, in front of its layers, its table and its output layer.

Only what this model has no layer for is renamed, and only to one of its layers that no other tensor is of.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qgraft.adapters.peft_names import parse_name, rename
from qgraft.adapters.targets import adaptable_layers
from qgraft.checkpoints.names import layers_of_now
from qgraft.model_parts import decoder_of, language_of
from qgraft.patterns import first_matching

_DECODER = re.compile(
    r"(?:model\.language_model|language_model\.model|model\.text_model|language_model|model)\.(layers\.\d+\..+|embed_tokens)"
)
_HEAD = re.compile(r"language_model\.(lm_head)")


def by_names_of_now(
    model: nn.Module, config: dict[str, Any], state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """PEFT's options and tensors with the names that this model's layers have, and a note where there were others."""
    paths = {name.path for key in state if (name := parse_name(key)) is not None}
    renamed = _renamed(model, paths)
    if not renamed:
        return config, state, ()
    tensors = {rename(key, renamed): tensor for key, tensor in state.items()}
    old, new = next(iter(renamed.items()))
    note = (
        f"{len(renamed)} layers are called otherwise here, as {old} is {new}: another release of transformers, or model"
    )
    return _options(config, renamed), tensors, (note,)


def _renamed(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """What the layers are called here that the model has under no such name, for those of which that can be told."""
    layers = adaptable_layers(model)
    missing = [path for path in sorted(paths) if path not in layers]
    found = layers_of_now(model, missing, layers) if missing else {}
    found |= {path: place for path in missing if path not in found and (place := _same_decoder(model, path)) in layers}
    counts = Counter([*found.values(), *paths])
    return {path: place for path, place in found.items() if counts[place] == 1}


def _same_decoder(model: nn.Module, path: str) -> str | None:
    """What a layer of a decoder of text is called here."""
    if (head := _HEAD.fullmatch(path)) is not None:
        return head[1]
    decoder = decoder_of(model)
    stem = language_of(model) or next((name for name, child in model.named_children() if child is decoder), None)
    found = _DECODER.fullmatch(path)
    return None if found is None or stem is None else f"{stem}.{found[1]}"


def _options(config: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The options with the ranks and alphas that they give these layers by their names of then, and the layers as targets."""
    options = dict(config)
    for key, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if patterns := config.get(key):
            by_path = {new: first_matching(patterns, old) for old, new in renamed.items()}
            own = {f"^{re.escape(new)}": config[usual] if found is None else patterns[found]
                   for new, found in by_path.items()}  # fmt: skip
            options[key] = {**own, **patterns}
    targets = config.get("target_modules")
    named = isinstance(targets, list) and not any("." in name for name in targets)  # by last parts, which are the same
    if not named and targets:
        options["target_modules"] = []
    return options
