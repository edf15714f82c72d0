"""Which adapters a request is for, and the bodies of those who load them: vLLM's and llama-server's.

    model = "base's name"          the base, or what `lora` says, or llama-server's global scales
    model = "law"                  an adapter
    model = "law=0.7+med=0.3"      a weighted mix; a name alone weighs 1
    lora  = [{"id": 0, "scale": 0.5}]      llama-server's: ids of /lora-adapters; those not listed count 0
    lora  = [{"name": "law", "scale": 0.5}] or {"law": 0.5}

Names and texts of vLLM's endpoints are those of vllm/entrypoints/serve/lora.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qgraft.ranges import Range
from qgraft.serving.fields import ApiError, check_known, flag_of, object_of, shown, text_of, wrong

WEIGHT = Range(-100, 100)  # of an adapter: far beyond what makes sense, and far below what no model computes with
_DECIMAL = re.compile(r"[+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?|[+-]?[0-9]+\.")

Weights = dict[str, float]


def mix_named(model: str) -> Weights | None:
    """The weights that a model's name says, {"law": 0.7, "med": 0.3}; None where it is no list of names with weights."""
    mix: Weights = {}
    for part in model.split("+"):
        name, equals, text = part.partition("=")
        weight = _number(text) if equals else 1.0
        if not name or name in mix or weight is None:
            return None
        mix[name] = weight
    return mix


def _number(text: str) -> float | None:
    number = float(text) if len(text) <= 30 and _DECIMAL.fullmatch(text) else None
    return number if number in WEIGHT else None


def lora_given(lora: object, listed: Mapping[int, str]) -> Weights:
    """The weights that a request's `lora` says.

    Args:
        listed: the adapters by their ids.

    Raises ApiError.
    """
    if isinstance(lora, Mapping):
        pairs = list(lora.items())
    elif isinstance(lora, list):
        pairs = [_pair(entry, listed) for entry in lora]
    else:
        raise _wrong_lora(lora)
    if any(not isinstance(name, str) for name, _ in pairs):
        raise _wrong_lora(lora)
    if odd := [weight for _, weight in pairs if weight not in WEIGHT]:
        raise wrong("lora", odd[0], f"weights: {WEIGHT}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ApiError(400, "lora: an adapter is listed twice", param="lora")
    return {name: float(weight) for name, weight in pairs}


def _pair(entry: object, listed: Mapping[int, str]) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping) or ("id" in entry) == ("name" in entry) or entry.keys() - {"id", "name", "scale"}:
        raise _wrong_lora(entry)
    scale = entry.get("scale", 1.0)
    if "name" in entry:
        return entry["name"], scale
    number = entry["id"]
    if type(number) is not int or number not in listed:
        ids = ", ".join(map(str, sorted(listed))) or "none, as no adapter is loaded"
        raise ApiError(400, f"lora: there is no adapter {str(number)[:50]}, expected one of {ids[:200]}", param="lora")
    return listed[number], scale


def _wrong_lora(given: object) -> ApiError:
    return wrong("lora", given, '[{"id": 0, "scale": 0.5}], [{"name": "law", "scale": 0.5}] or {"law": 0.5}')


@dataclass(frozen=True)
class LoadBody:
    """vLLM's body of /v1/load_lora_adapter."""

    name: str
    path: str
    replace: bool = False


def read_load(body: object) -> LoadBody:
    """Raises ApiError."""
    given = object_of(body)
    if not (given.get("lora_name") and given.get("lora_path")):
        raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", kind="InvalidUserInput")
    return LoadBody(text_of(given, "lora_name"), text_of(given, "lora_path"), flag_of(given, "load_inplace"))


def read_unload(body: object) -> str:
    """The name in vLLM's body of /v1/unload_lora_adapter. Raises ApiError."""
    given = object_of(body)
    if not given.get("lora_name"):
        raise ApiError(400, "'lora_name' needs to be provided to unload a LoRA adapter.", kind="InvalidUserInput")
    return text_of(given, "lora_name")


def loaded_text(name: str) -> str:
    """What vLLM answers."""
    return f"Success: LoRA adapter '{name}' added successfully."


def unloaded_text(name: str) -> str:
    """What vLLM answers."""
    return f"Success: LoRA adapter '{name}' removed successfully."


def read_scales(body: object, listed: Mapping[int, str]) -> Weights:
    """The global scales of llama-server's POST /lora-adapters: a list as in `lora`. Raises ApiError."""
    if not isinstance(body, list):
        raise ApiError(400, f'the body: got {shown(body)}, expected a list, [{{"id": 0, "scale": 0.5}}]')
    return lora_given(body, listed)


def adapters_body(
    listed: Mapping[int, str], paths: Mapping[str, str], scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """llama-server's GET /lora-adapters."""
    return [
        {"id": number, "path": paths.get(name, ""), "name": name, "scale": scales.get(name, 0.0)}
        for number, name in sorted(listed.items())
    ]


def read_tokenize(body: object) -> tuple[str, bool]:
    """(the text, whether with the tokens at a text's beginning) of llama-server's body. Raises ApiError."""
    given = object_of(body)
    check_known(given, {"content", "add_special"})
    return text_of(given, "content", empty=True), flag_of(given, "add_special")


def read_detokenize(body: object, size: int) -> list[int]:
    """The ids of llama-server's body, all of them below `size`. Raises ApiError."""
    tokens = object_of(body).get("tokens")
    if not isinstance(tokens, list):
        raise wrong("tokens", tokens, f"a list of ids below {size}")
    if odd := [token for token in tokens if type(token) is not int or not 0 <= token < size]:
        raise wrong("tokens", odd[0], f"ids below {size}")
    return tokens


def models_body(base: str, adapters: Mapping[str, str], created: int, context: int | None) -> dict[str, Any]:
    """OpenAI's GET /v1/models; adapters are models whose parent is the base, as vLLM lists them.

    Args:
        adapters: name -> where it is from.
    """
    own = {"id": base, "object": "model", "created": created, "owned_by": "qgraft", "root": base, "parent": None,
           "max_model_len": context}  # fmt: skip
    others = [
        {"id": name, "object": "model", "created": created, "owned_by": "qgraft", "root": path, "parent": base}
        for name, path in adapters.items()
    ]
    return {"object": "list", "data": [own, *others]}
