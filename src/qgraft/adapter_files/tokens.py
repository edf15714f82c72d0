"""The new tokens of an adapter: those whose texts go with its files, and which of them a model's tokenizer has to get."""

from pathlib import Path

from torch import nn

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.base import base_of
from qgraft.adapters.token_rows import token_ids
from qgraft.data.new_tokens import NewToken, check_new_tokens, read_new_tokens


def new_tokens_of(model: nn.Module, adapter: Adapter) -> list[NewToken]:
    """The tokens that the tokenizer got beyond the base's and the adapter has rows of."""
    ids = set(token_ids(adapter))
    return [token for token in base_of(model).tokens.values() if token.id in ids]


def stored_tokens(model: nn.Module, folder: Path, adapter: Adapter) -> tuple[list[NewToken], list[str]]:
    """(The adapter's tokens that the model's tokenizer does not have of its own, notes).

    Raises AdapterError where the tokenizer has others under their ids.
    """
    ids, speaks, known = set(token_ids(adapter)), base_of(model).tokenizer, base_of(model).tokens
    if not ids:
        return [], []
    there = read_new_tokens(folder, ids) if folder.is_dir() else None
    if speaks is None:
        return [], ["the model came without a tokenizer: which texts its tokens are is the caller's affair"]
    own = set(speaks.get_vocab().values()) - {token.id for token in known.values()}
    check_new_tokens(speaks, there or [])
    tokens = [token for token in there or [] if token.id not in own]
    if unnamed := sorted(ids - own - {token.id for token in tokens}):
        return tokens, [f"no tokenizer beside it says which text token {unnamed[0]} is"]
    return tokens, []
