"""Stage distill in whole runs: what is kept of a teacher, what is refused, and that students come nearer to it."""

import json

import pytest
import torch
import torch.nn.functional as F

import qgraft
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.cli.main import main
from qgraft.data.tokenizing import IGNORED
from qgraft.errors import CheckpointError, OptionError, StorageError
from qgraft.training.distill import distill
from qgraft.training.teacher_cache import ABOUT, TEACHER

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 5} of {i % 3}"} for i in range(12)]
BLOCK = "00001.safetensors"


@pytest.fixture(scope="module")
def adapter(tiny_gguf, tmp_path_factory):
    """Folder of an adapter that makes the tiny model say quite other things."""
    model, _ = qgraft.load(tiny_gguf("llama").path)
    attach_lora(model, r=4, lora_alpha=32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in find_adapter(model, "default").parts.values():
            part.lora_B.normal_(0, 0.05, generator=generator)
    folder = tmp_path_factory.mktemp("teacher") / "adapter"
    qgraft.save_adapter(model, folder)
    return folder


def arguments(tiny_gguf, adapter, folder, **options):
    path = str(tiny_gguf("llama").path)
    defaults = {"max_steps": 6, "per_device_train_batch_size": 3, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
                "plot_loss": False, "learning_rate": 1e-2, "r": 2, "stage": "distill", "loss_top_k": 16, "compute": "float32",
                "teacher_model_name_or_path": path, "teacher_adapter_name_or_path": adapter and str(adapter)}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})


def tokens_of(tiny_gguf) -> list[str]:
    """Of the tiny model's vocabulary, by their ids."""
    return [
        token for token, _ in sorted(qgraft.load(tiny_gguf("llama").path)[1].get_vocab().items(), key=lambda x: x[1])
    ]


def padded(tiny_gguf, rows: int) -> dict:
    """Options of a file whose embedding has so many rows more, named as converters name them."""
    tokens = tokens_of(tiny_gguf)
    words, special = len(tokens), 3
    tokens += [f"[PAD{words + n}]" for n in range(rows)]
    kinds = [*[3] * special, *[1] * (words - special), *[5] * rows]
    return {"config": {"vocab_size": words + rows},
            "metadata": {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}}  # fmt: skip


