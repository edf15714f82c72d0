"""Every command on ChatGLM folders as on a GGUF, the helpers that tutorials on ChatGLM use, and PEFT both ways."""

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qgraft
from qgraft.adapters.lora import LoraLinear
from qgraft.cli import main as cli
from qgraft.cli.chat import WordPrinter
from qgraft.data.batches import collate, split_batch
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.errors import AdapterError, CheckpointError, DataError
from qgraft.linear import QuantizedLinear
from qgraft.merging.calibration import neutral_samples
from qgraft.models.causal_lm import INSTEAD
from qgraft.models.find import NATIVE, Architecture
from qgraft.passes.decoder import padding_free
from qgraft.passes.loss import batch_loss
from qgraft.serving.text import AnswerText

FIRST, SECOND = NATIVE
GENERATIONS = {"chatglm": FIRST, "chatglm2": SECOND}
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm": {
        "vocab_size": 480, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 128,
        "max_sequence_length": 512, "position_encoding_2d": True, "layernorm_epsilon": 1e-5, "use_cache": True,
    },
    "chatglm2": {
        "padded_vocab_size": 384, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16,
        "ffn_hidden_size": 96, "multi_query_attention": True, "multi_query_group_num": 2, "seq_length": 512,
        "add_qkv_bias": True, "use_cache": True, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    },
}  # fmt: skip
QUANTIZED = {"chatglm": 2 * 64 * (3 * 64 + 64 + 2 * 128), "chatglm2": 2 * 64 * (64 + 2 * 32 + 64 + 3 * 96)}
LEAVES = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
PAST = [["介绍一下清华大学", "好"]]
ROWS = [{"ask": f"世界 {i} over", "reply": f"Hello, {i % 3} fox!", "past": PAST * (i % 2)} for i in range(24)]
COLUMNS = ["--prompt_column", "ask", "--response_column", "reply", "--history_column", "past"]
ALPACA = [{"instruction": f"你好 {i}", "input": "晚上" * (i % 2), "output": f"answer {i % 3}"} for i in range(12)]

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_environment_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets defaults of libraries; tests of other files must not inherit them."""
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "20000" if name == "GOMP_SPINCOUNT" else "false"))


@pytest.fixture(scope="module")
def folder(tiny_vocabulary, tmp_path_factory) -> Folder:
    """folder("chatglm2", "int4"), also "fp16", "int8", "int4-bin": made once. Do not change what is in it."""
    made: dict[tuple[str, str], Path] = {}

    def get(generation: str, kind: str) -> Path:
        if (generation, kind) not in made:
            path = tmp_path_factory.mktemp("models") / f"{generation}-{kind}"
            if kind == "fp16":
                write_float(path, generation, tiny_vocabulary(GENERATIONS[generation].vocabulary))
            elif kind == "int4-bin":
                shutil.copytree(get(generation, "int4"), path)
                torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
                (path / "model.safetensors").unlink()
            else:
                model, _ = qgraft.load(get(generation, "fp16"), device="cpu")
                qgraft.quantize(model, f"chatglm-{kind}")
                qgraft.save(model, path)
            made[generation, kind] = path
        return made[generation, kind]

    return get


def write_float(path: Path, generation: str, vocabulary: Path) -> None:
    """A random model in the layout of the fp16 release."""
    architecture, config = GENERATIONS[generation], {"model_type": "chatglm", **CONFIGS[generation]}
    if generation == "chatglm":
        tokenizer: Any = architecture.tokenizer(vocab_file=vocabulary)
        config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
                   for name in ("bos", "eos", "mask", "gmask", "pad")}  # fmt: skip
    torch.manual_seed(0)
    model = architecture.model(architecture.config.from_dict(config)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        centre, width = float(name.endswith("norm.weight")), 0.1 if parameter.dim() == 1 or "embed" in name else 0.15
        parameter.copy_(centre + width * torch.randn_like(parameter))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.half().clone() for name, tensor in model.state_dict().items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    shutil.copy(vocabulary, path / architecture.vocabulary)


@pytest.fixture(params=GENERATIONS)
def generation(request) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(ROWS))
    path.with_name("alpaca.json").write_text(json.dumps(ALPACA))
    return path


@pytest.fixture(scope="module")
def trained(folder, rows, tmp_path_factory) -> Callable[[str, str], Path]:
    """trained("chatglm2", "int4"): the output folder of `qgraft train`, once."""
    made: dict[tuple[str, str], Path] = {}

    def get(generation: str, kind: str) -> Path:
        if (generation, kind) not in made:
            out = tmp_path_factory.mktemp("runs") / "out"
            words = ["--dataset", rows, *COLUMNS, "--output_dir", out, "--max_steps", 12, "--save_steps", 6]
            words += ["--save_total_limit", 20]
            assert train(folder(generation, kind), *words, "--max_source_length", 48, "--val_size", 4) == 0
            made[generation, kind] = out
        return made[generation, kind]

    return get


def run(*words: Any) -> int:
    return cli.main([str(word) for word in words])


def train(model: Path, *words: Any) -> int:
    defaults = ["--learning_rate", "1e-2", "--use_cpu", "--logging_steps", 1, "--plot_loss", "false"]
    return run("train", "--model_name_or_path", model, *defaults, *words)


def first_loss(out: Path) -> float:
    return float(next(entry["loss"] for entry in log(out) if "loss" in entry))


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loaded(path: Path) -> tuple[Any, Any]:
    return qgraft.load(path, device="cpu")


def adapted(model: nn.Module, r: int = 4, **options: Any) -> dict[str, Tensor]:
    """Attach a LoRA whose both halves are random; returns its weights."""
    qgraft.attach_lora(model, r=r, **options)
    state = qgraft.lora_state_dict(model)
    torch.manual_seed(1)
    for key, value in state.items():
        value.copy_(torch.randn_like(value) * (0.05 if "lora_B" in key else 0.2))
    return state


@torch.no_grad()
def logits_of(model: nn.Module, ids: Sequence[int]) -> Tensor:
    return model(torch.tensor([list(ids)])).logits[0]


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """New ids by the definition: the whole sequence again for each, without a cache."""
    new: list[int] = []
    while len(new) < count and new[-1:] != [model.config.eos_token_id]:
        new.append(int(logits_of(model, [*ids, *new])[-1].argmax()))
    return new


def messages_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    past = [turn for asked, said in row["past"] for turn in (("user", asked), ("assistant", said))]
    return [*past, ("user", row["ask"]), ("assistant", row["reply"])]


# --- inspect


@pytest.mark.spread(3)
@pytest.mark.parametrize("kind", ["fp16", "int8", "int4", "int4-bin"])
def test_inspect_counts_weights_in_their_formats(folder, generation, kind, capsys):
    path = folder(generation, kind)
    assert run("inspect", path, "--json", "--tensors") == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = loaded(path)
    assert found["model"] == GENERATIONS[generation].model.__name__
    assert found["tokenizer"] == type(tokenizer).__name__
    assert found["fingerprint"] == model.qgraft.info.fingerprint
    float_file = load_file(folder(generation, "fp16") / "model.safetensors")
    float_weights = sum(tensor.numel() for tensor in float_file.values())
    counted = {format: entry["weights"] for format, entry in found["formats"].items()}
    if kind == "fp16":
        assert counted == {"f16": float_weights}
    else:
        assert counted == {f"chatglm-{kind[:4]}": QUANTIZED[generation], "f16": float_weights - QUANTIZED[generation]}
    stored = next(path.glob("*model*.*s*")) if kind != "int4-bin" else path / "pytorch_model.bin"
    assert found["bytes"] == stored.stat().st_size
    header = stored.stat().st_size - sum(entry["bytes"] for entry in found["formats"].values())
    assert 0 < header < 20_000
    assert len(found["tensors"]) == sum(entry["tensors"] for entry in found["formats"].values()) + 8 * (kind != "fp16")
    assert run("inspect", path) == 0
    assert f"tokenizer: {type(tokenizer).__name__}" in capsys.readouterr().out


def test_inspect_says_what_is_missing(folder, tmp_path, generation, capsys):
    path = copy_of(folder(generation, "int4"), tmp_path)
    (path / GENERATIONS[generation].vocabulary).unlink()
    assert run("inspect", path) == 0
    told = capsys.readouterr().out
    assert "tokenizer: none" in told and f"no vocabulary file ({GENERATIONS[generation].vocabulary})" in told
    configure(path, num_layers=3)
    assert run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "missing transformer" in found["does not load"]
    assert found["formats"]["i8"]["tensors"] == 8


def copy_of(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def configure(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- train


@pytest.mark.spread(3)
@pytest.mark.parametrize("kind", ["fp16", "int8", "int4", "int4-bin"])
def test_training_by_flags(trained, folder, generation, kind, capsys):
    out = trained(generation, kind)
    saved = json.loads((out / "run.json").read_text())
    assert saved["finished"] and saved["steps"] == 12
    assert saved["dataset"]["samples"] == 20 and saved["dataset"]["accounting"]["dropped"] == {}
    assert saved["metrics"]["eval_loss"] < saved["metrics"]["eval_loss_before"] - 0.5
    assert not any("passes through the model alone" in note for note in saved["notes"])
    capsys.readouterr()
    assert run("inspect", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seal"] == "holds" and found["parameters"] == saved["parameters"]
    assert found["base"]["fingerprint"] == loaded(folder(generation, kind))[0].qgraft.info.fingerprint
    assert set(found["config"]["target_modules"]) == LEAVES


def test_a_resumed_run_ends_in_the_same_bytes(trained, folder, rows, tmp_path, generation):
    whole = trained(generation, "int4")
    shutil.copytree(whole / "checkpoint-6", tmp_path / "out" / "checkpoint-6")
    words = ["--dataset", rows, *COLUMNS, "--output_dir", tmp_path / "out", "--max_steps", 12, "--save_steps", 6,
             "--max_source_length", 48, "--val_size", 4, "--resume_from_checkpoint", "true",
             "--save_total_limit", 20]  # fmt: skip
    assert train(folder(generation, "int4"), *words) == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.spread(1)
def test_the_built_in_set_alpaca_rows_and_checkpointed_activations(folder, rows, tmp_path, generation, capsys):
    data = ["--dataset", f"identity,{rows.with_name('alpaca.json')}", "--name", "Aria", "--author", "ACME"]
    for name, more in (("plain", []), ("again", ["--gradient_checkpointing", "true"])):
        words = ["--output_dir", tmp_path / name, "--max_steps", 3, "--max_tokens_per_pass", 96]
        assert train(folder(generation, "int4"), *data, *words, *more) == 0
    assert "the last answer is learned" not in capsys.readouterr().err  # no row has more than one
    assert first_loss(tmp_path / "again") == pytest.approx(first_loss(tmp_path / "plain"), abs=1e-5)
    plain, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "again"))
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.spread(4)
@pytest.mark.parametrize("budget", [0, 64, 10_000])
@pytest.mark.parametrize("kind", ["fp16", "int4"])
def test_packed_samples_have_the_gradients_of_single_ones(folder, generation, kind, budget):
    """...which the model's own forward pass gives, a sample at a time."""
    model, tokenizer = loaded(folder(generation, kind))
    state = adapted(model)
    samples = [Sample(*tokenizer.sample_ids(messages_of(row)), "") for row in ROWS[:7]]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == len(state)
    expected = torch.zeros(())
    for sample in samples:
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor(sample.labels)
        logits = model(input_ids=ids).logits[0]
        expected = expected + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(expected, parameters)
    with padding_free(model, samples) as problem:
        assert problem is None
        assert model.config._attn_implementation == "qgraft_samples"
        for part in split_batch(collate(samples), budget):
            batch_loss(model, part).backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-4, rtol=1e-3)


