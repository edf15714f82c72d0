"""Distillation on answers that are drawn in training: what is drawn, what is learned of it, that runs repeat themselves."""

import json

import pytest
import torch

import qgraft
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.errors import OptionError
from qgraft.passes.divergence import divergence
from qgraft.passes.rollouts import Asked, Rollouts
from qgraft.training import on_policy
from qgraft.training.checkpoints import storage
from qgraft.training.distill import distill
from qgraft.training.drawn import answer_begins, longest_samples
from qgraft.training.stages import DistillOptions

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 5} of {i % 3}"} for i in range(8)]


@pytest.fixture(scope="module")
def teacher_adapter(tiny_gguf, tmp_path_factory):
    """Folder of an adapter that makes the tiny model say quite other things."""
    return adapter_of(tiny_gguf, tmp_path_factory.mktemp("teacher") / "adapter", 5)


def adapter_of(tiny_gguf, folder, seed, r=4):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    attach_lora(model, r=r, lora_alpha=8 * r)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in find_adapter(model, "default").parts.values():
            part.lora_B.normal_(0, 0.05, generator=generator)
    qgraft.save_adapter(model, folder)
    return folder


def run(tiny_gguf, adapter, folder, rows=ROWS, **options):
    path = str(tiny_gguf("llama").path)
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
                "plot_loss": False, "learning_rate": 1e-2, "r": 2, "stage": "distill", "loss_top_k": 10**6,
                "compute": "float32", "teacher_model_name_or_path": path, "max_new_tokens": 6,
                "teacher_adapter_name_or_path": adapter and str(adapter)}  # fmt: skip
    model, tokenizer = qgraft.load(path)
    args = qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})
    return model, tokenizer, qgraft.train(model, tokenizer, rows, args)


