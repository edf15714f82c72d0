"""The configuration of a GGUF file's model, built from its keys by our own table (gguf_keys.py).

What llama.cpp computes where a key is absent, is computed here: its defaults, not those of transformers' classes. Where
llama.cpp itself departs from the model that a file was made of, the authors' model is followed:

    the window of Phi-3, StarCoder2   llama.cpp attends to everything
    yarn's beta and attention factor  llama.cpp passes over them (gguf_rope.py)
    longrope's long and short lists   llama.cpp goes by the session (gguf_rope.py)

Things that no key states are known from tensors (biases, a tied output, StableLM's parallel residual) or from the number
of layers (the attention scale of the largest Gemmas).
"""

import re
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_gemma import gemma3n_fields, gemma4_fields, unread_tensors
from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_key_parts import PATTERN, PER_LAYER, SHARED_SIZE, WINDOW, Keys
from qgraft.checkpoints.gguf_key_report import key_report
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_mixtures import MIXTURES, mixture_fields
from qgraft.checkpoints.gguf_rope import rope_parameters
from qgraft.checkpoints.gguf_t5 import settle_scale, t5_fields, t5_type
from qgraft.errors import CheckpointError, QgraftError, UnsupportedError
from qgraft.models.chatglm2 import ROTARY_BASE, ChatGLM2Config

