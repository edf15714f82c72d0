"""What llama.cpp does not load, of files whose keys and tensors say all of a model: found out by having it load them.

    biases          an architecture has none in llama.cpp, or not these: it counts the tensors of a file
    output layer    it wants a tensor of its own where most architectures may share the embedding
    heads           their width times their number is the model's width; keys have as many as queries
    norms           of Command R's queries and keys, only in models of 64 layers and more
    kinds           of hybrids it wants layers of both: with none of one kind it aborts, for want of a cache to make
    shared keys     Gemma 4's come from the last two layers that have keys, one with a window and then one without

transformers has models of these architectures with one or the other, and reads such a file.
"""

from collections.abc import Collection
from typing import Any

_WITHOUT_BIASES = {  # how the names of tensors end whose biases it has no place for
    "arcee": ("",),
    "cohere2": ("",),
    "command-r": ("",),
    "ernie4_5": ("",),
    "hunyuan-dense": ("",),
    "hunyuan-moe": ("",),
    "seed_oss": ("ffn_gate", "ffn_up", "ffn_down", "attn_output"),
    "smollm3": ("",),
}
_OWN_OUTPUT = {"gpt-oss", "minimax-m2", "nemotron", "olmo2", "olmoe", "qwen2moe", "stablelm"}
_OF_TWO_KINDS = {"lfm2", "qwen35"}  # of layers: with states beside attention
_NORMED_FROM = 64  # layers


def why_unread(architecture: str, config: Any, names: Collection[str]) -> str | None:
    """Why llama.cpp does not load a file with these tensors, or None.

    Args:
        config: of the model in transformers' words.
    """
    endings = _WITHOUT_BIASES.get(architecture, ())
    blocks = [name for name in names if name.startswith("blk.")]
    biases = (
        [name for name in blocks if name.endswith(tuple(f"{ending}.bias" for ending in endings))] if endings else []
    )
    if biases:
        return f"llama.cpp has no {min(biases)} in this architecture"
    if architecture in _OWN_OUTPUT and "output.weight" not in names:
        return "llama.cpp wants an output layer apart from the embedding in this architecture"
    if architecture == "command-r" and config.num_hidden_layers < _NORMED_FROM and "blk.0.attn_q_norm.weight" in names:
        return f"llama.cpp has norms of queries and keys from {_NORMED_FROM} layers on in this architecture"
    if architecture == "nemotron" and config.num_attention_heads * config.head_dim != config.hidden_size:
        usual = config.hidden_size / config.num_attention_heads
        return f"llama.cpp wants heads of hidden_size / num_attention_heads = {usual:g}, got {config.head_dim}"
    if architecture == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        got = f"{config.num_attention_heads}, got {config.num_key_value_heads}"
        return f"llama.cpp wants as many heads of keys as of queries, {got}"
    if architecture in _OF_TWO_KINDS and len(kinds := set(config.layer_types)) == 1:
        return f"llama.cpp wants layers of two kinds in this architecture, and all of these are {kinds.pop()}"
    return _why_not_shared(config) if architecture == "gemma4" and config.num_kv_shared_layers else None


def _why_not_shared(config: Any) -> str | None:
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    if own[-2:] == ["sliding_attention", "full_attention"]:
        return None
    return (
        f"llama.cpp takes shared keys and values from the two layers before, one with a window and then one without, and "
        f"these are {own[-2:]}"
    )
