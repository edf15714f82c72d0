"""How the rows of a file are read: their tokens, and which of them are learned; the same that training will do.

What `read_dataset` and `build_samples` make of the first rows, cut into pieces of text: one for each token, or for as many as
a character takes. Nothing is guessed here: what is shown is the sample.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraft.data.messages import Conversation
from qgraft.data.reading import Accounting, read_dataset
from qgraft.data.tokenizing import IGNORED, Sample, build_samples, resolve_template
from qgraft.errors import DataError
from qgraft.model_parts import marker_ids
from qgraft.passes.limits import sample_limit, stated_ends
from qgraft.serving.service import Service

READ, SHOWN = 500, 20  # rows
_WINDOW, _OF_CHARACTER = 8, 8  # tokens before a piece that its text may depend on; tokens that a character may have

Piece = tuple[str, bool]


def read_rows(service: Service, path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The first rows of a file as a run with these options reads them; see recipes.py for the options.

    Raises DataError, OptionError.
    """
    columns = {part: options[f"{part}_column"] for part in ("prompt", "response") if options.get(f"{part}_column")}
    conversations, accounting = read_dataset(
        str(path), name=options.get("name"), author=options.get("author"), columns=columns or None, max_samples=READ
    )
    said = [*accounting.said()]
    samples, problem = _samples(service, conversations, accounting, options)
    return {
        "read": accounting.read,
        "whole": accounting.read < READ,
        "kept": accounting.kept,
        "dropped": accounting.dropped,
        "examples": accounting.examples,
        "truncated": accounting.truncated,
        "notes": [*said, *(note for note in accounting.notes if note not in said)],
        "problem": problem,
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "learned": sum(label != IGNORED for sample in samples for label in sample.labels),
        "longest": max((len(sample.input_ids) for sample in samples), default=0),
        "rows": [_shown(service, sample) for sample in samples[:SHOWN]],
    }


def questions(path: Path, count: int = 3) -> list[str]:
    """What the first rows ask, to let a run answer them; nothing where the file cannot be read any more."""
    try:
        conversations, _ = read_dataset(str(path), max_samples=count)
    except DataError:
        return []
    asked = (next((m.content for m in each.messages if m.role == "user"), "") for each in conversations)
    return [text for text in asked if text][:count]


def _samples(
    service: Service, conversations: Sequence[Conversation], accounting: Accounting, options: Mapping[str, Any]
) -> tuple[list[Sample], str | None]:
    """(samples, why there are none)."""
    model = service.engine.model
    try:
        samples = build_samples(
            service.tokenizer, conversations, accounting, template=resolve_template(service.tokenizer),
            system=options.get("system"), max_length=sample_limit(model, options.get("max_length", 2048)),
            mask_history=bool(options.get("mask_history")), eos_ids=stated_ends(model),
            markers=marker_ids(model),
        )  # fmt: skip
    except DataError as error:  # every row is dropped: the counts say why
        return [], str(error)
    return samples, None


def _shown(service: Service, sample: Sample) -> dict[str, Any]:
    def decode(ids: list[int]) -> str:
        return str(service.tokenizer.decode(ids, skip_special_tokens=False))

    found = pieces(sample, decode)
    return {"source": sample.source, "tokens": len(sample.input_ids), "pieces": [[text, int(on)] for text, on in found]}


def pieces(sample: Sample, decode: Callable[[list[int]], str]) -> list[Piece]:
    """(text, whether it is learned) of each token, or of as many as make a whole character. Special tokens are shown."""
    found: list[Piece] = []
    before: list[int] = []
    pending: list[int] = []
    learned = False
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        pending.append(token)
        learned = learned or label != IGNORED
        known = decode(before) if before else ""
        text = decode([*before, *pending])[len(known) :]
        if text.endswith("\ufffd") and len(pending) < _OF_CHARACTER:
            continue
        found.append((text, learned))
        before, pending, learned = [*before, *pending][-_WINDOW:], [], False
    return [*found, ("\ufffd", learned)] if pending else found
