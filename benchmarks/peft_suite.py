"""PEFT's own LoRA tests on packed models, beside the same on float ones: what of them passes, and why the rest does not.

    pip download --no-deps --no-binary peft peft==0.21.2 && tar xf peft-0.21.2.tar.gz      # the release that is installed
    pip install diffusers parameterized scipy attrs                                        # which these tests import
    python benchmarks/peft_suite.py peft-0.21.2 -- -k save

None of PEFT's code is here. pytest runs its files twice, with this file as a plugin, which leaves out what is about other
methods, or models with nothing to pack, and makes tiny models in the place of the hub's. The second time every linear layer
and embedding of a model is packed before PEFT gets it, and every LoraConfig goes through `qgraft.peft_config`: what a user
does. Tests that want something else of the hub count as not run.
"""

import argparse
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

FILES = (
    "custom_models", "decoder_models", "initialization", "lora_variants", "low_level_api", "mixed", "other", "arrow",
    "bdlora", "velora", "lora_ga", "loraplus", "lora_conversion", "helpers", "tuners_utils", "seq_classifier",
    "encoder_decoder_models", "trainable_tokens", "target_parameters",
)  # fmt: skip
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 320,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # what a hub's name has in it -> transformers' configuration
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 8}),
    "gpt2": ("GPT2Config", GPT),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 16}),
    "t5": (
        "T5Config",
        {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0},
    ),
}  # fmt: skip
FORMATS = ("q8_0", "q4_1")  # of the models in turn
ODD = "chatglm-int8"  # of layers whose width has no blocks of 32
PACKED = "QGRAFT_PEFT_SUITE_PACKED"  # set in the second run


def pack(model: Any, format: str | None = None) -> Any:
    """Pack the linear layers and embeddings of a model in place, and return it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from qgraft.formats import quantize
    from qgraft.linear import QuantizedEmbedding, QuantizedLinear

    for number, (path, layer) in enumerate(list(model.named_modules())):
        if not path or type(layer) not in (nn.Linear, nn.Embedding, Conv1D):
            continue
        weight = layer.weight.detach()
        rows = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
        fitting = FORMATS[number % len(FORMATS)] if rows.shape[1] % 32 == 0 else ODD
        packed = quantize(rows.float(), format or fitting)
        if isinstance(layer, nn.Embedding):
            other: Any = QuantizedEmbedding(packed, weight.dtype, padding_idx=layer.padding_idx)
        else:
            other = QuantizedLinear(packed, None if layer.bias is None else layer.bias.detach(), weight.dtype)
        model.set_submodule(path, other.train(layer.training))
    return model


@cache
def folder_of(name: str, head: str) -> Path | None:
    """A tiny model of the kind that the hub's name says, for one of transformers' classes; None for an unknown name."""
    import torch
    import transformers

    kind = next((kind for kind in MODELS if kind in name.lower()), None)
    if kind is None:
        return None
    config_class, own = MODELS[kind]
    config = getattr(transformers, config_class)(**{**SIZES, **own})
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp()) / name.replace("/", "--")
    getattr(transformers, head).from_config(config).save_pretrained(folder)
    return folder


def load(head: Any, name: Any, *args: Any, **options: Any) -> Any:
    """What `from_pretrained` of a class of transformers gives in the place of the hub's model."""
    import qgraft

    known = Path(str(name)).exists()
    folder = name if known else folder_of(str(name), head.__name__)
    if folder is None:
        raise OSError(f"{name}: not one of the models that are made here")
    if not os.environ.get(PACKED):
        return head.original(folder, *args, **options)
    dtype = options.get("dtype", options.get("torch_dtype"))
    task = {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS"}.get(
        head.__name__
    )
    format = FORMATS[len(str(name)) % len(FORMATS)]
    model = qgraft.load(str(folder), quantize=format, dtype=dtype or "float32", device="cpu", task_type=task)[0]
    model.config._name_or_path = model.name_or_path = str(name)
    return model


def replace_loading() -> None:
    """Let classes of transformers make tiny models where they are asked for the hub's."""
    import transformers

    for name in ("CausalLM", "SeqtoSeqLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification"):
        if head := getattr(transformers, f"AutoModelFor{name}", None):
            head.original = head.from_pretrained
            head.from_pretrained = classmethod(load)


