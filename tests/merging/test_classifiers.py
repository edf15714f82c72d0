"""Calibrated merges of classifiers: what is compared, what is kept in four bits, and that the head stays as it is."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

import qgraft
from qgraft.data.label_samples import LabelSample
from qgraft.data.label_schemes import SEVERAL, SINGLE, LabelScheme
from qgraft.errors import DataError, UnsupportedError
from qgraft.merging.measure import compare, states_of
from qgraft.merging.outputs import outputs_of

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz")
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 40, "initializer_range": 0.15, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
KINDS = {"bert": (BertModel, BertConfig, {}), "roberta": (RobertaModel, RobertaConfig, {"pad_token_id": 0})}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny encoders without heads, by kind, with a tokenizer of letters."""
    found = {}
    for kind, (model, config, options) in KINDS.items():
        path = found[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model(config(**SHAPE, **options)).save_pretrained(path)
        inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
        inner.pre_tokenizer = Whitespace()
        inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
        PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names).save_pretrained(path)
    return found


def rows_of(count: int, seed: int, task: str = "SEQ_CLS") -> list[dict]:
    """Letters, one of which says what the label is; of words each does."""
    draw, rows = torch.Generator().manual_seed(seed), []

    def pick(letters: str) -> str:
        return letters[int(torch.randint(len(letters), (), generator=draw))]

    for number in range(count):
        letters = [pick("ghijklmnopqrstuvwxyz") for _ in range(3 + number % 9)]
        letters[int(torch.randint(len(letters), (), generator=draw))] = pick("def" if number % 2 else "abc")
        if task == "TOKEN_CLS":
            rows.append({"tokens": letters, "ner_tags": ["A" if letter in "abcghijkl" else "B" for letter in letters]})
        else:
            rows.append({"text": " ".join(letters), "label": "b" if number % 2 else "a"})
    return rows


def trained(folder, tmp_path, task="SEQ_CLS", quantize="q4_1", **options):
    names = ["A", "B"] if task == "TOKEN_CLS" else ["a", "b"]
    model, tokenizer = qgraft.load(folder, task_type=task, labels=names, quantize=quantize)
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(160, 1, task))
    (tmp_path / "rows.jsonl").write_text(lines)
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, learning_rate=5e-3, num_train_epochs=4, r=4,
                                 per_device_train_batch_size=16, plot_loss=False, val_size=40, save_strategy="no",
                                 dataset=str(tmp_path / "rows.jsonl"), compute="float32", **options)  # fmt: skip
    qgraft.train(model, tokenizer, None, args)
    return model, tokenizer


@torch.no_grad()
def accuracy(model, tokenizer, rows) -> float:
    return qgraft.evaluate(model, tokenizer, rows).metrics["accuracy"]


@pytest.mark.slow
def test_a_merge_into_four_bits_keeps_what_the_layers_learned(folders, tmp_path):
    """Nearer to the adapter's model than rounding, also on unrelated text; losses are evaluate()'s, with one head for all."""
    model, tokenizer = trained(folders["bert"], tmp_path)
    test, before = rows_of(120, 7), copy.deepcopy(model)
    path = "classifier"
    head = {
        name: tensor.clone() for name, tensor in model.get_submodule(path).named("default").module.state_dict().items()
    }
    own = model.get_submodule(path).base.weight.clone()
    nearest = qgraft.merge(copy.deepcopy(model), method="nearest", eval_dataset=test, min_retained=-1e9)
    named = qgraft.merge(copy.deepcopy(model), min_retained=-1e9)  # of the rows that the run learned and held out
    assert named.kept.held_out and named.kept.rows == 40 and named.distilled_steps
    report = qgraft.merge(model, calibration=rows_of(600, 3), eval_dataset=test, min_retained=0.85)
    kept = report.kept
    assert kept.unit == "label" and kept.labels == 120 and "same likeliest label" in str(report)
    assert "perplexity" not in str(report)
    assert kept.adapter == pytest.approx(qgraft.evaluate(before, tokenizer, test).loss, rel=1e-4)
    assert kept.merged == pytest.approx(qgraft.evaluate(model, tokenizer, test).loss, rel=1e-4)
    assert report.retained_gain > nearest.retained_gain and kept.task_kl < nearest.kept.task_kl
    assert kept.drift_kl < 0.2 * nearest.kept.drift_kl
    assert {layer.format for layer in report.layers} == {"q4_1"} and len(report.layers) == 12
    for name, tensor in model.get_submodule(path).state_dict().items():
        assert torch.equal(tensor, head[name].to(tensor.dtype))
    qgraft.unmerge(model)
    assert torch.equal(model.get_submodule(path).base.weight, own)
    assert qgraft.evaluate(model, tokenizer, test).loss == pytest.approx(kept.adapter, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["q4_1", "iq4_nl", "q4_0"])
