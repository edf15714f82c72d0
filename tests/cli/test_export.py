"""qgraft export as a user types it, and what the other commands do with the file."""

import json

import gguf
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import qgraft
from qgraft.adapter_files.folder import load_adapter
from qgraft.adapters.base import find_adapter
from qgraft.cli import main as cli


@pytest.fixture
def trained(tiny_gguf, tmp_path, capsys):
    """(model path, adapter folder) of a short run with a system prompt of its own."""
    rows, model, out = tmp_path / "my.jsonl", tiny_gguf("llama").path, tmp_path / "law"
    rows.write_text("".join(json.dumps({"instruction": f"question {i}", "output": "yes"}) + "\n" for i in range(8)))
    words = ["train", "--model_name_or_path", str(model), "--dataset", str(rows), "--output_dir", str(out)]
    assert cli.main([*words, "--max_steps", "3", "--learning_rate", "1e-2", "--use_cpu", "--system", "Be brief."]) == 0
    capsys.readouterr()
    return model, out


def export(model, adapter, target, to="gguf-lora", *more):
    words = ["export", "--model", model, "--adapter", adapter, "--to", to, "--output", target, *more]
    return cli.main([str(word) for word in words])


def test_the_file_is_a_lora_and_every_command_takes_it(trained, tmp_path, capsys):
    model, out = trained
    target = tmp_path / "law.lora.gguf"
    assert export(model, out, target) == 0
    printed = capsys.readouterr()
    assert f"llama-cli -m {model} --lora {target} -sys 'Be brief.'" in printed.out
    assert "14 layers" in printed.out and f"{target.stat().st_size:,} bytes" in printed.out
    assert "applied to 14/14 layers" in printed.err
    assert gguf.GGUFReader(target).fields["general.name"].contents() == "law"

    assert cli.main(["inspect", str(target), "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "GGUF-LoRA adapter"
    assert found["ranks"] == {"8": 14}
    assert found["formats"]["f16"]["tensors"] == len(found["tensors"]) == 28
    assert "fingerprint" not in found

    base = ["--model", str(model), "--device", "cpu"]
    losses = []
    for adapter in (out, target):
        words = ["--adapter", str(adapter), "--dataset", str(tmp_path / "my.jsonl"), "--json"]
        assert cli.main(["eval", *base, *words]) == 0
        printed = capsys.readouterr()
        losses.append(json.loads(printed.out)["results"]["law"]["loss"])
        assert "--system as in training: Be brief." in printed.err
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert cli.main(["chat", *base, "--adapter", str(target), "--prompt", "question 1", "--max_new_tokens", "2"]) == 0
    assert "adapter law: applied to 14/14 layers" in capsys.readouterr().err


def test_there_and_back_keeps_every_bit_and_peft_reads_it(trained, tmp_path, capsys):
    path, out = trained
    assert export(path, out, tmp_path / "law.lora.gguf", "gguf-lora", "--dtype", "float32") == 0
    assert export(path, tmp_path / "law.lora.gguf", tmp_path / "back", "peft") == 0
    assert "back: PEFT adapter folder" in capsys.readouterr().out
    model, _ = qgraft.load(path)
    assert load_adapter(model, out, "there").notes == load_adapter(model, tmp_path / "back", "back").notes == ()
    back = find_adapter(model, "back").parts
    for layer, lora in find_adapter(model, "there").parts.items():
        assert torch.equal(lora.lora_A, back[layer].lora_A) and torch.equal(lora.lora_B, back[layer].lora_B)
        assert lora.config.scaling == back[layer].config.scaling
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "back").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_folder_goes_to_another_folder_with_its_seal(trained, tmp_path):
    path, out = trained
    assert export(path, out, tmp_path / "half", "peft", "--dtype", "float16") == 0
    first, second = (json.loads((folder / "qgraft.json").read_text()) for folder in (out, tmp_path / "half"))
    assert first["arguments"] == second["arguments"]
    assert first["base"] == second["base"]
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (out, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"to": "onnx"}, "invalid choice: 'onnx'"),
        ({"output": "base"}, "is what is read"),
        ({"output": "adapter"}, "is what is read"),
        ({"output": "old"}, "old.gguf exists already\nhint: give another name, or --overwrite"),
        ({"dtype": "q4_0"}, "--dtype q4_0: expected float32, float16"),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"model": "other"}, "this model is 'qwen2'"),
    ],
)
@pytest.mark.spread(3)
def test_mistakes_are_told_and_nothing_is_written(change, expected, trained, tiny_gguf, tmp_path, capsys):
    model, out = trained
    lora = tmp_path / "law.lora.gguf"
    assert export(model, out, lora) == 0
    (tmp_path / "old.gguf").write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    paths = {
        "old": tmp_path / "old.gguf",
        "base": model,
        "adapter": lora,
        "nowhere": tmp_path / "nowhere",
        "other": tiny_gguf("qwen2").path,
    }
    chosen = {key: paths.get(value, value) for key, value in change.items()}
    given = {"model": model, "adapter": lora, "output": tmp_path / "new.gguf", "to": "gguf-lora", **chosen}
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    capsys.readouterr()
    assert cli.main(["export", *words]) == 2
    assert expected in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_becomes_a_file_with_the_adapter_in_it_or_beside_it(tiny_gguf, tmp_path, capsys):
    """The ways out of a folder: merged GGUF, base and GGUF-LoRA, and a folder for ollama."""
    tiny = tiny_gguf("llama")
    model, tokenizer = qgraft.load(tiny.path, device="cpu")
    folder, out = tmp_path / "folder", tmp_path / "out"
    tiny.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, _ = qgraft.load(folder, quantize="q8_0", device="cpu")
    qgraft.attach_lora(model, r=2)
    for key, value in qgraft.lora_state_dict(model).items():
        if "lora_B" in key:
            value.normal_(0, 0.05)
    qgraft.save_adapter(model, out)
    base = ["--model", str(folder), "--quantize", "q8_0"]
    assert cli.main(["export", *base, "--to", "gguf", "--output", str(tmp_path / "base.gguf")]) == 0
    words = [*base, "--adapter", str(out)]
    assert (
        cli.main(["export", *words, "--to", "gguf-lora", "--output", str(tmp_path / "lora.gguf"), "--dtype", "float32"])
        == 0
    )
    assert cli.main(["export", *words, "--to", "ollama", "--output", str(tmp_path / "ollama")]) == 0
    assert cli.main(["merge", *words, "--output", str(tmp_path / "merged.gguf"), "--method", "nearest"]) == 0
    assert {path.name for path in (tmp_path / "ollama").iterdir()} >= {"Modelfile", "adapter.gguf", "model.gguf"}
    assert (tmp_path / "ollama" / "model.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        expected = model(ids).logits
        beside, _ = qgraft.load(tmp_path / "base.gguf", device="cpu")
        plain = beside(ids).logits
        qgraft.load_adapter(beside, tmp_path / "lora.gguf", force=True)
        assert (beside(ids).logits - expected).abs().max() < 1e-3 < (plain - expected).abs().max()
        merged, _ = qgraft.load(tmp_path / "merged.gguf", device="cpu")
        assert (merged(ids).logits - expected).norm() < 0.5 * (plain - expected).norm()
    capsys.readouterr()
    for wrong, told in (
        (
            ["--to", "gguf", "--adapter", str(out), "--output", str(tmp_path / "x.gguf")],
            "qgraft merge --output NAME.gguf",
        ),
        (["--to", "gguf", "--output", str(tmp_path / "x")], "expected a name that ends in .gguf"),
        (["--to", "gguf-lora", "--output", str(tmp_path / "x.gguf")], "no --adapter is given"),
    ):
        assert cli.main(["export", *base, *wrong]) == 2
        assert told in capsys.readouterr().err
