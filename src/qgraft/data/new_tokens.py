"""New tokens of a tokenizer: which there are to be, and that a tokenizer has them under the ids that rows were trained for.

    <tool>   cut out of a text before anything else is done with it, as llama.cpp does it with user-defined tokens
             (special ones: as with control tokens, and left out where a text is printed)

The id is the one that the tokenizer gives next. So rows of a padded table that no token has are used first, and the table
is made longer when they are used up; in a GGUF file every row has its token, and the table always gets longer.

`pieces` are what the text was before. A new row begins with the mean of theirs (Gee et al. 2022, "Fast Vocabulary Transfer",
arXiv:2402.09977), so that the model reads a new token at first as it read its text on an average. transformers'
`resize_token_embeddings` begins with the mean of all rows, and so does qgraft where there are no pieces.
"""

import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from qgraft.errors import AdapterError, OptionError, StorageError, UnsupportedError, option
from qgraft.json_files import parse_json

FILES = (".txt", ".json")  # a word that ends so names a file of tokens


@dataclass(frozen=True)
class NewToken:
    """A token that the base's own tokenizer does not have.

    Attributes:
        pieces: the ids that the text was before; empty where that is not known.
    """

    text: str
    id: int
    special: bool = False
    pieces: tuple[int, ...] = ()


def read_texts(name: str, given: Sequence[str] | None) -> list[str]:
    """The tokens that an option names: texts, or files of one a line, or of a JSON list. Raises OptionError."""
    texts: list[str] = []
    for word in given or ():
        texts += _of_file(name, Path(word)) if word.endswith(FILES) else [word]
    if wrong := [text for text in texts if not text.strip() or "\0" in text]:
        raise OptionError(f"{name}: {wrong[0]!r} cannot be a token, expected a text that can be seen")
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise OptionError(f"{name}: {twice[0]!r} is there twice")
    return texts


def _of_file(name: str, path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{name}: {path}: the file of tokens cannot be read: {error}") from error
    if path.suffix == ".txt":
        return [line for line in text.splitlines() if line]
    try:
        found = parse_json(text)
    except ValueError as error:
        raise OptionError(f"{name}: {path} is not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise OptionError(f"{name}: {path}: expected a JSON list of texts")
    return found


def add_new_tokens(
    tokenizer: Any, known: MutableMapping[str, NewToken], texts: Sequence[str], special_texts: Sequence[str]
) -> list[NewToken]:
    """Add these to the tokenizer, and to `known`, which has those of the model so far.

    Raises OptionError for a text that is a token of the base, or was added as the other kind; UnsupportedError for a
    tokenizer that no token can be added to.
    """
    wanted = {**dict.fromkeys(texts, False), **dict.fromkeys(special_texts, True)}
    if both := sorted(set(texts) & set(special_texts)):
        raise OptionError(f"add_tokens and add_special_tokens both name {both[0]!r}")
    _check_fast(tokenizer)
    vocabulary = tokenizer.get_vocab()
    for text, special in wanted.items():
        if text in known and known[text].special != special:
            raise OptionError(f"{text!r} is on the model as a token that is {'not ' * special}special")
        if text in vocabulary and text not in known:
            raise OptionError(f"{text!r} is a token already, {vocabulary[text]}",
                              hint=f"{option('trainable_token_indices', vocabulary[text])} trains its row")  # fmt: skip
    pieces = {text: tuple(tokenizer.encode(text, add_special_tokens=False)) for text in wanted if text not in known}
    for text, special in wanted.items():
        if text not in vocabulary:
            _add(tokenizer, text, special)
        if text not in known:
            known[text] = NewToken(text, tokenizer.convert_tokens_to_ids(text), special, pieces[text])
    return [known[text] for text in wanted]


def _check_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(f"new tokens: a {type(tokenizer).__name__} has a vocabulary that does not grow",
                               hint="only fast tokenizers (tokenizer.json, or of a GGUF file) take new ones")  # fmt: skip


def _add(tokenizer: Any, text: str, special: bool) -> None:
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)], special_tokens=special)


def take_new_tokens(tokenizer: Any, known: MutableMapping[str, NewToken], tokens: Sequence[NewToken]) -> None:
    """Give a tokenizer the new tokens of an adapter, under their ids.

    Raises AdapterError, with nothing changed, where another token has such an id, or the text another one.
    """
    check_new_tokens(tokenizer, tokens)
    vocabulary = tokenizer.get_vocab()
    for token in sorted(tokens, key=lambda token: token.id):
        if token.text not in vocabulary:
            _add(tokenizer, token.text, token.special)
        known[token.text] = token


def check_new_tokens(tokenizer: Any, tokens: Sequence[NewToken]) -> None:
    """See take_new_tokens."""
    _check_fast(tokenizer)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    texts = {number: text for text, number in vocabulary.items()}
    problems = [
        f"token {token.id} is {token.text!r} for the adapter and {texts[token.id]!r} for the tokenizer"
        for token in tokens
        if texts.get(token.id, token.text) != token.text
    ]
    problems += [
        f"{token.text!r} is token {token.id} for the adapter and {vocabulary[token.text]} for the tokenizer"
        for token in tokens
        if vocabulary.get(token.text, token.id) != token.id
    ]
    first = max(texts, default=-1) + 1
    missing = sorted(token.id for token in tokens if token.text not in vocabulary)
    if not problems and missing != list(range(first, first + len(missing))):
        problems.append(f"its new tokens have the ids {missing[:8]}, and the tokenizer gives {first} next")
    if problems:
        raise AdapterError(
            "the adapter's new tokens are not those of the tokenizer:\n  " + "\n  ".join(problems[:8]),
            hint="load the model once more for it: one tokenizer has one meaning for an id",
        )


def write_tokenizer(folder: Path, tokenizer: Any) -> list[str]:
    """Write the tokenizer's own files into a folder of an adapter; returns their names. Raises StorageError."""
    before = {path.name for path in folder.iterdir()}
    try:
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in before)


def read_new_tokens(folder: Path, ids: set[int]) -> list[NewToken] | None:
    """Which added tokens of a folder's tokenizer.json have these ids; None without such a file. Raises AdapterError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        found = [NewToken(each["content"], each["id"], bool(each["special"])) for each in added if each["id"] in ids]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not all(isinstance(each.text, str) and type(each.id) is int for each in found):
        raise AdapterError(f"{path}: added_tokens: expected texts with their ids")
    return found