@pytest.mark.parametrize(("kind", "task"), [("roberta", "SEQ_CLS"), ("bert", "TOKEN_CLS")])
def test_other_formats_kinds_and_words(kind, task, format, folders, tmp_path):
    model, tokenizer = trained(folders[kind], tmp_path, task, format)
    test = rows_of(120, 7, task)
    learned = accuracy(model, tokenizer, test)
    report = qgraft.merge(model, calibration=rows_of(600, 3, task), eval_dataset=test, min_retained=0.7)
    assert report.kept.labels == (120 if task == "SEQ_CLS" else sum(len(row["tokens"]) for row in test))
    assert accuracy(model, tokenizer, test) > learned - 0.05


def test_what_is_compared_is_what_transformers_says(folders):
    """Of several labels a choice between two each; of words those with a label, whatever is padded; in the samples' order."""
    texts = [[2, 5, 6, 3], [2, 7, 3], [2, 8, 9, 10, 11, 3]]
    for task, problem, labels in (("SEQ_CLS", SINGLE, [[1], [], [0]]), ("SEQ_CLS", SEVERAL, [[1, 0], [], [1, 1]]),
                                  ("TOKEN_CLS", SINGLE, [[-100, 1, 0, -100], [], [-100, 0, -100, 1, 1, -100]])):  # fmt: skip
        model, _ = qgraft.load(folders["bert"], task_type=task, labels=["a", "b"], problem_type=problem)
        samples = [LabelSample(ids, each, "x", [0] * len(ids)) for ids, each in zip(texts, labels, strict=True)]
        assert outputs_of(model).classifier.scheme == LabelScheme(("a", "b"), problem)
        states, targets = states_of(model, samples)
        outputs = outputs_of(model)
        (batch,) = outputs.batches(samples, 1000)
        weights = outputs.weights(batch)
        expected, known = [], []
        for ids, each in zip(texts, labels, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            if task == "TOKEN_CLS":
                places = [place for place, label in enumerate(each) if label != -100] or list(range(len(ids)))
                logits = logits[places]
            expected.append(logits.reshape(-1, 1 if problem == SEVERAL else 2))
            known += [bool(each)] * len(expected[-1])
        logits = torch.cat(expected)
        torch.testing.assert_close(states.double(), logits, rtol=1e-4, atol=1e-5)
        assert weights.tolist() == [float(each) for each in known] and len(targets) == outputs.count(batch) == len(
            logits
        )
        assert [outputs.rows(sample) for sample in samples] == [len(each) for each in expected]
        head, other = outputs.head(model), states + 0.3 * torch.arange(states.shape[1])
        if problem == SEVERAL:
            assert compare(states, states, head, targets).losses[0] == pytest.approx(
                float(F.binary_cross_entropy_with_logits(logits[:, 0], targets.double())), rel=1e-5
            )
            p, q = logits.sigmoid(), (other.double()).sigmoid()
            apart = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            assert compare(states, other, head).divergence == pytest.approx(float(apart.mean()), rel=1e-4, abs=1e-7)
        else:
            assert compare(states, states, head, targets).losses[0] == pytest.approx(
                float(F.cross_entropy(logits, targets)), rel=1e-5
            )


def test_a_merge_solves_and_measures(folders):
    """Quick: an adapter that was not trained, on padded rows of several lengths; what is merged is nearer than the base."""
    model, tokenizer = qgraft.load(folders["roberta"], task_type="SEQ_CLS", labels=["a", "b"], quantize="q4_1")
    qgraft.attach_lora(model, r=2, target_modules="query,value,output.dense")
    torch.manual_seed(3)
    for _, parameter in model.qgraft.adapters["default"].named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows = rows_of(60, 4)
    adapter = states_of(model, samples := outputs_samples(model, tokenizer, rows))[0]
    report = qgraft.merge(
        model, tokenizer, calibration=rows_of(90, 5), eval_dataset=rows, min_retained=-1e9, method="codes"
    )
    assert report.kept.labels == 60 and all(layer.effect_kept > 0.2 for layer in report.layers)
    merged = states_of(model, samples)[0]
    head = outputs_of(model).head(model)
    assert compare(adapter, merged, head).divergence == pytest.approx(report.kept.task_kl, rel=1e-3)


def outputs_samples(model, tokenizer, rows):
    from qgraft.merging.task_rows import Reader

    return Reader(model, tokenizer, {}).samples(rows, {})


def test_numbers_and_rows_that_are_not_there_are_refused(folders, tmp_path):
    model, tokenizer = qgraft.load(folders["bert"], task_type="SEQ_CLS", labels=["x"], problem_type="regression",
                                   quantize="q4_1")  # fmt: skip
    qgraft.attach_lora(model, r=2)
    with pytest.raises(UnsupportedError, match="the model says numbers") as error:
        qgraft.merge(model, tokenizer)
    assert "to='f16'" in error.value.hint
    report = qgraft.merge(model, tokenizer, method="nearest")
    assert any("the model says numbers" in note for note in report.notes) and report.kept is None
    model, tokenizer = qgraft.load(folders["bert"], task_type="SEQ_CLS", labels=["a", "b"], quantize="q4_1")
    qgraft.attach_lora(model, r=2)
    with pytest.raises(DataError, match="names no training set"):
        qgraft.merge(model, tokenizer)
    with pytest.raises(DataError, match="labels that the model does not know: c"):
        qgraft.merge(model, tokenizer, calibration=[{"text": "a b", "label": "c"}] * 8)