_SOFT_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma 2 and 3n where the key is absent
_PERIODS = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gpt-oss": 2,
    "olmo2": 4,
}  # every so many layers one without a window
_SCALES = {"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}
_MOST_NAMED = 8
_USUAL_IDS = {"llama": {"bos": 1, "eos": 2}, "t5": {"eos": 1, "pad": 0}}  # of vocabularies whose file states none


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The configuration that the file's metadata states.

    Raises CheckpointError for values that cannot be, UnsupportedError for keys that would change the computation in a way
    that is not served.
    """
    header = Header(file)
    keys = TABLE[header.architecture]
    _check_sizes(header, file)
    _check_keys(header)
    values = {**keys.fixed, **_plain(header, keys), **_from_tensors(header, file), **_token_ids(file)}
    if header.architecture in ("gemma2", "gemma3"):
        values |= _gemma(header, file)
    elif header.architecture == "gemma3n":
        values |= gemma3n_fields(header, file)
    elif header.architecture == "gemma4":
        values |= gemma4_fields(header, file)
    elif header.architecture == "t5":
        values |= t5_fields(header, file)
    elif keys.rotates:
        values["rope_parameters"] = rope_parameters(header, file)
    if header.architecture == "chatglm":
        return _chatglm(header, values)
    if header.architecture in ("cohere2", "exaone4", "gpt-oss", "olmo2"):
        values |= _windowed(header, values["rope_parameters"])
    if header.architecture in ("lfm2", "lfm2moe"):
        values |= {"block_auto_adjust_ff_dim": False, **_key_heads(header)}
    if header.architecture in MIXTURES:
        values |= mixture_fields(header)
    if header.architecture in ("qwen35", "qwen35moe"):
        if header.count("ssm.time_step_rank") % header.count("ssm.group_count"):
            raise header.wrong("ssm.group_count", "a divisor of ssm.time_step_rank")
        values |= {
            "linear_value_head_dim": header.count("ssm.state_size"),
            "layer_types": [
                "full_attention" if header.attends(layer) else "linear_attention" for layer in range(header.layers)
            ],
        }
    if keys.type_of(header) == "granitemoeshared":
        values["shared_intermediate_size"] = header.count(SHARED_SIZE)
    if header.architecture == "mistral3":
        values |= {"sliding_window": None}  # transformers' default is one
        if keys.type_of(header) == "ministral3" and values["rope_parameters"]["rope_type"] != "yarn":
            raise header.refused("attention.temperature_scale", "0, where rope.scaling.type is not yarn")
    if header.architecture in ("phi3", "starcoder2") and header.get(WINDOW):
        values["sliding_window"] = header.count(WINDOW)
    if "original_max_position_embeddings" in values.get("rope_parameters", {}) and keys.model_type == "phi3":
        values["original_max_position_embeddings"] = values["rope_parameters"]["original_max_position_embeddings"]
    model_type = t5_type(file) if header.architecture == "t5" else keys.type_of(header)
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{file.path}: architecture {header.architecture!r}: transformers {transformers.__version__} has no {model_type}",
            hint="install a newer transformers",
        )
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ArithmeticError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        problem = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file.path}: transformers cannot read the configuration: {problem}") from error
    config.name_or_path = str(file.path)
    settle_scale(config, file)
    return config


def _chatglm(header: Header, values: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of our own code; half of each head is rotated, which llama.cpp does not do unless it is told."""
    header.count("rope.dimension_count")
    ratio = header.number("rope.freq_base", 10000.0) / ROTARY_BASE
    values |= {"rope_ratio": ratio, "rope_ratio_scales": "base" if ratio != 1 else None}
    with ForeignErrors(str(header.path)):
        config = ChatGLM2Config(**values)
    config.name_or_path = str(header.path)
    return config


def idle_tensors(header: Header, file: GgufFile) -> set[str]:
    """Tensors that are no part of the model here, and copied when it is saved: of layers that only draft tokens, and
    keys and values of layers that take those of others."""
    layers = header.layers
    if header.architecture in ("gemma3n", "gemma4"):
        return unread_tensors(header, file)
    return (
        {name for name in file.tensors if (match := re.match(r"blk\.(\d+)\.", name)) and int(match[1]) >= layers}
        if header.count("block_count") > layers
        else set()
    )


def notes_of(header: Header, file: GgufFile) -> tuple[str, ...]:
    """Sentences on layers that only draft, on tensors that nothing reads, on the keys that the table does not know."""
    drafts = header.count("block_count") - header.layers
    notes: tuple[str, ...] = (
        (f"{drafts} layers that only draft tokens are not loaded; a saved file has them as they are",) if drafts else ()
    )
    if header.architecture == "deepseek2" and header.get("attention.key_length_mla") is not None:
        notes += ("kv_b_proj is held as floats and takes no LoRA: the file has its keys transposed, its values apart",)
    if header.architecture == "granitemoe" and header.get(SHARED_SIZE):
        notes += ("shared_mlp.input_linear is held as floats and takes no LoRA: the file has its gate and up apart",)
    if idle := unread_tensors(header, file) if header.shared else ():
        notes += (
            f"{len(idle)} tensors of layers that take keys and values of others are not loaded; a saved file has them",
        )
    return notes + _unknown_keys_note(header)


def _unknown_keys_note(header: Header) -> tuple[str, ...]:
    unknown = key_report(header).unknown
    if not unknown:
        return ()
    more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
    return (f"metadata keys unknown to qgraft, without effect: {', '.join(unknown[:_MOST_NAMED])}{more}",)


def _check_sizes(header: Header, file: GgufFile) -> None:
    """Widths and counts are integers that the tensors can bear out, before anything is built in their size."""
    pattern = re.compile(r"enc\.blk\.(\d+)\." if header.architecture == "t5" else r"blk\.([^.]*)\.")
    blocks = {match[1] for name in file.tensors if (match := pattern.match(name))}
    widest = max((max(info.shape) for info in file.tensors.values()), default=0)
    required = ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"]
    optional = ["attention.head_count_kv", "attention.key_length", "attention.key_length_swa", PER_LAYER,
                "rope.dimension_count", "ssm.conv_kernel", "ssm.group_count", "ssm.state_size",
                "ssm.time_step_rank"]  # fmt: skip
    if TABLE[header.architecture].is_mixture:
        required.append("expert_count")  # or transformers' defaults would be taken
    if header.get("expert_count"):
        optional += TABLE[header.architecture].experts
    if header.architecture in ("lfm2", "lfm2moe"):
        optional.remove("attention.head_count_kv")  # by _key_heads
    if header.architecture == "qwen35moe":
        required.remove("feed_forward_length")
    if header.get(PER_LAYER) == 0:
        optional.remove(PER_LAYER)  # none
    experts = header.get("expert_count")
    bounds = {"block_count": len(blocks)} | ({"expert_used_count": experts} if type(experts) is int else {})
    problems: list[QgraftError] = []
    for key in (*required, *(key for key in optional if header.get(key) is not None)):
        try:
            if header.architecture in ("gemma3n", "gemma4") and key in (
                "feed_forward_length",
                "attention.head_count_kv",
            ):
                header.per_layer(key, most=widest)
            else:
                header.count(key, most=bounds.get(key, widest))
        except (CheckpointError, UnsupportedError) as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "\n  ".join(problem.message.removeprefix(f"{file.path}: ") for problem in problems)
        raise CheckpointError(f"{file.path}: the metadata does not fit the tensors:\n  {listed}")
    _check_vocabulary(file)


def _check_vocabulary(file: GgufFile) -> None:
    embedding, tokens = file.tensors.get("token_embd.weight"), file.metadata.get("tokenizer.ggml.tokens")
    if embedding is not None and tokens is not None and len(tokens) != embedding.shape[0]:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.tokens: got {len(tokens)} tokens, expected {embedding.shape[0]}, the rows of "
            "token_embd.weight"
        )


def _check_keys(header: Header) -> None:
    """Refuse, all at once, what would change the computation and is not served."""
    refused = key_report(header).refused
    lines = [f"{name}: got {header.metadata[name]!r:.80}, expected {expected}" for name, expected in refused.items()]
    if lines:
        raise UnsupportedError(f"{header.path}: metadata that is not served:\n  " + "\n  ".join(lines))


