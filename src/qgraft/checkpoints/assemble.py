"""Build a transformers model around packed weights, without ever holding a float copy of it.

The model class is instantiated with its parameters on the meta device (shapes, no memory). Then every linear layer and
embedding is replaced by a QuantizedLinear or QuantizedEmbedding that holds the checkpoint's packed tensor, and all other
parameters and buffers (norms, biases, routers) are read as floats, experts as their reader has them: packed in a stack of
matrices (experts.py), or as floats. A checkpoint is seen here only as a function
from a parameter's name to its tensor, so a GGUF file and a folder of safetensors share all of this.

Replaced is what is known to compute x W^T + b, or to look up rows, by its exact type (`packable`). A subclass keeps its
class and gets floats: some scale what they look up, some count positions from 2, some return two tensors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from qgraft.checkpoints.foreign import ForeignErrors
from qgraft.compat import cap_scores, hide_what_comes
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.experts import IMPLEMENTATION, ExpertStack, PackedLayer, Stack, holds_experts, misfit, place
from qgraft.formats import PackedTensor, dequantize, hold_floats
from qgraft.linear import (
    PackedWeight,
    QuantizedEmbedding,
    QuantizedLinear,
)
from qgraft.model_parts import CAUSAL, heads_of, hears, is_encoder_decoder, is_within, language_of, stated_task
from qgraft.models.find import architecture_of
from qgraft.plain_layers import is_plain_linear, qualified_name, weight_is_read
from qgraft.rotary import by_call

MOST_PROBLEMS = 500  # listed; more than that is another model's file

# Reads the parameter called so in the transformers model; None when the checkpoint has no such tensor. A linear layer's
# or embedding's weight comes as a PackedTensor, the weights of experts may come as stacks of them, by the names that they get
# in the model, everything else as a floating point tensor.
Reader = Callable[[str], PackedTensor | dict[str, Stack] | Tensor | None]
Same = Mapping[str, str]  # parameter -> the one that it is the same tensor as, which the checkpoint has

_CLASSES: dict[str, Any] = {
    CAUSAL: AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}

# Embeddings whose only addition is a factor, and the attribute that it is in: those of the Gemmas, and of BART's family
_SCALED = {
    f"transformers.models.{kind}.modeling_{kind}.{name}TextScaledWordEmbedding": "scalar_embed_scale"
    for kind, name in (
        *(("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3", "Gemma3"), ("gemma3n", "Gemma3n")),
        *(("gemma4", "Gemma4"), ("gemma4_unified", "Gemma4Unified"), ("vaultgemma", "VaultGemma")),
    )
} | {
    f"transformers.models.{kind}.modeling_{kind}.{name}ScaledWordEmbedding": "embed_scale"
    for kind, name in (
        *(("bart", "Bart"), ("mbart", "MBart"), ("plbart", "PLBart"), ("m2m_100", "M2M100")),
        *(("bigbird_pegasus", "BigBirdPegasus"), ("blenderbot", "Blenderbot"), ("pegasus_x", "PegasusX")),
    )
}


def assemble(
    config: PreTrainedConfig,
    read: Reader,
    dtype: torch.dtype,
    source: str,
    known_problems: Sequence[str] = (),
    same: Same | None = None,
) -> PreTrainedModel:
    """The model of `config` with its weights from `read`, computing in `dtype`, in evaluation mode, fully frozen.

    Args:
        same: the tied parameters; without it those that the model's class and config say are tied.

    Raises CheckpointError when tensors are missing or have other shapes, or something is wrong already (all listed);
    UnsupportedError when there is no language model for the config, causal or from sequence to sequence.
    """
    model = empty_model(config, dtype)
    cap_scores(model)
    hide_what_comes(model)
    by_call(model)
    same = dict(model.all_tied_weights_keys) if same is None else same
    problems = list(known_problems)
    _fill_modules(model, read, dtype, problems, same)
    _fill_parameters(model, read, dtype, problems, same)
    if any(isinstance(module, ExpertStack) for module in model.modules()):
        model.set_experts_implementation(IMPLEMENTATION)
    if problems:
        shown = "\n  ".join(problems[:MOST_PROBLEMS])
        more = f"\n  ... and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise CheckpointError(f"{source} does not fit the architecture {config.model_type}:\n  {shown}{more}")
    # Output and input embeddings share their PackedWeight already; transformers must not tie floats on top of that.
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}
    if next(model.parameters(), None) is None:
        # All packed, without biases and weights of norms (OLMo): transformers asks parameters for device and dtype
        model.register_parameter("computes_in", nn.Parameter(torch.empty(0, dtype=dtype)))
    if not hasattr(model, "generation_config"):
        vars(model)["generation_config"] = None  # of a classifier, which generates nothing
    model.requires_grad_(False)
    return model.eval()


def packable(model: nn.Module, path: str) -> bool:
    """Whether the layer at `path` can hold a packed weight instead of a float one and compute the same."""
    module = model.get_submodule(path)
    kinds = (nn.Embedding, Conv1D)
    known = is_plain_linear(module) or type(module) in kinds or qualified_name(module) in _SCALED
    return known and not weight_is_read(model, path) and not is_within(path, heads_of(model))


def weight_formats(model: nn.Module) -> dict[str, int]:
    """Number of weights held in each format, shared ones counted once."""
    formats: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedLayer) and id(module.packed_weight) not in seen:
            seen.add(id(module.packed_weight))
            packed = module.packed_weight.get()
            formats[packed.format] = formats.get(packed.format, 0) + packed.shape[0] * packed.shape[1]
    return formats


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with its parameters on the meta device. Raises UnsupportedError where there is none."""
    architecture = architecture_of(config)
    foreign = ForeignErrors(f"architecture {config.model_type!r}", UnsupportedError)
    task = stated_task(config.architectures)
    auto: Any = _CLASSES[task]
    if is_encoder_decoder(config):
        if task != CAUSAL:
            raise UnsupportedError(
                f"{config.model_type}: an encoder-decoder as a classifier ({task}) is not served",
                hint="encoders and decoders have such heads: BERT, ALBERT, RoBERTa, Qwen, Llama",
            )
        if not hears(config) and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise UnsupportedError(
                f"{config.model_type} has an encoder that reads no text, or none that transformers has with a decoder",
                hint="encoder-decoders of text are loaded (T5, mT5, umT5, BART, mBART, Marian, Pegasus and their kind), and "
                "Whisper",
            )
        auto = AutoModelForSpeechSeq2Seq if hears(config) else AutoModelForSeq2SeqLM
    elif reads_images(config):
        auto = AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False), foreign:  # buffers (rotary tables) are computed, not loaded
        if architecture is not None:
            return architecture.model._from_config(config, dtype=dtype)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    if auto is AutoModelForImageTextToText and language_of(model) is None:
        raise UnsupportedError(
            f"{config.model_type}: this model of images has no decoder of text of its own",
            hint="those of the kinds of LLaVA, Qwen-VL, Gemma 3 and Idefics 3 (SmolVLM) are loaded",
        )
    return model


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether the configuration names the class of transformers that reads images and texts (heads.settle_task says so)."""
    named: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return named is not None and [named.__name__] == config.architectures


def _fill_modules(model: PreTrainedModel, read: Reader, dtype: torch.dtype, problems: list[str], same: Same) -> None:
    held: dict[str, PackedWeight] = {}  # by the name it was read under: tied layers share it
    for path in [path for path, _ in model.named_modules() if path and packable(model, path)]:
        module: Any = model.get_submodule(path)
        name = same.get(f"{path}.weight", f"{path}.weight")
        weight = held.get(name)
        if weight is None:
            found = read(name)
            if found is None:
                problems.append(f"missing {path}.weight {list(module.weight.shape)}")
                continue
            assert not isinstance(found, dict)
            packed = found if isinstance(found, PackedTensor) or found.dim() != 2 else hold_floats(found)
            expected = tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)
            if not isinstance(packed, PackedTensor) or packed.shape != expected:  # only matrices come packed
                problems.append(f"{path}.weight: got shape {list(packed.shape)}, expected {list(expected)}")
                continue
            weight = held[name] = PackedWeight(packed)
        model.set_submodule(path, _packed_module(module, weight, _kept_dtype(model, f"{path}.weight", dtype)))


def _packed_module(module: nn.Module, weight: PackedWeight, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, _SCALED.get(qualified_name(module), ""), 1.0))
        return QuantizedEmbedding(weight, dtype, scale, module.padding_idx)
    bias: Any = module.bias  # on the meta device; read with the other parameters
    return QuantizedLinear(weight, None if bias is None else torch.empty_like(bias), dtype)


def _fill_parameters(model: PreTrainedModel, read: Reader, dtype: torch.dtype, problems: list[str], same: Same) -> None:
    """The parameters that are left, and the buffers."""
    filled: dict[str, nn.Parameter] = {}  # by the name it was read under
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if not parameter.is_meta or (leaf == "weight" and packable(model, owner)):  # the latter is reported already
            continue
        module: Any = model.get_submodule(owner)
        stored = same.get(name, name)
        if stored not in filled:
            value = read(stored)
            if value is None and hasattr(
                module, "create_weight"
            ):  # sinusoids (Marian, Pegasus): a formula, not in the files
                value = module.create_weight()
            if value is None:
                problems.append(f"missing {name} {list(parameter.shape)}")
                continue
            if isinstance(value, dict):
                problem = misfit(module, leaf, value) if holds_experts(module) else "the model computes with floats"
                if problem is None:
                    place(module, leaf, value)
                else:
                    problems.append(f"{name}: {problem}")
                continue
            if value.shape != parameter.shape:
                problems.append(f"{name}: got shape {list(value.shape)}, expected {list(parameter.shape)}")
                continue
            kept = _kept_dtype(model, name, dtype)
            value = dequantize(value, kept) if isinstance(value, PackedTensor) else value.to(kept)
            filled[stored] = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, filled[stored])
    problems += _fill_buffers(model, read)


def _fill_buffers(model: PreTrainedModel, read: Reader) -> list[str]:
    """What is wrong with the buffers that a checkpoint may hold. One that no layer has in it keeps what it was made with."""
    saved, problems = model.state_dict().keys(), list[str]()
    absent: dict[str, list[str]] = {}  # by the name without numbers of layers
    held = set()
    for name, buffer in list(model.named_buffers()):
        if name not in saved or ".packed_weight." in name:
            continue
        value, kind = read(name), re.sub(r"\.\d+\.", ".", name)
        if value is None:
            absent.setdefault(kind, []).append(f"missing {name} {list(buffer.shape)}")
            continue
        held.add(kind)
        if isinstance(value, Tensor) and value.shape == buffer.shape:
            buffer.copy_(value)
        elif isinstance(value, Tensor | PackedTensor):
            problems.append(f"{name}: got shape {list(value.shape)}, expected {list(buffer.shape)}")
    return problems + [each for kind in held for each in absent.get(kind, ())]


def _kept_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter: `dtype`, but for those that the architecture wants in float32 whatever it computes in."""
    patterns = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    return torch.float32 if any(re.search(pattern.replace("*", r"\w+"), name) for pattern in patterns) else dtype
