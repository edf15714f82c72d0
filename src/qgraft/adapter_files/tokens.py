"""What the tokenizer's files beside an adapter say: the texts of its new tokens, which of them a model's tokenizer has to
get; and the chat template, which TRL and LLaMA-Factory write there, too, where it is not the model's own."""

from pathlib import Path
from typing import Any

from torch import nn

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.base import base_of
from qgraft.adapters.token_rows import token_ids
from qgraft.data.new_tokens import NewToken, check_new_tokens, read_new_tokens
from qgraft.data.scripted import WritesPrompts
from qgraft.data.templates import tokenizers_own
from qgraft.errors import AdapterError, option
from qgraft.json_files import read_object

TEMPLATE, OPTIONS = "chat_template.jinja", "tokenizer_config.json"


def new_tokens_of(model: nn.Module, adapter: Adapter) -> list[NewToken]:
    """The tokens that the tokenizer got beyond the base's and the adapter has rows of."""
    ids = set(token_ids(adapter))
    return [token for token in base_of(model).tokens.values() if token.id in ids]


def stored_tokens(model: nn.Module, folder: Path, adapter: Adapter) -> tuple[list[NewToken], list[str]]:
    """(The adapter's tokens that the model's tokenizer does not have of its own, notes).

    Raises AdapterError where the tokenizer has others under their ids.
    """
    tokens, notes = _missing_tokens(model, folder, adapter)
    return tokens, notes + _template_note(base_of(model).tokenizer, folder)


def _template_note(speaks: Any, folder: Path) -> list[str]:
    """One sentence where the folder has another chat template than the model: the adapter may have been trained with it."""
    if speaks is None or isinstance(speaks, WritesPrompts):
        return []
    file, options = folder / TEMPLATE, folder / OPTIONS
    if file.is_file():
        told, where, hint = (
            file.read_text(encoding="utf-8", errors="replace"),
            TEMPLATE,
            f": {option('template', file)}",
        )
    elif options.is_file():
        told, where, hint = _default(read_object(options, AdapterError).get("chat_template")), OPTIONS, ""
    else:
        return []
    if not told.strip() or told.strip() == tokenizers_own(speaks)[0].strip():
        return []
    return [f"the folder has another chat template than the model ({where}), and prompts are made by the model's{hint}"]


def _default(stored: Any) -> str:
    """The template for conversations without tools of those that a tokenizer_config.json has; "" for none."""
    if isinstance(stored, list):  # of older releases
        stored = {each.get("name"): each.get("template") for each in stored if isinstance(each, dict)}
    found = stored.get("default") if isinstance(stored, dict) else stored
    return found if isinstance(found, str) else ""


def _missing_tokens(model: nn.Module, folder: Path, adapter: Adapter) -> tuple[list[NewToken], list[str]]:
    """See stored_tokens."""
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
