"""Whole runs on preferences: what is learned, logged and kept; resuming to the same bytes; what does not go together."""

import json

import pytest

import qgraft
from qgraft.errors import CheckpointError, DataError, OptionError
from qgraft.training.reference import REFERENCE

PAIRS = [
    {"prompt": f"question {i}", "chosen": f"yes {i % 3}", "rejected": f"no {i % 4} " * (1 + i % 3)} for i in range(12)
]
SINGLE = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
          for row in PAIRS for side in ("chosen", "rejected")]  # fmt: skip
LOGGED = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


def run(tiny_gguf, folder, rows=PAIRS, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    defaults = {"max_steps": 6, "per_device_train_batch_size": 3, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
                "plot_loss": False, "learning_rate": 1e-2, "r": 2, "stage": "dpo"}  # fmt: skip
    args = qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})
    return model, tokenizer, qgraft.train(model, tokenizer, rows, args)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_every_stage_learns_which_answers_are_preferred(stage, tiny_gguf, tmp_path):
    rows = SINGLE if stage == "kto" else PAIRS
    _, _, report = run(tiny_gguf, tmp_path / "out", rows, stage=stage, max_steps=20, val_size=4, learning_rate=3e-2)
    assert report.metrics["eval_loss"] < report.metrics["eval_loss_before"]
    assert report.metrics["eval_rewards/accuracies"] == 1.0
    steps = [entry for entry in logged(tmp_path / "out") if "loss" in entry]
    assert steps[-1].keys() >= LOGGED
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    assert (tmp_path / "out" / REFERENCE).is_file() == (stage not in ("orpo", "simpo"))
    seal = json.loads((tmp_path / "out" / "qgraft.json").read_text())
    assert "adapter_model.safetensors" in seal["files"]


def test_the_first_loss_of_dpo_is_that_of_a_coin(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out", max_steps=1, save_strategy="no", val_size=4)
    assert logged(tmp_path / "out")[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert logged(tmp_path / "out")[1]["loss"] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "more"), [("dpo", {"lora_dropout": 0.3}), ("kto", {}), ("orpo", {"train_on_prompt": True})]
)
def test_a_run_goes_on_to_the_same_bytes(stage, more, tiny_gguf, tmp_path):
    rows, options = (
        (SINGLE if stage == "kto" else PAIRS),
        {"stage": stage, "val_size": 4, "eval_strategy": "no", **more},
    )
    run(tiny_gguf, tmp_path / "whole", rows, **options)
    run(tiny_gguf, tmp_path / "part", rows, **options)
    for name in ("checkpoint-6",):
        qgraft.training.checkpoints.storage.remove_folder(tmp_path / "part" / name)
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    *_, report = run(tiny_gguf, tmp_path / "part", rows, **options, resume_from_checkpoint="true")
    assert report.finished and report.steps == 6
    whole, part = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()
    first, second = (logged(tmp_path / name)[-2] for name in ("whole", "part"))
    assert {key: first[key] for key in LOGGED} == {key: second[key] for key in LOGGED}


def test_the_reference_is_taken_from_the_folder_and_another_one_is_refused(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out")
    path = tmp_path / "out" / REFERENCE
    saved = json.loads(path.read_text())
    assert len(saved["learned"]) == len(PAIRS) and saved["held_out"] == []
    qgraft.training.checkpoints.storage.remove_folder(tmp_path / "out" / "checkpoint-6")
    path.write_text(json.dumps({**saved, "learned": [[-1.0, -2.0]] * len(PAIRS)}))
    with pytest.raises(CheckpointError, match="reference"):
        run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true")
    path.write_text("{broken")  # computed again, to the same numbers
    (tmp_path / "out" / "adapter_model.safetensors").unlink()  # or the run would be known to have ended
    *_, report = run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true")
    assert report.steps == 6 and json.loads(path.read_text())["learned"] == saved["learned"]


def test_an_adapter_that_is_trained_on_is_what_it_is_compared_with(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "first")
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    qgraft.load_adapter(model, tmp_path / "first")
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "second"), stage="dpo", max_steps=1, use_cpu=True, plot_loss=False,
                                 per_device_train_batch_size=3)  # fmt: skip
    report = qgraft.train(model, tokenizer, PAIRS, args)
    assert report.metrics["train_loss"] == pytest.approx(0.6931472, abs=1e-4)


