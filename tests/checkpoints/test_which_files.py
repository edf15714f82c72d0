"""Which files of a folder are its model and its tokenizer: those that transformers takes, whatever lies beside them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qgraft
from qgraft.checkpoints.shards import BIN_INDEX, BIN_WHOLE, INDEX, NAMED, WHOLE
from qgraft.errors import CheckpointError

State = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=20)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def write(path: Path, state: State) -> None:
    """In one file, or two with an index where the path is one."""
    if path.name in (INDEX, BIN_INDEX):
        end, names = ".bin" if path.name == BIN_INDEX else ".safetensors", list(state)
        files = {name: f"part-{number % 2}{end}" for number, name in enumerate(names)}
        for file in set(files.values()):
            write(path.with_name(file), {name: state[name] for name in names if files[name] == file})
        path.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    elif path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path, {"format": "pt"})


CASES: dict[str, tuple[str, tuple[str, ...]]] = {  # what the folder has beside other weights, which are in these files
    "an index left behind": (WHOLE, (INDEX, BIN_INDEX)),
    "a copy kept for later": (WHOLE, ("model_backup.safetensors", "consolidated.safetensors")),
    "a variant": (WHOLE, ("model.fp16.safetensors", BIN_WHOLE)),
    "shards beside an average": (INDEX, ("model_ema.safetensors", BIN_WHOLE)),
    "a pickle beside its average": (BIN_WHOLE, ("pytorch_model_ema.bin",)),
    "a pickle beside an older index": (BIN_WHOLE, (BIN_INDEX,)),
    "a pickle beside safetensors of something else": (BIN_WHOLE, ("adapter_model.safetensors",)),
    "pickles in shards beside safetensors of something else": (BIN_INDEX, ("adapter_model.safetensors",)),
    "a file that config.json names": ("z.safetensors", (WHOLE, INDEX)),
    "a file that config.json names before others": ("a.safetensors", (WHOLE,)),
}


@pytest.mark.spread(2)
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_in_the_files_that_transformers_reads(folder: Path, case: str) -> None:
    file, beside = CASES[case]
    state = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    for other in beside:
        write(folder / other, {name: value + 0.5 for name, value in state.items()})
    write(folder / file, state)
    if file.endswith(".safetensors") and file != WHOLE:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, NAMED: file}))
    ids = torch.arange(3, 12)[None]
    oracle, (model, _) = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), qgraft.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=0, atol=1e-5)
        qgraft.save(model, folder.with_name("saved"))
        saved = AutoModelForCausalLM.from_pretrained(folder.with_name("saved"), dtype=torch.float32)
        torch.testing.assert_close(saved(ids).logits, oracle(ids).logits, rtol=0, atol=1e-5)


def test_a_tensor_in_two_files_is_refused_where_none_of_them_counts(folder: Path) -> None:
    state = load_file(folder / WHOLE)
    (folder / WHOLE).rename(folder / "one.safetensors")
    write(folder / "two.safetensors", {"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is in one.safetensors and in two.safetensors") as caught:
        qgraft.load(folder)
    assert "Name it model.safetensors" in str(caught.value)
    (folder / "two.safetensors").unlink()
    qgraft.load(folder)  # of any name, where there is no doubt


@pytest.mark.spread(1)
@pytest.mark.parametrize("named", ["../tiny/model.safetensors", "model.bin", "gone.safetensors", 3])
def test_what_config_json_may_name(folder: Path, named: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, NAMED: named}))
    with pytest.raises(
        CheckpointError, match="missing gone" if named == "gone.safetensors" else "transformers_weights"
    ):
        qgraft.load(folder)


def test_an_adapter_beside_the_model_is_told_and_stays_there(folder: Path) -> None:
    """transformers would put it on; and on the base that it names, also of a folder that has its config alone."""
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    model, _ = qgraft.load(folder)
    note = next(note for note in model.qgraft.info.notes if "adapter_config.json" in note)
    assert f"load_adapter(model, {str(folder)!r})" in note
    qgraft.save(model, folder.with_name("saved"))
    assert not (folder.with_name("saved") / "adapter_config.json").exists()


def pieces(kind: str) -> bytes:
    """A sentencepiece vocabulary with T5's ids, or the usual ones."""
    text, ids = ["the cat sat on the mat", "hello world of a dog"] * 20, {}
    if kind == "t5":
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=30, hard_vocab_limit=False, minloglevel=2, **ids
    )
    return written.getvalue()


def t5(folder: Path) -> Any:
    (folder / "spiece.model").write_bytes(pieces("t5"))
    return transformers.T5Config(vocab_size=140, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **START)


def byt5(folder: Path) -> Any:
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **START)


def xglm(folder: Path) -> Any:
    (folder / "sentencepiece.bpe.model").write_bytes(pieces(""))
    return transformers.XGLMConfig(vocab_size=60, d_model=16, attention_heads=2, num_layers=1, ffn_dim=16)


def marian(folder: Path) -> Any:
    for side in ("source", "target"):
        (folder / f"{side}.spm").write_bytes(pieces(""))
    read = sentencepiece.SentencePieceProcessor(model_proto=pieces(""))
    tokens = dict.fromkeys(["</s>", "<unk>", *(read.id_to_piece(i) for i in range(len(read))), "<pad>"])
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": len(tokens) - 1}
    return transformers.MarianConfig(vocab_size=len(tokens), **shape, **heads, decoder_start_token_id=len(tokens) - 1)


START = {"decoder_start_token_id": 0}


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.spread(1)
@pytest.mark.parametrize("make", [marian, t5, byt5, xglm])
def test_every_kind_of_vocabulary_is_found_and_copied(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = make(folder)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    expected = AutoTokenizer.from_pretrained(folder)("the cat of a dog").input_ids
    model, tokenizer = qgraft.load(folder)
    assert tokenizer is not None and tokenizer("the cat of a dog").input_ids == expected
    qgraft.save(model, tmp_path / "saved")
    again = qgraft.load(tmp_path / "saved")[1]
    assert again is not None and again("the cat of a dog").input_ids == expected
