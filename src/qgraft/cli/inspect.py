"""qgraft inspect: what is in a model file, an adapter folder or a run, without reading all of its weights."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qgraft.cli.options import Parser, print_json
from qgraft.errors import CheckpointError, QgraftError


def run(words: Sequence[str]) -> int:
    """Parse, look, print."""
    parser = Parser("inspect", "Show what is in a GGUF file, an adapter, a training run or a model folder.")
    parser.add_argument(
        "path", help="model.gguf, adapter.lora.gguf, an output folder of `qgraft train`, or a Hugging Face folder"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    findings = examine(Path(options.path), options.tensors)
    if options.json:
        print_json(findings)
    else:
        _print(findings)
    return 0


def examine(path: Path, tensors: bool = False) -> dict[str, Any]:
    """What is at `path`, as JSON values. Raises CheckpointError when it is nothing that qgraft knows."""
    from qgraft.adapter_files.peft_config import CONFIG

    if path.is_dir() and (path / CONFIG).is_file():
        return _adapter(path, tensors)
    if thudm := _thudm(path, tensors):
        return thudm
    if path.is_dir() and (path / "config.json").is_file():
        return _folder(path, tensors)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        raise CheckpointError(
            f"{path} holds neither a model (config.json) nor an adapter ({CONFIG})",
            hint=f"name a file in it, of several parts of a model any: {files[0]}" if files else None,
        )
    return _gguf(path, tensors)


def _gguf(path: Path, tensors: bool) -> dict[str, Any]:
    from qgraft.adapter_files.gguf_lora import is_gguf_lora
    from qgraft.checkpoints.gguf_model import gguf_fingerprint
    from qgraft.checkpoints.gguf_split import read_model

    file = read_model(path)
    adapter = is_gguf_lora(file)
    formats: dict[str, dict[str, int]] = {}
    for info in file.tensors.values():
        entry = formats.setdefault(info.format, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += math.prod(info.shape)
        entry["bytes"] += info.nbytes
    findings = {
        "kind": "GGUF-LoRA adapter" if adapter else "GGUF model",
        "path": str(path),
        "bytes": sum(len(part.data) for part in file.parts or (file,)),
        **({"parts": [part.path.name for part in file.parts]} if file.parts else {}),
        **({"ranks": _ranks(file)} if adapter else {"fingerprint": gguf_fingerprint(file)}),
        "formats": formats,
        "metadata": {key: _short(value) for key, value in file.metadata.items()},
        **({} if adapter else {"keys": _keys(file)}),
    }
    if tensors:
        findings["tensors"] = {i.name: f"{i.format} {list(i.shape)}" for i in file.tensors.values()}
    return findings


def _keys(file: Any) -> dict[str, Any]:
    """What each metadata key is for: used, without effect, refused, unknown; only the lists that are not empty."""
    from qgraft.checkpoints.gguf_header import Header
    from qgraft.checkpoints.gguf_key_report import key_report
    from qgraft.checkpoints.gguf_keys import TABLE

    if file.metadata.get("general.architecture") not in TABLE:
        return {"does not load": f"the architecture is none of {', '.join(TABLE)}"}
    try:
        report = key_report(Header(file))
    except QgraftError as error:
        return {"does not load": error.message}
    lists = {"used": report.used, "without effect": report.without_effect, "refused": report.refused}
    return {name: keys for name, keys in {**lists, "unknown": report.unknown}.items() if keys}


def _ranks(file: Any) -> dict[int, int]:
    """{rank: number of layers} of a GGUF-LoRA."""
    ranks = Counter(info.shape[0] for info in file.tensors.values() if info.name.endswith(".lora_a"))
    return dict(sorted(ranks.items()))


def _adapter(path: Path, tensors: bool) -> dict[str, Any]:
    from qgraft.adapter_files.folder import changed_files, read_peft_config, read_safetensors, read_tensors
    from qgraft.adapter_files.prefix import ENCODER, is_prefix_config
    from qgraft.adapter_files.seal import SEAL, read_seal

    state, seal, config = read_tensors(path), read_seal(path), read_peft_config(path)
    problems, lora = changed_files(path, seal), "DoRA adapter" if config.get("use_dora") else "LoRA adapter"
    prefix = {"pre_seq_len": config.get("num_virtual_tokens"), "prefix_projection": config.get("prefix_projection")}
    findings = {
        "kind": "prefix (P-Tuning v2)" if is_prefix_config(config) else lora,
        "path": str(path),
        "parameters": (seal or {}).get("parameters") or sum(t.numel() for t in state.values()),
        **(prefix if is_prefix_config(config) else {}),
        "config": {key: value for key, value in config.items() if value not in (None, {}, [])},
        "seal": ("holds" if not problems else "; ".join(problems)) if seal else f"none ({SEAL} is missing)",
        **{key: value for key, value in (seal or {}).items() if key not in ("files", "kind", "parameters")},
    }
    if tensors:
        if (path / ENCODER).is_file() and is_prefix_config(config):
            state |= read_safetensors(path / ENCODER)
        findings["tensors"] = {key: f"{t.dtype} {list(t.shape)}" for key, t in state.items()}
    return findings


def _thudm(path: Path, tensors: bool) -> dict[str, Any]:
    """A prefix of THUDM's scripts, without its model; nothing where it is something else."""
    from qgraft.checkpoints.thudm_prefix import KEY, holds_only_prefix, read_thudm, tensor_names

    if not holds_only_prefix(tensor_names(path)):
        return {}
    stored = read_thudm(path)
    assert stored is not None
    findings = {
        "kind": "prefix (P-Tuning v2) of ChatGLM's scripts",
        "path": str(path),
        "parameters": sum(t.numel() for t in stored.values.values()),
        **_prefix(stored),
        "seal": "none (not known which base it was trained on)",
        **({"problems": "; ".join(stored.problems)} if stored.problems else {}),
    }
    if tensors:
        findings["tensors"] = {KEY + key: f"{t.dtype} {list(t.shape)}" for key, t in stored.values.items()}
    return findings


