"""Changes files at random and reads them: whatever is in them, there is an error of ours or none.

    python tests/hostile/fuzz.py adapter 180        adapter folders: LoRA as safetensors and as .bin, prefix; sealed or not
    python tests/hostile/fuzz.py folder 180         a Hugging Face folder with its tokenizer, as safetensors and as .bin
    python tests/hostile/fuzz.py yaml 180           configuration files of `train`, YAML and JSON

A case is one file of a folder, changed once to three times: bits, bytes, lengths; in JSON and YAML also values of other
types, numbers that are too large, keys that are gone or called otherwise, deep nesting. What counts as a fault is any other
exception than ours, a case that takes ten seconds, and memory that grows. `--keep FOLDER` keeps the cases at fault.
"""

import argparse
import copy
import itertools
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file

from qgraft.adapter_files.folder import load_adapter, save_adapter
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.attach_prefix import attach_prefix
from qgraft.checkpoints.load import load
from qgraft.errors import QgraftError
from qgraft.training.arguments import parse_arguments

SECONDS = 10  # that a case may take
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "0", "\ud800", "\x00", "q_proj", "(a+)+", "../../x", [], {}, [[]], [1], ["x"], {"x": 1}, {"": None}, [None],
    {"a": {"b": []}},
]  # fmt: skip
OPTIONS: dict[str, Any] = {
    "model_name_or_path": "tiny.gguf", "dataset": "rows.jsonl", "output_dir": "out", "learning_rate": 2e-4, "lora_alpha": 16,
    "r": 8, "num_train_epochs": 3, "logging_steps": 5, "lr_scheduler_type": "cosine", "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": [0, 1], "warmup_steps": 3, "save_strategy": "no",
    "report_to": "none", "optim": "adamw_torch", "seed": 7, "bf16": False, "template": "plain", "memory_limit": "2GB",
    "lr_scheduler_kwargs": {}, "max_length": 512, "system": "You are helpful", "mask_history": True, "val_size": 0.1,
}  # fmt: skip


class Hang(BaseException):
    """A case took longer than SECONDS."""


@dataclass
class Tally:
    """What became of the cases; `faults` are named by the last line of ours, `kept` has a traceback of each."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    kept: dict[str, str] = field(default_factory=dict)
    grown_mb: float = 0.0

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        lines = [f"{sum(self.ends.values())} cases: {ends}; memory grew by {self.grown_mb:.0f} MB"]
        return "\n".join(lines + [f"  {count} x {fault}\n{self.kept[fault]}" for fault, count in self.faults.items()])


def run(
    sources: list[Path], read: Callable[[Path], None], work: Path, rng: random.Random, *,
    seconds: float = float("inf"), cases: int = sys.maxsize, keep: Path | None = None,
) -> Tally:  # fmt: skip
    """Read changed copies of the `sources`, folders of a few files each, until time or cases are over."""
    tally, end, before = Tally(), time.monotonic() + seconds, _memory_mb()
    signal.signal(signal.SIGALRM, _too_long)
    for number in itertools.takewhile(lambda n: n < cases and time.monotonic() < end, itertools.count()):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(rng.choice(sources), work)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            change(rng.choice(sorted(path for path in work.iterdir() if path.is_file())), rng)
        fault = _end_of(read, work, tally)
        if fault:
            tally.faults[fault] += 1
            if keep and tally.faults[fault] == 1:
                shutil.copytree(work, keep / f"{number}")
        if number == 20:  # what is imported and cached on the way has been by then
            before = _memory_mb()
    tally.grown_mb = _memory_mb() - before
    return tally


def _end_of(read: Callable[[Path], None], work: Path, tally: Tally) -> str | None:
    """Read one case; its fault, None where there is none."""
    signal.alarm(SECONDS)
    try:
        read(work)
        tally.ends["read"] += 1
    except QgraftError as error:
        tally.ends["refused"] += 1
        if "weights_only" in str(error):
            return _fault(error, tally)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # to find out what there is, is the purpose
        return _fault(error, tally)
    finally:
        signal.alarm(0)
    return None


def _fault(error: BaseException, tally: Tally) -> str:
    tally.ends["faults"] += 1
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/qgraft/" in frame.filename] or frames
    name = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    tally.kept.setdefault(name, "".join(traceback.format_exception(error, limit=-6))[-3000:])
    return name


def _too_long(_: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s, in {frame}")


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def change(path: Path, rng: random.Random) -> None:
    """Change one file once."""
    if path.suffix in (".json", ".yaml") and rng.random() < 0.75:
        try:
            value = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
        except (ValueError, RecursionError, OSError, yaml.YAMLError):  # changed before
            value = {}
        path.write_bytes(_text_of(_changed_value(value, rng), path.suffix, rng))
    else:
        path.write_bytes(_changed_bytes(path.read_bytes(), rng))


def _text_of(value: Any, suffix: str, rng: random.Random) -> bytes:
    if rng.random() < 0.03:
        return ("[" * 100_000 if suffix == ".json" else "a: " + "[" * 5000).encode()
    text = json.dumps(value) if suffix == ".json" or rng.random() < 0.3 else yaml.safe_dump(value)
    if rng.random() < 0.05 and text.startswith("{"):
        text = '{"r": 3, "r": 4, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _changed_value(value: Any, rng: random.Random) -> Any:
    """A copy in which one value, anywhere, is another, or gone, or under another key."""
    places: list[tuple[Any, Any]] = []
    root = [copy.deepcopy(value)]
    waiting: list[Any] = [root]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else list(range(min(len(each), 40)))
        places += [(each, key) for key in keys]
        waiting += [each[key] for key in keys if isinstance(each[key], (dict, list))]
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0 and isinstance(holder, dict):
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", f"{key}s", "1", "peft_type", "r"])] = holder.pop(key)
    elif how == 2:
        other, where = rng.choice(places)
        holder[key] = copy.deepcopy(other[where])
    elif how == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice([-holder[key], str(holder[key]), holder[key] + 1, [holder[key]], holder[key] * 10**6])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return root[0]


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data or b"\0")
    at = (
        rng.randrange(len(found)) if rng.random() < 0.5 else rng.randrange(min(len(found), 1000))
    )  # headers are in front
    how = rng.randrange(6)
    if how == 0:
        del found[at:]
    elif how == 1:
        found[at : at + rng.choice([1, 4, 100])] = bytes(rng.choice([1, 4, 100]))
    elif how == 2:
        found[at:at] = rng.randbytes(rng.choice([1, 8, 50]))
    elif how == 3:
        found[at:at] = found[max(at - 30, 0) : at]
    else:
        for _ in range(rng.choice([1, 1, 3, 8])):
            found[rng.randrange(len(found)) if how == 4 else at] ^= 1 << rng.randrange(8)
    return bytes(found)


def make_folder(folder: Path) -> Path:
    """A tiny Llama with a tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(["hello world, this is a test of the tokenizer"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def folders(root: Path) -> tuple[list[Path], Callable[[Path], None]]:
    """(Hugging Face folders, what reads one)."""
    whole = make_folder(root / "safetensors")
    pickled = shutil.copytree(whole, root / "bin")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    indexed = shutil.copytree(whole, root / "index")
    names = dict.fromkeys(load_file(indexed / "model.safetensors"), "model.safetensors")
    (indexed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    def read(folder: Path) -> None:
        model, tokenizer = load(folder, quantize="q4_1")
        if tokenizer is not None:
            tokenizer.encode("hello world")
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3, 4]]))

    return [whole, pickled, indexed], read