def run(tiny_gguf, adapter, folder, rows=ROWS, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    args = arguments(tiny_gguf, adapter, folder, **options)
    return model, tokenizer, qgraft.train(model, tokenizer, rows, args)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def apart(model, teacher, samples) -> float:
    """The mean KL(teacher || model) at the labels, by transformers' forward passes, float64."""
    total, count = 0.0, 0
    for sample in samples:
        places = [at - 1 for at, label in enumerate(sample.labels) if at and label != IGNORED]
        with torch.no_grad():
            q, p = (
                each(torch.tensor([sample.input_ids])).logits[0, places].double().log_softmax(-1)
                for each in (model, teacher)
            )
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
        count += len(places)
    return total / count


def teacher_of(tiny_gguf, adapter):
    teacher, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.load_adapter(teacher, adapter)
    return teacher


def samples_of(tokenizer, rows):
    from qgraft.data.reading import read_dataset
    from qgraft.data.tokenizing import build_samples

    conversations, accounting = read_dataset(rows)
    return build_samples(tokenizer, conversations, accounting)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_than_by_the_labels(tiny_gguf, adapter, tmp_path):
    """On rows that neither has seen, by transformers' own logits; and the held-out loss that is logged is that KL."""
    held = [{"instruction": f"another {i}", "output": f"answer {i % 4} of {i % 2}"} for i in range(4)]
    options = {"max_steps": 20, "save_strategy": "no"}
    teacher, found = teacher_of(tiny_gguf, adapter), {}
    for name, more in (("distill", {"eval_strategy": "no"}), ("sft", {"stage": "sft", "loss_top_k": None,
                       "teacher_model_name_or_path": None, "teacher_adapter_name_or_path": None})):  # fmt: skip
        model, tokenizer, _ = run(tiny_gguf, adapter, tmp_path / name, **options, **more)
        found[name] = apart(model, teacher, samples_of(tokenizer, held))
        if name == "distill":
            steps = [entry for entry in logged(tmp_path / name) if "kd_loss" in entry]
            assert steps[-1]["kd_loss"] < 0.7 * steps[0]["kd_loss"]
    with qgraft.adapters_off(model):
        before = apart(model, teacher, samples_of(tokenizer, held))
    assert found["distill"] < 0.7 * before and found["distill"] < 0.7 * found["sft"]


def test_the_held_out_loss_is_the_divergence_from_the_teacher(tiny_gguf, adapter, tmp_path):
    """With all tokens named, whatever shares a pass; and with a share of the labels' loss in it."""
    options = {"loss_top_k": 10**6, "max_steps": 1, "eval_strategy": "epoch", "save_strategy": "no"}
    for tokens, share in ((1, 1.0), (4096, 0.25)):
        folder = tmp_path / str(tokens)
        model, tokenizer = qgraft.load(tiny_gguf("llama").path)
        args = arguments(tiny_gguf, adapter, folder, max_tokens_per_pass=tokens, kd_ratio=share, **options)
        qgraft.train(model, tokenizer, ROWS[4:], args, eval_dataset=ROWS[:4])
        samples, before = samples_of(tokenizer, ROWS[:4]), logged(folder)[0]
        with qgraft.adapters_off(model):
            expected = apart(model, teacher_of(tiny_gguf, adapter), samples)
            nll = qgraft.evaluate(model, tokenizer, ROWS[:4]).loss
        assert before["eval_kd_loss"] == pytest.approx(expected, rel=1e-4)
        assert before["eval_nll_loss"] == pytest.approx(nll, rel=1e-5)
        assert before["eval_loss"] == pytest.approx(share * expected + (1 - share) * nll, rel=1e-4)


def test_a_teacher_is_asked_once(tiny_gguf, adapter, tmp_path, monkeypatch):
    """A whole run, killed or not, a second one beside it, and one that has the cache alone."""
    from qgraft.training import teacher

    monkeypatch.setattr(teacher, "BLOCK_LABELS", 40)
    asked, original = [], teacher.likeliest

    def counted(states, *rest, **named):
        asked.append(len(states))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return original(states, *rest, **named)

    monkeypatch.setattr(teacher, "likeliest", counted)
    stop, options = 3, {"max_steps": 1, "save_strategy": "no"}
    cache = tmp_path / "out" / TEACHER
    with pytest.raises(KeyboardInterrupt):
        run(tiny_gguf, adapter, tmp_path / "out", **options)
    kept = sorted(path.name for path in cache.glob("*.safetensors"))
    assert len(kept) == 2 and (cache / ABOUT).is_file()
    stop = 0
    _, tokenizer, report = run(tiny_gguf, adapter, tmp_path / "out", **options)
    labels = sum(label != IGNORED for each in samples_of(tokenizer, ROWS) for label in each.labels[1:])
    assert sum(asked) - asked[2] == labels
    assert any("16 of" in note and f"{labels} labels" in note for note in report.notes)
    asked.clear()
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    alone = {"teacher_model_name_or_path": None, "teacher_cache": str(cache)}
    run(tiny_gguf, None, tmp_path / "again", **options, **alone)
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == first and not asked
    path = cache / kept[0]
    broken = bytearray(path.read_bytes())
    broken[-1] ^= 1
    path.write_bytes(broken)
    with pytest.raises(OptionError, match=r"1 of .* blocks are missing or damaged"):
        run(tiny_gguf, None, tmp_path / "third", **options, **alone)
    run(tiny_gguf, adapter, tmp_path / "third", **options, teacher_cache=str(cache))
    assert 0 < sum(asked) < labels
    assert (tmp_path / "third" / "adapter_model.safetensors").read_bytes() == first


def test_a_cache_of_anything_else_is_refused(tiny_gguf, adapter, tmp_path):
    options = {"max_steps": 1, "save_strategy": "no"}
    run(tiny_gguf, adapter, tmp_path / "out", **options)
    named = {**options, "teacher_cache": str(tmp_path / "out" / TEACHER)}
    for other, said in (({"rows": ROWS[1:]}, "rows"), ({"kd_temperature": 2.0}, "kd_temperature: was 1.0, now 2.0"),
                        ({"loss_top_k": 3}, "loss_top_k"),
                        ({"teacher_adapter_name_or_path": None},
                         r"teacher_adapter: was teacher \([0-9a-f]{12}\), now none\n")):  # fmt: skip
        with pytest.raises(StorageError, match=said) as error:
            run(tiny_gguf, adapter, tmp_path / "next", **{**named, **other})
        assert "teacher_cache=" in error.value.hint
    with pytest.raises(StorageError, match="of another teacher"):
        run(tiny_gguf, adapter, tmp_path / "next", **named, rows=ROWS[1:], overwrite_output_dir=True)
    run(tiny_gguf, adapter, tmp_path / "out", rows=ROWS[1:], **options, overwrite_output_dir=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not empty, and no teacher's"):
        run(tiny_gguf, adapter, tmp_path / "next", **{**named, "teacher_cache": str(tmp_path / "other")})


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bytes(tiny_gguf, adapter, tmp_path):
    options = {"lora_dropout": 0.3, "beta": 0.5, "kd_ratio": 0.5, "kd_temperature": 2.0}
    run(tiny_gguf, adapter, tmp_path / "whole", **options)
    run(tiny_gguf, adapter, tmp_path / "part", **options)
    qgraft.training.checkpoints.storage.remove_folder(tmp_path / "part" / "checkpoint-6")
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    *_, report = run(tiny_gguf, adapter, tmp_path / "part", **options, resume_from_checkpoint="true")
    assert report.finished and report.steps == 6
    whole, part = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()
    qgraft.training.checkpoints.storage.remove_folder(tmp_path / "part" / "checkpoint-6")
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    qgraft.training.checkpoints.storage.remove_folder(tmp_path / "part" / TEACHER)
    with pytest.raises(CheckpointError, match="teacher"):
        run(tiny_gguf, None, tmp_path / "part", **options, resume_from_checkpoint="true")


def test_a_larger_teacher_with_other_padding(tiny_gguf, tmp_path):
    """They are compared over the ids that both have, whichever has more."""
    larger = {"num_hidden_layers": 3, "hidden_size": 96, "head_dim": 24}
    words = tiny_gguf("llama").model.config.vocab_size
    options = padded(tiny_gguf, 8)
    teacher = tiny_gguf("llama", config={**options["config"], **larger}, metadata=options["metadata"], seed=3)
    student = tiny_gguf("llama")
    for one, other in ((student, teacher), (teacher, student)):
        model, tokenizer = qgraft.load(one.path)
        args = arguments(tiny_gguf, None, tmp_path / other.path.parent.name, teacher_model_name_or_path=str(other.path),
                         loss_top_k=10**6, max_steps=1, save_strategy="no")  # fmt: skip
        qgraft.train(model, tokenizer, ROWS[:6], args, eval_dataset=ROWS[:3])
        samples = samples_of(tokenizer, ROWS[:3])
        total = count = 0.0
        with torch.no_grad():
            for sample in samples:
                places = [at - 1 for at, label in enumerate(sample.labels) if at and label != IGNORED]
                q, p = (each.model(torch.tensor([sample.input_ids])).logits[0, places, :words].double().log_softmax(-1)
                        for each in (one, other))  # fmt: skip
                total, count = total + float(F.kl_div(q, p, reduction="sum", log_target=True)), count + len(places)
        assert logged(tmp_path / other.path.parent.name)[0]["eval_kd_loss"] == pytest.approx(total / count, rel=1e-3)


def test_a_teacher_that_reads_other_ids_is_refused(tiny_gguf, tmp_path):
    tokens = tokens_of(tiny_gguf)
    at = tokens.index("Q")
    tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
    swapped = tiny_gguf("llama", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(OptionError, match=rf"2 of .* ids mean other tokens: {at} is 'Q' and 'R', {at + 1} is") as error:
        run(tiny_gguf, None, tmp_path / "out", teacher_model_name_or_path=str(swapped.path))
    assert "same family" in error.value.hint
    other = qgraft.load(tiny_gguf("llama").path)[1].chat_template.replace("m.role }}\n", "m.role }} ")
    half = tiny_gguf("llama", metadata={"tokenizer.chat_template": other})
    with pytest.raises(OptionError, match=r"teacher .*: no sample is left: read 12 rows"):
        run(tiny_gguf, None, tmp_path / "out", teacher_model_name_or_path=str(half.path))
    said = tiny_gguf("llama", metadata={"tokenizer.chat_template": other.replace("assistant\n", "assistant ")})
    with pytest.raises(OptionError, match=r"reads other ids than the student: rows:1, token \d+: 'Ċ' and 'Ġ'") as error:
        run(tiny_gguf, None, tmp_path / "out", teacher_model_name_or_path=str(said.path))
    assert "template='chatml'" in error.value.hint
    run(tiny_gguf, None, tmp_path / "out", teacher_model_name_or_path=str(said.path), template="chatml", max_steps=1)
    short = tiny_gguf("llama", metadata={"llama.context_length": 16})
    with pytest.raises(OptionError, match="its context is 16 tokens, and the longest sample has") as error:
        run(tiny_gguf, None, tmp_path / "next", teacher_model_name_or_path=str(short.path))
    assert error.value.hint == "max_length=16"


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"teacher_model_name_or_path": None}, "needs a teacher"),
     ({"teacher_model_name_or_path": None, "teacher_adapter_name_or_path": "x"}, "of which model"),
     ({"stage": "sft"}, "stage sft has no teacher"), ({"loss_type": "ipo"}, "loss_type: it is of preferences"),
     ({"beta": 1.5}, "beta=1.5: expected a number from 0"), ({"beta": -0.1}, "beta=-0.1"),
     ({"kd_ratio": 0.0}, "kd_ratio=0.0"),
     ({"temperature": 2.0}, "kd_temperature is the loss's"), ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
     ({"cuda_graphs": "yes"}, "cuda_graphs=yes"), ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
     ({"do_eval": True, "eval_dataset": "x.jsonl"}, "do_eval without do_train")],
)  # fmt: skip
def test_options_that_have_no_meaning_are_refused(options, problem, tmp_path):
    defaults = {"stage": "distill", "use_cpu": True, "teacher_model_name_or_path": "teacher.gguf"}
    with pytest.raises(qgraft.QgraftError, match=problem):
        qgraft.TrainArguments(output_dir=str(tmp_path / "out"), **{**defaults, **options})


