"""From conversations to samples, with every row accounted for: of texts, and of texts with images."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from qgraft.data.messages import Conversation
from qgraft.data.reading import Accounting
from qgraft.errors import DataError

if TYPE_CHECKING:
    from qgraft.data.tokenizing import Sample

S = TypeVar("S", bound="Sample")


def accounted(
    conversations: Sequence[Conversation],
    accounting: Accounting,
    samples_of: Callable[[Conversation], list[S]],
    fitting: Callable[[Sequence[S]], list[S]],
    remarks: Callable[[], set[str]],
) -> list[S]:
    """The samples of conversations; `accounting` moves what is cut or gives no sample to its place.

    Args:
        samples_of: those of a conversation.
        fitting: these as they fit, cut or left out; raises ConversationError where none does.
        remarks: what somebody should know about the last conversation.

    Raises DataError where no sample is left.
    """
    samples, said = list[S](), Counter[str]()
    hint: str | None = None
    for conversation in conversations:
        try:
            whole = samples_of(conversation)
            found = fitting(whole)
        except DataError as error:  # one row never ends a run: ChatGLM's rounds, what a template refuses
            accounting.kept -= 1
            accounting.drop(error.message, conversation.source)
            hint = error.hint or hint
            continue
        finally:
            said.update(remarks())
        if lost := sum(len(s.input_ids) for s in whole) - sum(len(s.input_ids) for s in found):
            accounting.truncated += 1
            accounting.truncated_tokens += lost
        samples += found
    accounting.check()
    accounting.notes += [f"{sentence} (rows: {count})" for sentence, count in sorted(said.items())]
    if not samples:
        raise DataError(f"no sample is left: {accounting.summary()}", hint=hint)
    return samples
