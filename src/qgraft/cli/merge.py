"""qgraft merge: an adapter into the packed weights of its base, written as the same kind of file."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgraft import targets
from qgraft.cli.options import Parser, load_with_adapters, number_in, print_note
from qgraft.errors import MergeError, OptionError
from qgraft.locks import output_locked
from qgraft.ranges import AT_MOST_1, FINITE, SEED


def run(words: Sequence[str]) -> int:
    """Parse, load, merge, save, report."""
    parser = Parser(
        "merge",
        "Merge adapters into the packed weights of their base and write the same kind of file: same formats, same size.",
    )
    parser.add_model()
    parser.add_argument("--output", required=True, metavar="PATH", help="file (or folder) to write")
    parser.add_argument("--method", default="auto", help="auto, scales, codes, feedback, nearest, grid (default auto)")
    parser.add_argument(
        "--dataset", help="rows to calibrate on; default: those that the adapter keeps, or was trained on"
    )
    parser.add_argument("--eval_dataset", help="rows to measure on; default: the adapter's held-out set, or a split")
    parser.add_argument("--dataset_dir", help="folder of dataset_info.json and of the files it names")
    parser.add_argument(
        "--allow_outside_files", action="store_true", help="dataset_info.json may name files outside of its folder"
    )
    parser.add_argument("--template", help="chat template: auto, plain, chatml, or a .jinja file")
    parser.add_argument("--system", help="system prompt for rows that have none")
    parser.add_argument("--name", help="what {{name}} in the dataset becomes")
    parser.add_argument("--author", help="what {{author}} in the dataset becomes")
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        type=number_in(FINITE),
        help="of each --adapter, in their order (default 1)",
    )
    least = "fail below this share of the adapter's gain (default 0.9); -1: take whatever does no greater harm"
    parser.add_argument("--min-retained", type=number_in(AT_MOST_1), default=0.9, help=least)
    parser.add_argument(
        "--to", metavar="FORMAT", help="write the linear layers in another format; in a larger one the file grows"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output; never base or adapter")
    parser.add_argument("--seed", type=number_in(SEED), default=0, help="of the choice of calibration rows (default 0)")
    options = parser.parse_args(words)
    target = Path(options.output)
    if not options.adapter:
        raise OptionError("qgraft merge: no --adapter is given", hint="give the folder of the adapter to merge")
    if len(options.weight) > len(options.adapter):
        raise OptionError(f"qgraft merge: got {len(options.weight)} --weight for {len(options.adapter)} --adapter")

    _check_names(options.method, options.to)
    json_file, picture = (_beside(target, suffix) for suffix in ("json", "png"))
    inputs = [Path(each) for each in (options.model, *options.adapter)]
    for path, kind in ((target, "" if target.is_dir() else "gguf"), (json_file, "json"), (picture, "png")):
        targets.check_new(path, options.overwrite, inputs, kind)

    with output_locked(target):
        return _merge_into(target, json_file, picture, options)


def _check_names(method: str, to: str | None) -> None:
    """Raise for a method or a format that there is not, before the minutes that loading may take."""
    from qgraft.formats import get_format
    from qgraft.merging.layer import check_method

    check_method(method)
    if to is not None:
        get_format(to)


def _merge_into(target: Path, json_file: Path, picture: Path, options: argparse.Namespace) -> int:
    """Load, merge, save, report; nobody else writes there meanwhile."""
    from rich.console import Console

    from qgraft import plots
    from qgraft.adapters.base import find_adapter
    from qgraft.adapters.choose import use_adapter
    from qgraft.checkpoints.save import check_target, save
    from qgraft.merging.merge import merge
    from qgraft.merging.store import work_in
    from qgraft.merging.task_rows import as_asked

    # rows of the adapters themselves are asked as each of them was trained
    model, tokenizer, names = load_with_adapters(options, prompts=options.dataset is not None)
    nbytes = check_target(model, target, to=options.to, overwrite=options.overwrite)
    if options.dataset is None:
        for adapter in (find_adapter(model, name) for name in names):  # before they are read
            if as_asked(adapter.kept, adapter.trained, vars(options)) is not None:
                print_note(f"adapter {adapter.name}: the rows that it keeps")
            elif rows := adapter.trained.get("dataset"):
                print_note(f"adapter {adapter.name}: rows as in training: {rows}")
    use_adapter(model, dict(zip(names, [*options.weight, *[1.0] * len(names)], strict=False)))
    console = Console(stderr=True)
    failed: MergeError | None = None
    report: Any  # MergeReport; a MergeError brings it as well
    with work_in(_work_folder(target), console, nbytes) as work:  # until all is saved
        try:
            report = merge(
                model, tokenizer, calibration=options.dataset, eval_dataset=options.eval_dataset, method=options.method,
                to=options.to, min_retained=options.min_retained, seed=options.seed, work_dir=work, progress=console,
                dataset_dir=options.dataset_dir, template=options.template, system=options.system, name=options.name,
                author=options.author, allow_outside_files=options.allow_outside_files,
            )  # fmt: skip
        except MergeError as error:
            failed, report = error, error.report
        if failed is None:
            report = replace(report, notes=(*report.notes, *_unmeasured(model, report, options.to)))
        report.print(Console())
        if failed is not None:
            raise failed
        # also for the layers that no adapter is on
        saved = save(model, target, to=options.to, overwrite=options.overwrite)
    print_note(str(saved))
    report.save(json_file)
    plots.plot_merge(json_file, picture)
    print_note(f"report: {json_file} and {picture.name}")
    return 0


def _unmeasured(model: Any, report: Any, to: str | None) -> list[str]:
    """A sentence where layers that are not merged change their format, too, which comes after measuring."""
    from qgraft.adapters.lora_experts import stack_paths
    from qgraft.adapters.targets import find_targets
    from qgraft.experts import ExpertStack
    from qgraft.formats import fitting_format
    from qgraft.linear import QuantizedLinear

    merged = {layer.path for layer in report.layers}
    inner = [] if to is None else [*find_targets(model, "all-linear"), *stack_paths(model)]
    layers = [model.get_submodule(path) for path in inner if path not in merged]
    layers = [layer for layer in layers if isinstance(layer, QuantizedLinear | ExpertStack)]
    weights = [layer.packed_weight.get() for layer in layers]
    count = sum(fitting_format(str(to), each.shape[1]) not in (None, each.format) for each in weights)
    return [f"{count} linear layers without an adapter are written in {to}, too: not measured"] if count else []


def _work_folder(target: Path) -> Path:
    """Where the layers are kept that are solved, as long as the merge is not done."""
    target = Path(os.path.abspath(target))
    return target.with_name(f"{target.name}.merging")


def _beside(target: Path, suffix: str) -> Path:
    """A file of the report; a folder holds nothing but what save wrote, so it lies beside that."""
    target = Path(os.path.abspath(target))
    return target.with_name(f"{target.name.removesuffix('.gguf')}.merge.{suffix}")