# --- chat and eval


@pytest.mark.parametrize("kind", ["fp16", "int4-bin"])
def test_chat_answers_a_prompt(folder, generation, kind, capsys):
    path = folder(generation, kind)
    assert run("chat", "--model", path, "--prompt", "你好 world", "--max_new_tokens", 8, "--device", "cpu") == 0
    model, tokenizer = loaded(path)
    ids = greedy(model, tokenizer.prompt_ids([("user", "你好 world")]), 8)
    assert capsys.readouterr().out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_a_conversation_with_and_without_the_adapter(trained, folder, generation, capsys, monkeypatch):
    path, out = folder(generation, "int4"), trained(generation, "int4")
    asked = ["世界 1 over", "Hello?", "and now"]
    lines = iter([asked[0], "/base", asked[1], "/adapter out", asked[2], "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run("chat", "--model", path, "--adapter", out, "--device", "cpu", "--max_new_tokens", 6) == 0
    printed = capsys.readouterr()
    assert "active: the base" in printed.err and "active: out=1" in printed.err
    model, tokenizer = loaded(path)
    qgraft.load_adapter(model, out, "out")
    messages, expected = [], ""
    for question, active in zip(asked, ("out", None, "out"), strict=True):
        qgraft.use_adapter(model, active)
        messages.append(("user", question))
        ids = greedy(model, tokenizer.prompt_ids(messages), 6)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        expected += text + "\n"
        messages.append(("assistant", tokenizer.clean_answer(text)))
    assert printed.out == expected


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_eval_is_the_mean_loss_of_the_models_own_forward_pass(trained, folder, rows, generation, kind, capsys):
    path, out = folder(generation, kind), trained(generation, kind)
    words = ["--model", path, "--adapter", out, "--device", "cpu", "--dataset", rows, *COLUMNS, "--json"]
    assert run("eval", *words) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    model, tokenizer = loaded(path)
    qgraft.load_adapter(model, out, "out")
    for name in ("base", "out"):
        qgraft.use_adapter(model, None if name == "base" else name)
        total, count = 0.0, 0
        for row in ROWS:
            ids, labels = tokenizer.sample_ids(messages_of(row), 48, numbered=True)  # cut as in training
            total += float(F.cross_entropy(logits_of(model, ids)[:-1], torch.tensor(labels[1:]), reduction="sum"))
            count += sum(label != IGNORED for label in labels)
        assert found[name]["loss"] == pytest.approx(total / count, abs=1e-4)
        assert (found[name]["labels"], found[name]["samples"]) == (count, len(ROWS))
    assert found["out"]["loss"] < found["base"]["loss"] - 0.5


# --- merge, combine, export


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_merge_keeps_what_the_adapter_learned(trained, folder, rows, tmp_path, generation, kind, capsys):
    """The rows that the adapter keeps, and without them those of the columns that the training named."""
    path, out, target = folder(generation, kind), trained(generation, kind), tmp_path / "merged"
    assert run("merge", "--model", path, "--adapter", out, "--output", target, "--device", "cpu") == 0
    assert "8 tensors changed" in capsys.readouterr().err
    report = json.loads((tmp_path / "merged.merge.json").read_text())
    assert report["retained_gain"] > 0.9 and len(report["layers"]) == 8
    assert report["notes"][0].startswith(
        "rows of the task: the rows that the adapter keeps (calibration.safetensors): "
    )
    assert {p.name for p in target.iterdir()} == {p.name for p in path.iterdir()}
    assert (target / "config.json").read_bytes() == (path / "config.json").read_bytes()
    before, after = load_file(path / "model.safetensors"), load_file(target / "model.safetensors")
    shapes = [{key: (tensor.shape, tensor.dtype) for key, tensor in each.items()} for each in (before, after)]
    assert shapes[0] == shapes[1]
    (model, tokenizer), (merged, _) = loaded(path), loaded(target)
    ids, _ = tokenizer.sample_ids(messages_of(ROWS[2]), numbered=True)
    base = logits_of(model, ids)
    qgraft.load_adapter(model, out)
    tuned = logits_of(model, ids)
    assert (logits_of(merged, ids) - tuned).norm() < 0.35 * (tuned - base).norm()


def test_merge_and_unmerge_in_memory(folder, generation):
    model, tokenizer = loaded(folder(generation, "int4"))
    bytes_before = {
        path: m.packed.parts[0].clone() for path, m in model.named_modules() if isinstance(m, QuantizedLinear)
    }
    fingerprint, state = model.qgraft.info.fingerprint, adapted(model)
    ids = tokenizer.prompt_ids([("user", "你好")])
    tuned = logits_of(model, ids)
    qgraft.merge_lora(model, method="nearest")
    assert model.qgraft.info.fingerprint != fingerprint
    assert qgraft.adapter_names(model) == []
    qgraft.unmerge(model)
    assert model.qgraft.info.fingerprint == fingerprint
    assert qgraft.lora_state_dict(model).keys() == state.keys()
    torch.testing.assert_close(logits_of(model, ids), tuned, atol=1e-6, rtol=0)
    qgraft.detach_lora(model)
    for path, data in bytes_before.items():
        assert torch.equal(model.get_submodule(path).packed.parts[0], data)


def test_drift_is_measured_where_the_model_predicts(folder, generation):
    """Not in a prompt of the first generation, which sees all of it at once."""
    _, tokenizer = loaded(folder(generation, "fp16"))
    for sample in neutral_samples(tokenizer):
        learned = [label for label in sample.labels if label != IGNORED]
        assert sample.input_ids[-len(learned) :] == learned and learned[-1] == tokenizer.eos_token_id
        if generation == "chatglm":
            assert sample.input_ids[:2] == [tokenizer.gmask_token_id, tokenizer.bos_token_id] and learned[1:]


def test_combined_adapters_add_up(trained, folder, tmp_path, generation, capsys):
    path, out = folder(generation, "int4"), trained(generation, "int4")
    model, tokenizer = loaded(path)
    adapted(model)
    qgraft.save_adapter(model, tmp_path / "other")
    words = ["--adapter", f"{out}=0.7", "--adapter", f"{tmp_path / 'other'}=0.3", "--output", tmp_path / "both"]
    assert run("combine", *words) == 0
    assert "the sum is exact" in capsys.readouterr().out
    qgraft.load_adapter(model, out, "out")
    qgraft.use_adapter(model, {"out": 0.7, "default": 0.3})
    ids = tokenizer.prompt_ids([("user", "你好")])
    expected = logits_of(model, ids)
    model, _ = loaded(path)
    qgraft.load_adapter(model, tmp_path / "both")
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)


def test_export_is_for_gguf_bases(trained, folder, tmp_path, generation, capsys):
    path, out = folder(generation, "int4"), trained(generation, "int4")
    words = ["export", "--model", path, "--adapter", out]
    assert run(*words, "--to", "gguf-lora", "--output", tmp_path / "x.gguf") == 2
    told = capsys.readouterr().err
    assert "cannot be written as a GGUF file" in told and "Traceback" not in told and not list(tmp_path.iterdir())
    assert run(*words, "--to", "peft", "--output", tmp_path / "peft") == 0
    exported, original = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "peft", out))
    assert exported.keys() == original.keys() and all(torch.equal(exported[key], original[key]) for key in original)


