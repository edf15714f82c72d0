"""Folders as GGUF files: the same logits and ids when they are read again, and refused where a file cannot say it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tiny_models import MINISTRAL_ROPE, PAIRS, SHAPE
from tokenizers import Regex, normalizers, pre_tokenizers

import qgraft
from qgraft.checkpoints.gguf_file import GgufFile, read_gguf
from qgraft.checkpoints.gguf_from_folder import why_not_gguf
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_rules import ARCHITECTURES
from qgraft.checkpoints.gguf_write_keys import UNWRITTEN
from qgraft.checkpoints.gguf_write_tokenizer import PROBES, check_tokenizer, tokenizer_keys
from qgraft.checkpoints.pretokenizers import PRE_TOKENIZERS
from qgraft.errors import UnsupportedError

Maker = Callable[..., Any]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0 + i for i in range(8)],
        "short_factor": [1.0 + i / 8 for i in range(8)], "original_max_position_embeddings": 32}  # fmt: skip
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip


MIXTURES = {name for name, keys in TABLE.items() if keys.experts and not keys.other}
# see test_pack_experts.py, test_glm_tokenizer.py
WRITTEN = sorted(ARCHITECTURES.keys() - MIXTURES - UNWRITTEN - PAIRS - {"chatglm"})
RAW = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def cut(expression: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior, invert)


def header_of(keys: dict[str, Any]) -> GgufFile:
    """A file of nothing but these keys."""
    return GgufFile(Path("draft"), 3, 32, {"general.architecture": "llama", **keys}, {}, {}, 0, 0, torch.empty(0))


def make_folder(tiny_gguf: Maker, folder: Path, architecture: str, **options: Any) -> tuple[Path, Any]:
    """A float32 folder as transformers saves it, and the model in it."""
    tiny = tiny_gguf(architecture, **options)
    _, tokenizer = qgraft.load(tiny.path, device="cpu") if "config" not in options else qgraft.load(
        tiny_gguf(architecture).path, device="cpu"
    )  # fmt: skip
    tiny.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tiny.model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


def written(folder: Path, target: Path, **options: Any) -> tuple[Any, Any, Any, Any]:
    """(model of the folder, of the file that it is saved as, and their tokenizers)."""
    model, tokenizer = qgraft.load(folder, dtype="float32", device="cpu", **options)
    assert why_not_gguf(model) is None
    qgraft.save(model, target)
    again, its = qgraft.load(target, dtype="float32", device="cpu")
    return model, again, tokenizer, its


CASES: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in WRITTEN),
    (
        "gemma4",
        {
            "config": {
                "num_kv_shared_layers": 0,
                "use_double_wide_mlp": False,
                "hidden_size_per_layer_input": 0,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
            }
        },
    ),
    ("llama", {"tied": True}),
    ("llama", {"config": {"attention_bias": True, "mlp_bias": True}}),
    ("llama", {"config": {"rope_parameters": LLAMA3}}),
    ("llama", {"config": {"rope_parameters": YARN}}),
    ("qwen2", {"config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}}),
    ("phi3", {"config": {"rope_parameters": LONG, "original_max_position_embeddings": 32, "sliding_window": 20}}),
    ("gemma3", {"config": {"rope_parameters": GEMMA3, "num_hidden_layers": 7}}),
    ("gemma3", {"config": {"layer_types": ["sliding_attention", "full_attention"]}}),
    ("stablelm", {"config": {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5}}),
    ("gpt2", {"config": {"n_inner": 128}}),
    ("exaone4", {"config": {"rope_parameters": LLAMA3}}),
    (
        "exaone4",
        {
            "config": {
                "num_hidden_layers": 64,
                "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
                "sliding_window": 8,
                "sliding_window_pattern": 4,
            }
        },
    ),
    ("falcon", {"config": {"new_decoder_architecture": False, "num_kv_heads": None}}),  # 7B
    ("falcon", {"config": {"num_ln_in_parallel_attn": 1}}),  # 11B
    ("lfm2", {"config": {"block_auto_adjust_ff_dim": True, "block_multiple_of": 32}}),
    ("granite", {"config": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}}),
    (
        "hunyuan-dense",
        {"config": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}}},
    ),
    ("mistral3", {"config": {"rope_parameters": {**MINISTRAL_ROPE, "beta_fast": 0.5, "beta_slow": 0.02}}}),
]


@pytest.mark.spread(10)
@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_a_float_folder_is_the_same_model_as_a_file(
    architecture: str, options: dict[str, Any], tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    folder, theirs = make_folder(tiny_gguf, tmp_path / "folder", architecture, **options)
    model, again, tokenizer, its = written(folder, tmp_path / "new.gguf")
    ids = random_ids(model, rows=2, length=48)
    expected = logits(theirs, ids)
    assert (logits(model, ids) - expected).abs().max() < 1e-4
    assert (logits(again, ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    for text in (*PROBES, "<|im_start|>user\nhello the cat<|im_end|>\n"):
        assert tokenizer(text)["input_ids"] == its(text)["input_ids"], text
    assert tokenizer.chat_template == its.chat_template
    assert set(again.qgraft.info.formats) == {"f32"}


@pytest.mark.spread(3)
@pytest.mark.parametrize("architecture", WRITTEN)
def test_packed_rows_are_written_as_they_are(
    architecture: str, tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    folder, _ = make_folder(tiny_gguf, tmp_path / "folder", architecture)
    model, again, *_ = written(folder, tmp_path / "new.gguf", quantize="q4_1")
    ids = random_ids(model)
    assert (logits(again, ids) - logits(model, ids)).abs().max() < 1e-4
    assert again.qgraft.info.formats == model.qgraft.info.formats
    assert int(read_gguf(tmp_path / "new.gguf").metadata["general.file_type"]) == 3  # MOSTLY_Q4_1


SLIDING_LAST = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding_window|layer_types"),
    ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta|rope_parameters"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("falcon", {"alibi": True}, "alibi"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers"),
    ("granite", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ("mistral3", {"sliding_window": 16}, "sliding_window 16"),
    ("mistral3", {"rope_parameters": {**MINISTRAL_ROPE, "mscale": 0.7}}, "rope_parameters"),
    ("exaone4", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "sliding_window"),
    ("glm4", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "rope_parameters"),
    ("gemma3", {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": PLAIN}}, "'llama3' in some layers"),
    ("gemma3", {"rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN}}, "'longrope' in some layers"),
    # what llama.cpp does not load, see tests/oracle/test_llamacpp.py
    ("arcee", {"mlp_bias": True}, r"llama\.cpp has no blk\.0\.ffn_down\.bias"),
    ("smollm3", {"attention_bias": True}, r"llama\.cpp has no blk\.0\.attn_k\.bias"),
    ("hunyuan-dense", {"attention_bias": True}, r"llama\.cpp has no blk\.0\.attn_k\.bias"),
    ("nemotron", {"head_dim": 32}, "heads of hidden_size / num_attention_heads = 16, got 32"),
    ("gemma4", {"layer_types": [*SLIDING_LAST, "sliding_attention", "full_attention"], "num_hidden_layers": 6},
     "the two layers before"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config", "message"), REFUSED)
def test_what_no_key_states_is_refused(
    architecture: str, config: dict[str, Any], message: str, tiny_gguf: Maker, tmp_path: Path
) -> None:
    folder, _ = make_folder(tiny_gguf, tmp_path / "folder", architecture, config=config)
    model, _ = qgraft.load(folder, device="cpu")
    with pytest.raises(UnsupportedError, match=rf"(?s)cannot be written as a GGUF file: .*(?:{message})"):
        qgraft.save(model, tmp_path / "new.gguf")
    assert why_not_gguf(model) is not None
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([cut(PRE_TOKENIZERS["llama-bpe"].splits[0]), RAW], "dbrx"),
        ([cut(PRE_TOKENIZERS["stablelm2"].splits[0], "removed", True), RAW], "deepseek-r1-qwen"),
        ([cut(r"\w+"), RAW], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        ([pre_tokenizers.Whitespace(), RAW], None),
    ],
)  # fmt: skip
def test_how_a_published_tokenizer_cuts_text_has_a_name_or_is_refused(
    steps: list[Any], pre: str | None, tiny_gguf: Maker
) -> None:
    """As tokenizer.json files on the hub have it; the ids are those of the tokenizer that is read again."""
    _, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    rows = len(tokenizer)
    if pre is None:
        with pytest.raises(UnsupportedError, match="cuts text as none of llama"):
            tokenizer_keys(tokenizer, rows)
        return
    keys = tokenizer_keys(tokenizer, rows + 3)
    assert keys["tokenizer.ggml.pre"] == pre
    assert keys["tokenizer.ggml.tokens"][rows:] == [f"[PAD{rows + n}]" for n in range(3)]
    assert check_tokenizer(tokenizer, header_of(keys)) == []


def test_a_tokenizer_of_another_kind_is_refused_and_odd_blanks_are_said(tiny_gguf: Maker) -> None:
    _, tokenizer = qgraft.load(tiny_gguf("phi3").path, device="cpu")
    backend = tokenizer.backend_tokenizer
    keys = tokenizer_keys(tokenizer, len(tokenizer))
    assert check_tokenizer(tokenizer, header_of(keys)) == []
    backend.normalizer = normalizers.Sequence([])  # as transformers builds Llama's with legacy=False
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    keys = tokenizer_keys(tokenizer, len(tokenizer))
    notes = check_tokenizer(tokenizer, header_of(keys))
    assert ["special tokens" in note or "begins with a blank" in note for note in notes] == [True] * len(
        notes
    ) and notes
    keys["tokenizer.ggml.scores"] = keys["tokenizer.ggml.scores"][::-1]
    with pytest.raises(UnsupportedError, match=r"other ids than llama\.cpp would|depends on the text"):
        check_tokenizer(tokenizer, header_of(keys))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UnsupportedError, match="of the kind WordLevel"):
        tokenizer_keys(transformers.PreTrainedTokenizerFast(tokenizer_object=words), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mistral_is_a_llama_unless_it_has_a_window(
    dtype: str, tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    """Norms are float32 in the file whatever the model computes in."""
    llama = tiny_gguf("llama").model
    _, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    options = {
        key: value for key, value in llama.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    for window in (None, 16):
        config = transformers.MistralConfig(**{**options, "sliding_window": window})
        mistral = transformers.MistralForCausalLM(config).eval()
        mistral.load_state_dict(llama.state_dict())
        folder = tmp_path / f"window {window}"
        mistral.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model, _ = qgraft.load(folder, dtype=dtype, device="cpu")
        if window:
            assert "sliding_window 16" in str(why_not_gguf(model))
            continue
        qgraft.save(model, tmp_path / "new.gguf")
        again, _ = qgraft.load(tmp_path / "new.gguf", dtype="float32", device="cpu")
        ids = random_ids(again)
        assert (logits(again, ids) - logits(mistral, ids)).abs().max() < 1e-4


def test_olmo3_is_an_olmo2_with_a_window(tiny_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    """Its yarn is that of the layers without one."""
    _, tokenizer = qgraft.load(tiny_gguf("olmo2").path, device="cpu")
    shape = {key: value for key, value in SHAPE.items() if key != "num_hidden_layers"}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for ropes, lost in (({"full_attention": YARN, "sliding_attention": plain}, False),
                        ({"full_attention": YARN, "sliding_attention": YARN}, True)):  # fmt: skip
        config = transformers.Olmo3Config(
            **shape, num_hidden_layers=6, sliding_window=8, vocab_size=len(tokenizer), rope_parameters=ropes,
            pad_token_id=None, bos_token_id=1, eos_token_id=2,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        )  # fmt: skip
        olmo3 = transformers.Olmo3ForCausalLM(config).eval()
        for parameter in olmo3.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        olmo3.save_pretrained(tmp_path / "folder")
        tokenizer.save_pretrained(tmp_path / "folder")
        model, _ = qgraft.load(tmp_path / "folder", dtype="float32", device="cpu")
        if lost:
            assert "rope_parameters" in str(why_not_gguf(model))
            continue
        qgraft.save(model, tmp_path / "new.gguf")
        again, _ = qgraft.load(tmp_path / "new.gguf", dtype="float32", device="cpu")
        assert again.config.model_type == "olmo3"
        ids = random_ids(again, length=40)
        assert (logits(again, ids) - logits(olmo3, ids)).abs().max() < 1e-4


def test_new_tokens_behind_the_table_are_merged_first(tiny_gguf: Maker, tmp_path: Path) -> None:
    folder, _ = make_folder(tiny_gguf, tmp_path / "folder", "llama")
    model, tokenizer = qgraft.load(folder, quantize="q8_0", device="cpu")
    rows = [{"instruction": "call", "output": "<tool> ab"}] * 4
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "run"), add_tokens=["<tool>"], max_steps=1, r=2, use_cpu=True,
                                 target_modules="q_proj", save_strategy="no", plot_loss=False)  # fmt: skip
    qgraft.train(model, tokenizer, rows, args)
    with (
        qgraft.adapters_off(model),
        pytest.raises(UnsupportedError, match="rows of new tokens, '<tool>' with the id") as error,
    ):
        qgraft.save(model, tmp_path / "x.gguf")
    assert error.value.hint == "merge() it first, then save()"
    qgraft.merge(model, tokenizer, method="nearest", min_retained=-1e9)
    qgraft.save(model, tmp_path / "x.gguf")
    again, its = qgraft.load(tmp_path / "x.gguf", device="cpu")
    ids = tokenizer("<tool> ab", return_tensors="pt").input_ids
    assert its("<tool> ab")["input_ids"] == ids[0].tolist()
    assert torch.allclose(logits(again, ids), logits(model, ids), atol=1e-3)
