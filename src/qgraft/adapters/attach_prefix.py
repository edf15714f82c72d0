"""Put prefixes (P-Tuning v2, prefix.py) on a model. The base's weights are never touched.

    base.prefixes                the trained networks, a child of the base model (the decoder without its output layer)
    a hook before base.forward   makes the keys and values of the active prefixes, once for each pass, and passes them
                                 on as the keyword argument `prefix`; moves the positions where the layout counts them
    qgraft/attention.py          puts them in front of the keys and values of each layer

How many layers attend and how wide their keys are is found out by a pass over a few tokens, not read from names in a
configuration. Several active prefixes stand one after another. A batch may have another prefix in each row
(adapter_names, batch_rows.py): the shorter ones are filled up with keys that their rows do not see.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgraft.adapters.adapter import Adapter, join
from qgraft.adapters.attach import check_new_name, put_on
from qgraft.adapters.base import adapters_of, one_at_a_time, selection_of
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.prefix import HOME, Geometry, PrefixConfig, PrefixEncoder, Prefixes
from qgraft.adapters.selection import BatchRows, Selection
from qgraft.attention import PREFIX, SAMPLES, Prefix, attention_of, record_attention
from qgraft.compat import given_cache, reads_ahead_by_prefix
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.model_parts import argument_names, context_of, decoder_of, hears, vision_of


def attach_prefix(
    model: nn.Module,
    pre_seq_len: int = 128,
    prefix_projection: bool = False,
    prefix_dropout: float = 0.1,
    name: str = "default",
) -> PrefixConfig:
    """Freeze the model, give its attention layers a new trained prefix `name` (P-Tuning v2), make it the active adapter.

    Args:
        model: a decoder of transformers, or a ChatGLM; changed in place.
        pre_seq_len, prefix_projection, prefix_dropout: see PrefixConfig.
        name: how the adapter is called in use_adapter(); letters, digits, "_" and "-".

    Returns the options as a PrefixConfig. Raises OptionError for an impossible option, AdapterError for a name that is
    taken, UnsupportedError for a model whose attention takes no prefix, or that has no cache (an encoder).
    """
    config = PrefixConfig(pre_seq_len, prefix_projection, None, prefix_dropout, layout_of(model))
    attach_encoder(model, name, config)
    return config


@one_at_a_time
def attach_encoder(
    model: nn.Module,
    name: str,
    config: PrefixConfig,
    values: Mapping[str, Tensor] | None = None,
    geometry: Geometry | None = None,
) -> None:
    """Attach a prefix `name` with these options and make it active.

    Args:
        values: the encoder's tensors, copied: embedding.weight and, with projection, trans.{0,2}.{weight,bias}; without
            them they are random.
        geometry: of the model that the values were trained on, where that is known.

    Raises AdapterError for values that do not fit the model; see also attach_prefix.
    """
    if vision_of(model) or hears(getattr(model, "config", None)):
        raise UnsupportedError(
            f"a prefix cannot go on {type(model).__name__}, which {'sees images' if vision_of(model) else 'hears'}",
            hint="train a LoRA: finetuning_type lora",
        )
    if reads_ahead_by_prefix(getattr(model, "config", None)):
        raise UnsupportedError(
            f"a prefix cannot go on {type(model).__name__}: with this release of transformers its tokens would see those "
            "behind them",
            hint="install a newer transformers, or train a LoRA: finetuning_type lora",
        )
    check_new_name(model, name)
    selection_of(model).check_free()
    own = model_geometry(model)
    if geometry is not None and geometry != own:
        raise AdapterError(f"prefix {name!r} was trained on {geometry}; this model has {own}")
    if config.layout != layout_of(model):
        raise AdapterError(f"prefix {name!r} has the layout {config.layout!r}; this model's is {layout_of(model)!r}")
    encoder = make_encoder(model, config, own)
    if values is not None:
        encoder.load(values)
    put_encoder(model, name, encoder)
    use_adapter(model, name)


def make_encoder(model: nn.Module, config: PrefixConfig, geometry: Geometry) -> PrefixEncoder:
    """A prefix for the model, which is not on it yet. Raises OptionError where it leaves the model no context."""
    base = decoder_of(model)
    _check_length(base, config.pre_seq_len)
    return PrefixEncoder(config, geometry, base.get_input_embeddings().embedding_dim)


@one_at_a_time
def put_encoder(model: nn.Module, name: str, encoder: PrefixEncoder) -> None:
    """Put what make_encoder made on the model as `name`, inactive."""
    base = decoder_of(model)
    path = join(next(path for path, module in model.named_modules() if module is base), HOME)
    adapter = Adapter(name, "prefix", {path: encoder.to(base.device)})
    adapter.let_train(False)
    put_on(model, adapter, partial(_home, encoder.geometry))


def prefixes_of(model: nn.Module) -> Prefixes | None:
    """What holds the model's prefixes, if it has any."""
    paths = (path for adapter in adapters_of(model).values() if adapter.is_prefix for path in adapter.parts)
    home = None if (path := next(paths, None)) is None else model.get_submodule(path)
    assert isinstance(home, Prefixes | None)
    return home


def model_geometry(model: nn.Module) -> Geometry:
    """What the model wants keys and values to be: found out by a pass over a few tokens where no prefix is on it yet."""
    home = prefixes_of(model)
    if home is not None:
        return home.geometry
    with selection_of(model).taken("examined for its first prefix"):  # by another attention
        return probe_geometry(decoder_of(model))