def test_what_is_not_there_is_said(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    with pytest.raises(OptionError, match="a training"):
        qgraft.evaluate(model, tokenizer, ROWS, stage="distill")
    with pytest.raises(OptionError, match="stage='sft': nothing is learned of a teacher"):
        distill(model, tokenizer, ROWS, qgraft.TrainArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(OptionError, match="memory_limit 4GB: it is of the student alone"):
        run(tiny_gguf, None, tmp_path / "out", memory_limit="4GB")


def test_the_command_asks_and_training_takes_it(tiny_gguf, adapter, tmp_path, capsys):
    path, rows = str(tiny_gguf("llama").path), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = ["--model", path, "--train_file", str(rows), "--output_dir", str(tmp_path / "out"), "--use_cpu",
              "--max_steps", "1", "--plot_loss", "false"]  # fmt: skip
    teacher = ["--teacher", path, "--teacher_adapter", str(adapter)]
    assert main(["distill", *common, *teacher]) == 0
    said = capsys.readouterr()
    assert f"what the teacher says is in {tmp_path / 'out' / TEACHER}" in said.out
    assert "the teacher names 64 of" in said.err
    assert [each.name for each in (tmp_path / "out").iterdir()] == [TEACHER]
    cache = ["--teacher_cache", str(tmp_path / "out" / TEACHER)]
    assert main(["train", "--stage", "distill", *common, *cache, "--memory_limit", "8GB"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(["distill", *common, *teacher, "--adapter", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["distill", *common[2:], *teacher]) == 2 and main(["distill", *common[:4], *teacher]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_chatglm_learns_of_itself(generation, tiny_chatglm, tmp_path):
    """A teacher that is the student says nothing new; its tokenizer writes samples without a template."""
    folder = tiny_chatglm(generation)
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path), stage="distill", teacher_model_name_or_path=str(folder), max_steps=2, use_cpu=True,
        compute="float32", val_size=2, plot_loss=False, loss_top_k=9,
    )  # fmt: skip
    report = qgraft.train(*qgraft.load(folder), ROWS, args)
    assert report.metrics["eval_loss_before"] == pytest.approx(0, abs=1e-5)
    assert report.metrics["eval_nll_loss"] > 1


@pytest.mark.slow
def test_prefixes_frozen_layers_and_rate_searches(tiny_gguf, adapter, tmp_path):
    *_, report = run(tiny_gguf, adapter, tmp_path / "prefix", pre_seq_len=4, max_steps=30, learning_rate=3e-2,
                     val_size=4, prefix_dropout=0)  # fmt: skip
    assert report.metrics["eval_loss"] < report.metrics["eval_loss_before"]
    found = [run(tiny_gguf, adapter, tmp_path / str(kept), layers_to_transform="1", cache_frozen_layers=kept)[2].metrics
             for kept in (False, True)]  # fmt: skip
    assert found[0]["train_loss"] == pytest.approx(found[1]["train_loss"], rel=1e-4)
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    rates = qgraft.find_lr(model, tokenizer, ROWS, arguments(tiny_gguf, adapter, tmp_path / "rates"))
    assert len(rates.rates) > 5 and (tmp_path / "rates" / TEACHER / ABOUT).is_file()
    *_, report = run(tiny_gguf, adapter, tmp_path / "rates", learning_rate=1e-2)
    assert report.finished
