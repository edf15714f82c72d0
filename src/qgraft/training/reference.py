"""reference.json in output_dir: what the model said of every row before the first step.

    rows                 SHA-256 of the texts, those held out too
    base                 fingerprint of the base
    learned, held_out    for each row the log-probabilities of its texts

A run that goes on takes it from there: that saves a pass over all rows, and the numbers are the same ones though passes may
be cut otherwise now. Where the file is gone they are computed again, and their hash is compared with that of then (`Bound`).
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from qgraft import storage
from qgraft.adapters.base import base_of
from qgraft.adapters.choose import adapters_off
from qgraft.data.preference_samples import Preference
from qgraft.data.tokenizing import samples_sha256
from qgraft.errors import CheckpointError
from qgraft.json_files import read_object
from qgraft.memory.budget import evaluation_tokens
from qgraft.model_parts import is_encoder_decoder
from qgraft.passes.labels import classifier_of, settled
from qgraft.passes.log_probs import shares_prompts
from qgraft.training.classification import Classification
from qgraft.training.distillation import Distillation
from qgraft.training.images import IMAGES, holds_images
from qgraft.training.objective import Objective, SupervisedFineTuning
from qgraft.training.on_policy import draws_answers
from qgraft.training.padded import Padded
from qgraft.training.preferences import PreferenceOptimization, with_reference
from qgraft.training.processes import Processes
from qgraft.training.speech import kind_of
from qgraft.training.stages import distill_options, preference_options

if TYPE_CHECKING:
    from qgraft.training.prepare import Prepared

REFERENCE = "reference.json"
Sides = tuple[list[Preference], list[Preference]]  # learned, held out


def settle_objective(model: PreTrainedModel, prepared: "Prepared", tokens: int, processes: Processes) -> Objective:
    """What a run learns, so many tokens in a pass. Of preferences the rows then have what the reference says of them."""
    if prepared.objective is not None:
        return prepared.objective
    if is_encoder_decoder(model.config):
        return Padded(kind_of(model), prepared.args.label_smoothing_factor, alone=not tokens)
    if holds_images(prepared.samples):
        return Padded(IMAGES, prepared.args.label_smoothing_factor, alone=not tokens)
    if (classifier := classifier_of(model)) is not None:
        classifier, said = settled(model, classifier, [*prepared.samples, *prepared.eval_samples])
        prepared.notes += said
        return Classification(classifier, prepared.args.label_smoothing_factor)
    if (taught := distill_options(prepared.args)) is not None and prepared.lesson is not None:
        drawn = draws_answers(model, prepared, taught, processes.count) if taught.draws else None
        return Distillation(taught, prepared.lesson.width, drawn)
    options = preference_options(prepared.args)
    if options is None:
        return SupervisedFineTuning(prepared.args.label_smoothing_factor)
    shared = tokens > 0 and not options.labelled and shares_prompts(model, prepared.samples)
    objective = PreferenceOptimization(options, alone=not tokens, shared=shared)
    if options.refers:
        went_on = prepared.earlier.resume is not None or prepared.earlier.run is not None
        prepared.samples, prepared.eval_samples = referred(
            model, (prepared.samples, prepared.eval_samples), objective, evaluation_tokens(prepared.args), processes,
            to_base=prepared.refers_to_base, earlier=prepared.folder if went_on else None,
        )  # fmt: skip
    return objective


def said_by_reference(prepared: "Prepared") -> dict[str, str]:
    """A hash of what the reference or the teacher says, for what a run is bound to; nothing where there is none."""
    if prepared.lesson is not None:
        return {"teacher (SHA-256 of what it says)": prepared.lesson.sha256}
    rows = [each for each in (*prepared.samples, *prepared.eval_samples) if isinstance(each, Preference)]
    values = repr([each.reference for each in rows])
    said = any(each.reference for each in rows)
    return {"reference (SHA-256 of its log-probabilities)": hashlib.sha256(values.encode()).hexdigest()} if said else {}


def referred(
    model: PreTrainedModel,
    sides: Sides,
    objective: PreferenceOptimization,
    tokens: int,
    processes: Processes,
    *,
    to_base: bool,
    earlier: Path | None,
) -> Sides:
    """Both sides with what the reference says of each row.

    Args:
        to_base: whether the reference is the base; else the model with its adapter as it is.
        earlier: a folder whose run this is; what stands there is taken if it is of these rows and this base.
    """
    if earlier is not None and (found := _read(earlier / REFERENCE, _about(model, sides), sides)) is not None:
        return found
    with adapters_off(model) if to_base else nullcontext():
        learned, held_out = (with_reference(model, rows, tokens, objective, processes) for rows in sides)
    return learned, held_out


def write_reference(model: PreTrainedModel, prepared: "Prepared") -> None:
    """Write the file, where there is a reference. Raises StorageError."""
    if prepared.lesson is not None or not said_by_reference(prepared):
        return
    sides = prepared.samples, prepared.eval_samples
    values = {name: [each.reference for each in rows] for name, rows in zip(_SIDES, sides, strict=True)}
    storage.write_json(prepared.folder / REFERENCE, {**_about(model, sides), **values})


_SIDES = ("learned", "held_out")


def _about(model: PreTrainedModel, sides: Sides) -> dict[str, Any]:
    base = base_of(model).info
    every = [text for rows in sides for each in rows for text in _asked(each)]
    return {"rows": samples_sha256(every), "base": None if base is None else base.fingerprint}


def _asked(row: Preference) -> list[Any]:
    """The texts of a row that the reference is asked about."""
    return [*row.texts, *([row.mismatched] if row.mismatched is not None else [])]


def _read(path: Path, about: dict[str, Any], sides: Sides) -> Sides | None:
    """What the file says of these rows; None where it is not there, cannot be read, or is of others."""
    try:
        found = read_object(path, CheckpointError) if path.is_file() else {}
    except CheckpointError:
        return None
    if any(found.get(key) != value for key, value in about.items()):
        return None
    learned, held_out = (_taken(rows, found.get(name)) for name, rows in zip(_SIDES, sides, strict=True))
    return None if learned is None or held_out is None else (learned, held_out)


def _taken(rows: Sequence[Preference], values: object) -> list[Preference] | None:
    """The rows with these values, if they are numbers for each."""
    if not isinstance(values, list) or len(values) != len(rows):
        return None
    for each, row in zip(values, rows, strict=True):
        if not isinstance(each, list) or len(each) != len(_asked(row)) or not all(type(one) is float for one in each):
            return None
    return [replace(row, reference=tuple(each)) for each, row in zip(values, rows, strict=True)]