def _prefix(stored: Any) -> dict[str, Any]:
    rows = stored.values.get("embedding.weight")
    projection = any(name.startswith("trans.") for name in stored.values)
    return {"pre_seq_len": None if rows is None else len(rows), "prefix_projection": projection}


def _folder(path: Path, tensors: bool) -> dict[str, Any]:
    import torch

    from qgraft.checkpoints.folder_config import read_config_json
    from qgraft.checkpoints.folder_model import load_folder
    from qgraft.checkpoints.shards import open_shard, shard_paths
    from qgraft.checkpoints.thudm_prefix import read_thudm

    listed: dict[str, tuple[tuple[int, ...], str]] = {}
    with ExitStack() as stack:
        for file in shard_paths(path):
            shard = open_shard(file, stack)
            listed |= {name: shard.describe(name) for name in shard.names}
    model: Any = None
    try:
        model, tokenizer = load_folder(path, torch.float32)  # mapped: no more than norms and biases is read
        base = model.qgraft.info
        about = {"fingerprint": base.fingerprint, "model": type(model).__name__,
                 "tokenizer": type(tokenizer).__name__ if tokenizer else "none",
                 **({"notes": "; ".join(base.notes)} if base.notes else {})}  # fmt: skip
    except QgraftError as error:
        about = {"does not load": str(error)}
    prefix = read_thudm(path)
    findings = {
        "kind": "Hugging Face folder",
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in shard_paths(path)),
        **about,
        **({"prefix": _prefix(prefix)} if prefix else {}),
        "formats": _formats(listed, model),
        "config": read_config_json(path),
    }
    if tensors:
        findings["tensors"] = {name: f"{word.lower()} {list(shape)}" for name, (shape, word) in listed.items()}
    return findings


def _formats(listed: Mapping[str, tuple[tuple[int, ...], str]], model: Any) -> dict[str, dict[str, int]]:
    """Tensors, weights and bytes in each format. What int8 numbers mean, the loaded model knows; scales are no weights."""
    from qgraft.checkpoints.layouts import layout_for, owners, tensor_names
    from qgraft.linear import QuantizedEmbedding, QuantizedLinear

    modules = model.named_modules(remove_duplicate=False) if model is not None else ()
    kinds = (QuantizedEmbedding, QuantizedLinear)
    packed = {f"{path}.weight": each.packed_weight.get() for path, each in modules if isinstance(each, kinds)}
    formats: dict[str, dict[str, int]] = {}
    whose = owners(listed)
    for name, (shape, word) in listed.items():
        matrix = packed.get(whose.get(name, name))
        counted = matrix is None or name == tensor_names(layout_for(matrix.format), whose[name])[0]
        entry = formats.setdefault(matrix.format if matrix else word.lower(), {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += counted
        entry["weights"] += 0 if not counted else math.prod(matrix.shape if matrix else shape)
        bits = re.search(r"\d+", word)  # F16, BF16, I8, F8_E4M3, BOOL
        entry["bytes"] += math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
    return formats


def _short(value: Any) -> Any:
    """A metadata value that fits a line: long lists and texts are cut, with their length."""
    if isinstance(value, list):
        return value if len(value) <= 8 else f"[{len(value)} values]"
    if isinstance(value, str) and len(value) > 200:
        return f"{value[:200]}... ({len(value)} characters)"
    return value


def _print(value: Any, indent: str = "") -> None:
    """A nested mapping as indented `key: value` lines."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            print(f"{indent}{key}:")
            _print(entry, indent + "  ")
        else:
            for number, line in enumerate(f"{key}: {entry}".split("\n")):
                print(_wrapped(line, indent if number == 0 else indent + "  ", indent + "  "))


def _wrapped(line: str, indent: str, further: str) -> str:
    """A line of at most 80 columns where it has blanks to be cut at."""
    if len(indent + line) <= 80:
        return indent + line
    return textwrap.fill(line, 80, initial_indent=indent, subsequent_indent=further, replace_whitespace=False,
                         drop_whitespace=True, break_long_words=False, break_on_hyphens=False)  # fmt: skip
