"""PEFT's own LoRA layers around ours, for LoraConfig's hook for custom modules (for_peft.py).

A packed layer is called, and its weight never read: what PEFT computes from the weight (merges, DoRA, starting values by its
singular values) would come out as NaN, so it is refused before.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, Linear
from torch import Tensor, nn
from torch.nn.functional import embedding

from qgraft.errors import OptionError, UnsupportedError
from qgraft.linear import QuantizedEmbedding, QuantizedLinear

# Starting values that are drawn, or made of inputs. PEFT makes all others of the weight.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# What PEFT computes with the weight, or makes of layers whose weight is a Parameter.
_OF_WEIGHTS = (
    *("use_dora", "use_bdlora", "use_qalora", "arrow_config", "velora_config", "monteclora_config", "kasa_config"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "loftq_config"),
)


def check_config(config: LoraConfig) -> None:
    """Raise OptionError for a LoRA that PEFT cannot put on packed layers."""
    for name in _OF_WEIGHTS:
        if value := getattr(config, name, None):
            raise OptionError(f"{name}={value!r}: PEFT needs a float weight for it, and this model's are packed",
                              hint=f"leave {name} out")  # fmt: skip
    start = config.init_lora_weights
    if start not in _STARTS:
        raise OptionError(
            f"init_lora_weights={start!r}: PEFT makes these of a float weight, and this model's are packed",
            hint="init_lora_weights=True, 'gaussian', 'orthogonal' or 'eva'",
        )


class _OnPacked:
    """What PEFT's layers do otherwise on a packed base."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. Raises OptionError as check_config."""
        check_config(config)
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

    def __init__(self, base_layer: QuantizedLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # the weight is [out, in] whatever the float model's is

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]


class PeftEmbedding(_OnPacked, Embedding):
    """PEFT's LoRAs on a QuantizedEmbedding."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim  # type: ignore[return-value]

    def _embed(self, input: Tensor, weight: Tensor, input_fn: Any = None, output_fn: Any = None) -> Tensor:
        return embedding(input, weight)  # both functions are of tensor parallelism

    def _get_embed_scale(self) -> Tensor | None:
        scale = self.get_base_layer().scale
        return None if scale == 1.0 else torch.tensor(scale)


CUSTOM_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    QuantizedLinear: PeftLinear,
    QuantizedEmbedding: PeftEmbedding,
}
