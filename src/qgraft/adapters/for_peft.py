"""Let PEFT, and trainers made for it, put its LoRAs on a packed model: `peft_config`."""

from importlib.util import find_spec
from typing import Any

from torch import nn

from qgraft.adapters.base import adapter_names, require_model
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.given import described
from qgraft.linear import PackedWeight, QuantizedLinear


def peft_config(model: nn.Module, config: Any) -> Any:
    """Make a LoraConfig of PEFT one that PEFT can put on this packed model, and return it.

        model, tokenizer = qgraft.load("model.gguf")
        model = peft.get_peft_model(model, qgraft.peft_config(model, peft.LoraConfig(task_type="CAUSAL_LM")))
        model.add_adapter("second", qgraft.peft_config(model, peft.LoraConfig(task_type="CAUSAL_LM")))

    PEFT is told by its hook for custom modules what to put on packed layers. "all-linear", by which PEFT finds no packed
    layer, becomes the paths of those that it means; everything else stays as it is. The output layer unpacks its weight for
    those who ask for it from then on, as TRL's trainers do. To load an adapter:
    `PeftModel.from_pretrained(model, folder, config=qgraft.peft_config(model, LoraConfig.from_pretrained(folder)))`.

    Args:
        model: from load(), without adapters of qgraft's; or what get_peft_model made of one, for a further adapter.
        config: a peft.LoraConfig; changed in place.

    Raises OptionError for what is no LoraConfig, or asks for what PEFT does to float weights (PiSSA, target_parameters ...)
    or to the base itself (bias); AdapterError for a model with adapters of qgraft's; UnsupportedError without PEFT.
    """
    require_model(model)
    if find_spec("peft") is None:
        raise UnsupportedError("peft_config: peft is not installed", hint="pip install 'qgraft[combine]'")
    from peft import LoraConfig

    from qgraft.adapters.peft_layers import (
        check_config,
        custom_modules,
        is_tuned,
        name_all_linear,
        refuse_other_weights,
        without_peft,
    )

    if type(config) is not LoraConfig:
        raise OptionError(f"config: got {described(config)}, expected a peft.LoraConfig")
    base = without_peft(model)
    if not is_tuned(base) and (names := adapter_names(model)):
        raise AdapterError(
            f"the model has adapters of qgraft's: {', '.join(names)}", hint="qgraft.detach_adapter(model)"
        )
    packed = [path for path, module in base.named_modules(remove_duplicate=False) if isinstance(module, PackedWeight)]
    check_config(config, packed)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        name_all_linear(config, base)
    refuse_other_weights(base)
    config._register_custom_module(custom_modules(packed))
    head = getattr(base, "get_output_embeddings", lambda: None)()
    head = getattr(head, "base_layer", head)
    if isinstance(head, QuantizedLinear):
        head.weight_is_given = True  # TRL multiplies by it, and calls no layer
    return config
