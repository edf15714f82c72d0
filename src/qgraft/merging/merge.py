"""merge() and unmerge(): an adapter's delta into the packed weights of its base, and the original bytes back.

    rows       that fit, that judge, that measure (calibration.py)
    exact      layers whose deltas only change minimums, in closed form (exact.py); they need no rows, and no more is done
    measure    base and base + adapter on the rows that measure (measure.py)
    solve      every layer in the order of the forward pass (lockstep.py, layer.py)
    finish     the merged model is measured; where it may keep more, layers are distilled together (finish.py, distill.py)
    decide     below `min_retained` nothing is replaced and MergeError says what was reached

Merging takes the adapter off the model, so that it cannot count twice; `unmerge` puts the bytes and the adapters back.
The original bytes are kept for that (views of the mapped file, so they cost no memory until read).
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.attach import detach_lora, put_loras
from qgraft.adapters.base import adapter_names, alone, base_of, find_adapter, require_loras
from qgraft.adapters.choose import active_adapters, use_adapter
from qgraft.adapters.lora import ALL_ROWS, Lora, LoraLinear
from qgraft.adapters.lora_embedding import LoraEmbedding
from qgraft.adapters.states import non_finite
from qgraft.adapters.targets import adapted_layers, lora_layers
from qgraft.checkpoints.assemble import weight_formats
from qgraft.checkpoints.save import CONTAINERS, current_fingerprint
from qgraft.errors import AdapterError, UnsupportedError, worded
from qgraft.experts import ExpertStack
from qgraft.formats import (
    FORMATS,
    PackedTensor,
    dequantize,
    fitting_format,
    get_format,
    misfit_notes,
    quantize,
    take_rows,
)
from qgraft.linear import in_stored_order
from qgraft.merging.calibration import Calibration, Dataset, find_rows
from qgraft.merging.exact import merge_exactly
from qgraft.merging.experts import StackToMerge, round_stack, rounded_notes, stacks_to_merge
from qgraft.merging.finish import finish
from qgraft.merging.heads import heads_lent, heads_merged, is_comparable, no_number_rows, put_heads, settle_method
from qgraft.merging.layer import CHAINS, LayerReport, check_method, is_writable, merge_nearest
from qgraft.merging.lockstep import merge_in_step
from qgraft.merging.measure import Measurement, Packed, in_place
from qgraft.merging.merged import Merged, merged_of, put_back
from qgraft.merging.needed_rows import no_rows, rows_to_measure, rows_to_solve
from qgraft.merging.outputs import outputs_of
from qgraft.merging.report import Kept, MergeReport, check_kept
from qgraft.merging.store import WorkDir, held, identity
from qgraft.merging.token_rows import Written, rows_written
from qgraft.model_parts import is_encoder_decoder
from qgraft.passes.decoder import evaluating
from qgraft.progress import Display, bar_on, counted, shown
from qgraft.ranges import AT_MOST_1, SEED, check_ranges
from qgraft.sizes import peak_memory_bytes


@alone("merged")
def merge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    calibration: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    method: str = "auto",
    to: str | None = None,
    min_retained: float = 0.9,
    seed: int = 0,
    work_dir: str | Path | WorkDir | None = None,
    progress: bool | Console | None = None,
    **reading: Any,
) -> MergeReport:
    """Merge the active adapters, with their weights, into the packed weights of the model, in the formats they have.

    Args:
        tokenizer: None for the one that was loaded with the model.
        calibration: rows of the adapter's task, or what read_dataset takes; None for the rows that the adapter keeps
            (calibration.safetensors), else for the training set that it names. A few thousand tokens are used. Methods
            nearest and grid, and exact LoRAs, need none.
        eval_dataset: rows to measure on; None for the adapter's held-out set, else a part of the calibration rows.
        method: auto, which merges exact LoRAs (attach_lora(exact=True)) in closed form; or a part of it: scales, codes,
            feedback (GPTQ's order); or nearest (requantize), grid (requantize on the base's own scales).
        to: another format for the merged layers ("q8_0", "f16"). In a larger one more is kept, and the file that save()
            writes grows; what a smaller one takes from the base counts as lost.
        min_retained: fail, with nothing changed, below this share of the adapter's gain; -1e9: take whatever is kept.
        seed: of the choice of rows.
        work_dir: a folder to keep solved layers in, so that a merge which was killed goes on from them, to the same bytes;
            it is taken away when the merge is done. (A WorkDir: by whoever made it.)
        progress: whether it is shown; None for in a terminal and a notebook.
        reading: dataset_dir, template, system, name, author, allow_outside_files for the rows, as in evaluate(); what is
            not given is as the adapter was trained, but for a template in a file, which has to be given again.

    Raises AdapterError (no active adapter, NaN), DataError (no rows, or too few), MergeError (too little kept),
    OptionError, UnsupportedError (a format that cannot be written), StorageError (work_dir).
    """
    console = shown(progress)
    with held(work_dir, console) as work, rows_written(model) as rows:
        return _merge(
            model, tokenizer, calibration, eval_dataset, method, to, min_retained, seed, reading, console, work, rows
        )


def _merge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Dataset | None,
    eval_dataset: Dataset | None,
    method: str,
    to: str | None,
    min_retained: float,
    seed: int,
    reading: Mapping[str, Any],
    console: Console | None,
    work: WorkDir | None,
    rows: Written,
) -> MergeReport:
    """The parts of a merge in their order."""
    began = time.perf_counter()
    check_method(method)
    check_ranges({"min_retained": (min_retained, AT_MOST_1), "seed": (seed, SEED)})
    _check_format(model, to)
    layers, weights, exact = _layers_to_merge(model, to, method)
    experts = stacks_to_merge(model, weights, to)
    if base_of(model).info is not None:
        current_fingerprint(model)  # needs the file that was loaded; better missing now than after minutes
    adapters = [find_adapter(model, name) for name in weights]
    trained, brought = [each.trained for each in adapters], [each.kept for each in adapters]
    find: Any = partial(find_rows, model, tokenizer, calibration, eval_dataset, trained, reading, seed, brought)
    find = find if is_comparable(model) else no_number_rows
    solved = {path: layer for path, layer in layers.items() if path not in exact}
    speaks, given = tokenizer or base_of(model).tokenizer, (calibration, eval_dataset)
    starts = {path: _start(layer, to) for path, layer in solved.items()}
    method = settle_method(model, method, starts)
    solves = bool(solved or experts) and method in CHAINS
    chosen: Calibration | None
    unmeasured: str | None
    if is_encoder_decoder(model.config):
        chosen, unmeasured = no_rows(solves, method, *given)
    else:
        chosen, unmeasured = rows_to_solve(find, method) if solves else rows_to_measure(find, speaks, *given)
    deltas = {path: partial(_delta, layer, weights, starts[path]) for path, layer in solved.items()}
    kept, steps = None, 0
    with evaluating(model), heads_lent(model, weights), _together(model, chosen), bar_on(console) as bar:
        about = partial(identity, model, weights, method=method, to=to, seed=seed)
        changed: dict[str, LoraLinear | ExpertStack] = {
            **layers,
            **{path: each.stack for path, each in experts.items()},
        }
        measurement = None if chosen is None else Measurement(model, changed, chosen)
        done, reports = _solve(model, starts, deltas, chosen, method, bar, work, about, experts)
        others = {path: merged for path, (merged, _) in exact.items()}
        others |= {path: done[path] for path in experts}
        done = {path: merged for path, merged in done.items() if path not in experts}
        if chosen is not None and measurement is not None:
            measured = partial(_kept_with, measurement, others)
            if method == "auto" and solved:
                done, kept, steps = finish(model, changed, done, others, chosen, measured, counted(bar, "distilling"))
            else:
                kept = measured(done)
    calibrated, again = chosen if solves else None, work.note if work else None
    report = MergeReport(
        adapters=weights,
        method=method,
        layers=[*(report for _, report in exact.values()), *reports],
        kept=kept,
        calibration_rows=len(calibrated.fit) + len(calibrated.judge) if calibrated else 0,
        calibration_tokens=calibrated.tokens() if calibrated else 0,
        distilled_steps=steps,
        seconds=time.perf_counter() - began,
        peak_memory_bytes=peak_memory_bytes(),
        notes=(
            *(chosen.notes if chosen else ()),
            *filter(None, [unmeasured, again]),
            *_notes({path: each.in_features for path, each in changed.items()}, to, reports),
            *rows.notes,
        ),
    )
    info = base_of(model).info
    check_kept(report, min_retained, "f16" if info and info.container == "folder" else "q8_0")
    _replace(model, {**others, **done}, weights, rows)
    return report


def _together(model: PreTrainedModel, chosen: Calibration | None) -> AbstractContextManager[str | None]:
    """Within the block samples share passes where they can, which is found out once for all that a merge does with them."""
    if chosen is None:
        return nullcontext()
    samples = [*chosen.fit, *chosen.judge, *chosen.measure, *chosen.drift, *chain.from_iterable(chosen.further)]
    return outputs_of(model).together(model, samples)


def _kept_with(measurement: Measurement, others: Packed, done: Packed) -> Kept:
    """What is kept with these weights, and those of `others` in the other layers."""
    return measurement.kept({**others, **done})


def _solve(
    model: PreTrainedModel,
    starts: Packed,
    deltas: Mapping[str, Callable[..., Tensor]],
    chosen: Calibration | None,
    method: str,
    bar: Display,
    work: WorkDir | None,
    about: Callable[[Calibration], dict[str, Any]],
    experts: Mapping[str, StackToMerge],
) -> tuple[Packed, list[LayerReport]]:
    """Merged weights by module path, and what happened to each layer; the model is left as it was."""
    if not starts and not experts:
        return {}, []
    if chosen is None or method not in CHAINS:
        pairs = [merge_nearest(path, start, deltas[path](), method) for path, start in starts.items()]
        pairs += [round_stack(path, stack, method) for path, stack in experts.items()]
        return {report.path: packed for packed, report in pairs}, [report for _, report in pairs]
    found = 0
    if work is not None:
        work.begin(about(chosen), starts)
        found = len(work.found)
    shown, done, total = counted(bar, "layers"), count(found + 1), len(starts) + len(experts)
    shown(found, total)  # time left is reckoned from here on: what was found takes none
    return merge_in_step(
        model, starts, deltas, chosen.fit, chosen.judge, method, lambda _: shown(next(done), total), work, experts
    )


merge_lora = merge  # its name in the tutorials on ChatGLM's QuantizedLinear, beside attach_lora and detach_lora


@alone("unmerged")
def unmerge(model: PreTrainedModel) -> None:
    """Put the original bytes back, and the adapters on the model again, active with the weights they were merged with.

    Undoes all merges since the model was loaded; of two adapters of one name the later comes back as NAME-again1. Raises
    AdapterError when nothing is merged, or when an adapter of the same name has been attached meanwhile.
    """
    base, merges = base_of(model), merged_of(model)
    if merges is None:
        raise AdapterError("unmerge: nothing is merged into this model")
    if taken := sorted(merges.adapters.keys() & set(adapter_names(model))):
        raise AdapterError(
            f"unmerge would bring back {', '.join(taken)}, but adapters of that name are attached",
            hint="take them off with detach_lora() first",
        )
    active = {**merges.weights, **active_adapters(model)}
    put_back(model, merges)
    for adapter in merges.adapters.values():
        put_loras(model, copy.deepcopy(adapter))  # a copy of the model has the same Merged, and shall not train with it
    use_adapter(model, active)
    put_heads(model, merges.heads)
    base.info, base.origin, base.merged = merges.info, merges.origin, None


def _replace(
    model: PreTrainedModel, packed: Mapping[str, PackedTensor], weights: Mapping[str, float], rows: Written
) -> None:
    """Put the merged bytes in place and take the adapters off."""
    base, layers = base_of(model), dict[str, LoraLinear | ExpertStack](lora_layers(model))
    layers |= {path: each.stack for path, each in stacks_to_merge(model, weights).items()}
    before, info = merged_of(model) or Merged(base.info, {}, {}, {}, rows.origin), base.info
    with heads_merged(model, weights) as heads:
        if info is not None:  # adapters of the unmerged base no longer fit
            with in_place(layers, packed):  # may fail, so it comes before what cannot
                info = replace(info, fingerprint=current_fingerprint(model), formats=weight_formats(model))
    original = {path: layers[path].packed for path in packed} | rows.packed | before.packed
    for path, merged in packed.items():
        layers[path].replace(merged)
    adapters, active = dict(before.adapters), dict(before.weights)
    for name, weight in weights.items():
        others = (f"{name[:50]}-again{n}" for n in count(1))  # for when one of that name was merged before
        kept = next(each for each in chain([name], others) if each not in adapters)
        adapter = rows.adapters.get(name) or find_adapter(model, name)
        adapters[kept], active[kept] = replace(adapter, name=kept), weight
        detach_lora(model, name)
    base.info = info
    base.merged = Merged(before.info, original, adapters, active, before.origin, heads | before.heads)
    rows.kept = True


def _check_format(model: PreTrainedModel, to: str | None) -> None:
    """Raises UnsupportedError for a format that qgraft, or the container of the model, cannot write."""
    if to is None:
        return
    get_format(to)  # an unknown name gets the closest ones as a hint
    info = base_of(model).info
    held = CONTAINERS[info.container].held | CONTAINERS["gguf"].held if info else FORMATS  # a folder may become one
    possible = [name for name in held if FORMATS[name].quantize is not None]
    if to not in possible:
        raise UnsupportedError(f"merge: to={to!r}: expected {', '.join(sorted(possible))}")


def _layers_to_merge(
    model: PreTrainedModel, to: str | None, method: str
) -> tuple[dict[str, LoraLinear], dict[str, float], dict[str, tuple[PackedTensor, LayerReport]]]:
    """The layers that an active adapter is on, the active adapters, and what is merged in closed form already.

    Raises AdapterError, or UnsupportedError for layers that cannot take their delta.
    """
    weights = active_adapters(model)
    if not weights:
        merges = merged_of(model)
        done = f"; merged already: {', '.join(merges.adapters)}" if merges else ""
        attached = ", ".join(adapter_names(model)) or "none"
        raise AdapterError(
            f"merge: no adapter is active (attached: {attached}{done})",
            hint=worded(flags="give --adapter FOLDER", python="attach or load one, and choose it with use_adapter()"),
        )
    require_loras(model, weights, "merge")
    for name in weights:
        if broken := non_finite(dict(find_adapter(model, name).named_parameters())):
            raise AdapterError(f"merge: NaN or infinity in {len(broken)} tensors of {name!r}, {broken[0]} first")
    adapted = {path: layer for path, layer in adapted_layers(model) if any(name in layer.loras for name in weights)}
    layers = {path: layer for path, layer in adapted.items() if isinstance(layer, LoraLinear)}
    exact = merge_exactly(layers, weights) if method == "auto" and to is None else {}
    output: Any = model.get_output_embeddings()
    held = {name for name, each in FORMATS.items() if each.quantize is not None}
    problems = [f"{path} is the embedding" for path, layer in adapted.items() if isinstance(layer, LoraEmbedding)]
    stacks = stacks_to_merge(model, weights, to)
    problems += [f"{path} is {each.format}, which qgraft does not write" for path, each in stacks.items()
                 if each.format not in held]  # fmt: skip
    for path, layer in layers.items():
        if layer is output:
            problems.append(f"{path} is the output layer, which may share its weight with the embedding")
        elif not layer.is_packed:
            problems.append(f"{path} holds no packed weight")
        elif to is None and path not in exact and not is_writable(layer.packed):
            problems.append(f"{path} is {layer.packed.format}, which qgraft does not write")
    if problems:
        shown = "\n  ".join(problems[:8] + (["..."] if len(problems) > 8 else []))
        raise UnsupportedError(f"merge: these layers cannot take the delta:\n  {shown}",
                               hint=f"formats that can be written: {', '.join(sorted(held))}")  # fmt: skip
    return layers, weights, exact


def _start(layer: LoraLinear, to: str | None) -> PackedTensor:
    """The layer's weight in the format that its merged weight will have."""
    fitting = None if to is None else fitting_format(to, layer.in_features)
    packed = layer.packed
    return packed if fitting in (None, packed.format) else quantize(dequantize(packed, torch.float32), str(fitting))


@torch.no_grad()
def _delta(layer: LoraLinear, weights: Mapping[str, float], start: PackedTensor, rows: slice = ALL_ROWS) -> Tensor:
    """Some rows of what the adapted weight is above `start`, [out, in] float32 in its column order: what active adapters add.

    In another format what rounding the base took away is a part of it, so that a merge makes up for that, too.
    """
    loras = [(cast(Lora, layer.loras[name]), weight) for name, weight in weights.items() if name in layer.loras]
    parts = [weight * lora.delta(rows, layer.base) for lora, weight in loras]
    delta = in_stored_order(layer.base, torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
    if start.format == (packed := layer.packed).format:
        return delta
    index = torch.arange(layer.out_features, device=start.device)[rows]
    base, rounded = (dequantize(take_rows(each, index), torch.float32) for each in (packed, start))
    return delta + (base - rounded)


def _notes(widths: Mapping[str, int], to: str | None, reports: Sequence[LayerReport]) -> list[str]:
    """Which layers got another format than `to`, or none, by their inputs; which experts were rounded."""
    found = {} if to is None else {path: (width, fitting_format(to, width)) for path, width in widths.items()}
    return [*(misfit_notes(str(to), found) if found else ()), *rounded_notes(reports)]
