"""T5 in GGUF files against transformers' model of the same weights and PEFT: read, trained, merged, saved, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from tiny_pairs import KINDS as FOLDERS
from tiny_pairs import write_t5_gguf

import qgraft
from qgraft.adapters.targets import lora_layers
from qgraft.checkpoints.gguf_from_folder import why_not_gguf
from qgraft.cli.main import main
from qgraft.errors import CheckpointError, QgraftError, UnsupportedError
from qgraft.linear import QuantizedLinear
from qgraft.merging.merge import merge
from qgraft.serving.answering import answer
from qgraft.training.padded import Padded
from qgraft.training.predict import predict

PACKED = (Q.Q8_0, Q.Q4_1, Q.Q5_0, Q.F16)
WORDS = [("good", "positive"), ("bad and slow", "negative"), ("great", "positive"), ("awful", "negative")]
ROWS = [{"instruction": f"the service was {word}{' and good' * (n % 3)}", "output": label}
        for n, (word, label) in enumerate(WORDS * 3)]  # fmt: skip


@pytest.fixture(scope="session")
def t5_file(tmp_path_factory) -> Callable[..., Any]:
    """(path, transformers' model of its weights), made once for each kind and types; neither is to be changed."""
    made: dict[Any, Any] = {}

    def get(kind: str = "t5", types: tuple[Q, ...] = PACKED, **options: Any) -> Any:
        key = (kind, types, tuple(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(kind) / "tiny.gguf"
            made[key] = SimpleNamespace(path=path, model=write_t5_gguf(path, kind, types, **options))
        return made[key]

    return get


def inputs() -> dict[str, torch.Tensor]:
    """Two sources, one of them padded and one longer than the distances that have a bucket of their own."""
    ids, mask = torch.randint(3, 60, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 30:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 60, (2, 7))}


@torch.no_grad()
def apart(one: Any, other: Any) -> float:
    given = inputs()
    expected = other(**given).logits
    return float((one(**given).logits - expected).abs().max() / expected.abs().max())


KINDS = ["t5", "umt5", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5-untied", "mt5", "umt5-untied"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_computes_what_transformers_does(t5_file, kind: str) -> None:
    """Logits, and what generate() writes; all linear layers packed, in both halves; the encoder deeper than the decoder."""
    made = t5_file(kind, num_decoder_layers=1)
    model, tokenizer = qgraft.load(made.path)
    assert apart(model, made.model) <= 1e-5
    packed = {path: each for path, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    assert len(packed) == sum(isinstance(each, torch.nn.Linear) for each in made.model.modules())
    assert {"q8_0", "q4_1", "q5_0"} <= {each.packed.format for each in packed.values()}
    ids = tokenizer("the service was good", return_tensors="pt")
    told = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**ids, **told), made.model.generate(**ids, **told))
    assert model.qgraft.info.architecture == ("umt5" if "umt5" in kind else "t5") and not model.qgraft.info.notes


@pytest.mark.slow
def test_every_weight_moves_the_logits(t5_file) -> None:
    """Without this, equal logits would prove little."""
    made = t5_file("umt5-untied")
    model, _ = qgraft.load(made.path)
    torch.manual_seed(3)
    given = inputs()
    with torch.no_grad():
        before = model(**given).logits
        for name, parameter in made.model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(kept.roll(1, 0))
            moved = float((made.model(**given).logits - before).abs().max())
            parameter.copy_(kept)
            assert moved > 1e-3, name


@pytest.mark.slow
def test_a_tied_output_that_is_stored_twice_is_scaled(tmp_path: Path) -> None:
    """As some converters write T5's first release: in another format, even; an output of its own is not scaled."""
    model = write_t5_gguf(tmp_path / "once.gguf", "t5")
    twice = gguf.quants.quantize(model.shared.weight.numpy(), Q.Q8_0)
    tied = {"output.weight": model.shared.weight.numpy()}
    write_t5_gguf(tmp_path / "twice.gguf", "t5", extra=tied)
    assert apart(qgraft.load(tmp_path / "twice.gguf")[0], model) <= 1e-5
    write_t5_gguf(
        tmp_path / "rounded.gguf", "t5", extra={"output.weight": np.array(gguf.quants.dequantize(twice, Q.Q8_0))}
    )
    assert apart(qgraft.load(tmp_path / "rounded.gguf")[0], model) <= 0.05
    own = {"output.weight": np.random.default_rng(0).standard_normal((160, 32), np.float32)}
    write_t5_gguf(tmp_path / "own.gguf", "t5", extra=own)
    assert not qgraft.load(tmp_path / "own.gguf")[0].config.scale_decoder_outputs


def test_an_unchanged_file_is_saved_as_it_is_and_a_merged_one_read_again(t5_file, tmp_path: Path) -> None:
    """nearest on floats loses nothing; in packed layers every method keeps the format and the file's other bytes."""
    made = t5_file("t5")
    model, tokenizer = qgraft.load(made.path)
    qgraft.save(model, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == made.path.read_bytes()
    put_lora(model)
    given = inputs()
    with torch.no_grad():
        adapted = model(**given).logits
    with pytest.raises(UnsupportedError, match="nearest"):
        merge(model, tokenizer)
    merge(model, tokenizer, method="nearest", to="f16")
    qgraft.save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf")
    with torch.no_grad():
        assert float((again(**given).logits - adapted).abs().max() / adapted.abs().max()) < 1e-2
    assert apart(again, made.model) > 0.05
    qgraft.unmerge(model)
    merge(model, tokenizer, method="grid")
    qgraft.save(model, tmp_path / "grid.gguf")
    assert (tmp_path / "grid.gguf").stat().st_size == made.path.stat().st_size
    assert apart(qgraft.load(tmp_path / "grid.gguf")[0], model) == 0 and apart(model, made.model) > 0.02


@pytest.mark.slow
def test_an_exact_lora_is_merged_without_loss(t5_file, tmp_path: Path) -> None:
    made = t5_file("t5", (Q.Q4_1,))
    model, tokenizer = qgraft.load(made.path)
    qgraft.attach_lora(model, exact=True)
    for _, layer in lora_layers(model):
        for each in layer.loras["default"].parameters():
            torch.nn.init.normal_(each, std=0.02)
    torch.manual_seed(0)
    given = inputs()
    with torch.no_grad():
        adapted = model(**given).logits
    merge(model, tokenizer)
    qgraft.save(model, tmp_path / "merged.gguf")
    with torch.no_grad():
        merged = qgraft.load(tmp_path / "merged.gguf")[0](**given).logits
    assert float((merged - adapted).abs().max() / adapted.abs().max()) < 5e-3  # minimums are float16
    assert apart(model, made.model) > 2e-2


def put_lora(model: Any) -> None:
    qgraft.attach_lora(model, 4, 8)
    torch.manual_seed(1)
    for _, layer in lora_layers(model):
        for each in layer.loras["default"].parameters():
            torch.nn.init.normal_(each, std=0.1)


@pytest.mark.slow
def test_a_run_is_that_of_peft_on_the_dequantized_weights(t5_file, tmp_path: Path, monkeypatch) -> None:
    """20 steps on packed weights: PEFT's losses on the floats that they mean; PEFT reads the adapter, and answers alike."""
    made, batches, own = t5_file("t5"), [], Padded.batches
    monkeypatch.setattr(Padded, "batches", lambda self, rows, tokens: batches.append(rows) or own(self, rows, tokens))
    model, tokenizer = qgraft.load(made.path)
    assert model.config.dropout_rate == 0.1  # T5's, which no key states
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    qgraft.attach_lora(model, 4, 8, target_modules="q,v")
    qgraft.save_adapter(model, tmp_path / "start")
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path / "out"), max_steps=20, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        plot_loss=False, save_strategy="no", compute="float32", learning_rate=1e-2, r=4, lora_alpha=8,
        target_modules="q,v", max_new_tokens=6, do_predict=True,
    )  # fmt: skip
    qgraft.train(model, tokenizer, ROWS, args)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]

    made.model.save_pretrained(tmp_path / "floats")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "floats")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    trained = [each for each in theirs.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 20)
    collate, expected = transformers.DataCollatorForSeq2Seq(tokenizer, model=base), []
    for rows in batches:
        theirs.train()
        given = [{"input_ids": e.input_ids, "attention_mask": [1] * len(e.input_ids), "labels": e.labels} for e in rows]
        loss = theirs(**collate(given)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5) and len(losses) == 20 and losses[-1] < losses[0] - 0.1
    read = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "floats"), tmp_path / "out"
    ).eval()
    assert apart(read, model) <= 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"

    pytest.importorskip("rouge_chinese")
    found, texts = predict(model, tokenizer, ROWS[:4], args), []
    for row in ROWS[:4]:
        ids = read.generate(**tokenizer(row["instruction"], return_tensors="pt"), max_new_tokens=6)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert [text for _, text in found.pairs] == texts
    assert answer(model, tokenizer, [("user", ROWS[0]["instruction"])], max_new_tokens=6).text.strip() == texts[0]


START, BUCKETS = "t5.decoder_start_token_id", "t5.attention.relative_buckets_count"
BROKEN = {  # what the file has -> (its keys, tensors it lacks, the error, what it says)
    "no start": ({START: None}, (), CheckpointError, r"decoder_start_token_id: got None, expected the id"),
    "a start outside": ({START: 160}, (), CheckpointError, r"decoder_start_token_id: got 160, expected the id"),
    "no buckets": ({BUCKETS: None}, (), CheckpointError, r"relative_buckets_count: got None"),
    "other buckets": ({BUCKETS: 16}, (), CheckpointError, r"relative_attention_bias\.weight: got shape \[32, 4\]"),
    "too many layers": ({"t5.decoder_block_count": 3}, (), CheckpointError, "an integer from 1 to 2"),
    "a deep decoder": ({"t5.block_count": 1}, (), CheckpointError, "decoder_block_count: got 2, .* from 1 to 1"),
    "too few layers": ({"t5.decoder_block_count": 1}, (), CheckpointError, r"have no place .* dec\.blk\.1\."),
    "no bias": ({}, ("enc.blk.0.attn_rel_b.weight",), CheckpointError, "missing encoder.block.0.*relative_attention_bias"),
    "no table": ({}, ("token_embd.weight",), CheckpointError, "missing shared.weight"),
    "a scale": ({"t5.attention.scale": 0.5}, (), UnsupportedError, r"attention\.scale: got 0\.5"),
    "grouped heads": ({"t5.attention.head_count_kv": 2}, (), UnsupportedError, "head_count_kv: got 2"),
    "no charsmap": ({"tokenizer.ggml.precompiled_charsmap": [1] * 40}, (), CheckpointError, "precompiled_charsmap"),
}  # fmt: skip