def test_a_float_folder_is_quantized_while_loading(folder, rows, generation, capsys):
    losses = []
    for words in (["--model", folder(generation, "fp16"), "--quantize", "chatglm-int8"],
                  ["--model", folder(generation, "int8")]):  # fmt: skip
        assert run("eval", *words, "--device", "cpu", "--dataset", rows, *COLUMNS, "--json") == 0
        losses.append(json.loads(capsys.readouterr().out)["results"]["base"]["loss"])
    assert losses[0] == losses[1]


def test_doctor_knows_the_formats(capsys):
    assert run("doctor", "--json") == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert {"chatglm-int4", "chatglm-int8"} <= {choice["format"] for choice in kernels}


# --- the helpers of the tutorials


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_helpers_of_the_tutorials(folder, generation, kind):
    model, tokenizer = loaded(folder(generation, kind))
    ids = tokenizer.prompt_ids([("user", "你好")])
    before = logits_of(model, ids)
    qgraft.attach_lora(model, r=32, lora_alpha=32, lora_dropout=0.0)
    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert len(wrapped) == 2 * 4 and {path.rpartition(".")[2] for path in wrapped} == LEAVES
    assert all(isinstance(layer.base, QuantizedLinear) for layer in wrapped.values())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 16 and all("lora_" in name for name in trainable)
    state = qgraft.lora_state_dict(model)
    assert {tuple(tensor.shape) for key, tensor in state.items() if key.endswith("query_key_value.lora_A.weight")} == {
        (32, 64)
    }
    torch.testing.assert_close(logits_of(model, ids), before)
    for key, tensor in state.items():
        tensor.normal_(std=0.05 if "lora_B" in key else 0.2)
    tuned = logits_of(model, ids)
    qgraft.merge_lora(model, tokenizer, calibration=[{"prompt": r["ask"], "response": r["reply"]} for r in ROWS],
                      min_retained=0.0)  # fmt: skip
    assert (logits_of(model, ids) - tuned).norm() < (before - tuned).norm()
    qgraft.unmerge(model)
    qgraft.detach_lora(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_from_the_tensors_of_a_checkpoint(folder, generation, bits):
    path = folder(generation, f"int{bits}")
    model, _ = loaded(path)
    name = next(name for name, module in model.named_modules() if name.endswith("query_key_value"))
    weights = load_file(path / "model.safetensors")
    parts = (weights[f"{name}.{part}"] for part in ("weight", "weight_scale", "bias"))
    layer, x = qgraft.QuantizedLinear.from_params(bits, *parts), torch.randn(3, 64)
    torch.testing.assert_close(layer(x), model.get_submodule(name)(x))


# --- PEFT


def float_model(path: Path, architecture: Architecture) -> Any:
    return architecture.model.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("targets", [["query_key_value"], sorted(LEAVES)])
def test_an_adapter_made_by_peft_loads(folder, tmp_path, generation, targets):
    path = folder(generation, "fp16")
    plain = float_model(path, GENERATIONS[generation])
    made = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path / "peft")
    _, tokenizer = loaded(path)
    ids = tokenizer.prompt_ids([("user", "你好 world")])
    expected = logits_of(made.eval(), ids)
    model, _ = loaded(path)
    report = qgraft.load_adapter(model, tmp_path / "peft")
    assert report.applied == report.total == 2 * len(targets)
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=1e-5)
    packed, _ = loaded(folder(generation, "int4"))
    before = logits_of(packed, ids)
    assert qgraft.load_adapter(packed, tmp_path / "peft").applied == 2 * len(targets)
    with qgraft.adapters_off(packed):
        assert torch.equal(logits_of(packed, ids), before)
    assert (logits_of(packed, ids) - expected).norm() < (before - expected).norm()