def adapters(root: Path) -> tuple[list[Path], Callable[[Path], None]]:
    """(adapter folders, what reads one)."""
    model, _ = load(make_folder(root / "base"), quantize="q4_1")
    attach_lora(model, r=2, target_modules="q_proj,down_proj")
    save_adapter(model, root / "lora")
    detach_adapter(model, "default")
    attach_prefix(model, pre_seq_len=3, prefix_projection=True)
    save_adapter(model, root / "prefix")
    detach_adapter(model, "default")
    bare = shutil.copytree(root / "lora", root / "peft")
    pickled, bare_prefix = shutil.copytree(bare, root / "bin"), shutil.copytree(root / "prefix", root / "bare_prefix")
    for folder in (bare, pickled, bare_prefix):
        (folder / "qgraft.json").unlink()
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    config = json.loads((bare / "adapter_config.json").read_text())
    rich = {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\..*": 2}, "alpha_pattern": {"down_proj": 3}, "exclude_modules": None,
            "layers_pattern": "layers", "layers_to_transform": [0, 1]}  # fmt: skip
    (bare / "adapter_config.json").write_text(json.dumps(config | rich))

    def read(folder: Path) -> None:
        report = load_adapter(model, folder)
        try:
            with torch.no_grad():
                model(torch.tensor([[1, 2, 3, 4]]))
        finally:
            detach_adapter(model, report.name)

    return [root / "lora", root / "prefix", bare, pickled, bare_prefix], read


def configurations(root: Path) -> tuple[list[Path], Callable[[Path], None]]:
    """(folders with one configuration file each, what reads one)."""
    for suffix in ("yaml", "json"):
        (root / suffix).mkdir()
    (root / "yaml" / "train.yaml").write_text(yaml.safe_dump(OPTIONS))
    (root / "json" / "train.json").write_text(json.dumps(OPTIONS))

    def read(folder: Path) -> None:
        parse_arguments([str(next(folder.iterdir())), "use_cpu=true"])

    return [root / "yaml", root / "json"], read


KINDS = {"adapter": adapters, "folder": folders, "yaml": configurations}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sources, read = KINDS[args.kind](root)
        rng = random.Random(args.seed)
        tally = run(sources, read, root / "case", rng, seconds=args.seconds, keep=args.keep)
    print(tally)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
