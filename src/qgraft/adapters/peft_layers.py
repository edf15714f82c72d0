"""PEFT's own LoRA layers around ours, for LoraConfig's hook for custom modules (for_peft.py).

A packed layer is called, and its weight unpacked only for DoRA and MiCA, which read it. What PEFT does to weights (merges,
starting values that it takes out of them), or finds by their being Parameters, is refused: it would come out as NaN, or be
missing.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn
from torch.nn.functional import embedding

from qgraft.adapters.weight_copies import copy_problem
from qgraft.errors import OptionError, UnsupportedError
from qgraft.experts import ExpertStack
from qgraft.linear import QuantizedEmbedding, QuantizedLinear

# Starting values that are drawn, or made of inputs or of the weight. PEFT takes all others out of the weight.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# What PEFT does to the weight, or to Parameters only.
_OF_WEIGHTS = (
    *("use_qalora", "kasa_config", "trainable_token_indices", "target_parameters", "layer_replication", "loftq_config"),
    "ensure_weight_tying",
)


def check_config(config: LoraConfig, packed: Sequence[str]) -> None:
    """Raise OptionError for a LoRA that PEFT cannot put on a model whose weights at the paths `packed` are packed."""
    for name in _OF_WEIGHTS:
        if value := getattr(config, name, None):
            raise OptionError(f"{name}={value!r}: PEFT needs a float weight for it, and this model's are packed",
                              hint=f"leave {name} out")  # fmt: skip
    start = config.init_lora_weights
    if start not in _STARTS:
        raise OptionError(
            f"init_lora_weights={start!r}: PEFT makes these of a float weight, and this model's are packed",
            hint="init_lora_weights=True, 'gaussian', 'orthogonal', 'eva' or 'mica'",
        )
    if config.bias != "none":
        raise OptionError(
            f"bias={config.bias!r}: PEFT trains the biases of the base itself, and a packed base must stay what its file has",
            hint="bias='none'; lora_bias=True is a bias of the LoRA's own",
        )
    _check_copied(config.modules_to_save or (), packed)


def _check_copied(names: Sequence[str], packed: Sequence[str]) -> None:
    """Raise OptionError where PEFT, which goes by the ends of names, would train a copy of something packed."""
    for path in packed:
        above = accumulate(path.split("."), "{}.{}".format)
        if name := next((name for part in above for name in names if part.endswith(name)), None):
            raise OptionError(
                f"modules_to_save: {name!r} is or has {path.rpartition('.')[0]}, which is packed: a copy of it has no weight "
                "that can be trained",
                hint="name it in target_modules: a LoRA is trained on it",
            )


def refuse_other_weights(model: nn.Module) -> None:
    """Let load_state_dict of the model raise where it is given the weight of a packed layer, and it is not that of the base.

    PEFT's files hold tables of a larger vocabulary, or that were trained. What a module has no Parameter for, PEFT passes by.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            layer.register_load_state_dict_pre_hook(_refuse_other_weight)


def _refuse_other_weight(layer: nn.Module, state: Any, prefix: str, *arguments: Any) -> None:
    path, errors = prefix.removesuffix("."), arguments[-1]
    if (copy := state.pop(f"{prefix}weight", None)) is not None:
        problem = copy_problem(path, layer, copy.cpu())
        errors += [problem] if problem and problem not in errors else []


def without_peft(model: nn.Module) -> nn.Module:
    """The model inside of what PEFT puts around all of one; its layers may be PEFT's."""
    while isinstance(model, PeftModel | PeftMixedModel | BaseTuner):
        model = model.model if isinstance(model, BaseTuner) else model.base_model
    return model


def is_tuned(model: nn.Module) -> bool:
    """Whether PEFT has put layers around the model's."""
    return any(hasattr(type(module), "adapter_layer_names") for module in model.modules())


def name_all_linear(config: LoraConfig, model: nn.Module) -> None:
    """Put the paths of all layers that PEFT means by "all-linear" in its place, those of packed layers among them.

    Raises OptionError for packed experts, which PEFT means in some models: it finds them by their being Parameters.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    packed = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    inner = {path for path, layer in packed.items() if layer is not head and not path.endswith(".base_layer")}
    if any(isinstance(module, ExpertStack) for module in model.modules()):
        raise OptionError(
            "target_modules='all-linear': PEFT means the experts of some models too, and this model's are packed",
            hint=f"name the layers, some of {sorted({path.rpartition('.')[2] for path in inner})}",
        )
    _maybe_include_all_linear_layers(config, model)  # those that are no packed layers, or that PEFT has wrapped already
    config.target_modules = inner.union(config.target_modules or ())  # type: ignore[assignment]  # a set, as PEFT has it


class _OnPacked:
    """What PEFT's layers do otherwise on a packed base.

    Attributes:
        packed: the paths of all packed weights of the model.
    """

    packed: Sequence[str] = ()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises OptionError as check_config."""
        check_config(config, self.packed)
        if config.use_dora or config.init_lora_weights == "mica":
            base = self.get_base_layer()  # type: ignore[attr-defined]
            base.weight_is_given = True
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise UnsupportedError: a packed weight takes what an adapter adds only if it is packed again."""
        raise UnsupportedError(
            "PEFT cannot merge into packed weights",
            hint="model.save_pretrained('adapter'); base = model.unload(); qgraft.load_adapter(base, 'adapter'); "
            "qgraft.merge(base)",
        )


class PeftLinear(_OnPacked, Linear):
    """PEFT's LoRAs on a QuantizedLinear."""

    def __init__(self, base_layer: QuantizedLinear, *args: Any, packed: Sequence[str] = (), **kwargs: Any) -> None:
        self.packed = packed
        super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As above."""
        self.fan_in_fan_out = False  # the weight is [out, in] whatever the float model's is
        super().update_layer(*args, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]


class PeftEmbedding(_OnPacked, Embedding):
    """PEFT's LoRAs on a QuantizedEmbedding."""

    def __init__(self, base_layer: QuantizedEmbedding, *args: Any, packed: Sequence[str] = (), **kwargs: Any) -> None:
        self.packed = packed
        super().__init__(base_layer, *args, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim  # type: ignore[return-value]

    def _embed(self, input: Tensor, weight: Tensor, input_fn: Any = None, output_fn: Any = None) -> Tensor:
        base = self.get_base_layer()
        assert isinstance(base, QuantizedEmbedding)
        return embedding(input, weight, base.padding_idx)  # both functions are of tensor parallelism

    def _get_embed_scale(self) -> Tensor | None:
        scale = self.get_base_layer().scale
        return None if scale == 1.0 else torch.tensor(scale)


def custom_modules(packed: Sequence[str]) -> dict[Any, Any]:
    """What PEFT puts on packed layers, for LoraConfig's hook; `packed`: the paths of all packed weights of the model."""
    return {
        QuantizedLinear: partial(PeftLinear, packed=tuple(packed)),
        QuantizedEmbedding: partial(PeftEmbedding, packed=tuple(packed)),
    }
