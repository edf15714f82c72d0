"""Preferences from the command line: train from a YAML file, measure the base and the adapter."""

import json

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


def test_what_does_not_go_together_is_said(tmp_path, capsys):
    assert main(["train", "--stage", "kto", "--loss_type", "hinge", "--output_dir", str(tmp_path / "out")]) == 2
    assert "loss_type='hinge': stage kto has kto, apo_zero_unpaired" in capsys.readouterr().err
