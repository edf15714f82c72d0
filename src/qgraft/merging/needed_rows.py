"""Which rows a merge needs: those to solve for, those to measure on where there are some, or none at all."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from qgraft.errors import DataError, UnsupportedError, option, worded
from qgraft.merging.calibration import Calibration, Dataset


def rows_to_solve(find: Callable[[], Calibration | None], method: str) -> tuple[Calibration | None, str | None]:
    """(The rows, nothing to say). Raises DataError where there are none."""
    chosen = find()
    if chosen is None:
        raise DataError(
            f"merge with method {method} needs rows of the adapter's task, and the adapter names no training set",
            hint=f"give {worded(flags='--dataset', python='calibration=')}, or {option('method', 'nearest')}, which needs "
            "none and keeps little",
        )
    return chosen, None


def rows_to_measure(
    find: Callable[[], Calibration | None], tokenizer: PreTrainedTokenizerBase | None, *given: Dataset | None
) -> tuple[Calibration | None, str | None]:
    """(rows, or why there are none) where nothing is solved for: only rows that are given have to be there."""
    needed = any(each is not None for each in given)
    if tokenizer is None and not needed:
        return None, "what was kept is not measured: the model came without a tokenizer"
    try:
        return find(), None
    except DataError as error:
        if needed:
            raise
        return None, f"what was kept is not measured: {error.message}"


def no_rows(solves: bool, method: str, *given: Dataset | None) -> tuple[Calibration | None, str | None]:
    """(None, why there are no rows) for an encoder-decoder, whose layers are not solved in the order of one pass.

    Raises UnsupportedError where rows are given, or the method `solves` for some.
    """
    wanted = [f"method {method}"] if solves else []
    wanted += ["rows to solve for, or to measure on"] if any(each is not None for each in given) else []
    if wanted:
        raise UnsupportedError(
            f"merge: {' and '.join(wanted)}: an encoder-decoder is merged without rows, by the methods nearest and grid",
            hint=f"{option('method', 'nearest')} keeps everything in float layers; packed ones lose what they round away",
        )
    return None, "what was kept is not measured, as the model is an encoder-decoder"