def bytes_of(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def drawn(monkeypatch):
    """Every group of prompts with its answers, by what drew them."""
    found, original = [], Rollouts.answers

    def told(self, asked):
        answers = original(self, asked)
        found.append((self, list(asked), answers))
        return answers

    monkeypatch.setattr(Rollouts, "answers", told)
    return found


def test_the_loss_is_the_divergence_on_what_the_student_drew(tiny_gguf, teacher_adapter, tmp_path, drawn):
    """Of the first step, by transformers' forward passes; greedy answers are those of generate(), and each ends once."""
    beta, folder = 0.5, tmp_path / "out"
    run(tiny_gguf, teacher_adapter, folder, lmbda=1.0, beta=beta, temperature=0.0, max_steps=1, save_strategy="no")
    student, teacher = (qgraft.load(tiny_gguf("llama").path)[0] for _ in range(2))
    qgraft.load_adapter(teacher, teacher_adapter)
    total, count = 0.0, 0
    (rollouts, asked, answers), *others = drawn
    assert not others and len(answers) == 2 and rollouts.problem is None and rollouts._native.steps > 0
    for each, answer in zip(asked, answers, strict=True):
        told = student.generate(torch.tensor([each.prompt]), max_new_tokens=6, do_sample=False,
                                eos_token_id=list(rollouts.ends), pad_token_id=0)  # fmt: skip
        assert told[0, len(each.prompt) :].tolist() == answer
        places = slice(len(each.prompt) - 1, len(each.prompt) + len(answer) - 1)
        with torch.no_grad():
            q, p = (m(torch.tensor([each.prompt + answer])).logits[0, places].double().log_softmax(-1)
                    for m in (student, teacher))  # fmt: skip
        total, count = total + float(divergence(q, p, beta).sum()), count + len(answer)
    assert logged(folder)[0]["kd_loss"] == pytest.approx(total / count, rel=1e-4)
    assert logged(folder)[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_shares_of_none_and_of_all_and_what_repeats(tiny_gguf, teacher_adapter, tmp_path, drawn):
    """lmbda=0 is the run without it, byte for byte; of a half some batches are drawn; the seed decides."""
    options = {"save_strategy": "no"}
    run(tiny_gguf, teacher_adapter, tmp_path / "off", **options)
    run(tiny_gguf, teacher_adapter, tmp_path / "none", lmbda=0.0, **options)
    assert not drawn and bytes_of(tmp_path / "off") == bytes_of(tmp_path / "none")
    half = {"lmbda": 0.5, "lora_dropout": 0.2, "max_steps": 6}
    run(tiny_gguf, teacher_adapter, tmp_path / "half", **half)
    first = [answers for *_, answers in drawn]
    assert 0 < len(first) < 6
    storage.remove_folder(tmp_path / "half" / "checkpoint-6")
    whole = bytes_of(tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    drawn.clear()
    run(tiny_gguf, teacher_adapter, tmp_path / "half", resume_from_checkpoint="true", **half)
    assert bytes_of(tmp_path / "half") == whole
    assert [answers for *_, answers in drawn] == first[len(first) - len(drawn) :]


@pytest.mark.slow
def test_the_teacher_draws_the_rest_with_seq_kd(tiny_gguf, teacher_adapter, tmp_path, drawn):
    *_, report = run(tiny_gguf, teacher_adapter, tmp_path / "out", seq_kd=True, temperature=0.0, max_steps=1, kd_ratio=0.5,
                     save_strategy="no")  # fmt: skip
    teacher, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.load_adapter(teacher, teacher_adapter)
    (rollouts, asked, answers), *others = drawn
    assert not others
    for each, answer in zip(asked, answers, strict=True):
        told = teacher.generate(torch.tensor([each.prompt]), max_new_tokens=6, do_sample=False,
                                eos_token_id=list(rollouts.ends), pad_token_id=0)  # fmt: skip
        assert told[0, len(each.prompt) :].tolist() == answer
    assert any("stays beside the student" in note for note in report.notes)
    assert not (tmp_path / "out" / "teacher").exists()


@pytest.mark.slow
def test_a_student_comes_nearer_where_it_writes(tiny_gguf, teacher_adapter, tmp_path):
    """The divergence on its own answers falls, dropout and DoRA included, and held-out rows are measured by the cache."""
    held = [{"instruction": f"another {i}", "output": f"answer {i % 4}"} for i in range(4)]
    kinds = {
        "plain": ({}, 0.8),
        "dora": ({"use_dora": True}, 0.8),
        "prefix": ({"pre_seq_len": 8, "learning_rate": 3e-2}, 0.97),
    }
    for name, (more, share) in kinds.items():
        path = str(tiny_gguf("llama").path)
        args = qgraft.TrainArguments(
            output_dir=str(tmp_path / name), stage="distill", teacher_model_name_or_path=path, lmbda=1.0, beta=1.0,
            teacher_adapter_name_or_path=str(teacher_adapter), max_steps=30, per_device_train_batch_size=4, logging_steps=1,
            use_cpu=True, plot_loss=False, max_new_tokens=8, save_strategy="no", compute="float32",
            **{"learning_rate": 1e-2, **more},
        )  # fmt: skip
        report = qgraft.train(*qgraft.load(path), ROWS, args, eval_dataset=held)
        losses = [entry["kd_loss"] for entry in logged(tmp_path / name) if "kd_loss" in entry]
        assert sum(losses[-5:]) < share * sum(losses[:5]), name
        assert report.metrics["eval_loss"] < report.metrics["eval_loss_before"]
        assert any("one by one: it has a prefix" in note for note in report.notes) is (name == "prefix")


def test_answers_are_drawn_by_the_models_own_shares(tiny_gguf):
    """First tokens of many texts against softmax(logits / temperature), by chi squared; alone or together the same."""
    model, _ = qgraft.load(tiny_gguf("llama").path)
    prompt = [5, 9, 21, 7]
    rollouts = Rollouts(model, ends=[2], width=40, tokens=512, temperature=0.7)
    asked = [Asked(prompt, 1, seed) for seed in range(1000)]
    first = torch.tensor([answer[0] for answer in rollouts.answers(asked)])
    with torch.no_grad():
        shares = (model(torch.tensor([prompt])).logits[0, -1, :40].double() / 0.7).softmax(-1)
    counts, expected = torch.bincount(first, minlength=40).double(), 1000 * shares
    assert int(first.max()) < 40
    assert float(((counts - expected) ** 2 / expected).sum()) < 39 + 4 * (2 * 39) ** 0.5  # 4 standard deviations
    texts = [Asked(prompt[: n % 3 + 1], 3 + n, n) for n in range(5)]
    together = rollouts.answers(texts)
    assert together == [rollouts.answers([each])[0] for each in texts]
    rollouts.problem = "as if they could not share passes"
    assert rollouts.answers(texts) == together and any(len(answer) > 3 for answer in together)


def test_prompts_end_where_the_last_answer_begins():
    sample = Sample(
        [1, 2, 3, 4, 5, 6, 7], [IGNORED, IGNORED, 3, IGNORED, 5, 6, IGNORED], "row", [0, 0, 1, 0, 0.5, 0.5, 0]
    )
    assert answer_begins(sample) == 4
    grown = longest_samples([sample], 20, DistillOptions(lmbda=0.5, max_new_tokens=5))[0]
    assert grown.input_ids == [1, 2, 3, 4, 5, 6, 7, 5, 6] and grown.weights == [0.0] * 4 + [0.5] * 5
    assert len(longest_samples([sample], 6, DistillOptions(lmbda=1.0, max_new_tokens=5))[0].input_ids) == 6
    assert on_policy._number(1, 2) != on_policy._number(12)


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"teacher_model_name_or_path": None, "teacher_cache": "x"}, "name it in teacher_model_name_or_path"),
     ({"seq_kd": True}, "with lmbda=1 the student draws"), ({"kd_ratio": 0.5}, "kd_ratio: to learn"),
     ({"train_on_prompt": True}, "train_on_prompt"), ({"mask_reasoning": True}, "mask_reasoning"),
     ({"cache_frozen_layers": True}, "cache_frozen_layers"), ({"memory_limit": "4GB"}, "memory_limit"),
     ({"top_p": 0.5}, "temperature=0 takes the likeliest"), ({"lmbda": 1.5}, "lmbda=1.5: expected a number from 0 to 1"),
     ({"stage": "sft", "teacher_model_name_or_path": None}, "lmbda: stage sft has no teacher")],
)  # fmt: skip
def test_options_that_have_no_meaning_are_refused(options, problem, tmp_path):
    defaults = {"stage": "distill", "use_cpu": True, "teacher_model_name_or_path": "teacher.gguf", "lmbda": 1.0}
    with pytest.raises(OptionError, match=problem):
        qgraft.TrainArguments(output_dir=str(tmp_path / "out"), **{**defaults, **options})


@pytest.mark.slow
def test_another_teacher_does_not_go_on_and_none_is_asked_before(tiny_gguf, teacher_adapter, tmp_path):
    run(tiny_gguf, teacher_adapter, tmp_path / "out", lmbda=1.0, max_steps=2)
    other = adapter_of(tiny_gguf, tmp_path / "other", 6)
    with pytest.raises(qgraft.QgraftError, match="teacher"):
        run(tiny_gguf, other, tmp_path / "out", lmbda=1.0, resume_from_checkpoint="true")
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "next"), use_cpu=True, stage="distill", lmbda=0.5,
                                 teacher_model_name_or_path=str(tiny_gguf("llama").path))  # fmt: skip
    with pytest.raises(OptionError, match="drawn answers are judged in training"):
        distill(model, tokenizer, ROWS, args)
