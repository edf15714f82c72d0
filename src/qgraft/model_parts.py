"""How transformers puts a model together: one function for each question that is asked of it, and nowhere else an answer.

    token ids -> decoder: layer 0 -> layer 1 -> ... -> norm -> states -> output layer -> what is done to logits -> logits

    decoder_of, has_decoder, decoder_states    what is below the output layer, and what it computes
    decoder_layers                             the layers, in order
    computed_dtype                             what the model computes in
    argument_names                             what a forward pass may be given
    context_of                                 how many positions there are
    keeps_state                                whether padding would be learned or remembered
    mixes_neighbours                           whether a token also sees others by a way that is not attention
    is_encoder_decoder, hears                  whether one part reads and another one writes, and whether it reads sound
    sees_what_comes                            whether it reads in both directions, and so cannot write
    task_of, heads_of, labels_of               whether it classifies texts or their tokens, what does so, and what as
    language_of, vision_of                     of a model that sees images, the part that reads text, and the others
    marker_ids                                 the ids that stand for images in its texts

How attention is computed and masked is asked in attention.py, how a cache is called in compat.py, what is done to logits
is found out in passes/decoder.py, and which layers compute which formula is known in passes/known_layers.py and
passes/decoding_network.py. tests/contract/test_facade.py holds all of these to the oldest and the newest release.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qgraft.errors import UnsupportedError


def decoder_of(model: nn.Module) -> Any:
    """The decoder without its output layer; the model itself where that is one, or is both at once (Llama 4)."""
    return getattr(model, "base_model", model)


def has_decoder(model: nn.Module) -> bool:
    """Whether the decoder is a model of its own, below the output layer."""
    decoder = decoder_of(model)
    return isinstance(decoder, PreTrainedModel) and decoder is not model


def decoder_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The states [B, T, hidden] that the output layer takes, without a cache.

    Raises UnsupportedError for a model whose decoder has no pass of its own.
    """
    if not has_decoder(model):
        raise UnsupportedError(f"{type(model).__name__} has no decoder apart from its output layer")
    states: Tensor = decoder_of(model)(use_cache=False, **inputs).last_hidden_state
    return states


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder, in order: what gradient checkpointing takes as units, or the list of all layers.

    Raises UnsupportedError for a model that has neither.
    """
    decoder, config = decoder_of(model), getattr(model, "config", None)
    if (language := language_of(model)) is not None:
        decoder = model.get_submodule(language)
    units = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if units:
        within = {id(inner) for unit in units for inner in unit.modules() if inner is not unit}
        return [unit for unit in units if id(unit) not in within]
    count = None if config is None else config.get_text_config().num_hidden_layers
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    if (layers := next(lists, None)) is None:  # of lists within lists the outer one comes first
        raise UnsupportedError(f"{type(model).__name__} has no layers: expected a list of them in its decoder")
    return list(layers)


def computed_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the model computes in: the dtype of its embeddings. Its `dtype` is that of any parameter, also of a LoRA."""
    table: Any = model.get_input_embeddings()
    dtype: torch.dtype = table.weight.dtype
    return dtype


CLASSIFIERS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}  # PEFT's task_type
CAUSAL, SEQUENCE_TO_SEQUENCE = "CAUSAL_LM", "SEQ_2_SEQ_LM"
IMAGES = "IMAGE_TEXT_TO_TEXT"  # as transformers calls it; to PEFT such a model is CAUSAL_LM


def task_of(model: nn.Module) -> str:
    """What the model is for, as PEFT's task_type says it, by the name of its class: CAUSAL_LM but for classifiers."""
    return stated_task([type(model).__name__])


def stated_task(architectures: Any) -> str:
    """The same of the names of classes in a config.json."""
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((task for task, ending in CLASSIFIERS.items() if name.endswith(ending)), CAUSAL)


def heads_of(model: nn.Module) -> list[str]:
    """The paths of the modules of a classifier that make logits of the decoder's states; none of other models.

    They are all modules beside the decoder, and its pooler, which reads one state only. None of them is packed.
    """
    if task_of(model) == CAUSAL:
        return []
    decoder = decoder_of(model)
    stem = next((name for name, child in model.named_children() if child is decoder), "")
    found = [f"{stem}.{name}" for name, _ in decoder.named_children() if name == "pooler"]
    found += [name for name, child in model.named_children() if child is not decoder]
    return [path for path in found if any(True for _ in model.get_submodule(path).parameters())]


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """What a classifier tells apart, by their ids; nothing of other models."""
    config: Any = getattr(model, "config", None)
    if task_of(model) == CAUSAL or config is None:
        return ()
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def require_writer(model: nn.Module, action: str) -> None:
    """Raise UnsupportedError for a classifier, where `action` needs a model that writes."""
    if (task := task_of(model)) != CAUSAL:
        raise UnsupportedError(
            f"{action}: a {type(model).__name__} is a classifier ({task}), which writes no answers",
            hint="`qgraft eval` measures it, `qgraft train --do_predict` writes down what it says of rows",
        )


