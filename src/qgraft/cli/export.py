"""qgraft export: an adapter in the layout of other programs."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qgraft import storage
from qgraft.cli.options import Parser, free_name, print_note

TARGETS = ("gguf-lora", "peft", "thudm")


def run(words: Sequence[str]) -> int:
    """Parse, load, write, say what was written and how to use it."""
    parser = Parser(
        "export",
        "Write an adapter for other programs: as a GGUF-LoRA, which llama.cpp runs beside the base's file,\n"
        "as a folder that PEFT reads (from a GGUF-LoRA; qgraft's own folders are PEFT's already), or, a prefix of a\n"
        "ChatGLM, as THUDM's P-Tuning scripts save it.",
    )
    parser.add_argument("--adapter", required=True, metavar="PATH", help="adapter folder, GGUF-LoRA, or THUDM's prefix")
    parser.add_argument(
        "--model", required=True, help="the base: GGUF file, folder, hub id (org/name:file.gguf), known model"
    )
    parser.add_argument("--quantize", metavar="FORMAT", help="pack a float base while loading, as in training")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what to write")
    parser.add_argument("--output", required=True, metavar="PATH", help="file (gguf-lora) or folder (others) to write")
    parser.add_argument(
        "--dtype", help="of the values: float16, float32; default: float16 (gguf-lora), float32 (others)"
    )
    parser.add_argument("--force", action="store_true", help="load an adapter that does not fit, as far as it does")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output; never base or adapter")
    options = parser.parse_args(words)
    source, target = Path(options.adapter), Path(options.output)
    storage.check_new(target, options.overwrite, [source, Path(options.model)])

    from qgraft.adapter_files.folder import load_adapter
    from qgraft.adapters.base import adapter_names, find_adapter
    from qgraft.checkpoints.load import load

    model, _ = load(options.model, quantize=options.quantize, dtype="float32", device="cpu")
    name = free_name(source.resolve().name, adapter_names(model))
    print_note(str(load_adapter(model, source, name, force=options.force)))
    arguments = find_adapter(model, name).trained
    if options.to == "gguf-lora":
        print(_gguf_lora(model, target, name, options, arguments))
    elif options.to == "thudm":
        print(_thudm(model, target, name, options.dtype or "float32", options.overwrite))
    else:
        print(_peft(model, source, target, name, options.dtype or "float32", arguments))
    return 0


def _gguf_lora(model: Any, target: Path, name: str, options: argparse.Namespace, arguments: dict[str, Any]) -> str:
    from qgraft.adapter_files.gguf_lora import export_gguf_lora

    dtype = options.dtype or "float16"
    done = export_gguf_lora(model, target, name, dtype, arguments, options.overwrite)
    base = shlex.quote(str(model.qgraft.info.source))
    system = arguments.get("system")
    prompt = f" -sys {shlex.quote(system)}" if isinstance(system, str) else ""
    return (
        f"{target}: GGUF-LoRA for {done.architecture}, {done.layers} layers, {done.parameters:,} values in {dtype}, "
        f"{done.nbytes:,} bytes\n\n"
        f"  llama-cli -m {base} --lora {shlex.quote(str(target))}{prompt}\n"
        f"  qgraft chat --model {base} --adapter {shlex.quote(str(target))}"
    )


def _thudm(model: Any, target: Path, name: str, dtype: str, overwrite: bool) -> str:
    from qgraft.adapter_files.thudm import export_thudm
    from qgraft.adapters.base import find_adapter

    nbytes = export_thudm(model, target, name, dtype, overwrite)
    values = find_adapter(model, name).size
    return f"{target}: prefix in THUDM's layout, {values:,} values in {dtype}, {nbytes:,} bytes"


def _peft(model: Any, source: Path, target: Path, name: str, dtype: str, arguments: dict[str, Any]) -> str:
    from qgraft.adapter_files.folder import save_adapter
    from qgraft.adapter_files.seal import read_seal

    details = read_seal(source) or {"exported_from": source.name, "arguments": arguments}
    save_adapter(model, target, name, details, dtype)
    parameters = (read_seal(target) or {}).get("parameters", 0)
    return f"{target}: PEFT adapter folder, {parameters:,} values in {dtype}"