def test_eval_says_which_answers_a_model_prefers(tiny_gguf, tmp_path):
    model, tokenizer, _ = run(tiny_gguf, tmp_path / "out", max_steps=20, learning_rate=3e-2, val_size=4)
    found = qgraft.evaluate(model, tokenizer, PAIRS, stage="dpo")
    assert found.metrics["rewards/accuracies"] == 1.0 and found.metrics["rewards/margins"] > 0 and found.samples == 12
    with qgraft.adapters_off(model):
        base = qgraft.evaluate(model, tokenizer, PAIRS, stage="dpo")
    assert base.loss == pytest.approx(0.6931472, abs=1e-5) and base.metrics["rewards/margins"] == pytest.approx(
        0, abs=1e-4
    )
    kto = qgraft.evaluate(model, tokenizer, SINGLE, stage="kto")
    assert kto.metrics["rewards/chosen"] > kto.metrics["rewards/rejected"]


def test_a_prefix_learns_preferences_too(tiny_gguf, tmp_path):
    *_, report = run(
        tiny_gguf, tmp_path / "out", pre_seq_len=4, max_steps=30, learning_rate=3e-2, val_size=4, prefix_dropout=0
    )
    assert report.metrics["eval_rewards/accuracies"] >= 0.75
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0


def test_passes_in_parts_come_to_the_same(tiny_gguf, tmp_path):
    """However many tokens pass at a time, and whatever is logged."""
    found = [run(tiny_gguf, tmp_path / str(tokens), max_tokens_per_pass=tokens, max_steps=2, save_strategy="no")[2].metrics
             for tokens in (1, 4096)]  # fmt: skip
    assert found[0]["train_loss"] == pytest.approx(found[1]["train_loss"], rel=1e-5)
    assert found[0]["tokens"] == found[1]["tokens"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"fp16": True}, "fp16"), ({"cache_frozen_layers": True}, "cache_frozen_layers"),
     ({"cuda_graphs": "yes"}, "cuda_graphs=yes: passes of pairs are not recorded"),
     ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"train_on_prompt": True}, "train_on_prompt"),
     ({"beta": 0.0}, "beta=0.0: expected a number above 0"),
     ({"stage": "sft", "beta": 0.1}, "stage sft learns no preferences"),
     ({"stage": "rm"}, "stage='rm': expected sft, dpo, ipo, orpo, simpo, kto"),
     ({"predict_with_generate": True, "do_eval": True}, "predict_with_generate")],
)  # fmt: skip
def test_options_that_have_no_meaning_are_refused(options, problem, tmp_path):
    with pytest.raises(qgraft.QgraftError, match=problem):
        qgraft.TrainArguments(output_dir=str(tmp_path / "out"), **{"stage": "dpo", "use_cpu": True, **options})


def test_rows_of_the_other_kind_are_refused(tiny_gguf, tmp_path):
    with pytest.raises(DataError, match="holds a pair") as error:
        run(tiny_gguf, tmp_path / "out", PAIRS, stage="kto")
    assert "rows:1" in str(error.value) and error.value.hint
    with pytest.raises(OptionError, match="for ChatGLM's tokenizers"):
        run(tiny_gguf, tmp_path / "out", max_target_length=8)
    with pytest.raises(DataError, match="which stage kto learns"):
        run(tiny_gguf, tmp_path / "out", SINGLE)
    with pytest.raises(DataError, match="is the only row, of those learned or of those held out") as error:
        run(tiny_gguf, tmp_path / "out", SINGLE, stage="kto", val_size=1)
    assert "hold out more rows" in error.value.hint
    with pytest.raises(DataError, match="is the only row"):
        run(tiny_gguf, tmp_path / "out", SINGLE[:1], stage="kto")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_jobs_of_preferences_train_alone(tmp_path):
    from qgraft.jobs.train import check_jobs

    jobs = [qgraft.TrainArguments(output_dir=str(tmp_path / name), stage=name, use_cpu=True) for name in ("dpo", "sft")]
    with pytest.raises(OptionError, match="stage dpo trains alone"):
        check_jobs(jobs)


def test_names_of_llamafactory(tmp_path):
    from qgraft.training.arguments import arguments_from_dict

    args = arguments_from_dict(
        {"stage": "dpo", "pref_beta": 0.3, "pref_loss": "orpo", "output_dir": str(tmp_path), "use_cpu": True}
    )
    assert (args.beta, args.loss_type) == (0.3, "orpo")
