"""The tokens whose rows a run trains: new ones, which its options name by their texts, and those named by their ids."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import adapter_names, base_of, find_adapter
from qgraft.adapters.token_rows import token_ids, token_rows_of
from qgraft.adapters.token_tables import TokenIndices, table_values, tables_of
from qgraft.data.new_tokens import NewToken, add_new_tokens, read_texts
from qgraft.errors import OptionError, UnsupportedError, option
from qgraft.linear import table_rows
from qgraft.training.arguments import TrainArguments
from qgraft.training.stages import preference_options


def trains_rows(args: TrainArguments) -> bool:
    """Whether the options name any tokens."""
    return bool(args.add_tokens or args.add_special_tokens or args.trainable_token_indices)


def take_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainArguments) -> list[str]:
    """Give the tokenizer, and the one that the model was loaded with, the new tokens of a run; returns notes.

    Raises OptionError, UnsupportedError for a model or a tokenizer that takes none.
    """
    if not trains_rows(args):
        return []
    tables = tables_of(model)
    if args.trainable_token_indices:
        tables.named(_stated(args))  # or an error, before the tokenizer is changed
    texts = read_texts("add_tokens", args.add_tokens), read_texts("add_special_tokens", args.add_special_tokens)
    base = base_of(model)
    if not any(texts):
        _check_there(tokenizer, args)
        return []
    preferred = preference_options(args)
    if preferred is not None and preferred.refers and args.adapter_name not in adapter_names(model):
        raise UnsupportedError(
            f"stage={args.stage} with new tokens: the base that answers are compared with has no rows of them",
            hint=f"train them with {option('stage', 'sft')} and go on from that adapter, or take {option('stage', 'orpo')}",
        )
    known = dict(base.tokens)
    added = add_new_tokens(tokenizer, known, *texts)
    if base.tokenizer is None:
        base.tokenizer = tokenizer
    if base.tokenizer is not tokenizer:
        add_new_tokens(base.tokenizer, dict(base.tokens), *texts)
    base.tokens.update(known)
    _check_there(tokenizer, args)
    count = table_rows(_layer(model, tables.table))
    first, within = added[0], sum(token.id < count for token in added)
    where = f"{within} in rows of the table that no token had, " if within else ""
    return [
        f"{len(added)} new tokens, {where}the first is {first.text!r}, {first.id}; each begins as the mean of the "
        "tokens that its text was"
    ]


def _check_there(tokenizer: PreTrainedTokenizerBase, args: TrainArguments) -> None:
    """Raise OptionError for ids of trainable_token_indices that are no tokens."""
    given = _stated(args) if args.trainable_token_indices else []
    ids: list[int] = [each for some in given.values() for each in some] if isinstance(given, Mapping) else [*given]
    if wrong := [each for each in ids if not 0 <= each < len(tokenizer)]:
        raise OptionError(
            f"trainable_token_indices: got {wrong[0]}, expected ids of tokens that are there, 0 to {len(tokenizer) - 1}",
            hint=f"new tokens are {option('add_tokens', 'TEXT')}",
        )


def _layer(model: PreTrainedModel, path: str) -> Any:
    module: Any = model.get_submodule(path)
    return getattr(module, "base", module)


def new_tokens(model: PreTrainedModel, args: TrainArguments) -> list[NewToken]:
    """The new tokens that the options name, as take_tokens found them."""
    texts = [*read_texts("add_tokens", args.add_tokens), *read_texts("add_special_tokens", args.add_special_tokens)]
    known: Mapping[str, NewToken] = base_of(model).tokens
    if missing := [text for text in texts if text not in known]:
        raise OptionError(f"add_tokens: the tokenizer was not given {missing[0]!r}")
    return [known[text] for text in texts]


def indices_of(model: PreTrainedModel, args: TrainArguments) -> dict[str, list[int]]:
    """trainable_token_indices of a new adapter: those of the option, and the new tokens in table and output layer."""
    tables, new = tables_of(model), [token.id for token in new_tokens(model, args)]
    named = tables.named(_stated(args)) if args.trainable_token_indices else {}
    paths = [tables.table, *([tables.head] if tables.head and not tables.tied else [])]
    if new:
        if own := [f"{path} ({len(ids)} tokens)" for path, ids in named.items() if path not in paths]:
            raise OptionError(f"trainable_token_indices: {own[0]} of a tied model cannot go with new tokens")
        named = {path: (*named.get(path, ()), *new) for path in paths}
    return {path: list(ids) for path, ids in named.items()}


def _stated(args: TrainArguments) -> TokenIndices:
    """The option as PEFT has it: a list, or lists by names of layers. Raises OptionError."""
    given: Any = args.trainable_token_indices
    words = {"": given.split(",")} if isinstance(given, str) else given
    found: dict[str, list[int]] = {}
    for name, ids in words.items():
        try:
            found[name] = [int(each) for each in ids]
        except (TypeError, ValueError):
            raise OptionError(
                f"trainable_token_indices: got {str(ids)[:80]}, expected token ids",
                hint=f"{option('trainable_token_indices', '5,6')}, or lists by names of layers",
            ) from None
    return found[""] if isinstance(given, str) else found


@torch.no_grad()
def begin_rows(model: PreTrainedModel, args: TrainArguments) -> None:
    """Let the rows of new tokens of the attached adapter begin with the mean of their pieces'."""
    pieces = {token.id: token.pieces for token in new_tokens(model, args) if token.pieces}
    for path, part in token_rows_of(find_adapter(model, args.adapter_name)).items():
        layer = _layer(model, path)
        count = table_rows(layer)
        for place, token in enumerate(part.config.token_indices):
            known = [piece for piece in pieces.get(token, ()) if piece < count]
            if known:
                part.rows[place] = _mean(layer, known)


def _mean(layer: Any, pieces: list[int]) -> Tensor:
    return table_values(layer, pieces).double().mean(0).float()


def check_rows(model: PreTrainedModel, args: TrainArguments) -> list[str]:
    """What the options say of tokens that the attached adapter has no rows of, a line for each."""
    if not trains_rows(args):
        return []
    wanted, have = indices_of(model, args), set(token_ids(find_adapter(model, args.adapter_name)))
    missing = sorted({each for ids in wanted.values() for each in ids} - have)
    return [f"it has no rows of the tokens {', '.join(map(str, missing[:8]))}"] if missing else []