def layout_of(model: nn.Module) -> str:
    """The layout of the model's prefixes: chatglm, chatglm2, or PEFT's for all others."""
    return str(getattr(model, "prefix_layout", "peft"))


def probe_geometry(base: Any) -> Geometry:
    """What the model's attention layers want keys and values to be. Raises UnsupportedError where there can be none."""
    calls, off = record_attention(base)
    layers = [call.layer for call in calls if call.layer is not None]
    shapes = {shape for call in calls for shape in (call.key_shape, call.value_shape)}
    problem = None
    if not calls:
        problem = "has attention of its own, which takes no prefix"
    elif not all(call.causal for call in calls):
        problem = "is no decoder: it attends in both directions and has no cache of keys and values"
    elif len(set(layers)) < len(calls):
        problem = "has layers that attend twice or have no number, so that it is not clear what a layer's prefix is"
    elif len(shapes) > 1:
        problem = f"has keys and values of different shapes: {', '.join(map(str, sorted(shapes)))}"
    elif not off <= (1e-3 if base.dtype == torch.float32 else 3e-2):
        problem = f"attends otherwise than by a softmax over its keys: the result would be off by {off:.1%}"
    if problem:
        raise UnsupportedError(
            f"a prefix cannot go on {type(base).__name__}: it {problem}",
            hint="P-Tuning v2 is for decoders of transformers whose attention function can be exchanged",
        )
    kv_heads, head_dim = shapes.pop()
    return Geometry(tuple(layers), kv_heads, head_dim)


def counted_positions(model: nn.Module) -> int:
    """How many positions of the model's context the active prefixes take."""
    home = prefixes_of(model)
    if home is None or not home.counted:
        return 0
    active = [home.encoder(name) for name in home.selection.now().weights if name in home.encoders]
    return sum(encoder.config.pre_seq_len for encoder in active)


def _check_length(base: nn.Module, pre_seq_len: int) -> None:
    context = context_of(base)
    if context is not None and pre_seq_len >= context:
        raise OptionError(f"pre_seq_len={pre_seq_len} leaves no room: the model's context is {context} tokens")


def _home(geometry: Geometry, model: nn.Module, path: str, selection: Selection) -> Prefixes:
    """What holds the model's prefixes; with the first one it comes, and the attention that takes them."""
    base, home = decoder_of(model), prefixes_of(model)
    if home is not None:
        return home
    with selection.taken("given its first prefix"):
        hook = base.register_forward_pre_hook(_pass_on, with_kwargs=True)
        home = Prefixes(selection, geometry, attention_of(base), hook).train(base.training)
        setattr(base, HOME, home)
        base.set_attn_implementation(PREFIX)
    return home


def _pass_on(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the forward of the base model: give it the active prefixes, and positions after them."""
    home: Prefixes = getattr(base, HOME)
    prefix, taken = _active_prefix(home)
    if prefix is None:
        return None
    if attention_of(base) not in (PREFIX, SAMPLES):
        raise UnsupportedError(
            f"a prefix is active and the attention was set to {attention_of(base)!r}, which knows none",
            hint=f"model.set_attn_implementation({PREFIX!r}), or take the prefix off",
        )
    known = argument_names(base)
    given = {**dict(zip(known, args, strict=False)), **kwargs, "prefix": prefix}
    if home.counted and "position_ids" in known:
        given["position_ids"] = _positions(given) + taken
    return (), given


def _positions(given: Mapping[str, Any]) -> Tensor:
    """The position_ids that were given, or those that a model of transformers makes: they count on from the cache."""
    positions: Tensor | None = given.get("position_ids")
    if positions is None:
        inputs = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        cache = given_cache(given)
        past = 0 if cache is None else cache.get_seq_length()
        positions = (torch.arange(inputs.shape[1], device=inputs.device) + past)[None]
    return positions


def _active_prefix(home: Prefixes) -> tuple[Prefix | None, int | Tensor]:
    """The keys and values of what is active, and how many tokens they are as long as, [B, 1] where rows differ."""
    active = home.selection.now()
    if active.uniform is None and active.rows is not None:
        return _prefix_of_rows(home, active.rows)
    parts = [home.key_values(name) for name in active.uniform or () if name in home.encoders]
    if not parts:
        return None, 0
    stacked = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # [2L, G, P, D]
    return Prefix(_by_layer(home.geometry, stacked[:, None])), stacked.shape[2]


def _prefix_of_rows(home: Prefixes, rows: BatchRows) -> tuple[Prefix | None, int | Tensor]:
    """Another prefix for each row, all as long as the longest; rows without one see none of it."""
    groups = [(name, index) for name, index in rows.groups if name in home.encoders]
    if not groups:
        return None, 0
    parts = [home.key_values(name) for name, _ in groups]
    parts = [parts[0][:, :, :0], *parts]  # the first of the table: no prefix
    which_B = torch.zeros(rows.batch, dtype=torch.long, device=parts[0].device)
    for number, (_, index) in enumerate(groups, start=1):
        which_B[index] = number
    lengths_B = torch.tensor([part.shape[2] for part in parts], device=which_B.device)[which_B]
    longest = int(lengths_B.max())
    table = torch.stack([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts], dim=1)
    seen_BP = torch.arange(longest, device=which_B.device) < lengths_B[:, None]
    return Prefix(_by_layer(home.geometry, table[:, which_B]), seen_BP), lengths_B[:, None]


def _by_layer(geometry: Geometry, stacked: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """[2L, 1 or B, G, P, D] -> keys and values under the number of their layer."""
    return {layer: (stacked[2 * i], stacked[2 * i + 1]) for i, layer in enumerate(geometry.layers)}
