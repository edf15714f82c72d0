"""What other libraries raise for files that are not what they should be: turned into errors of ours, in one place.

transformers, tokenizers and sentencepiece check little of what they read; a field of another type, a name that their tables
do not have, or a flipped bit ends in whatever the line in question raises. All of these types were seen; a bug of theirs
looks the same, and is told in the same words.
"""

from types import TracebackType

from huggingface_hub.errors import StrictDataclassError

from qgraft.errors import CheckpointError, QgraftError

FOREIGN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError, StrictDataclassError,
)  # fmt: skip


class ForeignErrors:
    """`with ForeignErrors("x: ..."):` raises as an error of ours what a library raises for a broken file.

    The tokenizers package raises plain `Exception`, not a class of its own; exactly that one is meant, not all below it.
    """

    def __init__(self, what: str, error: type[QgraftError] = CheckpointError) -> None:
        """`what` the error begins with."""
        self.what, self.error = what, error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, reason: BaseException | None, _: TracebackType | None) -> None:
        if reason is not None and (kind is Exception or isinstance(reason, FOREIGN)):
            raise self.error(f"{self.what}: {one_line(reason)}") from reason


def one_line(reason: BaseException) -> str:
    """What an exception says, in one line of at most 300 characters; its name where it says nothing."""
    text = " ".join(str(reason).split())[:300]
    return f"{type(reason).__name__}: {text}" if isinstance(reason, LookupError) or not text else text
