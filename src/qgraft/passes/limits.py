"""How long a text may be that goes through a model, where the model's files say that it ends, and what it may not hold."""

from transformers import PreTrainedModel

from qgraft.adapters.attach_prefix import counted_positions
from qgraft.errors import OptionError
from qgraft.model_parts import context_of


def sample_limit(model: PreTrainedModel, max_length: int, reserved: int = 0) -> int:
    """The longest sample: max_length, but never more than the model's context leaves beside the active prefixes.

    Args:
        reserved: positions that a prefix takes which is attached later.

    Raises OptionError where prefixes leave no room for a question and its answer.
    """
    context = context_length(model, reserved)
    return max_length if context is None else min(max_length, context)


def stated_ends(model: PreTrainedModel) -> list[int]:
    """The ids of end tokens that the model's files state, beside the tokenizer's; see data/ends.py."""
    told = None if model.generation_config is None else model.generation_config.eos_token_id
    return [told] if isinstance(told, int) else list(told or ())


def suppressed_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids of tokens that the model's files rule out in answers, whatever their logits (marks of images in Gemma 4):
    `suppress_tokens` of generation_config.json or of a GGUF file, which transformers' generate() and llama.cpp go by."""
    return tuple(getattr(model.generation_config, "suppress_tokens", None) or ())


def context_length(model: PreTrainedModel, reserved: int = 0) -> int | None:
    """How many tokens the model sees at most beside the active prefixes; None where it sets no limit.

    Raises as sample_limit does.
    """
    context = context_of(model)
    if context is None:
        return None
    taken = counted_positions(model) + reserved
    if taken and context - taken < 2:
        raise OptionError(
            f"a prefix of {taken} tokens leaves no room for a sample: the model's context is {context} tokens",
            hint="give a smaller pre_seq_len",
        )
    return context - taken
