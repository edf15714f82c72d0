"""Build a transformers model around packed weights, without ever holding a float copy of it.

The model class is instantiated with its parameters on the meta device (shapes, no memory). Then every linear layer and
embedding whose weight the checkpoint holds as a packed tensor is replaced by a QuantizedLinear or QuantizedEmbedding,
and the few remaining parameters (norms, biases) are read as floats. A checkpoint is seen here only as a function from
a parameter's name to its tensor, so a GGUF file and a folder of safetensors share all of this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qgraft.compat import cap_scores
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.formats import PackedTensor
from qgraft.linear import QuantizedEmbedding, QuantizedLinear
from qgraft.models.find import architecture_of

MOST_PROBLEMS = 500  # listed; more than that is another model's file

# Reads the parameter called so in the transformers model; None when the checkpoint has no such tensor. A linear layer's
# or embedding's weight comes as a PackedTensor, everything else as a floating point tensor.
Reader = Callable[[str], PackedTensor | Tensor | None]


@dataclass(frozen=True)
class BaseInfo:
    """Where a model came from; `load` leaves it on the model as `model.qgraft_base`.

    Attributes:
        source: the path or hub id that was loaded.
        container: "gguf" or "folder".
        architecture: transformers' model_type.
        fingerprint: says which base this is, whatever its path; see fingerprint.py.
        formats: number of weights in each format, for example {"q4_1": 106168320}.
        notes: what a reader should know about this load, each one sentence.
    """

    source: str
    container: str
    architecture: str
    fingerprint: str
    formats: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class TokenizerErrors:
    """`with TokenizerErrors(path):` turns what transformers raises for a broken tokenizer into a CheckpointError.

    The tokenizers package raises plain `Exception`, not a class of its own; exactly that one is meant, not all below it.
    """

    def __init__(self, source: object) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        usual = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
        if kind is Exception or isinstance(error, usual):
            problem = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.source}: transformers cannot build the tokenizer: {problem}") from error


def assemble(
    config: PreTrainedConfig, read: Reader, dtype: torch.dtype, source: str, known_problems: Sequence[str] = ()
) -> PreTrainedModel:
    """The model of `config` with its weights from `read`, computing in `dtype`, in evaluation mode, fully frozen.

    Raises CheckpointError when tensors are missing or have other shapes, or something is wrong already (all listed);
    UnsupportedError when there is no causal language model for the config.
    """
    model = empty_model(config, dtype)
    cap_scores(model)
    problems = list(known_problems)
    _fill_modules(model, read, dtype, problems)
    _fill_parameters(model, read, dtype, problems)
    if problems:
        shown = "\n  ".join(problems[:MOST_PROBLEMS])
        more = f"\n  ... and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise CheckpointError(f"{source} does not fit the architecture {config.model_type}:\n  {shown}{more}")
    # Output and input embeddings share their PackedWeight already; transformers must not tie floats on top of that.
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}
    model.requires_grad_(False)
    return model.eval()


def weight_formats(model: nn.Module) -> dict[str, int]:
    """Number of weights held in each format, shared ones counted once."""
    formats: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and id(module.packed_weight) not in seen:
            seen.add(id(module.packed_weight))
            packed = module.packed_weight.get()
            formats[packed.format] = formats.get(packed.format, 0) + packed.shape[0] * packed.shape[1]
    return formats


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` with its parameters on the meta device. Raises UnsupportedError where there is none."""
    architecture = architecture_of(config)
    with init_empty_weights(include_buffers=False):  # buffers (rotary tables) are computed, not loaded
        try:
            if architecture is not None:
                return architecture.model._from_config(config, dtype=dtype)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(f"architecture {config.model_type!r}: {error}") from error


def _fill_modules(model: PreTrainedModel, read: Reader, dtype: torch.dtype, problems: list[str]) -> None:
    output = model.get_output_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or (module is output and tied):
            continue
        weight = read(f"{path}.weight")
        if weight is None:
            problems.append(f"missing {path}.weight {list(module.weight.shape)}")
            continue
        expected = tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)
        if not isinstance(weight, PackedTensor) or weight.shape != expected:  # only matrices come packed
            problems.append(f"{path}.weight: got shape {list(weight.shape)}, expected {list(expected)}")
            continue
        model.set_submodule(path, _packed_module(module, weight, dtype))
    if tied and output is not None:
        _tie_output(model)


def _packed_module(module: nn.Module, weight: PackedTensor, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        # Gemma's embedding class multiplies each row by a constant
        scale = float(getattr(module, "scalar_embed_scale", 1.0))
        return QuantizedEmbedding(weight, dtype, scale, module.padding_idx)
    bias: Any = module.bias  # on the meta device; read with the other parameters
    return QuantizedLinear(weight, None if bias is None else torch.empty_like(bias))


def _tie_output(model: PreTrainedModel) -> None:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        path = next(path for path, module in model.named_modules() if module is output)
        model.set_submodule(path, QuantizedLinear(embedding.packed_weight))


def _fill_parameters(model: PreTrainedModel, read: Reader, dtype: torch.dtype, problems: list[str]) -> None:
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if leaf == "weight" and isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            continue  # reported already
        value = read(name)
        if value is None:
            problems.append(f"missing {name} {list(parameter.shape)}")
        elif not isinstance(value, Tensor) or value.shape != parameter.shape:
            problems.append(f"{name}: got shape {list(value.shape)}, expected {list(parameter.shape)}")
        else:
            setattr(module, leaf, nn.Parameter(value.to(dtype), requires_grad=False))
