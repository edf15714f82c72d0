"""qgraft export: a model or an adapter in the layout of other programs."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qgraft import storage, targets
from qgraft.cli.options import Parser, free_name, print_note, print_notes
from qgraft.errors import OptionError, near_match
from qgraft.locks import folder_locked, output_locked

TARGETS = ("gguf", "gguf-lora", "ollama", "peft", "thudm")


def run(words: Sequence[str]) -> int:
    """Parse, load, write, say what was written and how to use it."""
    parser = Parser(
        "export",
        "Write a model or an adapter for other programs:\n"
        "  gguf       a folder as a GGUF file (an adapter in it: qgraft merge --output NAME.gguf)\n"
        "  gguf-lora  an adapter that llama.cpp runs beside the base's file\n"
        "  ollama     a folder with a Modelfile, for `ollama create`; with or without an adapter\n"
        "  peft       a folder that PEFT reads, from a GGUF-LoRA; qgraft's own folders are PEFT's already\n"
        "  thudm      a prefix of a ChatGLM, as THUDM's P-Tuning scripts save it",
    )
    parser.add_argument(
        "--adapter", metavar="PATH", action="append", help="adapter folder, GGUF-LoRA, or THUDM's prefix"
    )
    parser.add_argument(
        "--model", required=True, help="the base: GGUF file, folder, hub id (org/name:file.gguf), known model"
    )
    parser.add_argument("--quantize", metavar="FORMAT", help="pack a float base while loading, as in training")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what to write")
    parser.add_argument("--output", required=True, metavar="PATH", help="file (gguf, gguf-lora) or folder to write")
    parser.add_argument(
        "--dtype", help="of the values: float16, float32; default: float16 (gguf-lora), float32 (others)"
    )
    parser.add_argument("--force", action="store_true", help="load an adapter that does not fit, as far as it does")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output; never base or adapter")
    options = parser.parse_args(words)
    target = Path(options.output)
    if len(options.adapter or ()) > 1:
        raise OptionError("qgraft export writes one adapter, and several are given",
                          hint="qgraft combine makes one of several")  # fmt: skip
    options.adapter = options.adapter[0] if options.adapter else None
    kind = "gguf" if options.to in ("gguf", "gguf-lora") else ""
    targets.check_new(target, options.overwrite, map(Path, filter(None, (options.adapter, options.model))), kind)
    if options.adapter is None and options.to not in ("gguf", "ollama"):
        raise OptionError(f"qgraft export --to {options.to}: no --adapter is given", hint="give the adapter's folder")
    if options.adapter is not None and options.to == "gguf":
        raise OptionError(
            "qgraft export --to gguf writes the base alone, and --adapter is given",
            hint="qgraft merge --output NAME.gguf writes base and adapter in one; --to gguf-lora the adapter alone",
        )
    if options.to == "gguf" and target.suffix != ".gguf":
        raise OptionError(f"--output {target}: expected a name that ends in .gguf")
    _check_dtype(options)
    with output_locked(target):
        print(_written(target, options))
    return 0


def _written(target: Path, options: argparse.Namespace) -> str:
    """Load and write; returns what to say of it."""
    model, tokenizer, name, arguments = _loaded(options)
    if options.to == "gguf":
        return _gguf(model, target, options.overwrite)
    if options.to == "gguf-lora":
        return _gguf_lora(model, target, name, options, arguments)
    if options.to == "ollama":
        return _ollama(model, tokenizer, target, name, options, arguments)
    if options.to == "thudm":
        return _thudm(model, target, name, options.dtype or "float32", options.overwrite)
    return _peft(model, Path(options.adapter), target, name, options, arguments)


def _check_dtype(options: argparse.Namespace) -> None:
    """Raise OptionError for a --dtype that the target has not, before the base is loaded."""
    if options.dtype is None:
        return
    if options.adapter is None:
        raise OptionError(
            f"--dtype {options.dtype}: it is that of an adapter's values, and no --adapter is given",
            hint="leave it out: the base's weights are written as they are",
        )
    possible = ("float32", "float16", "bfloat16") if options.to == "peft" else ("float32", "float16")
    if options.dtype not in possible:
        raise OptionError(
            f"--dtype {options.dtype}: expected {', '.join(possible)}", hint=near_match(options.dtype, possible)
        )


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, str, dict[str, Any]]:
    """(model, tokenizer, the adapter's name, what it was trained with); no adapter has the name ""."""
    from qgraft.adapter_files.folder import load_adapter
    from qgraft.adapter_files.told_task import told_labels
    from qgraft.adapters.base import adapter_names, find_adapter
    from qgraft.checkpoints.load import load

    about = told_labels(options.model, options.adapter) if options.adapter is not None else {}
    model, tokenizer = load(options.model, quantize=options.quantize, dtype="float32", device="cpu", **about)
    if options.adapter is None:
        print_notes(model)
        return model, tokenizer, "", {}
    source = Path(options.adapter)
    name = free_name(source.resolve().name, adapter_names(model))
    print_note(str(load_adapter(model, source, name, force=options.force)))
    return model, tokenizer, name, dict(find_adapter(model, name).trained)


def _gguf(model: Any, target: Path, overwrite: bool) -> str:
    from qgraft.checkpoints.save import save

    return str(save(model, target, overwrite=overwrite))


def _gguf_lora(model: Any, target: Path, name: str, options: argparse.Namespace, arguments: dict[str, Any]) -> str:
    from qgraft.adapter_files.gguf_lora import export_gguf_lora

    dtype = options.dtype or "float16"
    done = export_gguf_lora(model, target, name, dtype, arguments, options.overwrite)
    base = shlex.quote(str(model.qgraft.info.source))
    system = arguments.get("system")
    prompt = f" -sys {shlex.quote(system)}" if isinstance(system, str) else ""
    files = _files(model)
    beside = shlex.quote(files[0]) if files else "BASE.gguf"
    return (
        f"{target}: GGUF-LoRA for {done.architecture}, {done.layers} layers, {done.parameters:,} values in {dtype}, "
        f"{done.nbytes:,} bytes\n\n"
        f"  llama-cli -m {beside} --lora {shlex.quote(str(target))}{prompt}\n"
        f"  qgraft chat --model {base} --adapter {shlex.quote(str(target))}"
    )


def _files(model: Any) -> list[str]:
    """The GGUF files of the base; llama.cpp is given the first. None where it has other files."""
    from qgraft.checkpoints.gguf_split import read_model

    if model.qgraft.info.container != "gguf":
        return []
    file = read_model(model.qgraft.info.source)
    return [str(part.path) for part in file.parts or (file,)]


def _ollama(
    model: Any, tokenizer: Any, target: Path, name: str, options: argparse.Namespace, arguments: dict[str, Any]
) -> str:
    """The folder for `ollama create`: the Modelfile and what it names, but the base's own file where there is one."""
    from qgraft.adapter_files.gguf_lora import export_gguf_lora
    from qgraft.adapter_files.modelfile import modelfile
    from qgraft.adapters.choose import adapters_off
    from qgraft.checkpoints.save import check_target, save
    from qgraft.cli.options import without_tokenizer
    from qgraft.data.ends import end_token_ids
    from qgraft.data.templates import named_template

    if tokenizer is None:
        raise without_tokenizer(options.model, model, "a Modelfile")
    targets.check_folder_target(target)
    if len(files := _files(model)) > 1:
        raise OptionError(
            f"qgraft export --to ollama: {options.model} is a model in {len(files)} files, and Ollama reads one",
            hint=f"make one file of it: llama-gguf-split --merge {shlex.quote(files[0])} model.gguf",
        )
    base = Path(model.qgraft.info.source).resolve()
    storage.check_name(base)  # which stands in the Modelfile
    if model.qgraft.info.container == "folder":
        base = Path("model.gguf")
        with adapters_off(model):
            check_target(model, target.with_suffix(".gguf"), overwrite=True)
    template = arguments.get("template")
    stated = model.generation_config.eos_token_id
    ends = end_token_ids(tokenizer, stated, named_template(tokenizer, template))
    lora = "./adapter.gguf" if name else None
    prefix = str(arguments.get("source_prefix") or "")
    described = modelfile(base, lora, tokenizer, ends, arguments.get("system"), template, prefix)
    with storage.publish_folder(target) as staging:
        if name:
            export_gguf_lora(model, staging / "adapter.gguf", name, options.dtype or "float16", arguments)
        if model.qgraft.info.container == "folder":
            with adapters_off(model):
                save(model, staging / "model.gguf")
        storage.write_file(staging / "Modelfile", described.text.encode())
    file = shlex.quote(str(target / "Modelfile"))
    notes = "".join(f"{note}\n" for note in described.notes)
    return f"{notes}{target}: Modelfile\n\n  ollama create NAME -f {file}\n  ollama run NAME"


def _thudm(model: Any, target: Path, name: str, dtype: str, overwrite: bool) -> str:
    from qgraft.adapter_files.thudm import export_thudm
    from qgraft.adapters.base import find_adapter

    nbytes = export_thudm(model, target, name, dtype, overwrite)
    values = find_adapter(model, name).size
    return f"{target}: prefix in THUDM's layout, {values:,} values in {dtype}, {nbytes:,} bytes"


def _peft(
    model: Any, source: Path, target: Path, name: str, options: argparse.Namespace, arguments: dict[str, Any]
) -> str:
    from qgraft.adapter_files.folder import save_adapter
    from qgraft.adapter_files.lora import refuse_minimums
    from qgraft.adapter_files.seal import read_seal
    from qgraft.adapters.base import find_adapter

    refuse_minimums(find_adapter(model, name))
    details = read_seal(source) or {"exported_from": source.name, "arguments": arguments}
    dtype = options.dtype or "float32"
    with folder_locked(target):  # now that it is there if it was not
        targets.check_new(target, options.overwrite, [source, Path(options.model)])  # somebody may just have written it
        save_adapter(model, target, name, details, dtype)
    parameters = (read_seal(target) or {}).get("parameters", 0)
    return f"{target}: PEFT adapter folder, {parameters:,} values in {dtype}"
