"""Combine adapters from their folders into a new folder: no base is loaded, the files say all that is needed.

The arithmetic is adapters/combine.py's. Here: the adapters must have been trained on the same base, by the fingerprints
in their seals; the new folder is written like any other adapter (folder.py), its seal carries that base over and
says what was combined. What all inputs share of the dataset and the prompt (template, system ...) goes into the seal as
well, so that the new adapter is prompted as they were; and where all of them keep rows to be merged with, it has rows of all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgraft.adapter_files.calibration import read_rows
from qgraft.adapter_files.folder import WEIGHTS, read_adapter, write_adapter
from qgraft.adapter_files.lora import StoredLoras, as_matrix, is_of_convolution, parse_state
from qgraft.adapter_files.peft_config import (
    CONFIG,
    layer_config,
    peft_config,
    stated_rank,
)
from qgraft.adapter_files.prefix import is_prefix_config
from qgraft.adapter_files.seal import EXACT, is_exact, remembered_arguments
from qgraft.adapters.adapter import prefix_error
from qgraft.adapters.combine import (
    DENSITY,
    PRUNING,
    CombineReport,
    Factors,
    check_options,
    combine_layers,
    experts_error,
    no_product_error,
)
from qgraft.adapters.dora import DoraLora
from qgraft.adapters.exact import MinimumLora
from qgraft.adapters.kept_rows import rows_of_all
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.peft_names import tensor_name
from qgraft.adapters.states import non_finite
from qgraft.data.templates import PROMPT_OPTIONS
from qgraft.errors import AdapterError, OptionError, UnsupportedError, option
from qgraft.locks import folder_locked
from qgraft.model_parts import CAUSAL
from qgraft.targets import check_new

_OF_ROWS = ("dataset", "dataset_dir", "eval_dataset", "name", "author", *PROMPT_OPTIONS)


def combine_files(
    adapters: Mapping[str | Path, float],
    output: str | Path,
    method: str = "linear",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: str = "float32",
    force: bool = False,
    overwrite: bool = False,
) -> CombineReport:
    """Combine the adapters in these folders, folder -> weight, and write the result to the folder `output`.

    Args:
        method, r, density, seed: see adapters.combine.combine.
        dtype: of the stored weights: float32, float16 or bfloat16.
        force: combine although the base of an adapter is another one or not known.
        overwrite: write over the adapter that `output` holds; never over an input.

    Raises AdapterError that lists all that is wrong with the inputs, OptionError, UnsupportedError, StorageError when
    `output` exists already, is held by a run or another process, or cannot be written.
    """
    output = Path(output)
    folders = {Path(folder): weight for folder, weight in adapters.items()}
    check_options(folders, method, r, density, seed)
    names = _names(folders)
    check_new(output, overwrite, folders)
    for folder in folders:
        if folder.is_file():
            raise AdapterError(f"{folder} is a file, and combining takes folders",
                               hint="qgraft export --to peft makes the folder of a GGUF-LoRA")  # fmt: skip
    read = {folder: read_adapter(folder) for folder in folders}
    if prefixes := [names[folder] for folder, (config, _, _) in read.items() if is_prefix_config(config)]:
        raise prefix_error("combine", prefixes)
    layers, embeddings, convolutions, problems = {}, set(), set(), []
    for folder, (config, state, _) in read.items():
        stored = parse_state(state, config.get("modules_to_save"))
        if stored.whole:
            raise UnsupportedError(f"combine: {folder} has a head of its own, and heads have no sum")
        convolutions |= {path for path, pair in stored.pairs.items() if is_of_convolution(pair)}
        layers[names[folder]], wrong = _factors(config, stored)
        embeddings |= stored.embeddings
        if stored.rows:
            raise UnsupportedError(
                f"combine: {names[folder]!r} has rows of single tokens ({sorted(stored.rows)[0]}), which are no LoRA",
                hint="merge it: the merged file has them",
            )
        if config.get("target_parameters"):
            raise experts_error(", ".join(config["target_parameters"]))
        if stored.minimums:
            raise no_product_error("combine", sorted(stored.minimums)[0], MinimumLora.about)
        if config.get("use_dora"):
            raise no_product_error("combine", str(folder), DoraLora.about)
        problems += [f"{folder}: {problem}" for problem in wrong]
    if problems:
        raise AdapterError("the adapters cannot be combined:\n  " + "\n  ".join(problems))
    seals = {folder: seal for folder, (_, _, seal) in read.items()}
    base = _common_base(seals, force)
    weights = {names[folder]: weight for folder, weight in folders.items()}
    combined, report = combine_layers(layers, weights, output.name, method, r, density, seed)
    configs = {path: LoraConfig(made.rank, lora_alpha=made.rank) for path, made in combined.items()}
    targets = _targets([config for config, _, _ in read.values()], sorted(combined))
    details = {**_details(report, folders, density, seed), "arguments": _shared_arguments(seals), "base": base}
    details[EXACT] = method == "linear" and all(map(is_exact, seals.values()))  # sums of A stay as A are, cuts do not
    state = {
        tensor_name(path, part, path in embeddings): matrix[..., None, None] if path in convolutions else matrix
        for path, made in combined.items()
        for part, matrix in (("A", made.A), ("B", made.B))
    }
    tasks = {config.get("task_type") for config, _, _ in read.values()}
    task_type = tasks.pop() if len(tasks) == 1 else CAUSAL
    options = peft_config(configs, targets, (base or {}).get("source"), task_type=task_type)
    kept = rows_of_all([read_rows(folder, seal) for folder, seal in seals.items()])
    with folder_locked(output):
        check_new(output, overwrite, folders)  # another process may just have written it
        write_adapter(output, output.name, {WEIGHTS: state}, options, details, dtype, kept)
    return report


def _names(folders: Mapping[Path, float]) -> dict[Path, str]:
    """What to call the adapters in a report: folders by their names, or by their paths where two have one name."""
    if not folders:
        raise OptionError("combine: got no adapters, expected at least one folder")
    same = [str(folder) for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1]
    if same:
        raise OptionError(
            f"an adapter is given twice: {', '.join(same)}", hint="give it once, with the sum of the weights"
        )
    short = [folder.resolve().name for folder in folders]
    return {
        folder: name if short.count(name) == 1 else str(folder) for folder, name in zip(folders, short, strict=True)
    }


def _factors(config: Mapping[str, Any], stored: StoredLoras) -> tuple[dict[str, Factors], list[str]]:
    """({module path: A, B and scaling}, what is wrong with the tensors)."""
    problems, layers = list(stored.problems), {}
    for path, pair in stored.pairs.items():
        problems += [f"{tensor_name(path, part)}: NaN or infinity" for part in non_finite(pair)]
        A, B = (as_matrix(pair[part]) if is_of_convolution(pair) else pair[part] for part in "AB")
        fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and A.is_floating_point() and B.is_floating_point()
        if not fits:
            problems.append(
                f"{path}: got A {list(A.shape)} {A.dtype}, B {list(B.shape)} {B.dtype}, expected a LoRA's pair"
            )
        elif A.shape[0] != (rank := stated_rank(config, path)):
            problems.append(f"{path}: rank {A.shape[0]}, but {CONFIG} says r={rank}")
        else:
            layers[path] = Factors(A.float(), B.float(), layer_config(config, path, A.shape[0]).scaling)
    if not stored.pairs:
        problems.append("no layer in it")
    return layers, problems


def _common_base(seals: Mapping[Path, dict[str, Any] | None], force: bool) -> dict[str, Any] | None:
    """The base that the inputs were trained on. Raises AdapterError where it is not one, unless forced."""
    bases = {folder: (seal or {}).get("base") or None for folder, seal in seals.items()}
    known = {str(base.get("fingerprint")): base for base in bases.values() if base}
    if (None in bases.values() or len(known) > 1) and not force:
        lines = [
            f"{folder}: {base.get('fingerprint')} ({base.get('source')})" if base else f"{folder}: not known"
            for folder, base in bases.items()
        ]
        raise AdapterError(
            "the adapters were not trained on one base, as far as is known:\n  " + "\n  ".join(lines),
            hint=f"combine adapters of the same base, or use {option('force')} where you know that it is",
        )
    return next(iter(known.values())) if len(known) == 1 else None


def _targets(configs: list[dict[str, Any]], paths: list[str]) -> list[str]:
    """PEFT's target_modules for these layers: the names that the inputs give theirs, or else all whole paths."""
    lists = [config.get("target_modules") for config in configs]
    narrowed = any(config.get("layers_to_transform") is not None or config.get("exclude_modules") for config in configs)
    if narrowed or not all(isinstance(names, list) for names in lists):
        return paths
    return sorted({str(name) for names in lists for name in names or ()})


def _shared_arguments(seals: Mapping[Path, dict[str, Any] | None]) -> dict[str, Any]:
    """What all inputs were trained with alike, of the arguments that say which rows, and how a prompt looks."""
    known = [remembered_arguments(seal) for seal in seals.values()]
    return {
        key: known[0][key]
        for key in _OF_ROWS
        if key in known[0] and all(arguments.get(key) == known[0][key] for arguments in known)
    }


def _details(report: CombineReport, folders: Mapping[Path, float], density: float | None, seed: int) -> dict[str, Any]:
    """What the seal says about the combination."""
    details: dict[str, Any] = {
        "combined": {str(folder): weight for folder, weight in folders.items()},
        "method": report.method,
    }
    if report.method in PRUNING:
        details |= {"density": DENSITY if density is None else density, "seed": seed}
    return details | ({"truncation_error": report.error} if report.cuts else {})
