"""P-Tuning v2 through every command, as a user types it; what needs a delta says why a prefix has none."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qgraft
from qgraft.cli import main as cli

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(12)]


@pytest.fixture(autouse=True)
def _no_environment_left(monkeypatch):
    """The command line sets defaults of libraries; tests of other files must not inherit them."""
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "20000" if name == "GOMP_SPINCOUNT" else "false"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def train(model, rows_file, out, *more):
    words = ["train", "--model_name_or_path", str(model), "--dataset", str(rows_file), "--output_dir", str(out)]
    options = ["--max_steps", "4", "--learning_rate", "1e-2", "--use_cpu", "--val_size", "3", "--save_steps", "2"]
    assert cli.main([*words, *options, *more]) == 0


@pytest.fixture(scope="module")
def trained(tiny_gguf, tmp_path_factory, rows_file):
    """(model path, folder of a prefix with projection, folder of a LoRA). Do not change what is in them."""
    model, folder = tiny_gguf("llama").path, tmp_path_factory.mktemp("trained")
    train(model, rows_file, folder / "prefix", "--pre_seq_len", "4", "--prefix_projection", "true")
    train(model, rows_file, folder / "lora")
    return model, folder / "prefix", folder / "lora"


def evaluate(capsys, rows_file, *words):
    assert cli.main(["eval", *map(str, words), "--dataset", str(rows_file), "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    return {name: found["loss"] for name, found in json.loads(printed.out)["results"].items()}, printed.err


def inspect(capsys, path, *words):
    assert cli.main(["inspect", str(path), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_and_chat_take_both_kinds(trained, rows_file, capsys, monkeypatch):
    model, prefix, lora = trained
    losses, told = evaluate(capsys, rows_file, "--model", model, "--adapter", prefix, "--adapter", lora)
    assert list(losses) == ["base", "prefix", "lora"]
    assert losses["prefix"] < losses["base"] and losses["lora"] < losses["base"]
    assert "adapter prefix: prefix of 4 tokens with projection, applied to 2/2 layers" in told
    lines = ["/adapters", "/adapter prefix", "hello", "/adapter prefix=0.5", "/adapter prefix lora", "hello", "/quit"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    words = ["--model", str(model), "--adapter", str(prefix), "--adapter", str(lora), "--device", "cpu"]
    assert cli.main(["chat", *words, "--max_new_tokens", "3"]) == 0
    told = capsys.readouterr().err
    assert "adapters: prefix, lora" in told
    assert "active: lora=1; attached: prefix, lora" in told
    assert "active: prefix=1; attached" in told
    assert "weights of prefixes: got prefix=0.5, expected 1" in told
    assert "active: prefix=1, lora=1; attached" in told


def test_inspect_a_prefix(trained, tmp_path, capsys):
    prefix = shutil.copytree(trained[1], tmp_path / "prefix")
    found = inspect(capsys, prefix, "--tensors")
    assert found["kind"] == "prefix (P-Tuning v2)"
    assert (found["pre_seq_len"], found["prefix_projection"], found["seal"]) == (4, True, "holds")
    stored = load_file(prefix / "prefix_encoder.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert {"prompt_embeddings", "embedding.weight", "trans.2.bias"} < found["tensors"].keys()
    assert found["prefix"]["layout"] == "peft"
    with open(prefix / "prefix_encoder.safetensors", "ab") as file:
        file.write(b"x")
    assert "prefix_encoder.safetensors: got" in inspect(capsys, prefix)["seal"]


def test_what_needs_a_delta_says_why_not(trained, tmp_path, capsys):
    model, prefix, lora = trained
    common, target = ["--model", str(model), "--adapter", str(prefix)], str(tmp_path / "new")
    for words in (
        ["merge", *common, "--output", f"{target}.gguf"],
        ["merge", *common, "--adapter", str(lora), "--output", f"{target}.gguf"],
        ["combine", "--adapter", f"{prefix}=0.5", "--adapter", f"{lora}=0.5", "--output", target],
        ["export", *common, "--to", "gguf-lora", "--output", f"{target}.gguf"],
    ):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert "'prefix' is a prefix (P-Tuning v2): keys and values in front of the attention, which change no" in told
    assert not list(tmp_path.glob("new*"))


def test_export_a_prefix_for_peft(trained, tmp_path, capsys):
    model, prefix, _ = trained
    words = ["--model", str(model), "--adapter", str(prefix), "--to", "peft", "--output", str(tmp_path / "half")]
    assert cli.main(["export", *words, "--dtype", "float16"]) == 0
    assert "PEFT adapter folder" in capsys.readouterr().out
    seals = [json.loads((folder / "qgraft.json").read_text()) for folder in (prefix, tmp_path / "half")]
    assert seals[0]["arguments"] == seals[1]["arguments"] and seals[0]["prefix"] == seals[1]["prefix"]
    words = ["--model", str(model), "--adapter", str(prefix), "--to", "thudm", "--output", str(tmp_path / "thudm")]
    assert cli.main(["export", *words]) == 2
    assert "it is of a ChatGLM, and this is a LlamaForCausalLM" in capsys.readouterr().err


@pytest.mark.spread(2)
@pytest.mark.parametrize("projection", ["false", "true"])
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_there_and_back_between_qgraft_and_the_scripts(
    tiny_chatglm, generation, projection, tmp_path, rows_file, capsys
):
    model, out, thudm = tiny_chatglm(generation), tmp_path / "out", tmp_path / "thudm"
    train(model, rows_file, out, "--pre_seq_len", "4", "--prefix_projection", projection)
    capsys.readouterr()
    common = ["--model", str(model), "--adapter", str(out)]
    assert cli.main(["export", *common, "--to", "thudm", "--output", str(thudm)]) == 0
    printed = capsys.readouterr().out
    found = inspect(capsys, out)
    assert f"prefix in THUDM's layout, {found['parameters']:,} values in float32" in printed
    losses = []
    for adapter in (out, out / "checkpoint-4", thudm, thudm / "pytorch_model.bin"):
        results, _ = evaluate(capsys, rows_file, "--model", model, "--adapter", adapter)
        losses.append(list(results.values())[1])
    assert losses[1:] == [losses[0]] * 3 and losses[0] != results["base"]
    for path in (thudm, thudm / "pytorch_model.bin"):
        found = inspect(capsys, path, "--tensors")
        assert found["kind"] == "prefix (P-Tuning v2) of ChatGLM's scripts"
        assert (found["pre_seq_len"], found["prefix_projection"]) == (4, projection == "true")
        assert all(name.startswith("transformer.prefix_encoder.") for name in found["tensors"])
    assert cli.main(["eval", "--model", str(thudm), "--dataset", str(rows_file), "--device", "cpu"]) == 2
    assert "holds a prefix (P-Tuning v2) and no model" in capsys.readouterr().err
    words = ["--model", str(model), "--adapter", str(thudm), "--to", "peft", "--output", str(tmp_path / "back")]
    assert cli.main(["export", *words]) == 0
    capsys.readouterr()
    assert (
        list(evaluate(capsys, rows_file, "--model", model, "--adapter", tmp_path / "back")[0].values())[1] == losses[0]
    )


@pytest.fixture
def whole(tiny_chatglm, tmp_path):
    """A folder with a ChatGLM2 and a prefix in it."""
    source, folder = tiny_chatglm("chatglm2"), tmp_path / "whole"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    values = torch.randn(5, 2 * 2 * 2 * 8, generator=torch.Generator().manual_seed(0))
    save_file({**weights, "transformer.prefix_encoder.embedding.weight": values}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pre_seq_len": 5}))
    return folder


def test_a_model_with_its_own_prefix(whole, tiny_chatglm, rows_file, tmp_path, capsys, monkeypatch):
    losses, told = evaluate(capsys, rows_file, "--model", whole)
    plain, _ = evaluate(capsys, rows_file, "--model", tiny_chatglm("chatglm2"))
    assert list(losses) == ["base", "default"]
    assert losses["base"] == plain["base"] != losses["default"]
    assert "adapter default: the model's own prefix" in told
    found = inspect(capsys, whole)
    assert found["prefix"] == {"pre_seq_len": 5, "prefix_projection": False}
    lines = ["/adapters", "/base", "/adapter default", "/quit"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    assert cli.main(["chat", "--model", str(whole), "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert told.count("active: default=1; attached: default") == 2
    words = ["train", "--model_name_or_path", str(whole), "--dataset", str(rows_file), "--use_cpu", "--max_steps", "2"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "refused")]) == 2
    assert "finetuning_type=lora: the model has a prefix of that name" in capsys.readouterr().err
    assert cli.main([*words, "--output_dir", str(tmp_path / "more"), "--pre_seq_len", "5"]) == 0
    capsys.readouterr()
    model, _ = qgraft.load(tiny_chatglm("chatglm2"), device="cpu")
    qgraft.load_adapter(model, tmp_path / "more")


def test_a_number_of_tokens_that_is_not_the_prefixs(trained, rows_file, tmp_path, capsys):
    model, prefix, lora = trained
    common = ["train", "--model_name_or_path", str(model), "--dataset", str(rows_file), "--use_cpu"]
    for adapter, message in ((prefix, "pre_seq_len=5: the prefix 'default' has 4 tokens"), (lora, "is a LoRA")):
        words = ["--adapter_name_or_path", str(adapter), "--pre_seq_len", "5", "--output_dir", str(tmp_path / "more")]
        assert cli.main([*common, *words]) == 2
        assert message in capsys.readouterr().err
