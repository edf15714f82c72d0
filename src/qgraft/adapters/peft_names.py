"""PEFT's names of the tensors of a LoRA: the only place that knows how they are made up.

    base_model.model.<module path>.lora_A.weight       [r, in]
    base_model.model.<module path>.lora_B.weight       [out, r]
    base_model.model.<module path>.lora_embedding_A    [r, vocabulary]     of an embedding
    base_model.model.<module path>.lora_embedding_B    [width, r]
    base_model.model.<module path>.lora_magnitude_vector   [out]       beside them, of DoRA
    base_model.model.<module path>.minimum_A           [r, groups]         of an exact LoRA on a K-quant (exact.py): no
    base_model.model.<module path>.minimum_B           [out, r]            names of PEFT's, which cannot compute it
    base_model.model.<module path>.token_adapter.trainable_tokens_delta    [tokens, width]    rows of single tokens
    base_model.model.<module path>.base_layer.weight   a copy of the base's weight beside a LoRA on the embedding or the
                                                       output layer; without `base_layer` where it was resized,
                                                       below `token_adapter` beside rows of single tokens
    base_model.model.<module path>.<its tensor>        of a module that is trained whole (modules_to_save)

PEFT's own model is `base_model.model`, with the adapter's name behind `lora_A`. Its files leave the name out; a state dict
of the whole model does not, so `default`, the name that PEFT gives, is read as well.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAME = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_(?P<of>embedding_)?(?P<part>[AB])(?:\.default)?(?P<weight>\.weight)?"
)
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_MINIMUMS = re.compile(r"base_model\.model\.(?P<path>.+)\.minimum_(?P<part>[AB])")
_ROWS = re.compile(r"base_model\.model\.(?P<path>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_COPY = re.compile(r"base_model\.model\.(?P<path>.+?)(?:\.token_adapter)?(?:\.base_layer)?\.weight")

# model_type of mixtures whose experts had matrices of these names in transformers 4: PEFT takes them in target_modules for
# those still, also where dense and shared layers are called so (_convert_peft_config_moe)
OF_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj"})
TAKEN_FOR_EXPERTS = frozenset(
    {"afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
     "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
     "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla",
     "solar_open"}
)  # fmt: skip
MAGNITUDE = "magnitude"


@dataclass(frozen=True)
class TensorName:
    """What one of PEFT's names says.

    Attributes:
        path: of the layer.
        part: "A" or "B" of its LoRA, MAGNITUDE of a DoRA; "rows" of single tokens; None for a copy of the base's weight.
        of_embedding: whether the LoRA is that of an embedding.
        of_minimums: whether it is an exact one on a K-quant.
    """

    path: str
    part: str | None = None
    of_embedding: bool = False
    of_minimums: bool = False


def tensor_name(path: str, part: str, of_embedding: bool = False) -> str:
    """PEFT's name of the A or B of a LoRA on the layer at this module path."""
    return f"base_model.model.{path}." + (f"lora_embedding_{part}" if of_embedding else f"lora_{part}.weight")


def minimums_name(path: str, part: str) -> str:
    """Our name of the A or B of an exact LoRA on the layer at this module path, which is in a K-quant."""
    return f"base_model.model.{path}.minimum_{part}"


def magnitude_name(path: str) -> str:
    """PEFT's name of the magnitudes of a DoRA on the layer at this module path."""
    return f"base_model.model.{path}.lora_magnitude_vector"


def rows_name(path: str) -> str:
    """PEFT's name of the rows of single tokens of the layer at this module path."""
    return f"base_model.model.{path}.token_adapter.trainable_tokens_delta"


def whole_name(path: str, leaf: str) -> str:
    """PEFT's name of a tensor of the module at this path, which is trained whole."""
    return f"base_model.model.{path}.{leaf}"


def whole_path(name: str, saved: Sequence[str]) -> tuple[str, str] | None:
    """(module path, name within it) of a tensor of a module that PEFT's modules_to_save names; None for other tensors."""
    stem, rest = "base_model.model.", name.removeprefix("base_model.model.")
    if is_lora(name) or not name.startswith(stem):
        return None
    parts = rest.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    path = next((path for path in paths if path.endswith(tuple(saved))), None)  # as PEFT compares them
    return None if path is None else (path, rest[len(path) + 1 :])


def rename(name: str, paths: Mapping[str, str]) -> str:
    """The name of a tensor with what `paths` has in the place of its module path, where it has that."""
    found, stem = parse_name(name), "base_model.model."
    if found is None or found.path not in paths:
        return name
    return stem + paths[found.path] + name.removeprefix(stem)[len(found.path) :]


def is_lora(name: str) -> bool:
    """Whether a tensor that is called so is, or means to be, of a LoRA."""
    return any(pattern.fullmatch(name) is not None for pattern in (_NAME, _MAGNITUDE, _MINIMUMS))


def parse_name(name: str) -> TensorName | None:
    """What the name of a tensor says; None for one that is not made up so."""
    if (lora := _NAME.fullmatch(name)) is not None:
        of_embedding = bool(lora["of"])
        return TensorName(lora["path"], lora["part"], of_embedding) if of_embedding != bool(lora["weight"]) else None
    if (minimums := _MINIMUMS.fullmatch(name)) is not None:
        return TensorName(minimums["path"], minimums["part"], of_minimums=True)
    if (magnitude := _MAGNITUDE.fullmatch(name)) is not None:
        return TensorName(magnitude["path"], MAGNITUDE)
    if (rows := _ROWS.fullmatch(name)) is not None:
        return TensorName(rows["path"], "rows")
    copied = _COPY.fullmatch(name)
    return None if copied is None else TensorName(copied["path"])
