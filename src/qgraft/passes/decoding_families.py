"""Which decoders of transformers kernels compute as a whole (decoding_network.py): a table of exact classes.

    family          attention                                    instead of, or beside, gate, up and down
    llama ...       Llama's; norms of heads; windows
    qwen3_moe       norms of heads                               softmax, chosen, normalized
    qwen2_moe                                                    softmax, chosen; a shared expert with a gate
    mixtral         a window                                     softmax, chosen, normalized
    olmoe           norms of all heads together                  softmax, chosen
    granitemoe      multiplied residuals and embeddings          chosen, softmax of these
    glm4_moe        rotates a part of a head                     sigmoid, groups, chosen by a corrected score; shared experts
    dots1           norms of heads, windows                      likewise
    ernie4_5_moe    rotates neighbours                           softmax, chosen by a corrected score; shared experts
    gpt_oss         sinks, windows                               chosen, softmax of these; biases; a clamped gate

Layers without experts, wherever a family has some, are Llama's. A formula is that of one class, so a class that is not in the
table is not computed, however it is called.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qgraft.errors import UnsupportedError
from qgraft.kernels.decoder import Routing


@dataclass(frozen=True)
class Mixture:
    """The experts of a family's layers, whose class is the family's name and "Experts".

    Attributes:
        block, router: classes of what holds all of it, and of what chooses, without the family's name.
        routing: the formula, of the router's own options.
        at, chooses: what the layer calls the block, and the block the router.
        shared: what the block calls the experts that all tokens share; shared_gate: what it calls their gate.
        correction: what is called so is added to the scores that experts are chosen by; keeper: (name, class) of what
            has it in the router, which has it itself without one.
    """

    block: str
    router: str
    routing: Callable[[Any], Routing]
    at: str = "mlp"
    chooses: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    correction: str | None = None
    keeper: tuple[str, str] | None = None


@dataclass(frozen=True)
class Family:
    """A decoder's classes and formula.

    Attributes:
        name: what its classes are called: f"{name}Model", ...
        window: which layers `sliding_window` is of: those that "layer_types" says, "all", or "none".
        head_norms: "heads" of queries and keys one by one, "wide" all of them together, or "" for none.
        partial, pairs: whether the first channels of a head may be rotated alone; whether neighbours are.
        sinks: whether each head has a score for nothing.
        unserved: an option of the configuration that must be None.
    """

    name: str
    window: str = "layer_types"
    head_norms: str = ""
    partial: bool = False
    pairs: bool = False
    sinks: bool = False
    unserved: str | None = None
    mixture: Mixture | None = None

    def windows(self, config: Any) -> list[int]:
        """Of each layer, how many tokens it sees at most; 0 for all. A layer sees what the mask that it is given shows."""
        layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or 0
        if self.window != "layer_types":
            return [window if self.window == "all" else 0] * layers
        types = getattr(config, "layer_types", None) or ["full_attention"] * layers
        return [window if name == "sliding_attention" else 0 for name in types]


def _softmax(router: Any) -> Routing:
    return Routing(router.top_k, "softmax", normalized=router.norm_topk_prob)


def _normalized_softmax(router: Any) -> Routing:
    return Routing(router.top_k, "softmax", normalized=True)


def _logits(router: Any) -> Routing:
    return Routing(router.top_k, "logits")


def _floored_softmax(router: Any) -> Routing:
    return Routing(router.top_k, "softmax", normalized=True, least_sum=router.norm_min)


def _sigmoid(router: Any) -> Routing:
    return Routing(
        router.top_k, "sigmoid", router.num_group, router.topk_group, normalized=router.norm_topk_prob, added_to_sum=1e-20,
        scaling=router.routed_scaling_factor,
    )  # fmt: skip


_CORRECTION = "e_score_correction_bias"
_OF_SIGMOID = Mixture("MoE", "TopkRouter", _sigmoid, shared="shared_experts", correction=_CORRECTION)
FAMILIES: Mapping[str, Family] = {  # transformers.models -> classes
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window="all"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", head_norms="heads"),
    "qwen3_moe": Family(
        "Qwen3Moe", window="all", head_norms="heads", mixture=Mixture("SparseMoeBlock", "TopKRouter", _softmax)
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        mixture=Mixture(
            "SparseMoeBlock", "TopKRouter", _softmax, shared="shared_expert", shared_gate="shared_expert_gate"
        ),
    ),
    "mixtral": Family("Mixtral", window="all", mixture=Mixture("SparseMoeBlock", "TopKRouter", _normalized_softmax)),
    "olmoe": Family(
        "Olmoe", window="none", head_norms="wide", unserved="clip_qkv",
        mixture=Mixture("SparseMoeBlock", "TopKRouter", _softmax),
    ),
    "granitemoe": Family(
        "GraniteMoe", window="none",
        mixture=Mixture("MoE", "TopKRouter", _logits, at="block_sparse_moe", chooses="router"),
    ),
    "glm4_moe": Family("Glm4Moe", window="none", head_norms="heads", partial=True, mixture=_OF_SIGMOID),
    "dots1": Family("Dots1", head_norms="heads", mixture=_OF_SIGMOID),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe", window="none", pairs=True,
        mixture=Mixture(
            "SparseMoeBlock", "TopKRouter", _floored_softmax, shared="shared_experts",
            correction=_CORRECTION, keeper=("moe_statics", "Statics"),
        ),
    ),
    "gpt_oss": Family("GptOss", sinks=True, mixture=Mixture("MLP", "TopKRouter", _logits, chooses="router")),
}  # fmt: skip


def family_of(base: nn.Module) -> str:
    """The family of a decoder, by its class. Raises UnsupportedError for all others."""
    for name, family in FAMILIES.items():
        if type(base) is class_of(name, f"{family.name}Model"):
            return name
    raise UnsupportedError(f"it decodes {', '.join(f'{family.name}Model' for family in FAMILIES.values())} only")


def class_of(family: str, name: str) -> Any:
    """A class of a family, or None where its module was never imported, so that nothing can be of that class."""
    kind = "configuration" if name.endswith("Config") else "modeling"
    return getattr(sys.modules.get(f"transformers.models.{family}.{kind}_{family}"), name, None)
