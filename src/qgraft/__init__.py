"""qgraft: fine-tune the quantized model file you already have.

    model, tokenizer = qgraft.load("model.gguf")          # weights stay packed
    qgraft.attach_lora(model, r=8)
    qgraft.train(model, tokenizer, rows, qgraft.TrainArguments(output_dir="out"))
    qgraft.merge(model)                                   # into the same packed weights
    qgraft.save(model, "merged.gguf")                     # the same kind of file

The public names are listed below and loaded on first use, so that `import qgraft` stays cheap: it brings in neither torch
nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qgraft.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    MergeError,
    OptionError,
    QgraftError,
    StorageError,
    TrainingError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from qgraft.adapter_files.folder import load_adapter, save_adapter
    from qgraft.adapters.attach import attach_lora, detach_adapter, detach_lora
    from qgraft.adapters.attach_prefix import attach_prefix
    from qgraft.adapters.base import adapter_names
    from qgraft.adapters.choose import active_adapters, adapters_off, use_adapter
    from qgraft.adapters.combine import combine
    from qgraft.adapters.for_peft import peft_config
    from qgraft.adapters.states import load_lora_state_dict, lora_state_dict
    from qgraft.checkpoints.load import load
    from qgraft.checkpoints.pull import pull
    from qgraft.checkpoints.quantize import quantize
    from qgraft.checkpoints.save import save
    from qgraft.linear import QuantizedLinear
    from qgraft.merging.merge import merge, merge_lora, unmerge
    from qgraft.training.arguments import TrainArguments
    from qgraft.training.evaluate import evaluate
    from qgraft.training.find_lr import find_lr
    from qgraft.training.run import train

__version__ = "0.1.0"

_HOMES = {  # public name -> the module it lives in
    "QuantizedLinear": "linear",
    "TrainArguments": "training.arguments",
    "active_adapters": "adapters.choose",
    "adapter_names": "adapters.base",
    "adapters_off": "adapters.choose",
    "attach_lora": "adapters.attach",
    "attach_prefix": "adapters.attach_prefix",
    "combine": "adapters.combine",
    "detach_adapter": "adapters.attach",
    "detach_lora": "adapters.attach",
    "evaluate": "training.evaluate",
    "find_lr": "training.find_lr",
    "load": "checkpoints.load",
    "load_adapter": "adapter_files.folder",
    "load_lora_state_dict": "adapters.states",
    "lora_state_dict": "adapters.states",
    "merge": "merging.merge",
    "merge_lora": "merging.merge",
    "peft_config": "adapters.for_peft",
    "pull": "checkpoints.pull",
    "quantize": "checkpoints.quantize",
    "save": "checkpoints.save",
    "save_adapter": "adapter_files.folder",
    "train": "training.run",
    "unmerge": "merging.merge",
    "use_adapter": "adapters.choose",
}

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "MergeError",
    "OptionError",
    "QgraftError",
    "QuantizedLinear",
    "StorageError",
    "TrainArguments",
    "TrainingError",
    "UnsupportedError",
    "active_adapters",
    "adapter_names",
    "adapters_off",
    "attach_lora",
    "attach_prefix",
    "combine",
    "detach_adapter",
    "detach_lora",
    "evaluate",
    "find_lr",
    "load",
    "load_adapter",
    "load_lora_state_dict",
    "lora_state_dict",
    "merge",
    "merge_lora",
    "peft_config",
    "pull",
    "quantize",
    "save",
    "save_adapter",
    "train",
    "unmerge",
    "use_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qgraft' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"qgraft.{_HOMES[name]}"), name)
    except ImportError as error:
        import_module("qgraft.releases").explain(error)
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
