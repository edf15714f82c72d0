"""Encoder-decoders against transformers and PEFT: loading, losses, training, answers, merging, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_pairs import KINDS, write_pairs_model

import qgraft
from qgraft.adapters.targets import lora_layers
from qgraft.data.pairs import PairOptions, PairSample, build_pairs
from qgraft.data.reading import read_dataset
from qgraft.errors import DataError, OptionError, QgraftError, UnsupportedError
from qgraft.linear import QuantizedLinear
from qgraft.passes.pairs import collate_pairs, padded_together, pair_losses, split_pairs
from qgraft.serving.answering import answer
from qgraft.training.padded import Padded
from qgraft.training.predict import predict
from qgraft.training.seq2seq import PAIRS

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment.py"
WORDS = [("good", "positive"), ("bad and slow", "negative"), ("great", "positive"), ("awful", "negative")]
ROWS = [{"sentence": f"the service was {word}{' and good' * (n % 3)}", "text_label": label}
        for n, (word, label) in enumerate(WORDS * 3)]  # fmt: skip
COLUMNS = {"prompt": "sentence", "response": "text_label"}


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """(folder, the model that transformers made) of each kind, made once; neither is to be changed."""
    made = {}

    def get(kind="t5"):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = SimpleNamespace(path=folder, model=write_pairs_model(kind, folder))
        return made[kind]

    return get


def inputs(padded=True):
    """Two sources, one of them shorter, and what the decoder reads."""
    ids, mask = torch.randint(3, 160, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    if padded:
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 160, (2, 5))}


@torch.no_grad()
def logits_apart(one, other):
    given = inputs()
    return float((one(**given).logits - other(**given).logits).abs().max())


def arguments(folder, **options):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "plot_loss": False,
                "prompt_column": "sentence", "response_column": "text_label", "save_strategy": "no", "compute": "float32",
                "learning_rate": 1e-2, "r": 4, "lora_alpha": 8}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})


QUICK = {"t5", "marian"}


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in sorted(KINDS)])
def test_a_folder_computes_what_transformers_does(pairs_folder, kind):
    """Logits with padding, and what generate() writes; BART's scaled embeddings, Marian's positions that no file holds."""
    made = pairs_folder(kind)
    model, _ = qgraft.load(made.path)
    assert logits_apart(model, made.model) <= 1e-5
    given = {key: value for key, value in inputs().items() if key != "decoder_input_ids"}
    told = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, **told), made.model.generate(**given, **told))


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_packed_layers_are_those_of_the_dequantized_model(pairs_folder, kind):
    """All linear layers but the output layer are packed; T5's wo too, whose weight the code of transformers asks for its
    type."""
    made = pairs_folder(kind)
    model, _ = qgraft.load(made.path, quantize="q8_0")
    oracle = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.path).eval()
    packed = {path: each for path, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    output = model.get_output_embeddings()
    assert all(each.packed.format == "q8_0" for each in packed.values() if each is not output)
    assert len(packed) == sum(isinstance(each, torch.nn.Linear) for each in oracle.modules())
    for path, each in packed.items():
        oracle.get_submodule(path).weight.data.copy_(each.dequantize())
    assert logits_apart(model, oracle) <= 1e-5


@pytest.mark.parametrize(
    "targets",
    [None, pytest.param(["q", "v"], marks=pytest.mark.slow), pytest.param("all-linear", marks=pytest.mark.slow)],
)
def test_target_names_put_loras_where_peft_does(pairs_folder, targets):
    """In both halves, and on the attention between them; None is PEFT's default for T5, the names q and v."""
    made = pairs_folder("t5")
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(transformers.AutoModelForSeq2SeqLM.from_pretrained(made.path), config)
    expected = {
        path.removeprefix("base_model.model.") for path, each in theirs.named_modules() if hasattr(each, "lora_A")
    }
    model, _ = qgraft.load(made.path)
    qgraft.attach_lora(model, r=4, target_modules=targets or ["q", "v"])
    assert {path for path, _ in lora_layers(model)} == expected
    assert any("EncDecAttention" in path for path in expected) and any(path.startswith("encoder") for path in expected)