def test_an_adapter_made_here_loads_in_peft(trained, folder, generation):
    path, out = folder(generation, "fp16"), trained(generation, "fp16")
    model, tokenizer = loaded(path)
    qgraft.load_adapter(model, out)
    ids = tokenizer.prompt_ids([("user", ROWS[0]["ask"])])
    tuned = peft.PeftModel.from_pretrained(float_model(path, GENERATIONS[generation]), out).eval()
    torch.testing.assert_close(logits_of(tuned, ids), logits_of(model, ids), atol=1e-5, rtol=1e-5)
    new = tuned.generate(input_ids=torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert new[0, len(ids) :].tolist() == greedy(model, ids, 5)


# --- bad input


def test_an_adapter_of_weights_packed_while_loading_is_told_how_to_load_them(folder, rows, tmp_path, capsys):
    path, out = folder("chatglm2", "fp16"), tmp_path / "out"
    words = ["--dataset", rows, *COLUMNS, "--output_dir", out, "--max_steps", 2, "--pre_seq_len", 4]
    assert train(path, *words, "--quantization_bit", 4) == 0
    chat = ["--model", path, "--adapter", out, "--prompt", "hi", "--max_new_tokens", 2]
    assert run("chat", *chat) == 2
    told = capsys.readouterr().err
    assert "in chatglm-int4)" in told and "give --quantize chatglm-int4" in told and "--force" not in told
    assert run("chat", *chat, "--quantize", "chatglm-int4") == 0
    model, _ = loaded(path)
    with pytest.raises(AdapterError, match="give quantize='chatglm-int4'"):
        qgraft.load_adapter(model, out)
    whole = tmp_path / "whole"
    assert train(path, "--dataset", rows, *COLUMNS, "--output_dir", whole, "--max_steps", 2) == 0
    capsys.readouterr()
    assert run("chat", "--model", path, "--adapter", whole, "--prompt", "hi", "--quantize", "chatglm-int8") == 2
    assert "leave --quantize out" in capsys.readouterr().err


@pytest.mark.parametrize("name", INSTEAD)
def test_names_of_the_releases_say_what_there_is(folder, generation, name):
    model, _ = loaded(folder(generation, "int4"))
    assert not hasattr(model, name) and hasattr(model, "transformer")
    with pytest.raises(AttributeError, match=rf"no '{name}'; instead: .*(qgraft\.|generate)"):
        getattr(model, name)


@pytest.mark.parametrize("command", ["train", "chat", "eval", "merge"])
def test_commands_name_the_vocabulary_that_is_missing(folder, rows, tmp_path, generation, command, capsys):
    path, file = copy_of(folder(generation, "int4"), tmp_path), GENERATIONS[generation].vocabulary
    (path / file).unlink()
    words = {
        "train": ["--model_name_or_path", path, "--dataset", rows, "--output_dir", tmp_path / "o", "--use_cpu"],
        "chat": ["--model", path, "--prompt", "hi"],
        "eval": ["--model", path, "--dataset", rows],
        "merge": ["--model", path, "--adapter", path, "--output", tmp_path / "o"],
    }[command]
    assert run(command, *words) == 2
    told = capsys.readouterr().err
    assert f"no vocabulary file ({file})" in told and f"put the release's {file} beside config.json" in told
    assert not (tmp_path / "o").exists()


def test_a_vocabulary_that_is_no_third_generations_is_refused(folder, tmp_path, capsys):
    path = copy_of(folder("chatglm2", "int4"), tmp_path)
    configure(path, _name_or_path="THUDM/chatglm3-6b")
    assert run("chat", "--model", path, "--prompt", "hi") == 2
    assert "a sentencepiece file that is no plain BPE, as ChatGLM3's is" in capsys.readouterr().err


def other(generation: str) -> str:
    return "chatglm" if generation == "chatglm2" else "chatglm2"


@pytest.mark.parametrize("damage", ["other generation", "too many ids", "other ids"])
def test_a_vocabulary_of_another_model_is_refused(folder, tmp_path, generation, damage, tiny_vocabulary, capsys):
    path, file = copy_of(folder(generation, "int4"), tmp_path), GENERATIONS[generation].vocabulary
    if damage == "other generation":
        shutil.copy(tiny_vocabulary(GENERATIONS[other(generation)].vocabulary), path / file)
        expected = "no vocabulary of ChatGLM"
    elif damage == "too many ids":
        key, size = ("vocab_size", 300) if generation == "chatglm" else ("padded_vocab_size", 300)
        configure(path, **{key: size})
        expected = "not this model's vocabulary: it has"
    else:
        configure(path, eos_token_id=7)
        expected = "and config.json says 7"
    assert run("chat", "--model", path, "--prompt", "hi") == 2
    told = capsys.readouterr().err
    assert expected in told and str(path / file) in told and "Traceback" not in told
    with pytest.raises(CheckpointError):
        loaded(path)


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_a_hostile_pickle_is_refused_and_named(folder, tmp_path, generation, command, capsys):
    path = copy_of(folder(generation, "int4"), tmp_path)
    (path / "model.safetensors").unlink()
    torch.save({"a": Hostile(tmp_path / "executed")}, path / "pytorch_model.bin")
    assert run(*([command, path] if command == "inspect" else [command, "--model", path, "--prompt", "hi"])) == 2
    told = capsys.readouterr().err
    assert "pytorch_model.bin is refused" in told and "mkdir" in told
    assert not (tmp_path / "executed").exists()


def test_a_question_that_holds_the_mark_of_the_answer(folder, rows, tmp_path, capsys, monkeypatch):
    """<sop> in a text of the first generation is the special id, and a prompt ends there."""
    path = folder("chatglm", "int4")
    _, tokenizer = loaded(path)
    with pytest.raises(DataError, match="holds <sop>"):
        tokenizer.prompt_ids([("user", "what is <sop>?")])
    assert tokenizer.sample_ids([("user", "what?"), ("assistant", "<sop>")])
    lines = iter(["what is <sop>?", "what?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run("chat", "--model", path, "--device", "cpu", "--max_new_tokens", 3) == 0
    assert "error: a question or its history holds <sop>" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "<sop>", "response": "x"}))
    assert train(path, "--dataset", bad, "--output_dir", tmp_path / "o") == 2
    told = capsys.readouterr().err
    assert "dropped: a question or its history holds <sop>" in told and "(first bad.jsonl:1)" in told
    second = loaded(folder("chatglm2", "int4"))[1]
    assert second.prompt_ids([("user", "what is <sop>?")])


