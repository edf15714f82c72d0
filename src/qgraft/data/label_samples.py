"""Labelled texts as token ids, and batches of them: padded on the right, with the mask that leaves the padding out.

    text    [CLS] text [SEP], or two of them, as the model's tokenizer writes them; labels: what LabelScheme.target says
    words   the ids of each word one after another; the label stands at the first id of a word, -100 elsewhere, as in
            transformers' examples; a word whose own label is -100 is read, and not learned

Texts of several lengths share a batch by padding: an encoder sees both directions, so attention sample by sample within a row
(data/batches.py) is not what these models were trained with, and their pooler reads the first token of a row alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qgraft.data.batches import IGNORED
from qgraft.data.label_schemes import NUMBER, SEVERAL, LabelScheme, has_label, names_of
from qgraft.data.messages import Conversation
from qgraft.data.reading import Accounting
from qgraft.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDED = ("input_ids", "token_type_ids")


@dataclass(frozen=True, eq=False)
class LabelSample:
    """Token ids, and of a text [id], a number for each label, or [number]; of words an id or -100 for each token.

    `kinds` are the token_type_ids where the tokenizer has some, `missing` the places of words without a label to learn: cut
    off, without a token, or without a label; `part` is 0: a row is one sample. Without labels it is unrelated text
    (merging/calibration.py).
    """

    input_ids: list[int]
    labels: list[float]
    source: str
    kinds: list[int] | None = None
    missing: tuple[int, ...] = ()
    part: ClassVar[int] = 0
    weights: ClassVar[None] = None
    desirable: ClassVar[None] = None

    @property
    def length(self) -> int:
        """How many tokens it is."""
        return len(self.input_ids)

    @property
    def texts(self) -> "tuple[LabelSample, ...]":
        """What passes through the model to learn it: itself."""
        return (self,)


def build_label_samples(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Conversation],
    accounting: Accounting,
    scheme: LabelScheme,
    *,
    tokens: bool,
    max_length: int,
) -> list[LabelSample]:
    """A sample of each row; longer ones are cut and counted.

    Raises DataError for labels that the scheme does not have, all of them, and where no row is left; OptionError for a
    tokenizer that cannot tell which token is of which word.
    """
    if tokens and not getattr(tokenizer, "is_fast", False):
        raise OptionError("task_type TOKEN_CLS: the tokenizer cannot say which token is of which word",
                          hint="give a folder with a tokenizer.json")  # fmt: skip
    scheme.check(_every_name(rows, scheme, tokens))
    samples = []
    for row in rows:
        made = _tagged(tokenizer, row, scheme, max_length) if tokens else _labelled(tokenizer, row, scheme, max_length)
        sample, cut = made
        if tokens and all(label == IGNORED for label in sample.labels):
            accounting.kept -= 1
            accounting.drop("no word is left of it", row.source)
            continue
        if cut:
            accounting.truncated += 1
            accounting.truncated_tokens += cut
        samples.append(sample)
    accounting.check()
    if not samples:
        raise DataError(f"no row is left to learn: {accounting.summary()}")
    return samples


def _every_name(rows: Sequence[Conversation], scheme: LabelScheme, tokens: bool) -> set[str]:
    if scheme.problem_type == NUMBER:
        return set()
    labels = (each for row in rows for each in (filter(has_label, row.label) if tokens else [row.label]))
    return {name for label in labels for name in ([*label] if isinstance(label, dict) else names_of(label))}


def _labelled(
    tokenizer: "PreTrainedTokenizerBase", row: Conversation, scheme: LabelScheme, longest: int
) -> tuple[LabelSample, int]:
    """(a sample, how many tokens it lost)."""
    texts = [message.content for message in row.messages]
    whole = tokenizer(*texts, truncation=False, verbose=False)
    cut = max(len(whole["input_ids"]) - longest, 0)
    kept = tokenizer(*texts, truncation=True, max_length=longest, verbose=False) if cut else whole
    return LabelSample(list(kept["input_ids"]), scheme.target(row.label), row.source, _kinds(kept)), cut


def _tagged(
    tokenizer: "PreTrainedTokenizerBase", row: Conversation, scheme: LabelScheme, longest: int
) -> tuple[LabelSample, int]:
    words = [message.content for message in row.messages]
    ids = [scheme.target(label)[0] if has_label(label) else IGNORED for label in row.label]
    whole = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
    cut = max(len(whole["input_ids"]) - longest, 0)
    kept = whole
    if cut:
        kept = tokenizer(words, is_split_into_words=True, truncation=True, max_length=longest, verbose=False)
    places = kept.word_ids()
    first = [place is not None and place != before for place, before in zip(places, [None, *places], strict=False)]
    labels = [ids[place] if begins else IGNORED for place, begins in zip(places, first, strict=True)]
    missing = tuple(place for place, label in enumerate(ids) if label == IGNORED or place not in places)
    return LabelSample(list(kept["input_ids"]), labels, row.source, _kinds(kept), missing), cut


def _kinds(encoded: Any) -> list[int] | None:
    kinds = encoded.get("token_type_ids")
    return None if kinds is None else list(kinds)


def collate_texts(samples: Sequence[LabelSample], padding: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and, where all have them, token_type_ids, [B, T] int64."""
    width = max(len(sample.input_ids) for sample in samples)
    short = [width - len(sample.input_ids) for sample in samples]
    batch = {
        "input_ids": torch.tensor([s.input_ids + [padding] * n for s, n in zip(samples, short, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(s.input_ids) + [0] * n for s, n in zip(samples, short, strict=True)]),
    }
    if all(sample.kinds is not None for sample in samples):
        kinds = [(sample.kinds or []) + [0] * n for sample, n in zip(samples, short, strict=True)]
        batch["token_type_ids"] = torch.tensor(kinds)
    return batch


def collate_labelled(
    samples: Sequence[LabelSample], scheme: LabelScheme, *, tokens: bool, padding: int
) -> dict[str, Tensor]:
    """The same, with labels: [B] int64, [B, labels] or [B] float32, or [B, T]."""
    batch = collate_texts(samples, padding)
    if tokens:
        width = batch["input_ids"].shape[1]
        labels = [sample.labels + [IGNORED] * (width - sample.length) for sample in samples]
        return {**batch, "labels": torch.tensor(labels, dtype=torch.int64)}
    values = [sample.labels for sample in samples]
    if scheme.problem_type == SEVERAL:
        return {**batch, "labels": torch.tensor(values, dtype=torch.float32)}
    dtype = torch.float32 if scheme.problem_type == NUMBER else torch.int64
    return {**batch, "labels": torch.tensor(values, dtype=dtype)[:, 0]}


def label_batches(
    samples: Sequence[LabelSample], tokens: int, scheme: LabelScheme, *, words: bool, padding: int
) -> list[dict[str, Tensor]]:
    """Batches of at most so many tokens with their padding, samples of similar length together; 0 for one sample in each."""
    parts: list[list[LabelSample]] = []
    for sample in sorted(samples, key=lambda each: len(each.input_ids)):
        if not parts or (len(parts[-1]) + 1) * len(sample.input_ids) > tokens:
            parts.append([])
        parts[-1].append(sample)
    return [collate_labelled(part, scheme, tokens=words, padding=padding) for part in parts]
