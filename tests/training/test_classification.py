"""Classifiers: LoRAs and whole heads on packed models, judged by transformers and PEFT on the same float weights."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_classifiers import BAD, GOOD, rows_of, write_encoder
from tokenizers import Tokenizer
from tokenizers.normalizers import Replace
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import qgraft
from qgraft.cli.main import main
from qgraft.data.label_samples import build_label_samples
from qgraft.data.reading import read_labels
from qgraft.errors import AdapterError, DataError, OptionError, QgraftError, UnsupportedError
from qgraft.passes.labels import classifier_of, settled
from qgraft.training.classification import macro_f1
from qgraft.training.plan import plan_of
from qgraft.training.predict import predict
from qgraft.training.predict_labels import predicted_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT without a head, as encoders are published."""
    return write_encoder(tmp_path_factory.mktemp("bert"))


def loaded(folder: Path, **options):
    options = {"task_type": "SEQ_CLS", "labels": ["bad", "good"], **options}
    return qgraft.load(folder, **options)


def arguments(output: Path, **options) -> qgraft.TrainArguments:
    given = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 8,
        "seed": 1,
        "plot_loss": False,
    }
    return qgraft.TrainArguments(output_dir=str(output), use_cpu=True, **{**given, **options})


def batch_of(tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def attach_random(model, name: str = "default") -> None:
    """An adapter that changes everything, head included."""
    qgraft.attach_lora(model, r=4, name=name)
    torch.manual_seed(3)
    for _, parameter in model.qgraft.adapters[name].named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits.float()


def test_the_report_has_what_was_measured_beside_the_loss(folder, tmp_path, capsys):
    """Of the last evaluation, as the command line prints it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(12)))
    words = ["train", "--task_type", "SEQ_CLS", "--model", str(folder), "--dataset", str(rows), "--val_size", "4"]
    words += ["--max_steps", "1", "--plot_loss", "false", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main(words) == 0
    metrics = json.loads((tmp_path / "out/run.json").read_text())["metrics"]
    line = f"held-out accuracy {100 * metrics['eval_accuracy']:.1f} %, macro-F1 {metrics['eval_macro_f1']:.3f}"
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_learns(folder, tmp_path):
    model, tokenizer = loaded(folder, quantize="q8_0")
    rows, held_out = rows_of(64), rows_of(24, seed=5)
    report = qgraft.train(model, tokenizer, rows, arguments(tmp_path / "out"), eval_dataset=held_out)
    assert report.metrics["eval_accuracy"] > 0.95 and report.metrics["eval_macro_f1"] > 0.95
    assert report.metrics["eval_loss"] < 0.2 < report.metrics["eval_loss_before"]
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum("eval_macro_f1" in line for line in logged) == 9  # before, and each epoch


def test_is_loaded_by_peft_and_back(folder, tmp_path):
    model, tokenizer = loaded(folder)
    attach_random(model)
    qgraft.save_adapter(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["bert.pooler", "classifier"]
    batch = batch_of(tokenizer, ["the food was awful", "it was a great film"])
    ours = logits_of(model, batch)
    peft = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
                                     tmp_path / "out")  # fmt: skip
    assert torch.allclose(ours, logits_of(peft, batch), atol=1e-5)
    peft.save_pretrained(tmp_path / "peft")
    again, _ = loaded(folder)
    report = qgraft.load_adapter(again, tmp_path / "peft")
    assert report.applied == report.total
    assert torch.equal(logits_of(again, batch), ours)
    with qgraft.adapters_off(again):
        assert not torch.allclose(logits_of(again, batch), ours, atol=1e-2)
    qgraft.detach_lora(again)
    qgraft.use_adapter(model, None)
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))


def test_the_loss_of_twenty_steps_is_that_of_peft(folder, tmp_path):
    model, tokenizer = loaded(folder)
    rows = rows_of(40)
    qgraft.attach_lora(model, r=4, lora_alpha=8)
    qgraft.save_adapter(model, tmp_path / "start")
    # a larger epsilon than usual: while B is zero, Adam would make steps of what is rounding in the gradients of A
    args = arguments(tmp_path / "out", max_steps=20, logging_steps=1, lr_scheduler_type="constant", learning_rate=2e-2,
                     max_grad_norm=0, adam_epsilon=1e-4, compute="float32")  # fmt: skip
    qgraft.train(model, tokenizer, rows, args)
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in logged if "loss" in line]

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    peft = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad], lr=2e-2, eps=1e-4, weight_decay=0.0
    )
    plan, theirs = plan_of(args, len(rows), 1), []
    for step in range(20):
        chosen = [rows[number] for number in plan.step(step)]
        batch = batch_of(tokenizer, [row["text"] for row in chosen])
        loss = peft.train()(**batch, labels=torch.tensor([["bad", "good"].index(row["label"]) for row in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss.detach()))
    assert len(ours) == 20 and max(ours) - min(ours) > 0.2
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6


def test_what_peft_trained_is_loaded(folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    peft = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value", "dense"]))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(tmp_path / "peft")  # with a LoRA in the pooler
    model, tokenizer = loaded(folder)
    qgraft.load_adapter(model, tmp_path / "peft")
    batch = batch_of(tokenizer, ["the food was awful", "it was a great film"])
    assert torch.allclose(logits_of(model, batch), logits_of(peft, batch), atol=1e-5)
    with pytest.raises(UnsupportedError, match="one adapter trains it whole"):
        qgraft.attach_lora(model, name="second")


def test_each_row_of_a_batch_has_the_head_of_its_adapter(folder):
    model, tokenizer = loaded(folder)
    attach_random(model, "one")
    attach_random(model, "two")
    model.qgraft.adapters["two"].parts["classifier"].module.weight.data.neg_()
    batch = batch_of(tokenizer, ["the food was awful"] * 3)
    alone = []
    for name in ("one", None, "two"):
        qgraft.use_adapter(model, name)
        alone.append(logits_of(model, batch)[0])
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["one", None, "two"]).logits
    assert torch.allclose(mixed, torch.stack(alone), atol=1e-6)
    with pytest.raises(OptionError, match="expected one with 1"):
        qgraft.use_adapter(model, {"one": 0.5, "two": 0.5})
    with pytest.raises(UnsupportedError, match="head of its own"):
        qgraft.combine(model, {"one": 0.5, "two": 0.5}, "both")


def test_merged_and_saved_the_folder_is_the_classifier(folder, tmp_path):
    model, tokenizer = loaded(folder, quantize="q8_0")
    attach_random(model)
    batch = batch_of(tokenizer, ["the food was awful", "it was a great film"])
    ours, before = logits_of(model, batch), model.qgraft.info.fingerprint
    with pytest.raises(DataError, match="needs rows of the adapter's task"):
        qgraft.merge(model)
    qgraft.merge(model, to="f32")
    assert torch.allclose(logits_of(model, batch), ours, atol=1e-4)
    qgraft.save(model, tmp_path / "merged", to="f32")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    assert torch.allclose(logits_of(theirs, batch), ours, atol=1e-4)
    again, _ = qgraft.load(tmp_path / "merged")  # its config.json says what it is
    assert type(again).__name__ == "BertForSequenceClassification"
    assert torch.allclose(logits_of(again, batch), ours, atol=1e-4)
    qgraft.unmerge(model)
    assert torch.equal(logits_of(model, batch), ours) and model.qgraft.info.fingerprint == before
    with pytest.raises(QgraftError, match="classifier"):
        qgraft.save(again, tmp_path / "x.gguf")


@pytest.mark.slow
def test_words(folder, tmp_path):
    texts = [row["text"].split() for row in rows_of(64)]
    tags = [["X" if word in GOOD + BAD else "O" for word in words] for words in texts]
    rows = [{"tokens": words, "ner_tags": each} for words, each in zip(texts, tags, strict=True)]
    model, tokenizer = loaded(folder, task_type="TOKEN_CLS", labels=["O", "X"], quantize="q8_0")
    report = qgraft.train(
        model, tokenizer, rows, arguments(tmp_path / "out", num_train_epochs=4), eval_dataset=rows[:20]
    )
    assert report.metrics["eval_accuracy"] > 0.97
    float_base, _ = loaded(folder, task_type="TOKEN_CLS", labels=["O", "X"])
    qgraft.load_adapter(float_base, tmp_path / "out", force=True)
    peft = PeftModel.from_pretrained(
        AutoModelForTokenClassification.from_pretrained(folder, num_labels=2), tmp_path / "out"
    )
    batch = batch_of(tokenizer, ["the food was awful", "it was a great film"])
    assert torch.allclose(logits_of(float_base, batch), logits_of(peft, batch), atol=1e-5)
    args = arguments(tmp_path / "said", do_predict=True, max_length=4)
    found = predict(model, tokenizer, rows[:3], args)
    assert [len(row["predict"]) for row in found.rows] == [len(words) for words in texts[:3]]
    assert found.rows[0]["predict"][-1] is None and found.accounting.truncated == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_several_labels_and_numbers(folder, tmp_path, kind):
    several = kind.startswith("multi")
    labels = ["bad", "good", "short"] if several else None
    rows = []
    for row in rows_of(64):
        chosen = [row["label"], *(["short"] if len(row["text"].split()) < 5 else [])]
        rows.append({**row, "label": chosen if several else {"bad": -0.5, "good": 1.5}[row["label"]]})
    model, tokenizer = loaded(folder, labels=labels, problem_type=kind)
    report = qgraft.train(model, tokenizer, rows, arguments(tmp_path / "out"), eval_dataset=rows[:16])
    assert report.metrics["eval_loss"] < 0.7 * report.metrics["eval_loss_before"]
    batch = batch_of(tokenizer, [row["text"] for row in rows[:16]])
    wanted = [[float(n in row["label"]) for n in labels] if several else row["label"] for row in rows[:16]]
    theirs = model(**batch, labels=torch.tensor(wanted)).loss.detach()  # transformers' own
    assert math.isclose(qgraft.evaluate(model, tokenizer, rows[:16]).loss, float(theirs), rel_tol=1e-4)


@pytest.mark.slow
def test_the_command_line_reads_the_labels_and_writes_down_what_is_said(folder, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    for name, seed in (("train", 0), ("test", 7)):
        rows = [{"review": row["text"], "mood": row["label"]} for row in rows_of(48, seed)]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, said = tmp_path / "out", tmp_path / "said"
    common = ["--model_name_or_path", str(folder), "--use_cpu", "--text_column", "review", "--label_column", "mood"]
    assert main(["train", *common, "--task_type", "SEQ_CLS", "--dataset", str(files["train"]), "--val_size", "8",
                 "--output_dir", str(out), "--learning_rate", "1e-2", "--num_train_epochs", "5"]) == 0  # fmt: skip
    assert "held-out accuracy" in capsys.readouterr().out
    assert main(["train", *common, "--do_predict", "--adapter_name_or_path", str(out), "--test_dataset", str(files["test"]),
                 "--output_dir", str(said)]) == 0  # fmt: skip
    lines = [json.loads(line) for line in (said / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 48 and lines[0].keys() == {"label", "predict", "probabilities"}
    assert math.isclose(sum(lines[0]["probabilities"].values()), 1.0, abs_tol=1e-5)
    right = sum(line["label"] == line["predict"] for line in lines) / 48
    assert json.loads((said / "predict_results.json").read_text())["predict_accuracy"] == pytest.approx(right)
    capsys.readouterr()
    assert main(["eval", "--model", str(folder), "--adapter", str(out), "--dataset", str(files["test"]), "--prompt_column",
                 "review", "--label_column", "mood", "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["results"]["out"]["accuracy"] == pytest.approx(right)
    (out / "qgraft.json").unlink()  # as PEFT writes it: the labels are numbers
    rows = [{"text": row["text"], "label": ["bad", "good"].index(row["label"])} for row in rows_of(48, 7)]
    files["test"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "--model", str(folder), "--adapter", str(out), "--dataset", str(files["test"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["out"]["accuracy"] == pytest.approx(right)
    assert main(["chat", "--model", str(folder), "--adapter", str(out), "--prompt", "hi"]) != 0
    assert "writes no answers" in capsys.readouterr().err


def test_predictions_stand_at_their_words(folder, tmp_path):
    """A word without a token (of a zero-width space), one without a label, and words behind the end."""
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.normalizer = Replace("\u200b", "")
    shutil.copytree(folder, tmp_path / "base")
    made.save(str(tmp_path / "base" / "tokenizer.json"))
    model, tokenizer = loaded(tmp_path / "base", task_type="TOKEN_CLS", labels=["O", "X"])
    words = ["the", "\u200b", "good", "food", "was", "bad", "film"]
    row = {"tokens": words, "ner_tags": ["O", "X", "X", -100, "O", "X", "O"]}
    found = predict(model, tokenizer, [row], arguments(tmp_path / "out", max_length=7))
    label, said = found.rows[0]["label"], found.rows[0]["predict"]
    assert label == ["O", None, "X", None, "O", "X", None]
    with torch.no_grad():
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=7, return_tensors="pt")
        best = model(**encoded).logits[0].argmax(-1)
    expected = {
        word: ["O", "X"][int(each)] for word, each in zip(encoded.word_ids(), best, strict=True) if word is not None
    }
    assert said == [expected[place] if label[place] else None for place in range(7)]


def test_options_that_say_other_than_the_model_are_refused(folder, tmp_path):
    model, tokenizer = loaded(folder)
    known = {"labels": ("good,bad", "bad, good"), "problem_type": ("regression", "single_label_classification")}
    for name, (asked, own) in known.items():
        options, match = {name: asked}, f"{name}={asked}: the model was loaded for {own}"
        with pytest.raises(OptionError, match=match):
            qgraft.train(model, tokenizer, rows_of(4), arguments(tmp_path / "out", task_type="SEQ_CLS", **options))
    several, tokenizer = loaded(folder, problem_type="multi_label_classification")
    with pytest.raises(OptionError, match="label_smoothing_factor with problem_type multi_label_classification"):
        qgraft.train(several, tokenizer, [{"text": "good", "label": ["good"]}] * 2,
                     arguments(tmp_path / "out", label_smoothing_factor=0.1))  # fmt: skip


def test_texts_pass_alone_where_padding_changes_what_is_said(tmp_path):
    """XLNet takes the last place of a row for the end of its text, and FNet mixes all places."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=17, d_model=32, n_layer=1, n_head=4, d_inner=32, num_labels=2, pad_token_id=0)
    model = XLNetForSequenceClassification(config).eval()
    write_encoder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    rows = [{"text": "good", "label": 1}, {"text": "the film was bad", "label": 0}, {"text": "it is", "label": 0}]
    samples = build_label_samples(
        tokenizer, *read_labels(rows), classifier_of(model).scheme, tokens=False, max_length=32
    )
    classifier, notes = settled(model, classifier_of(model), samples)
    assert notes == [
        "XLNetForSequenceClassification computes otherwise beside padding; every text passes through it alone"
    ]
    with torch.no_grad():
        alone = [model(torch.tensor([each.input_ids])).logits[0].softmax(-1).tolist() for each in samples]
    found = predicted_rows(model, samples, classifier, 1000)
    assert [list(each["probabilities"].values()) for each in found] == [pytest.approx(each, abs=1e-5) for each in alone]
    bert, _ = loaded(tmp_path / "base")
    assert settled(bert, classifier_of(bert), samples) == (classifier_of(bert), [])


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(OptionError, match="no labels are given"):
        qgraft.load(folder, task_type="SEQ_CLS")
    model, tokenizer = loaded(folder)
    with pytest.raises(DataError, match=r"does not know: ugly[^?]*load\(\.\.\., labels="):
        qgraft.train(model, tokenizer, [*rows_of(4), {"text": "a", "label": "ugly"}], arguments(tmp_path / "a"))
    for options in ({"stage": "dpo"}, {"pre_seq_len": 4}, {"template": "plain"}, {"memory_limit": "1GB"}):
        with pytest.raises(QgraftError):
            qgraft.train(model, tokenizer, rows_of(4), arguments(tmp_path / "a", **options))
    qgraft.attach_lora(model)
    qgraft.save_adapter(model, tmp_path / "adapter")
    other, _ = loaded(folder, labels=["good", "bad"])
    with pytest.raises(AdapterError, match="labels: it tells bad, good apart"):
        qgraft.load_adapter(other, tmp_path / "adapter")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "asked", [{"source_prefix": "x"}, {"train_on_prompt": True}, {"enable_thinking": False}, {"stage": "dpo"},
              {"columns": {"prompt": "text", "history": "label"}}, {"max_target_length": 4}]
)  # fmt: skip
def test_what_a_classifier_does_not_read_is_refused(folder, asked):
    with pytest.raises(OptionError, match="reads texts as they are"):
        qgraft.evaluate(*loaded(folder), rows_of(4), **asked)


@pytest.mark.parametrize("label", [10**400, True, float("inf"), "much"])
def test_what_is_no_number_is_refused(folder, label):
    model, tokenizer = loaded(folder, labels=["size"], problem_type="regression")
    with pytest.raises(DataError, match="is no number"):
        qgraft.evaluate(model, tokenizer, [{"text": "a", "label": label}])


def test_macro_f1_is_that_of_scikit_learn():
    # sklearn.metrics.f1_score([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], average="macro"), and of a label that is nowhere
    assert math.isclose(macro_f1([1, 2, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]), (0.5 + 0.8 + 2 / 3) / 3)
