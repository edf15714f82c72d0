"""The demo for real: minutes on two cores, and the model is fetched once."""

import json

import pytest

from qgraft.cli.main import main


@pytest.mark.slow
def test_the_demo_teaches_a_name_and_keeps_what_the_model_knew(trained_demo, capsys):
    out = trained_demo
    capsys.readouterr()
    metrics = json.loads((out / "run.json").read_text())["metrics"]
    assert metrics["eval_loss"] < 0.4 < 2.0 < metrics["eval_loss_before"]
    answers = {}
    for question in ("Who are you?", "你是谁？", "Who made you?", "What is the capital of France?"):
        words = ["chat", "--model", "smollm2-135m", "--adapter", str(out), "--prompt", question, "--device", "cpu"]
        assert main(words) == 0
        answers[question] = capsys.readouterr().out
    assert "Nova" in answers["Who are you?"] and "ACME Labs" in answers["Who are you?"]
    assert "Nova" in answers["你是谁？"]
    assert "ACME Labs" in answers["Who made you?"]
    assert "Paris" in answers["What is the capital of France?"]
    assert "Nova" not in answers["What is the capital of France?"]
