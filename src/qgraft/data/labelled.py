"""Rows of labelled texts: what classifiers learn.

    texts    {"text": "...", "label": "positive"}               a label: a name, a number, true or false
             {"sentence1": "...", "sentence2": "...", "label": 0}     two texts that belong together
             {"text": "...", "labels": ["spam", "advert"]}       several of them, or {"spam": 1, "advert": 0}
             {"text": "...", "label": 3.5}                       a number to come close to
    tokens   {"tokens": ["Ada", "lives", ...], "ner_tags": ["B-PER", "O", ...]}      a label for each word

Other columns are named with prompt_column (two of them with a comma) and label_column. A label is kept as the row has it;
what it is to the model is said in label_schemes.py.
"""

import json
from collections.abc import Mapping, Sequence
from numbers import Number

from qgraft.data.calls import RowError
from qgraft.data.messages import Message
from qgraft.data.rows import Read, RowLayout, column_called, is_empty, text_of, unread

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("text", "text_pair"), ("sentence_a", "sentence_b"),
)  # fmt: skip
TEXTS = ("text", "sentence", "review", "content", "prompt", "instruction", "question", "input", "query")
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "text_label", "target")
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")

Label = str | int | float | bool | list["Label"] | dict[str, "Label"]


def read_labelled(row: object, layout: RowLayout) -> Sequence[Read]:
    """One or two texts, each a message, with their label. Raises RowError."""
    row = checked_row(row)
    columns = _text_columns(row, layout)
    texts = [text_of(row[column], "text") for column in columns]
    if not all(text.strip() for text in texts):
        raise RowError("empty text")
    column = column_of(row, layout, "label", LABELS, "label")
    label = _label(row[column])
    ignored = frozenset(unread(row, (*columns, column)))
    return [Read([Message("user", text) for text in texts], ignored=ignored, label=label)]


def read_tagged(row: object, layout: RowLayout) -> Sequence[Read]:
    """Words, each a message, with a list of their labels. Raises RowError."""
    row = checked_row(row)
    words, tags = column_of(row, layout, "prompt", WORDS), column_of(row, layout, "label", TAGS, "label")
    texts, labels = _list(row[words], words), _list(row[tags], tags)
    if len(texts) != len(labels):
        raise RowError(f"{len(texts)} {words} and {len(labels)} {tags}")
    if not texts:
        raise RowError("no words")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError(f"{words} holds an empty word, or what is no text")
    if not all(_is_plain(label) for label in labels):
        raise RowError(f"{tags} holds what is no label")
    ignored = frozenset(unread(row, (words, tags)))
    said = [Message("user", text_of(text, "word")) for text in texts]
    return [Read(said, ignored=ignored, label=[_plain(label) for label in labels])]


def labelled_rows() -> str:
    """What rows look like, for a hint."""
    return (
        'rows hold a text and its label ({"text": ..., "label": ...}), or tokens and their ner_tags; other columns are named '
        "with prompt_column and label_column"
    )


def checked_row(row: object) -> Mapping[str, object]:
    """The row. Raises RowError for what is none, or has cells without a column."""
    if not isinstance(row, Mapping):
        raise RowError(f"row is a {type(row).__name__}, not an object")
    if None in row:
        raise RowError("more cells than the header")
    return row


def _text_columns(row: Mapping[str, object], layout: RowLayout) -> list[str]:
    """The column of the text, or both of them."""
    told = layout.columns.get("prompt")
    if told is not None:
        named = [told] if column_called(row, told) else [part.strip() for part in told.split(",")]
        found = [column_called(row, name) for name in named]
        if None in found or len(found) > 2:
            raise RowError(f"no column {named[found.index(None)]!r}" if None in found else "more than two text columns")
        return [column for column in found if column is not None]
    for pair in PAIRS:
        both = [column_called(row, name) for name in pair]
        if None not in both:
            return [column for column in both if column is not None]
    return [column_of(row, layout, "prompt", TEXTS)]


def column_of(row: Mapping[str, object], layout: RowLayout, part: str, names: Sequence[str], what: str = "text") -> str:
    """The column of `what`: the one that is named for this part, or else the first of `names`. Raises RowError for none."""
    told = layout.columns.get(part)
    for name in [told] if told is not None else names:
        if (column := column_called(row, name)) is not None:
            return column
    if told is not None:
        raise RowError(f"no column {told!r}")
    raise RowError(f"no column of the {what}: {', '.join(sorted(map(str, row))[:6]) or 'none'}")


def _label(value: object) -> Label:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and each in (0, 1) for key, each in value.items()):
            raise RowError("label is an object, whose values are not 0 or 1")
        return {str(key): bool(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        if not all(_is_plain(each) for each in value):
            raise RowError("label is a list that holds what is no label")
        labels = [_plain(each) for each in value]
        if len(set(map(str, labels))) < len(labels):
            raise RowError("a label stands twice; of 0 and 1 for each label make {name: 0 or 1}")
        return labels
    if not _is_plain(value):
        raise RowError("no label" if is_empty(value) else f"label is a {type(value).__name__}")
    return _plain(value)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | Number) and not isinstance(value, complex) and not is_empty(value)


def _plain(value: object) -> Label:
    """A text without blanks around it, or a number of Python's own."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return text_of(value, "label").strip()
    number: Label = json.loads(str(value))  # of numpy's
    return number


def _list(value: object, called: str) -> Sequence[object]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise RowError(f"{called} is a {type(value).__name__}, not a list")
    return list(value)
