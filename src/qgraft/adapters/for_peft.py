"""Let PEFT, and trainers made for it, put its LoRAs on a packed model: `peft_config`."""

from importlib.util import find_spec
from typing import Any

from torch import nn

from qgraft.adapters.base import adapter_names, require_model
from qgraft.adapters.targets import adaptable_layers, find_targets, is_named
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.given import described
from qgraft.linear import QuantizedEmbedding, QuantizedLinear


def peft_config(model: nn.Module, config: Any) -> Any:
    """Make a LoraConfig of PEFT one that PEFT can put on this packed model, and return it.

        model, tokenizer = qgraft.load("model.gguf")
        model = peft.get_peft_model(model, qgraft.peft_config(model, peft.LoraConfig(task_type="CAUSAL_LM")))

    PEFT is told by its hook for custom modules what to put on packed layers. "all-linear", which PEFT finds no packed layer
    by, becomes their paths; everything else stays as it is. The output layer unpacks its weight for those who ask for it from
    then on, as TRL's trainers do. To load an adapter:
    `PeftModel.from_pretrained(model, folder, config=qgraft.peft_config(model, LoraConfig.from_pretrained(folder)))`.

    Args:
        model: from load(), without adapters of qgraft's.
        config: a peft.LoraConfig; changed in place.

    Raises OptionError for what is no LoraConfig, or asks for what PEFT computes from float weights (DoRA, PiSSA ...);
    AdapterError for a model with adapters of qgraft's; UnsupportedError without PEFT.
    """
    require_model(model)
    if find_spec("peft") is None:
        raise UnsupportedError("peft_config: peft is not installed", hint="pip install 'qgraft[combine]'")
    from peft import LoraConfig

    from qgraft.adapters.peft_layers import CUSTOM_MODULES, check_config

    if type(config) is not LoraConfig:
        raise OptionError(f"config: got {described(config)}, expected a peft.LoraConfig")
    if names := adapter_names(model):
        raise AdapterError(
            f"the model has adapters of qgraft's: {', '.join(names)}", hint="qgraft.detach_adapter(model)"
        )
    check_config(config)
    _check_copied(model, config.modules_to_save or ())
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = set(find_targets(model, "all-linear"))  # type: ignore[assignment]  # as PEFT does
    config._register_custom_module(CUSTOM_MODULES)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, QuantizedLinear):
        head.weight_is_given = True  # TRL multiplies by it, and calls no layer
    return config


def _check_copied(model: nn.Module, names: Any) -> None:
    """Raise OptionError where PEFT would train a copy of a packed layer, which has nothing to train."""
    for path, layer in adaptable_layers(model).items():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding) and any(is_named(path, name) for name in names):
            raise OptionError(
                f"modules_to_save: {path} is packed, so a copy of it has no weight that can be trained",
                hint="name it in target_modules: a LoRA is trained on it",
            )