def _plain(header: Header, keys: Keys) -> dict[str, Any]:
    """The fields that one key sets."""
    values: dict[str, Any] = {}
    defaults = {"attention.head_count_kv": header.heads, "attention.key_length": header.head_dim,
                "interleave_moe_layer_step": 1}  # fmt: skip
    for key, field in keys.fields_of(header).items():
        if key == "block_count":
            values[field] = header.layers
        elif key.endswith("epsilon"):
            values[field] = header.number(key, zero=True)
        elif key.endswith("softcapping"):
            default = _SOFT_CAPS[key] if header.architecture in ("gemma2", "gemma3n") else 0.0
            values[field] = header.number(key, default, zero=not default) or None
        elif key in _SCALES:  # 0 is none
            usual = header.attention_width**-0.5 if key == "attention.scale" else 1.0
            values[field] = header.number(key, usual, zero=key != "logit_scale") or usual
        else:
            values[field] = header.count(key, defaults.get(key))
    return values


def _from_tensors(header: Header, file: GgufFile) -> dict[str, Any]:
    """What the presence and shape of tensors says."""
    names = {name.split(".", 2)[2] for name in file.tensors if name.startswith("blk.")}
    embedding = file.tensors.get("token_embd.weight")
    values: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in file.tensors}
    if embedding is not None:
        values["vocab_size"] = embedding.shape[0]
    if header.architecture == "falcon":
        grouped = header.count("attention.head_count_kv", header.heads) > 1 or "attn_norm_2.weight" in names
        values |= {"new_decoder_architecture": grouped, "num_ln_in_parallel_attn": 1 + ("attn_norm_2.weight" in names)}
    if header.architecture == "stablelm":
        values["use_parallel_residual"] = "ffn_norm.weight" not in names
    return values | {field: tensor in names for field, tensor in TABLE[header.architecture].present.items()}


def _token_ids(file: GgufFile) -> dict[str, int | None]:
    """The ids of special tokens; sentencepiece's are known where the file states none, as in llama.cpp."""
    usual = _USUAL_IDS.get(str(file.metadata.get("tokenizer.ggml.model")), {})
    return {
        f"{role}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id", usual.get(role))
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def _gemma(header: Header, file: GgufFile) -> dict[str, Any]:
    """Attention scale, windows and rotations of Gemma 2 and 3."""
    windows = _windows(header)
    values: dict[str, Any] = {
        "query_pre_attn_scalar": header.attention_width,
        "sliding_window": header.count(WINDOW, 4096) if any(windows) else header.count("context_length"),
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in windows],
    }
    rope = rope_parameters(header, file)
    if header.architecture == "gemma2":
        return values | {"rope_parameters": rope}
    local = {"rope_type": "default", "rope_theta": header.number("rope.freq_base_swa", 10000.0)}
    return values | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _key_heads(header: Header) -> dict[str, Any]:
    """The heads of keys in LFM2's layers of attention, and which layers these are."""
    key, layers = "attention.head_count_kv", header.count("block_count")
    stated = header.get(key)
    counts = [stated] * layers if type(stated) is int else stated
    heads = {count for count in counts or () if count != 0}
    if (
        not isinstance(counts, list)
        or len(counts) != layers
        or len(heads) != 1
        or not all(type(n) is int for n in counts)
    ):
        raise header.wrong(key, f"{layers} times 0 or one number of heads")
    kinds = ["full_attention" if count else "conv" for count in counts]
    return {"num_key_value_heads": heads.pop(), "layer_types": kinds}


def _windowed(header: Header, rope: dict[str, Any]) -> dict[str, Any]:
    """Windows of Cohere 2, gpt-oss, OLMo 3, EXAONE 4. Layers with one have OLMo 3's plain rotations, or EXAONE 4's only."""
    windows = _windows(header)
    values: dict[str, Any] = {
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in windows]
    }
    if header.architecture == "exaone4":
        if not any(windows) and (header.get(WINDOW) or 0) not in (0, header.count("context_length")):
            raise header.refused(WINDOW, "0, but in a model of 64 layers, whose windows llama.cpp knows by that number")
        return values | {"sliding_window": header.count(WINDOW, 4096) if any(windows) else None}
    if header.architecture in ("cohere2", "gpt-oss"):
        return values | {"sliding_window": header.count(WINDOW)}
    if not header.get(WINDOW):
        return {}
    ropes = {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": rope["rope_theta"]},
    }
    return values | {"sliding_window": header.count(WINDOW), "rope_parameters": ropes}


def _windows(header: Header) -> list[bool]:
    """For each layer whether it has a window."""
    layers, pattern = header.count("block_count"), header.get(PATTERN)
    if header.architecture == "exaone4" and layers != 64:
        return [False] * layers
    if header.architecture in ("gemma3", "olmo2") and not header.get(WINDOW):
        return [False] * layers
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(each in (0, 1) for each in pattern):
            raise header.wrong(PATTERN, f"{layers} times true or false")
        return [bool(each) for each in pattern]
    period = _PERIODS[header.architecture] if pattern is None else pattern
    if type(period) is not int or period < 0:
        raise header.wrong(PATTERN, "a number of layers, or a list of true and false")
    return [period == 0 or layer % period < period - 1 for layer in range(layers)]