@pytest.mark.parametrize(
    ("kind", "targets"), [("t5", "q,v"), pytest.param("bart", "q_proj,v_proj", marks=pytest.mark.slow)]
)
def test_a_run_is_that_of_peft(pairs_folder, tmp_path, monkeypatch, kind, targets):
    """20 steps with AdamW, clipping and a linear schedule on the same float weights: the same losses; PEFT reads the
    adapter, and computes the same with it."""
    made, batches = pairs_folder(kind), []
    own = Padded.batches
    monkeypatch.setattr(Padded, "batches", lambda self, rows, tokens: batches.append(rows) or own(self, rows, tokens))
    model, tokenizer = qgraft.load(made.path)
    qgraft.attach_lora(model, 4, 8, target_modules=targets)
    qgraft.save_adapter(model, tmp_path / "start")
    out = tmp_path / "out"
    qgraft.train(model, tokenizer, ROWS, arguments(out, max_steps=20, val_size=2, target_modules=targets))
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert [e["eval_perplexity"] for e in logged if "eval_perplexity" in e][-1] == pytest.approx(
        torch.tensor(logged[-2]["eval_loss"]).exp().item(), rel=1e-4
    )

    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trained = [each for each in theirs.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 20)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model=base)
    expected = []
    for rows in batches:
        theirs.train()
        given = [{"input_ids": e.input_ids, "attention_mask": [1] * len(e.input_ids), "labels": e.labels} for e in rows]
        loss = theirs(**collate(given)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5) and min(losses) < losses[0] - 0.05

    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    fresh = transformers.AutoModelForSeq2SeqLM.from_pretrained(made.path)
    read = peft.PeftModel.from_pretrained(fresh, out).eval()
    assert type(read) is peft.PeftModelForSeq2SeqLM and logits_apart(read, model) <= 1e-5
    again, _ = qgraft.load(made.path)
    assert qgraft.load_adapter(again, out).applied == len(dict(lora_layers(model))) and logits_apart(again, model) == 0


def test_losses_of_a_padded_pass_are_each_pairs_own(pairs_folder):
    """Weighed, smoothed, and in passes of any size; a pair's loss is what transformers says of it alone."""
    made = pairs_folder("t5")
    model, tokenizer = qgraft.load(made.path)
    samples = build_pairs(tokenizer, *read_dataset(ROWS, columns=COLUMNS), PairOptions())
    samples[1] = PairSample(samples[1].input_ids, [*samples[1].labels, 9, 8, 7], "", weight=0.5)
    oracle, smooth = 0.0, 0.0
    for each in samples:
        ids, labels = torch.tensor([each.input_ids]), torch.tensor([each.labels])
        with torch.no_grad():
            said = made.model(input_ids=ids, labels=labels)
        oracle += each.weight * said.loss.item() * len(each.labels)
        smooth += each.weight * F.cross_entropy(said.logits[0], labels[0], reduction="sum", label_smoothing=0.1).item()
    for tokens in (0, 40, 4000):
        parts = split_pairs(samples, tokens)
        assert sorted(each.source for part in parts for each in part) == sorted(each.source for each in samples)
        for part in parts:
            batch = collate_pairs(part, 0)
            assert len(part) == 1 or batch["input_ids"].numel() + batch["labels"].numel() <= tokens
        with torch.no_grad():
            assert sum(float(pair_losses(model, part)[0]) for part in parts) == pytest.approx(oracle, rel=1e-5)
            assert sum(float(pair_losses(model, part, 0.1)[0]) for part in parts) == pytest.approx(smooth, rel=1e-5)
    assert Padded(PAIRS).count(samples) == sum(each.weight * len(each.labels) for each in samples)
    found = qgraft.evaluate(model, tokenizer, ROWS, columns=COLUMNS)
    plain = build_pairs(tokenizer, *read_dataset(ROWS, columns=COLUMNS), PairOptions())
    with torch.no_grad():
        total = sum(float(pair_losses(model, [each])[0]) for each in plain)
    assert found.labels == sum(len(each.labels) for each in plain)
    assert found.loss == pytest.approx(total / found.labels, rel=1e-5) and found.samples == len(ROWS)
    assert qgraft.evaluate(model, tokenizer, ROWS, columns=COLUMNS, source_prefix="translate: ").loss != found.loss


