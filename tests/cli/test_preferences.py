"""Preferences from the command line: train from a YAML file, measure the base and the adapter."""

import json

import pytest
import yaml

from qgraft.cli.main import main


def test_train_and_eval(tiny_gguf, tmp_path, capsys):
    rows, model = tmp_path / "rows.jsonl", str(tiny_gguf("llama").path)
    rows.write_text("".join(json.dumps({"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}) + "\n"
                            for i in range(10)))  # fmt: skip
    options = {
        "model_name_or_path": model, "dataset": str(rows), "output_dir": str(tmp_path / "out"), "stage": "dpo", "beta": 0.2,
        "loss_type": "sigmoid", "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "val_size": 3,
        "use_cpu": True, "plot_loss": False, "do_train": True, "do_eval": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "held-out rows rewarded the right way round: 100.0 %, by " in said
    assert "perplexity" not in said and "eval_rewards/accuracies 1.0000" in said
    written = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert written["eval_rewards/margins"] > 0
    words = ["--adapter", str(tmp_path / "out"), "--dataset", str(rows), "--stage", "dpo", "--beta", "0.2"]
    words = ["eval", "--model", model, *words]
    assert main(words) == 0
    base, adapter, counts = capsys.readouterr().out.splitlines()
    assert base.startswith("base") and "loss 0.6931" in base and "rewarded more 0.0 %  margin" in base
    assert "rewarded more 100.0 %" in adapter
    assert counts == "10 samples, 0 rows dropped"
    assert main([*words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    (name,) = results.keys() - {"base"}
    assert results[name]["rewards/margins"] > 0


def test_eval_measures_the_loss_that_was_learned(tiny_gguf, tmp_path, capsys):
    """Its numbers too: held-out losses of training come again, which those of the defaults would not."""
    rows, model = tmp_path / "rows.jsonl", str(tiny_gguf("llama").path)
    rows.write_text("".join(json.dumps({"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}) + "\n"
                            for i in range(6)))  # fmt: skip
    loss = ["--stage", "simpo", "--beta", "2", "--simpo_gamma", "1.5", "--label_smoothing", "0.1", "--rpo_alpha", "0.3"]
    out = str(tmp_path / "out")
    words = ["--dataset", str(rows), "--eval_dataset", str(rows), "--output_dir", out, "--learning_rate", "1e-2"]
    assert main(["train", "--model_name_or_path", model, *words, "--max_steps", "2", "--use_cpu", *loss]) == 0
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    results = []
    for said in (loss, loss[:4]):
        assert main(["eval", "--model", model, "--adapter", out, "--dataset", str(rows), *said, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["results"]["out"]["loss"])
    expected = min(each["eval_loss"] for each in logged if "eval_loss" in each)
    assert results[0] == pytest.approx(expected, rel=1e-4)
    assert results[1] != pytest.approx(expected, rel=1e-2)
    assert main(["eval", "--model", model, "--dataset", str(rows), "--stage", "dpo", "--rpo_alpha", "nan"]) == 2


def test_what_does_not_go_together_is_said(tmp_path, capsys):
    assert main(["train", "--stage", "kto", "--loss_type", "hinge", "--output_dir", str(tmp_path / "out")]) == 2
    assert "loss_type='hinge': stage kto has kto, apo_zero_unpaired" in capsys.readouterr().err