# --- streaming

TEXTS = [
    "def f():\n    return 1\n\n\n        x = 2 ;  y\n", "Hello , world . it ' s do n't\n  ok \n . end",
    "你好， 世界\n 再 见", "\n\n   a", "   lead", "\U0001f600 x \U0001f44b\U0001f3fdy",
]  # fmt: skip


def text_of(tokenizer: Any) -> AnswerText:
    """As answer() makes it."""
    rewrites = tokenizer.clean_up_tokenization_spaces
    return AnswerText(lambda some: str(tokenizer.decode(some, skip_special_tokens=True)), rewrites=rewrites)


def printed_by(tokenizer: Any, ids: Sequence[int]) -> str:
    printer, out = WordPrinter(text_of(tokenizer)), io.StringIO()
    with redirect_stdout(out):
        printer.put(torch.tensor([[5, 6, 7]]))
        for token in ids:
            printer.put(torch.tensor([token]))
        printer.end()
    return out.getvalue()


@pytest.fixture(scope="module", params=GENERATIONS)
def tokenizer(folder, request) -> Any:
    return loaded(folder(request.param, "fp16"))[1]


@pytest.mark.parametrize("text", TEXTS)
def test_a_printed_answer_is_the_decoded_one(tokenizer, text):
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert printed_by(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


@given(st.data())
def test_so_is_one_of_any_ids(tokenizer, data):
    often = tokenizer("a\n b\n\n  c\t. ,'\u00e9", add_special_tokens=False)["input_ids"]
    ids = data.draw(st.lists(st.sampled_from(often) | st.integers(0, len(tokenizer) - 1), max_size=40))
    assert printed_by(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_an_id_without_text_does_not_end_a_line_again(tokenizer):
    ids = tokenizer("a\nb", add_special_tokens=False)["input_ids"][:-1]
    ids += [tokenizer.pad_token_id, *tokenizer.convert_tokens_to_ids(["\u2581", "\u2581"])]
    assert printed_by(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_words_are_printed_before_the_answer_is_complete(tokenizer):
    for text, printed in (("one two three", "one two"), ("你好，世界", "你好，世界"), ("a\nb", "a\n")):
        seen = io.StringIO()
        printer = WordPrinter(text_of(tokenizer))
        with redirect_stdout(seen):
            for ids in ([0], *tokenizer(text, add_special_tokens=False)["input_ids"]):
                printer.put(torch.tensor(ids))
        assert seen.getvalue() == tokenizer.decode(tokenizer(printed, add_special_tokens=False)["input_ids"])