def language_of(model: nn.Module) -> str | None:
    """The path of the decoder of text in a model that also sees images, without its output layer; None of other models.

    It is the outermost model of transformers in there whose configuration is the text's.
    """
    config = getattr(model, "config", None)
    if getattr(config, "vision_config", None) is None or is_encoder_decoder(config):
        return None
    text: Any = config.get_text_config()  # type: ignore[union-attr]
    inner = ((path, module) for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel))
    return next((path for path, module in inner if type(module.config) is type(text)), None)


def vision_of(model: nn.Module) -> list[str]:
    """The paths of the modules that make of images what the decoder of text reads; none of a model that reads text alone.

    They are all that stand beside that decoder below the output layer: tower, projector, connector.
    """
    if (language := language_of(model)) is None:
        return []
    found, stem, decoder = list[str](), "", decoder_of(model)
    for part in language.split("."):
        module = model.get_submodule(stem) if stem else model
        if module is not model or module is decoder:
            found += [f"{stem}.{name}".lstrip(".") for name, _ in module.named_children() if name != part]
        stem = f"{stem}.{part}".lstrip(".")
    return found


_MARKERS = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa)_(\w+_)?token_(id|index)")


def marker_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids by which a model that sees finds images, videos and sounds in a text, as its configuration has them."""
    if language_of(model) is None:
        return ()
    stated = vars(model.config).items()
    return tuple(value for name, value in stated if _MARKERS.fullmatch(name) and isinstance(value, int))


def is_within(path: str, modules: Iterable[str]) -> bool:
    """Whether the module at `path` is one of these, or in one."""
    return any(f"{path}.".startswith(f"{each}.") for each in modules)


def argument_names(module: nn.Module) -> list[str]:
    """The names of what the forward pass takes, in order; beside them most take any keyword."""
    return list(inspect.signature(module.forward).parameters)


def context_of(model: nn.Module) -> int | None:
    """How many positions the model has, its decoder where it hears; None where it sets no limit."""
    config = getattr(model, "config", None)
    if hears(config):
        return int(config.max_target_positions)  # type: ignore[union-attr]
    context = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    table = getattr(getattr(decoder_of(model), "embeddings", None), "position_embeddings", None)
    begin = getattr(table, "padding_idx", None)  # of RoBERTa's kind, whose positions begin behind it
    return context - (0 if begin is None else begin + 1) if isinstance(context, int) else None


def is_encoder_decoder(config: PreTrainedConfig | None) -> bool:
    """Whether this is of a model whose encoder reads one sequence, and whose decoder writes another one (T5, BART)."""
    return bool(getattr(config, "is_encoder_decoder", False))


def sees_what_comes(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration attends in both directions, though transformers has it write too (BERT, XLM).

    transformers makes a decoder of an encoder that `is_decoder` (XLM: `causal`), and warns of one that is not. Decoders that
    are nothing else may have `is_decoder=False` in their configurations, too: it is read of no other architectures.
    XLM goes by `causal` alone; to CPM-Ant a whole text is context, and XLNet is told an order in each call.
    """
    if config.model_type in ("cpmant", "xlnet", "xlm"):
        return not getattr(config, "causal", False)
    fills_gaps = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type, "")  # BART's by an encoder and a decoder
    if not fills_gaps.endswith(("ForMaskedLM", "WithLMHeadModel")) and config.model_type != "bert-generation":
        return False
    return not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def hears(config: PreTrainedConfig | None) -> bool:
    """Whether this is of an encoder-decoder whose encoder reads sound, and whose decoder writes text (Whisper)."""
    return is_encoder_decoder(config) and getattr(config, "model_type", None) == "whisper"


def peft_task(model: nn.Module) -> str | None:
    """PEFT's task_type of the model: task_of, and SEQ_2_SEQ_LM of an encoder-decoder that writes.

    Modules that are no models of transformers (diffusers') have none, and neither have models that hear: PEFT's class for
    SEQ_2_SEQ_LM hands input_ids on.
    """
    if not isinstance(model, PreTrainedModel) or hears(getattr(model, "config", None)):
        return None
    task, pairs = task_of(model), is_encoder_decoder(getattr(model, "config", None))
    return SEQUENCE_TO_SEQUENCE if pairs and task == CAUSAL else task


def pairs_unsupported(action: str) -> UnsupportedError:
    """The error where `action` is asked for an encoder-decoder."""
    return UnsupportedError(
        f"{action}: this is an encoder-decoder, and only decoders that read prompt and answer as one text can do that",
        hint="of encoder-decoders there are train, eval, chat, predictions, and merges by the method nearest",
    )


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether every token that goes in, padding too, changes a state that the later ones see (Mamba and its kind)."""
    return bool(model._is_stateful)


def mixes_neighbours(model: PreTrainedModel) -> bool:
    """Whether a layer takes what is before a token in the row by a state or a convolution, whose sample it may be or not.

    Attention is told where samples begin, and such layers are not: transformers' code passes it over, and some kernels
    that it may use instead do not. How far it reaches (three tokens, in LFM2) may be too little for a trial to see. So may
    be how many tokens it takes until Llama 4's temperature changes, which goes by the number of tokens before in the row.
    """
    return keeps_state(model) or any(
        isinstance(module, nn.Conv1d) or _counts_the_row(module) for module in decoder_of(model).modules()
    )


def _counts_the_row(module: Any) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope
