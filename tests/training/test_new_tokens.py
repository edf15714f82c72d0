"""New tokens from the options of a run to the files of an adapter, PEFT and a merged model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

import qgraft
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.base import base_of, find_adapter
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.data.new_tokens import NewToken, check_new_tokens, read_texts
from qgraft.errors import AdapterError, DataError, MergeError, OptionError, UnsupportedError
from qgraft.jobs.train import check_jobs
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampling

Maker = Callable[..., Any]
ROWS = [{"instruction": "call", "output": "<tool> ab </tool>"}, {"instruction": "who", "output": "<tool>b</tool>"}] * 5
TEXT = "<tool> ab</tool>x"


def arguments(folder: Path, **options: Any) -> qgraft.TrainArguments:
    given = {"add_tokens": ["</tool>"], "add_special_tokens": ["<tool>"], "max_steps": 2, "learning_rate": 1e-2}
    given |= {"save_strategy": "no", **options}
    return qgraft.TrainArguments(
        output_dir=str(folder), r=2, target_modules="q_proj", use_cpu=True, plot_loss=False, **given
    )


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits[0]


@pytest.fixture(scope="session")
def trained(
    tiny_gguf: Maker, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Path, Tensor, Tensor]]:
    """(file and float model, the adapter's folder, ids of TEXT, their logits), by architecture; trained once a session."""
    made: dict[str, Any] = {}

    def get(architecture: str = "llama") -> tuple[Any, Path, Tensor, Tensor]:
        if architecture not in made:
            tiny = tiny_gguf(architecture, tied=architecture == "qwen2")
            folder = tmp_path_factory.mktemp("run") / "adapter"
            model, tokenizer = qgraft.load(tiny.path, device="cpu")
            report = qgraft.train(model, tokenizer, ROWS, arguments(folder, trainable_token_indices=[7]))
            assert "2 new tokens, the first is '</tool>', 294" in "\n".join(report.notes)
            ids = tokenizer(TEXT, return_tensors="pt").input_ids
            made[architecture] = tiny, folder, ids, logits(model, ids)
        return made[architecture]

    return get


CASES = ["qwen2", pytest.param("llama", marks=pytest.mark.slow)]


@pytest.mark.parametrize("architecture", CASES)
def test_the_files_are_read_by_peft_transformers_and_qgraft(trained: Any, architecture: str) -> None:
    tiny, folder, ids, expected = trained(architecture)
    model, tokenizer = qgraft.load(tiny.path, device="cpu")
    assert tokenizer(TEXT).input_ids != ids[0].tolist()
    assert "rows of 3 tokens" in str(qgraft.load_adapter(model, folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).input_ids == theirs(TEXT).input_ids == ids[0].tolist()
    assert (
        tokenizer.decode(ids[0], skip_special_tokens=True)
        == theirs.decode(ids[0], skip_special_tokens=True)
        == " ab</tool>x"
    )
    assert logits(model, ids).equal(expected)
    base = copy.deepcopy(tiny.model).eval()
    base.resize_token_embeddings(len(theirs), mean_resizing=False)
    got = logits(peft.PeftModel.from_pretrained(base, folder), ids)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    with pytest.raises(AdapterError, match=r"the tokenizer gives 295 next|is '</tool>' for the adapter and '<other>'"):
        other, words = qgraft.load(tiny.path, device="cpu")
        words.add_tokens(["<other>"])
        qgraft.load_adapter(other, folder)
    (folder / "tokenizer.json").write_bytes(changed := (folder / "tokenizer.json").read_bytes() + b" ")
    try:
        with pytest.raises(AdapterError, match=r"changed since it was saved:\n  tokenizer\.json"):
            qgraft.load_adapter(qgraft.load(tiny.path, device="cpu")[0], folder)
    finally:
        (folder / "tokenizer.json").write_bytes(changed[:-1])


@pytest.mark.parametrize("architecture", CASES)
def test_a_merged_file_has_the_tokens(trained: Any, tmp_path: Path, architecture: str) -> None:
    tiny, folder, ids, expected = trained(architecture)
    model, _ = qgraft.load(tiny.path, device="cpu")
    qgraft.load_adapter(model, folder)
    with pytest.raises(MergeError):
        qgraft.merge(model, method="nearest", min_retained=1.0, eval_dataset=ROWS * 2, progress=False)
    assert logits(model, ids).equal(expected)  # nothing was changed
    report = qgraft.merge(model, method="nearest", min_retained=-1e9, progress=False)
    assert "rows of 3 tokens are written into model.embed_tokens in q8_0" in " ".join(report.notes)
    assert float((logits(model, ids) - expected).abs().max()) < 0.1 * float(expected.abs().max())
    merged = tmp_path / "merged.gguf"
    qgraft.save(model, merged)
    again, words = qgraft.load(merged, device="cpu")
    assert words(TEXT).input_ids == ids[0].tolist()
    assert logits(again, ids).equal(logits(model, ids))
    assert base_of(again).info.fingerprint == base_of(model).info.fingerprint
    _check_file(tiny.path, merged)
    qgraft.unmerge(model)
    assert logits(model, ids).equal(expected)
    qgraft.detach_adapter(model)
    qgraft.save(model, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == tiny.path.read_bytes()


def _check_file(before: Path, after: Path) -> None:
    """By the gguf package: two rows more, all other rows and all other keys as they were."""
    old, new = gguf.GGUFReader(before), gguf.GGUFReader(after)
    tensors = {tensor.name: tensor for tensor in old.tensors}
    for tensor in new.tensors:
        if tensor.name in ("token_embd.weight", "output.weight"):
            was, kept = tensors[tensor.name].data, np.arange(len(tensors[tensor.name].data)) != 7
            assert len(tensor.data) == len(was) + 2
            assert tensor.tensor_type == tensors[tensor.name].tensor_type
            assert np.array_equal(tensor.data[: len(was)][kept], was[kept])
    fields = {name: field.contents() for name, field in new.fields.items() if not name.startswith("GGUF.")}
    changed = {name for name, value in fields.items() if name not in old.fields or old.fields[name].contents() != value}
    sizes = {name for name in changed if name.endswith(".vocab_size")}
    assert changed - sizes <= {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"}
    assert all(fields[name] == len(fields["tokenizer.ggml.tokens"]) for name in sizes)
    assert fields["tokenizer.ggml.tokens"][-2:] == ["</tool>", "<tool>"]
    assert fields["tokenizer.ggml.token_type"][-2:] == [4, 3]  # user-defined, control
    assert len(fields["tokenizer.ggml.token_type"]) == len(fields["tokenizer.ggml.tokens"])


def test_what_is_no_lora_is_not_dropped(trained: Any, tmp_path: Path) -> None:
    tiny, folder, ids, _ = trained()
    model, tokenizer = qgraft.load(tiny.path, device="cpu")
    qgraft.load_adapter(model, folder)
    for attempt in (
        lambda: combine_files({folder: 1.0}, tmp_path / "combined"),
        lambda: export_gguf_lora(model, tmp_path / "x.gguf"),
        lambda: qgraft.combine(model, {"default": 1.0}, "c"),
    ):
        with pytest.raises(UnsupportedError, match="rows of single tokens"):
            attempt()
    engine = Engine(model, tokenizer)
    prompt, greedy = tuple(ids[0].tolist()), Sampling(temperature=0)
    mine, base = answer_all(
        engine, [Request(prompt, {"default": 1.0}, greedy, max_tokens=4), Request((3, 4), {}, greedy, max_tokens=4)]
    )
    with pytest.raises(DataError, match="new tokens of another adapter"):
        answer_all(engine, [Request(prompt, {}, greedy, max_tokens=4)])
    engine.stop()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
    assert [token.id for token in mine["tokens"]] == expected[: len(mine["tokens"])]
    with qgraft.adapters_off(model):
        expected = model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False)[0, 2:].tolist()
    assert [token.id for token in base["tokens"]] == expected[: len(base["tokens"])]


def test_rows_begin_with_the_mean_of_their_pieces(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama")
    model, tokenizer = qgraft.load(tiny.path, device="cpu")
    pieces = tokenizer("<tool>", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    words = tmp_path / "words.txt"
    words.write_text("<tool>\n\n</tool>\n")
    qgraft.train(
        model,
        tokenizer,
        ROWS,
        arguments(tmp_path / "a", add_tokens=[str(words)], add_special_tokens=None, learning_rate=0.0),
    )
    for path, table in (("model.embed_tokens", tiny.model.model.embed_tokens), ("lm_head", tiny.model.lm_head)):
        rows = find_adapter(model).parts[path].rows.detach()
        torch.testing.assert_close(rows[0], table.weight[pieces].mean(0).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(OptionError, match="it has no rows of the tokens 296"):
        qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "b", add_tokens=["<more>"], add_special_tokens=None))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tiny_gguf: Maker, tmp_path: Path) -> None:
    """From a checkpoint, with a tokenizer that knows nothing of it, to the bytes of a run that was not stopped."""
    results = []
    for folder, steps in ((tmp_path / "a", [4]), (tmp_path / "b", [2, 4])):
        for most in steps:
            model, tokenizer = qgraft.load(tiny_gguf("qwen2", tied=True).path, device="cpu")
            options = {"resume_from_checkpoint": str(folder / "checkpoint-2")} if steps.index(most) else {}
            args = arguments(
                folder, max_steps=most, lr_scheduler_type="constant", save_strategy="steps", save_steps=2, **options
            )
            qgraft.train(model, tokenizer, ROWS, args)
        results.append((folder / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_tokens_that_cannot_be_are_refused(tiny_gguf: Maker, tmp_path: Path) -> None:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(OptionError, match=match):
            qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "x", **options))

    refused("'a' is a token already", add_tokens=["a"])
    refused("both name '<x>'", add_tokens=["<x>"], add_special_tokens=["<x>"])
    refused("'<x>' is there twice", add_tokens=["<x>", "<x>"])
    refused("the file of tokens cannot be read", add_tokens=[str(tmp_path / "none.txt")])
    refused("cannot be a token", add_tokens=[" "])
    refused("expected token ids", trainable_token_indices={"lm_head": ["a"]})
    refused("a prefix has no rows", finetuning_type="p_tuning")
    for ids in ([294], {"lm_head": [5, 400]}):
        refused("expected ids of tokens that are there, 0 to 293", trainable_token_indices=ids, add_tokens=None,
                add_special_tokens=None)  # fmt: skip
    with pytest.raises(UnsupportedError, match="stage=dpo with new tokens: the base"):
        qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "x", stage="dpo"))
    with pytest.raises(OptionError, match="rows of tokens are for a run alone"):
        check_jobs([arguments(tmp_path / "a"), arguments(tmp_path / "b")])
    assert len(tokenizer) == 294
    (tmp_path / "words.json").write_text(json.dumps(["<a>", "b, c"]))
    assert read_texts("add_tokens", [str(tmp_path / "words.json"), "<d>"]) == ["<a>", "b, c", "<d>"]
    with pytest.raises(AdapterError, match="the ids \\[295\\], and the tokenizer gives 294 next"):
        check_new_tokens(tokenizer, [NewToken("<x>", 295)])


def test_a_student_learns_to_write_its_new_tokens(trained: Any, tmp_path: Path) -> None:
    tiny, folder, *_ = trained()
    model, tokenizer = qgraft.load(tiny.path, device="cpu")
    pieces = tokenizer("<tool>", add_special_tokens=False).input_ids
    teacher = {"teacher_model_name_or_path": str(tiny.path), "teacher_adapter_name_or_path": str(folder)}
    qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "student", stage="distill", **teacher))
    head = find_adapter(model).parts["lm_head"]
    row = head.rows.detach()[head.config.token_indices.index(tokenizer.convert_tokens_to_ids("<tool>"))]
    assert (row - tiny.model.lm_head.weight[pieces].mean(0)).abs().max() > 1e-3


def make_folder(folder: Path, rows: int, tokenizer: Any) -> Path:
    """A float model whose table has so many rows, with a tokenizer of 294 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.spread(1)
@pytest.mark.parametrize("rows", [295, 294, 300])
def test_rows_that_no_token_has_are_used_first(tiny_gguf: Maker, tmp_path: Path, rows: int) -> None:
    tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")[1]
    model, tokenizer = qgraft.load(make_folder(tmp_path / "base", rows, tokenizer), device="cpu")
    report = qgraft.train(model, tokenizer, ROWS, arguments(tmp_path / "a", save_calibration=False))
    within = min(2, rows - 294)
    assert (f"{within} in rows of the table that no token had" in " ".join(report.notes)) == (within > 0)
    assert model.config.vocab_size == max(rows, 296)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = logits(model, ids)
    qgraft.merge(model, method="nearest", min_retained=-1e9, progress=False)
    qgraft.save(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.config.vocab_size == max(rows, 296)
    assert torch.allclose(logits(theirs, ids), expected, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT).input_ids == ids[0].tolist()
    qgraft.save(model, tmp_path / "merged.gguf")
    again, words = qgraft.load(tmp_path / "merged.gguf", device="cpu")
    assert words(TEXT).input_ids == ids[0].tolist()
    assert torch.allclose(logits(again, ids), expected, atol=1e-5)
    assert len(read_gguf(tmp_path / "merged.gguf").metadata["tokenizer.ggml.tokens"]) == max(rows, 296)