@pytest.mark.spread(4)
@pytest.mark.parametrize("name", BROKEN)
def test_refused(tmp_path: Path, name: str) -> None:
    keys, drop, error, said = BROKEN[name]
    write_t5_gguf(tmp_path / "tiny.gguf", "t5", keys=keys, drop=drop)
    with pytest.raises(error, match=said):
        qgraft.load(tmp_path / "tiny.gguf")


@pytest.mark.slow
def test_what_is_for_decoders_is_refused(t5_file, tmp_path: Path, capsys) -> None:
    """Also on the command line, where a file says only when it is read what it is; and an encoder alone."""
    path = str(t5_file("t5").path)
    for words in (["serve", "--model", path], ["estimate", "--model", path],
                  ["train", "--model_name_or_path", path, "--dataset", "identity", "--stage", "dpo", "--output_dir",
                   str(tmp_path / "out"), "--use_cpu", "true"]):  # fmt: skip
        assert main(words) == 2
        assert "encoder-decoder" in capsys.readouterr().err
    writer = gguf.GGUFWriter(tmp_path / "encoder.gguf", "t5encoder")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(UnsupportedError, match="'t5encoder'") as refused:
        qgraft.load(tmp_path / "encoder.gguf")
    assert "encoder alone" in str(refused.value.hint)
    model, _ = qgraft.load(path)
    with pytest.raises(QgraftError):
        qgraft.attach_prefix(model, 4)


CANNOT = {  # options of a folder's model -> what a GGUF file cannot say
    "silu": ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu'"),
    "far": ("t5", {"relative_attention_max_distance": 64}, "relative_attention_max_distance 64"),
    "deep": ("t5", {"num_decoder_layers": 3}, "its decoder has 3 layers"),
    "tied mT5": ("mt5", {"tie_word_embeddings": True}, "scale_decoder_outputs False"),
    "no start": ("t5", {"decoder_start_token_id": None}, "decoder_start_token_id"),
}


@pytest.mark.parametrize(
    "name", [each if each == "tied mT5" else pytest.param(each, marks=pytest.mark.slow) for each in CANNOT]
)
def test_what_a_file_cannot_say(tmp_path: Path, name: str) -> None:
    kind, options, said = CANNOT[name]
    class_name, config, more = FOLDERS[kind]
    model = getattr(transformers, class_name)(getattr(transformers, config)(**{**more, **options}))
    write_t5_gguf(tmp_path / "made.gguf", "t5")
    model.save_pretrained(tmp_path / "folder")
    qgraft.load(tmp_path / "made.gguf")[1].save_pretrained(tmp_path / "folder")
    assert said in str(why_not_gguf(qgraft.load(tmp_path / "folder")[0]))
