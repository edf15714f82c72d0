"""Which releases of the libraries qgraft was tested with, and what is said where others are installed.

pip takes no others: pyproject.toml has the same ranges, and tests/test_releases.py holds the two together; `make contract`
runs the tests with the oldest and with the newest. Somebody may install another release all the same. Then load() warns
once, names what the release lacks of TAKEN in one error, and an import that fails within qgraft is told in these words
too. That a name is there does not say that it does what it did: tests/contract asks that.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qgraft.errors import UnsupportedError

TESTED = {  # library -> the oldest and the newest release, as far as the digits here go
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.24"),
    "accelerate": ("1.10", "1.15"),
    "gguf": ("0.17.1", "0.19"),  # 0.17.0 takes no sentencepiece above 0.2.0
    "safetensors": ("0.8", "0.8"),
    "huggingface-hub": ("1.5", "2.4"),
    "sentencepiece": ("0.2.2", "0.2.3"),  # 0.2.1 cuts some texts into other pieces
    "peft": ("0.21", "0.21"),  # earlier releases combine adapters otherwise
}

TAKEN = {  # module -> what is taken of it beside its documentation, "name" or "name(parameters)"
    "accelerate": "init_empty_weights(include_buffers)",
    "huggingface_hub.errors": "HfHubHTTPError HFValidationError LocalEntryNotFoundError StrictDataclassError",
    "transformers": "PreTrainedModel._from_config PreTrainedModel._is_stateful PreTrainedModel.dummy_inputs "
    "PreTrainedModel.set_attn_implementation PreTrainedTokenizer._pad(padding_strategy,padding_side) "
    "TrainingArguments.n_gpu TrainingArguments.get_warmup_steps(num_training_steps) "
    "TrainingArguments.get_process_log_level TrainerState.compute_steps(args,max_steps)",
    "transformers.activations": "ACT2FN",
    "transformers.cache_utils": "DynamicLayer DynamicSlidingWindowLayer",
    "transformers.conversion_mapping": "get_model_conversion_mapping",
    "transformers.convert_slow_tokenizer": "bytes_to_unicode",
    "transformers.core_model_loading": "Concatenate MergeModulelist WeightConverter.convert WeightConverter.add_tensor "
    "WeightRenaming dot_natural_key rename_source_key(base_model_prefix,meta_state_dict)",
    "transformers.masking_utils": "ALL_MASK_ATTENTION_FUNCTIONS create_causal_mask(config,inputs_embeds,attention_mask)",
    "transformers.modeling_layers": "GradientCheckpointingLayer",
    "transformers.modeling_outputs": "BaseModelOutputWithPast CausalLMOutputWithPast MoeModelOutputWithPast",
    "transformers.modeling_utils": "ALL_ATTENTION_FUNCTIONS.get_interface",
    "transformers.models.auto.modeling_auto": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "transformers.models.whisper.modeling_whisper": "shift_tokens_right(input_ids,pad_token_id,decoder_start_token_id)",
    "transformers.models.whisper.tokenization_whisper": "LANGUAGES TO_LANGUAGE_CODE",
    "transformers.pytorch_utils": "Conv1D",
    "transformers.integrations.moe": "ALL_EXPERTS_FUNCTIONS",
    "transformers.integrations": "get_reporting_integration_callbacks(report_to)",
    "transformers.optimization": "Adafactor",
    "transformers.trainer_callback": "DefaultFlowCallback ExportableState.state",
    "transformers.trainer_utils": "IntervalStrategy SaveStrategy SchedulerType",
    "transformers.training_args": "OptimizerNames",
    "transformers.utils": "PaddingStrategy can_return_tuple",
    "transformers.utils.generic": "merge_with_config_defaults",
    "transformers.utils.output_capturing": "capture_outputs",
}


def installed() -> dict[str, str]:
    """The releases of these libraries that are here."""
    found = {}
    for name in TESTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def range_of(library: str) -> str:
    """The releases that it was tested with, as pip reads them: >=5.17,<5.25."""
    oldest, newest = TESTED[library]
    *front, last = _numbers(newest)
    return f">={oldest},<{'.'.join(map(str, [*front, last + 1]))}"


def untested(releases: Mapping[str, str]) -> dict[str, str]:
    """What to say of each of these releases that qgraft was not tested with."""
    phrases = {}
    for name, release in releases.items():
        oldest, newest = TESTED[name]
        here = _numbers(release)
        if here < _numbers(oldest) or here[: len(_numbers(newest))] > _numbers(newest):
            tested = oldest if oldest == newest else f"{oldest} to {newest}"
            phrases[name] = f"{name} {release} (tested: {tested})"
    return phrases


@functools.cache
def check_releases() -> None:
    """Warn of releases that qgraft was not tested with, once in a process.

    Raises UnsupportedError where such a release lacks something that is taken of it.
    """
    others = untested(installed())
    if not others:
        return
    if missing := lacking(others):
        raise UnsupportedError(
            f"{', '.join(others.values())}: not there any more: {', '.join(missing)}", hint=_pip(others)
        )
    warnings.warn(
        f"qgraft was not tested with {', '.join(others.values())}, so results may differ; {_pip(others)}",
        stacklevel=3,  # the line that called load()
    )


def explain(error: ImportError) -> None:
    """Raise UnsupportedError where an import failed in a library of another release than those tested."""
    library = (error.name or "").partition(".")[0].replace("_", "-")
    others = {name: phrase for name, phrase in untested(installed()).items() if name == library}
    if others:
        raise UnsupportedError(f"{others[library]}: {error}", hint=_pip(others)) from error


def lacking(libraries: Mapping[str, Any]) -> list[str]:
    """What is in TAKEN of these libraries, and not in what is installed."""
    return [
        f"{module}.{name}"
        for module, names in TAKEN.items()
        if module.partition(".")[0].replace("_", "-") in libraries
        for name in names.split()
        if not _has(module, name)
    ]


def _has(module: str, wanted: str) -> bool:
    path, _, parameters = wanted.rstrip(")").partition("(")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return not parameters or set(parameters.split(",")) <= inspect.signature(found).parameters.keys()


def _pip(libraries: Mapping[str, Any]) -> str:
    return "pip install " + " ".join(f"'{name}{range_of(name)}'" for name in libraries)


def _numbers(release: str) -> tuple[int, ...]:
    """5.24.0.dev0+cpu -> (5, 24, 0)."""
    return tuple(int(part) for part in release.partition("+")[0].split(".")[:3] if part.isdigit())