def test_a_model_that_padding_changes_gets_one_pair_in_a_pass(pairs_folder, monkeypatch):
    """And one whose own loss is another is refused."""
    model, tokenizer = qgraft.load(pairs_folder("t5").path)
    samples = build_pairs(tokenizer, *read_dataset(ROWS, columns=COLUMNS), PairOptions())
    with padded_together(model, samples) as apart:
        assert apart is None
    forward = type(model).forward

    def blind(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", blind)
    with padded_together(model, samples) as apart:
        assert apart is not None and "beside padding" in apart

    def other(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = None if output.loss is None else output.loss * 2
        return output

    monkeypatch.setattr(type(model), "forward", other)
    with pytest.raises(UnsupportedError, match="own loss"), padded_together(model, samples):
        pass


def test_rows_that_are_no_pair_are_dropped_and_long_ones_cut(pairs_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(pairs_folder("t5").path)
    rows = [
        {"instruction": "good", "output": "positive"},
        {"instruction": "good", "output": "positive", "system": "Be brief."},
        {"instruction": "good", "output": "positive", "history": [["bad", "negative"]]},
        {"instruction": "good bad great awful and slow", "output": "positive negative neutral"},
    ]
    conversations, accounting = read_dataset(rows)
    samples = build_pairs(tokenizer, conversations, accounting, PairOptions("translate: ", 4, 3))
    assert len(samples) == accounting.kept == 2 and sum(accounting.dropped.values()) == 2
    assert accounting.truncated == 2 and accounting.truncated_tokens > 0
    expected = tokenizer("translate: good bad great awful and slow", truncation=True, max_length=4)["input_ids"]
    assert samples[1].input_ids == expected and samples[1].input_ids[-1] == samples[1].labels[-1] == 1
    with pytest.raises(DataError, match="no sample is left"):
        build_pairs(tokenizer, *read_dataset(rows[1:3]), PairOptions())


def test_predictions_and_answers_are_what_transformers_generates(pairs_folder, tmp_path):
    """Several rows at once, padded, and one in a chat; both with the text in front of each."""
    pytest.importorskip("rouge_chinese")
    made = pairs_folder("bart")
    model, tokenizer = qgraft.load(made.path)
    asked = [f"translate: {row['sentence']}" for row in ROWS[:5]]
    expected = []
    for text in asked:
        ids = made.model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), max_new_tokens=6)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    args = arguments(
        tmp_path, do_predict=True, max_new_tokens=6, source_prefix="translate: ", per_device_eval_batch_size=3
    )
    found = predict(model, tokenizer, ROWS[:5], args)
    assert found.pairs == [(row["text_label"], text) for row, text in zip(ROWS[:5], expected, strict=True)]
    said = answer(model, tokenizer, [("user", ROWS[0]["sentence"])], source_prefix="translate: ", max_new_tokens=6)
    assert said.text.strip() == expected[0]
    with pytest.raises(DataError, match="one text"):
        answer(model, tokenizer, [("user", "good"), ("assistant", "yes"), ("user", "bad")])
    with pytest.raises(DataError, match="64"):
        answer(model, tokenizer, [("user", "good " * 80)])


def test_a_lora_is_merged_into_float_weights_without_loss(pairs_folder, tmp_path):
    """transformers reads the saved folder, which computes what the adapter did; what needs rows is refused."""
    made = pairs_folder("t5")
    model, tokenizer = qgraft.load(made.path)
    qgraft.attach_lora(model, 4, 8)
    for _, layer in lora_layers(model):
        for each in layer.loras["default"].parameters():
            torch.nn.init.normal_(each, std=0.1)
    given = inputs()
    with torch.no_grad():
        adapted = model(**given).logits
    with pytest.raises(UnsupportedError, match="nearest"):
        qgraft.merge(model, tokenizer)
    with pytest.raises(UnsupportedError, match="without rows"):
        qgraft.merge(model, tokenizer, method="nearest", eval_dataset=ROWS)
    report = qgraft.merge(model, tokenizer, method="nearest")
    assert any("not measured" in note for note in report.notes)
    qgraft.save(model, tmp_path / "merged")
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert float((merged(**given).logits - adapted).abs().max()) <= 1e-5 * float(adapted.abs().max())
    assert logits_apart(merged, made.model) > 1e-2


REFUSED = {
    "stage": "dpo", "finetuning_type": "p_tuning", "train_on_prompt": True, "mask_history": True, "template": "chatml",
    "system": "Be brief.", "cache_frozen_layers": True, "neftune_noise_alpha": 5.0, "memory_limit": "6GB",
    "system_text": "drop",
}  # fmt: skip


def test_what_it_is_for_may_be_said(pairs_folder):
    folder = pairs_folder("t5").path
    assert qgraft.load(folder, device="cpu", task_type="SEQ_2_SEQ_LM")[0].config.is_encoder_decoder
    with pytest.raises(OptionError, match="task_type='CAUSAL_LM': t5 is loaded for SEQ_2_SEQ_LM"):
        qgraft.load(folder, device="cpu", task_type="CAUSAL_LM")


def test_what_has_no_meaning_is_refused_before_the_weights_are_read(pairs_folder, tmp_path):
    """In train() and evaluate(); on the command line by config.json alone."""
    from qgraft.cli.main import main

    made = pairs_folder("t5")
    model, tokenizer = qgraft.load(made.path)
    for name, value in REFUSED.items():
        with pytest.raises(OptionError, match=f"encoder-decoder.*{name}"):
            qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "out", **{name: value}))
    with pytest.raises(OptionError, match="packing"):
        packing = ["--packing", "true", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
        from qgraft.training.arguments import parse_arguments

        qgraft.train(model, tokenizer, ROWS, parse_arguments(packing))
    with pytest.raises(OptionError, match="system"):
        qgraft.evaluate(model, tokenizer, ROWS, columns=COLUMNS, system="Be brief.")
    with pytest.raises(QgraftError):
        qgraft.attach_prefix(model, 4)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((made.path / "config.json").read_bytes())
    for words in (
        [
            "train",
            "--model_name_or_path",
            bare,
            "--dataset",
            "x.jsonl",
            "--stage",
            "dpo",
            "--output_dir",
            tmp_path / "o",
        ],
        ["serve", "--model", bare],
        ["estimate", "--model", bare],
    ):
        assert main(list(map(str, words))) == 2


def test_eval_cuts_sides_as_in_training(pairs_folder, tmp_path, capsys):
    """evaluate() is told; the command takes the lengths from the adapter, and says so."""
    from qgraft.cli.main import main

    made, rows = pairs_folder("t5"), tmp_path / "rows.json"
    rows.write_text(
        json.dumps([{"instruction": "good bad great awful and slow", "output": "positive negative neutral"}])
    )
    model, tokenizer = qgraft.load(made.path)
    qgraft.attach_lora(model, 4, 8)
    sides = {"max_source_length": 4, "max_target_length": 7, "val_max_target_length": 3}
    qgraft.save_adapter(model, tmp_path / "cut", details={"arguments": sides})
    cut = qgraft.evaluate(model, tokenizer, str(rows), max_source_length=4, max_target_length=3)
    whole = qgraft.evaluate(model, tokenizer, str(rows))
    assert cut.labels == 3 < whole.labels and cut.truncated == 1 and not whole.truncated
    words = ["eval", "--model", str(made.path), "--adapter", str(tmp_path / "cut"), "--dataset", str(rows)]
    assert main(words) == 0
    found = capsys.readouterr()
    assert (
        f"loss {cut.loss:.4f}" in found.out
        and "1 cut at max_source_length 4, max_target_length 3: their" in " ".join(found.out.split())
    )
    assert "--max_source_length as in training: 4" in found.err and "--max_target_length as in training: 3" in found.err
    assert main([*words, "--max_target_length", "30", "--max_source_length", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["base"]["labels"] == whole.labels
    with pytest.raises(OptionError, match="max_source_length"):
        qgraft.evaluate(model, tokenizer, str(rows), max_source_length=1)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bytes_and_a_rate_is_looked_for(pairs_folder, tmp_path):
    """With dropout in the adapter; find_lr leaves none on the model."""
    made, options = (
        pairs_folder("bart"),
        {"lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2, "val_size": 2},
    )
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        model, tokenizer = qgraft.load(made.path)
        again = {"resume_from_checkpoint": "auto"} if (tmp_path / folder).exists() else {}
        qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / folder, **options, **again, max_steps=steps,
                                                       lr_scheduler_type="constant"))  # fmt: skip
    whole, parts = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("whole", "parts"))
    assert whole == parts
    model, tokenizer = qgraft.load(made.path)
    found = qgraft.find_lr(model, tokenizer, ROWS, arguments(tmp_path / "rates"))
    assert len(found.losses) > 5 and not qgraft.adapter_names(model)


@pytest.mark.slow
def test_the_commands_learn_measure_answer_and_merge(pairs_folder, tmp_path, capsys):
    """From a csv file: what is in front of sources is remembered; the merged folder is measured as the adapter is."""
    from qgraft.cli.main import main

    made, rows, out = pairs_folder("t5"), tmp_path / "rows.csv", tmp_path / "out"
    rows.write_text("sentence,text_label\n" + "".join(f"{r['sentence']},{r['text_label']}\n" for r in ROWS))
    columns = ["--dataset", rows, "--prompt_column", "sentence", "--response_column", "text_label"]

    def run(*words):
        capsys.readouterr()
        assert main(list(map(str, words))) == 0
        return capsys.readouterr().out

    run("train", "--model_name_or_path", made.path, *columns, "--source_prefix", "translate: ", "--max_steps", 4,
        "--learning_rate", 1e-2, "--output_dir", out, "--use_cpu", "true", "--compute", "float32")  # fmt: skip
    found = json.loads(run("eval", "--model", made.path, "--adapter", out, *columns, "--json"))["results"]
    assert found["out"]["loss"] < found["base"]["loss"]
    assert run(
        "chat", "--model", made.path, "--adapter", out, "--prompt", "the service was good", "--max_new_tokens", 3
    )
    run("merge", "--model", made.path, "--adapter", out, "--method", "nearest", "--output", tmp_path / "merged")
    words = ("eval", "--model", tmp_path / "merged", *columns, "--source_prefix", "translate: ", "--json")
    assert json.loads(run(*words))["results"]["base"]["loss"] == pytest.approx(found["out"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_walk_through_runs(tmp_path):
    """Rows in a file, a tiny T5 made on the spot: PEFT and qgraft read the adapter and give the same answers."""
    rows = tmp_path / "rows.csv"
    lines = (f"{r['sentence']} {n},{r['text_label']}\n" for n, r in enumerate(ROWS * 3))
    rows.write_text("sentence,text_label\n" + "".join(lines))
    found = subprocess.run(
        [sys.executable, EXAMPLE, "--tiny", "--rows", rows, "--epochs", "2", "--output", tmp_path / "out"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "epoch 1: train_loss" in found and "epoch 2: train_loss" in found and "eval_ppl" in found
    assert "read by qgraft, same answers: True" in found and "read by PEFT, same answers: 4 of 4" in found