def replace_peft() -> None:
    """Let PEFT's functions take packed models, with configurations that have been through qgraft.peft_config."""
    import peft
    from peft import LoraConfig, PeftMixedModel, PeftModel

    import qgraft
    from qgraft.adapters.peft_layers import is_tuned, without_peft

    def given(model: Any, config: Any) -> Any:
        if not is_tuned(without_peft(model)):
            pack(without_peft(model), "f32")  # what a test has made itself, and may have asked already
        return qgraft.peft_config(model, config) if type(config) is LoraConfig else config

    def taking(function: Any) -> Any:
        """`function` with a `peft_config` that has been through ours, for its `model` or itself."""

        @wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            found = inspect.signature(function).bind(*args, **options)
            model = found.arguments.get("model", found.arguments.get("self"))
            found.arguments["peft_config"] = given(model, found.arguments["peft_config"])
            return function(*found.args, **found.kwargs)

        return wrapper

    original = PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **options: Any) -> Any:
        config = options.pop("config", None)
        if config is None:
            kept = {key: options[key] for key in ("subfolder", "revision") if key in options}
            config = peft.PeftConfig.from_pretrained(model_id, **kept)
        return original(cls, model, model_id, *args, config=given(model, config), **options)

    peft.get_peft_model = peft.mapping_func.get_peft_model = taking(peft.get_peft_model)
    peft.inject_adapter_in_model = peft.mapping.inject_adapter_in_model = taking(peft.inject_adapter_in_model)
    PeftModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    for kind in (PeftModel, PeftMixedModel):
        kind.add_adapter = taking(kind.add_adapter)  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    """Before the tests are imported."""
    replace_loading()
    if os.environ.get(PACKED):
        replace_peft()


def of_lora(item: Any) -> bool:
    """Whether a test is about LoRA, on a model that is not of convolutions or of torch's own attention."""
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    if any(isinstance(value, str) and value.startswith(("Conv", "MHA")) for value in values):
        return False
    classes = [value.__name__ for value in values if inspect.isclass(value)]
    classes += [type(value).__name__ for value in values if hasattr(value, "peft_type")]
    if classes:
        return set(classes) == {"LoraConfig"}
    return "LoraConfig" in inspect.getsource(item.function)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what is about other methods, pack the custom models where they are made, and let nobody ask the hub."""
    config.hook.pytest_deselected(items=[item for item in items if not of_lora(item)])
    items[:] = [item for item in items if of_lora(item)]
    for module in {item.module for item in items}:
        if hasattr(module, "hub_online_once"):
            module.hub_online_once = nullcontext
        made = getattr(module, "MockTransformerWrapper", None)
        if made is not None and os.environ.get(PACKED):
            make = made.from_pretrained
            made.from_pretrained = classmethod(lambda cls, *args, make=make, **options: pack(make(*args, **options)))


def run(source: Path, packed: bool, more: list[str]) -> dict[str, tuple[str, str]]:
    """test -> (passed | refused | failed | skipped, why) of one run."""
    place = Path(tempfile.mkdtemp())
    report, tests = place / "report.xml", Path(shutil.copytree(source / "tests", place / "tests")).parent
    (tests / "tests" / "__init__.py").touch()  # which the release leaves out
    files = [str(path) for name in FILES if (path := tests / "tests" / f"test_{name}.py").exists()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    }
    environment |= {"HF_HUB_OFFLINE": "1"} | ({PACKED: "1"} if packed else {})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "peft_suite",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-W",
        "ignore",
    ]
    subprocess.run([*command, f"--junitxml={report}", *more, *files], cwd=tests, env=environment, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        why = "" if bad is None else bad.get("message", "")
        if outcome == "failed" and (
            "not one of the models" in why or "offline" in why.lower() or "LocalEntryNotFound" in why
        ):
            outcome = "skipped"
        elif outcome == "failed" and why.startswith("qgraft.errors."):
            outcome = "refused"
        found[f"{case.get('classname', '').removeprefix('tests.test_')}::{case.get('name')}"] = (outcome, why)
    return found


def main(words: list[str]) -> None:
    """Run both, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the unpacked source of the release of PEFT that is installed")
    parser.add_argument("--only", choices=("float", "packed"))
    end = words.index("--") if "--" in words else len(words)
    given, more = parser.parse_args(words[:end]), words[end + 1 :]  # what stands behind -- is for pytest
    plain = {} if given.only == "packed" else run(given.source.resolve(), False, more)
    packed = {} if given.only == "float" else run(given.source.resolve(), True, more)
    table: dict[str, Counter[str]] = {}
    for kind, results in (("float", plain), ("packed", packed)):
        for name, (outcome, _) in results.items():
            table.setdefault(name.split("::")[0].split(".")[0], Counter())[f"{kind} {outcome}"] += 1
    for file, counts in sorted(table.items()):
        print(file, dict(sorted(counts.items())))
    reasons = Counter(why.split("\n")[0] for outcome, why in packed.values() if outcome == "refused")
    for why, count in reasons.most_common():
        print(f"refused {count}: {why}")
    for name, (outcome, why) in sorted(packed.items()):
        if outcome == "failed":
            print(f"{name}: float {plain.get(name, ('not run', ''))[0]}\n    {why.splitlines()[0] if why else ''}")


if __name__ == "__main__":
    main(sys.argv[1:])
