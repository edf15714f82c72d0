"""What differs between the releases of transformers that qgraft works with: the one place that knows it.

    5.24    the keyword of the cache is `cache` in forward(), generate() and in outputs; before it was `past_key_values`
    5.23    gradient checkpointing is called activation checkpointing, of a model and among the options
            "sdpa" refuses capped attention scores (Gemma 2), and such models take "eager"; 5.17 left the cap out, silently
    5.17    umT5's decoder saw the tokens that it was to predict, and its outputs were scaled whatever config.json said;
            so did Doge's, in texts without padding, and decoders that are made of BigBird, Megatron-BERT, RemBERT, RoFormer;
            attention in chunks counted them from the beginning of a row, over the borders of its samples

Models of our own are written with the new name. `takes_cache` lets a function of theirs be called with either, and shows
in its signature the one that the installed release asks for: generate() looks there for what a model understands.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, TrainingArguments

Function = TypeVar("Function", bound=Callable[..., Any])

_NAMES = ("cache", "past_key_values")
_KNOWN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: str = next(name for name in _NAMES if name in _KNOWN)  # what the installed release calls it


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward pass, under either name, or None."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def cache_in(output: Any) -> Any:
    """The cache in the output of a forward pass, or None."""
    return getattr(output, CACHE)


def takes_cache(function: Function) -> Function:
    """Let a function with a parameter `cache` be called with the older name of it as well."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            kwargs["cache"] = kwargs.pop("past_key_values")
        return function(*args, **kwargs)

    own = inspect.signature(function)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in own.parameters.values()]
    call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def cap_scores(model: PreTrainedModel) -> None:
    """Let a model whose configuration caps the attention's scores compute them by an implementation that does so."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def hide_what_comes(model: PreTrainedModel) -> None:
    """Let a decoder attend to no token behind the one that it reads: umT5's, as the other T5s' do, and Doge's.

    Doge adds a mask of its own to the causal one, which "sdpa" was given none of in old releases; "eager" always is.
    """
    if model.config.model_type == "doge":
        model.set_attn_implementation("eager")
    if model.config.model_type == "umt5":
        for module in model.modules():
            if getattr(module, "has_relative_attention_bias", False):  # no layer between the halves has one
                vars(module)["is_causal"] = bool(getattr(module, "is_decoder", False))


def reads_ahead(config: PreTrainedConfig) -> bool:
    """Whether the installed release lets such a decoder attend to what comes, though its configuration says is_decoder."""
    return CACHE != "cache" and config.model_type in ("big_bird", "megatron-bert", "rembert", "roformer")


def counts_chunks_over_samples(config: PreTrainedConfig) -> bool:
    """Whether the installed release takes the samples of a row for one where attention goes by chunks (Llama 4)."""
    return CACHE != "cache" and "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def reads_ahead_by_prefix(config: PreTrainedConfig | None) -> bool:
    """Whether the installed release lets such a decoder attend to what comes once it has a prefix (see hide_what_comes)."""
    return CACHE != "cache" and getattr(config, "model_type", None) == "doge"


def asks_for_checkpointing(args: TrainingArguments) -> bool:
    """Whether these options ask for activations to be computed again in the backward pass, under either name."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


@contextmanager
def activation_checkpointing(model: PreTrainedModel, args: TrainingArguments) -> Iterator[None]:
    """Within the block the model computes activations again, where the options ask for it; afterwards as before.

    Raises ValueError for a model that cannot.
    """
    if hasattr(model, "enable_gradient_checkpointing"):  # of diffusers, which takes the same kind of it
        with _checkpointing_of_diffusers(model, args):
            yield
        return
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not asks_for_checkpointing(args) or getattr(model, f"is_{name}_checkpointing"):
        yield
        return
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    getattr(model, f"{name}_checkpointing_enable")(kwargs or {"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


@contextmanager
def _checkpointing_of_diffusers(model: Any, args: TrainingArguments) -> Iterator[None]:
    asked = asks_for_checkpointing(args) and not model.is_gradient_checkpointing
    if asked:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if asked:
            model.disable_gradient_checkpointing()
