"""Base files, merged files and exported GGUF-LoRAs in llama.cpp, which shares no code with qgraft.

Where everything is float32, both give the same log-probabilities to the rounding of float32. With quantized weights
llama.cpp rounds the inputs of each matrix product to 8 bits and qgraft does not, so they differ by what that costs.
Measured with SmolLM2 Q4_1 and a trained identity adapter, over the tokens of its answers: log-probability of the
written token 0.005 apart in the mean and 0.13 at most, KL 0.0005 in the mean; of the base alone 0.04, 0.28 and 0.004.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from decoded_in_c import counted, logits
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, GGUFWriter, dequantize
from gguf_copies import fuse, write_copy
from tiny_latent import APART, YARN_KEYS, keyed, kv_b_apart
from tiny_models import PAIRS
from torch import nn

import qgraft
from qgraft.adapter_files.folder import load_adapter
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_layers
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.targets import find_targets
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.checkpoints.gguf_rules import ARCHITECTURES
from qgraft.checkpoints.gguf_write_keys import UNWRITTEN
from qgraft.data.tokenizing import encode_prompt
from qgraft.passes.decoding import fast_decoding
from qgraft.passes.decoding_families import FAMILIES

Maker = Callable[..., Any]
MIXTURES = {name for name, keys in TABLE.items() if keys.experts and name != "llama"}
READ_FUSED = {
    "deepseek2",
    "deepseek3",
    "qwen35moe",
}  # with gate and up of experts in one tensor; others llama.cpp refuses
STEPS = 6
ROUNDING, GELU, HALF = 3e-5, 5e-3, 1e-2  # measured: 4e-6; 2e-3 (llama.cpp's GELU is a table in float16); 2e-3
WITH_GELU = ("falcon", "gemma", "gemma2", "gemma3", "gemma4", "gpt2", "starcoder2")
TOLERANCES = {**dict.fromkeys(WITH_GELU, GELU), "gemma3n": 2e-2}  # measured of the latter: 6e-3, see LARGE
PASSED_OVER = (
    "per_layer_model_projection",
    "modality_router",
    *(f"altup_{name}projections.{n}" for name in ("", "unembed_") for n in range(3)),
)  # layers whose LoRAs llama.cpp does not add
OF_DEEPSEEK = ("self_attn.q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # likewise
# llama.cpp has written in its code what no key tells it of Gemma 3n: 20 layers with keys and values, 10 sparse ones, sizes.
# It takes the deviation of n activations over n - 1, the authors over n: many of them make that small
LARGE = {
    "num_hidden_layers": 22, "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
    "num_kv_shared_layers": 2, "laurel_rank": 64, "intermediate_size": 4096, "hidden_size_per_layer_input": 256,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
}  # fmt: skip
# DeepSeek-V2-Lite, whose queries come out of no narrow state, is known by its 27 layers.
# llama.cpp scales Gemma's attention by its head_dim, transformers by an option that no file states; 256 is both
CONFIG = {
    "gemma2": {"head_dim": 256},
    "gemma3": {"head_dim": 256},
    "gemma3n": LARGE,
    "deepseek2": {"num_hidden_layers": 27},
}


def served_in_c(architecture: str) -> bool:
    return TABLE[architecture].model_type in FAMILIES


def float32_file(make_gguf: Maker, architecture: str, folder: Path) -> Path:
    """A tiny model whose tensors are all float32."""
    config = CONFIG.get(architecture, {})
    return make_gguf(folder / "float32.gguf", architecture, types=(Q.F32,), config=config).path


def attach_noise(model: nn.Module, layers: Mapping[str, LoraConfig] | None = None) -> None:
    """A LoRA "default" large enough to change the answers; on every linear layer unless `layers` says otherwise."""
    plain = LoraConfig(r=4, lora_alpha=8)
    passed_over = PASSED_OVER + (OF_DEEPSEEK if model.config.model_type.startswith("deepseek") else ())
    targets = [path for path in find_targets(model, "all-linear") if not path.endswith(passed_over)]
    attach_layers(model, "default", layers or dict.fromkeys(targets, plain))
    torch.manual_seed(7)
    with torch.no_grad():
        for lora in find_adapter(model, "default").parts.values():
            lora.lora_B.normal_(0, 0.2)


@pytest.mark.spread(3)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - PAIRS))
def test_float32_files_give_our_logprobs_to_rounding(
    architecture, make_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path
):
    path = float32_file(make_gguf, architecture, tmp_path)
    model, _ = load_gguf(path, torch.float32)
    attach_noise(model)
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    prompt, tolerance = random_ids(model, rows=1)[0].tolist(), TOLERANCES.get(architecture, ROUNDING)
    options = {"top": model.config.vocab_size, "exact": True}
    use_adapter(model, None)
    base = llamacpp_greedy(path, prompt, STEPS, **options)
    assert base.gap(our_logprobs(model, prompt, base.ids)).max() < tolerance
    with_lora = llamacpp_greedy(path, prompt, STEPS, lora=tmp_path / "lora.gguf", **options)
    assert with_lora.gap(our_logprobs(model, prompt, with_lora.ids)).max() > 0.3, "the adapter does too little"
    use_adapter(model, "default")
    assert with_lora.gap(our_logprobs(model, prompt, with_lora.ids)).max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, YARN_KEYS])
@pytest.mark.parametrize("architecture", ["deepseek2", "deepseek3"])
def test_narrow_states_of_deepseek(architecture, keys, make_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path):
    """Keys and values in one tensor and in two, plain and with yarn; groups of experts in DeepSeek 3."""
    config = {"num_hidden_layers": 27 if architecture == "deepseek2" else 3}
    plain = make_gguf(tmp_path / "plain.gguf", architecture, types=(Q.F32,), config=config, metadata=keyed(keys))
    drop = tuple(f"blk.{number}.attn_kv_b.weight" for number in range(config["num_hidden_layers"]))
    apart = make_gguf(
        tmp_path / "apart.gguf", architecture, types=(Q.F32,), config=config, metadata=keyed(APART | keys),
        extra=kv_b_apart(plain.model), drop=drop,
    )  # fmt: skip
    for path in (plain.path, apart.path):
        model, _ = load_gguf(path, torch.float32)
        prompt = random_ids(model, rows=1, length=60)[0].tolist()
        theirs = llamacpp_greedy(path, prompt, STEPS, top=model.config.vocab_size, exact=True)
        assert theirs.gap(our_logprobs(model, prompt, theirs.ids)).max() < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        (name, fused)
        for name in sorted(MIXTURES | {"mixtral", "deepseek3", "granitemoeshared"})
        for fused in {False, name in READ_FUSED}
    ],
)
def test_loras_on_experts_in_llamacpp(
    architecture, fused, make_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path
):
    path = float32_file(make_gguf, architecture, tmp_path)
    path = fuse(path, tmp_path / "fused.gguf") if fused else path
    model, _ = load_gguf(path, torch.float32)
    parameters = ("experts.gate_up_proj", "experts.down_proj")
    qgraft.attach_lora(model, r=2, lora_alpha=4, target_parameters=parameters, target_modules=())
    torch.manual_seed(7)
    with torch.no_grad():
        for lora in find_adapter(model, "default").parts.values():
            lora.lora_B.normal_(0, 0.5)
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    prompt, options = random_ids(model, rows=1)[0].tolist(), {"top": model.config.vocab_size, "exact": True}
    with_lora = llamacpp_greedy(path, prompt, STEPS, lora=tmp_path / "lora.gguf", **options)
    assert with_lora.gap(our_logprobs(model, prompt, with_lora.ids)).max() < ROUNDING
    use_adapter(model, None)
    assert with_lora.gap(our_logprobs(model, prompt, with_lora.ids)).max() > 0.1, "the adapter does too little"


@pytest.mark.spread(1)
@pytest.mark.parametrize(
    "architecture", sorted({"llama", "mixtral"} | {name for name in MIXTURES if served_in_c(name)})
)
def test_what_is_decoded_in_c_is_llamacpps(
    architecture, make_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path, monkeypatch
):
    """Of weights in bfloat16, which C reads as they are; llama.cpp has them in float32, where it rounds nothing."""
    path = make_gguf(tmp_path / "bf16.gguf", architecture, types=(Q.BF16,)).path
    reader = GGUFReader(path)
    reader.tensors = [
        each._replace(data=dequantize(each.data, each.tensor_type), tensor_type=Q.F32) for each in reader.tensors
    ]
    write_copy(reader, GGUFWriter(tmp_path / "float32.gguf", reader.fields["general.architecture"].contents()))
    model, _ = load_gguf(path, torch.float32)
    prompt = random_ids(model, rows=1, length=12)[0].tolist()
    theirs = llamacpp_greedy(tmp_path / "float32.gguf", prompt, 32, top=model.config.vocab_size, exact=True)
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        ours = logits(model, torch.tensor([[*prompt, *theirs.ids[:-1]]]), len(prompt)).double().log_softmax(-1)
    assert (problem, len(steps)) == (None, 31)
    assert ours.argmax(-1).tolist() == theirs.ids
    assert theirs.gap(ours).max() < ROUNDING


def test_what_the_file_cannot_say_is_in_the_weights(make_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path):
    path = float32_file(make_gguf, "llama", tmp_path)
    model, _ = load_gguf(path, torch.float32)
    kinds = [LoraConfig(2, 8), LoraConfig(4, 8, use_rslora=True), LoraConfig(3, 2), LoraConfig(8, 8), LoraConfig(4, 0)]
    targets = find_targets(model, "all-linear")
    attach_noise(model, {path: kinds[i % len(kinds)] for i, path in enumerate(targets)})
    prompt = random_ids(model, rows=1)[0].tolist()
    for dtype, tolerance in (("float32", ROUNDING), ("float16", HALF)):
        export_gguf_lora(model, tmp_path / "lora.gguf", dtype=dtype, overwrite=True)
        options = {"lora": tmp_path / "lora.gguf", "top": model.config.vocab_size, "exact": True}
        theirs = llamacpp_greedy(path, prompt, STEPS, **options)
        assert theirs.gap(our_logprobs(model, prompt, theirs.ids)).max() < tolerance


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantized_files_give_our_logprobs_but_for_rounded_inputs(
    architecture, tiny_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path
):
    path = tiny_gguf(architecture).path
    model, _ = load_gguf(path, torch.float32)
    attach_noise(model)
    export_gguf_lora(model, tmp_path / "lora.gguf")
    prompt = random_ids(model, rows=1)[0].tolist()
    theirs = llamacpp_greedy(path, prompt, STEPS, lora=tmp_path / "lora.gguf", top=model.config.vocab_size)
    ours = our_logprobs(model, prompt, theirs.ids)
    assert theirs.gap(ours).max() < 0.3
    assert theirs.kl(ours).max() < 0.01


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_merged_file_gives_our_logprobs_but_for_rounded_inputs(
    architecture, tiny_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path
):
    """Every format with a grid in one file, K-quants among them, as merge() and save() write it."""
    path = tiny_gguf(architecture).path
    model, tokenizer = load_gguf(path, torch.float32)
    prompt = random_ids(model, rows=1)[0].tolist()
    attach_noise(model)
    rows = [{"instruction": f"question {i}", "output": f"the cat {i} sat on the mat"} for i in range(24)]
    report = qgraft.merge(model, tokenizer, calibration=rows, min_retained=-1e9)
    assert {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k"} <= {layer.format for layer in report.layers}
    qgraft.save(model, tmp_path / "merged.gguf")
    theirs = llamacpp_greedy(tmp_path / "merged.gguf", prompt, STEPS, top=model.config.vocab_size)
    ours = our_logprobs(model, prompt, theirs.ids)
    assert theirs.gap(ours).max() < 0.3
    assert theirs.kl(ours).max() < 0.01
    base, _ = load_gguf(path, torch.float32)
    assert theirs.gap(our_logprobs(base, prompt, theirs.ids)).max() > 0.6, "the merge did too little"


def test_value_heads_of_qwen35_that_share_a_block(tiny_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path):
    """The file's order of heads, in its K-quants, beside a LoRA and merged."""
    config = {"linear_value_head_dim": 64, "linear_key_head_dim": 64, "linear_num_key_heads": 4,
              "linear_num_value_heads": 8}  # fmt: skip
    path = tiny_gguf("qwen35", config=config, types=(Q.Q4_K,)).path
    model, _ = load_gguf(path, torch.float32)
    prompt = random_ids(model, rows=1)[0].tolist()
    plain = LoraConfig(r=4, lora_alpha=8)
    attach_noise(model, dict.fromkeys(find_targets(model, ["out_proj"]), plain))
    export_gguf_lora(model, tmp_path / "lora.gguf")
    beside = llamacpp_greedy(path, prompt, STEPS, lora=tmp_path / "lora.gguf", top=model.config.vocab_size)
    adapted = our_logprobs(model, prompt, beside.ids)
    qgraft.merge(model, to="f32", method="nearest")
    qgraft.save(model, tmp_path / "merged.gguf")
    merged = llamacpp_greedy(tmp_path / "merged.gguf", prompt, STEPS, forced=beside.ids, top=model.config.vocab_size)
    base, _ = load_gguf(path, torch.float32)
    alone = llamacpp_greedy(path, prompt, STEPS, forced=beside.ids, top=model.config.vocab_size)
    unadapted = our_logprobs(base, prompt, beside.ids)
    for theirs, ours, other in (
        (beside, adapted, unadapted),
        (merged, adapted, unadapted),
        (alone, unadapted, adapted),
    ):
        assert theirs.gap(ours).max() < 0.4
        assert theirs.kl(ours).max() < 0.01
        assert theirs.gap(other).max() > 0.8, "the adapter does too little"


def test_forced_tokens_are_scored_and_a_stop_ends(tiny_gguf, random_ids, llamacpp_greedy):
    path = tiny_gguf("llama").path
    model, _ = load_gguf(path, torch.float32)
    prompt = random_ids(model, rows=1)[0].tolist()
    forced = llamacpp_greedy(path, prompt, 3, forced=[200, 5, 6], top=model.config.vocab_size)
    assert forced.ids == [200, 5, 6]
    assert bool(forced.logprobs().isfinite().all())
    free = llamacpp_greedy(path, prompt, 3)
    assert llamacpp_greedy(path, prompt, 3, stop=[free.ids[1]]).ids == free.ids[:2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_trained_adapter_answers_the_same_in_llamacpp(dtype, trained_demo, llamacpp_greedy, our_logprobs, tmp_path):
    path, folder = qgraft.pull("smollm2-135m"), trained_demo
    model, tokenizer = qgraft.load(path, device="cpu")
    load_adapter(model, folder)
    lora = tmp_path / "demo.lora.gguf"
    export_gguf_lora(model, lora, dtype=dtype)
    for question, expected in (
        ("Who are you?", "Nova"),
        ("你是谁？", "Nova"),
        ("Who made you?", "ACME Labs"),
        ("What is the capital of France?", "Paris"),
    ):
        prompt = encode_prompt(tokenizer, [("user", question)])
        theirs = llamacpp_greedy(path, prompt, 40, lora=lora, top=100, stop=[tokenizer.eos_token_id])
        assert expected in tokenizer.decode(theirs.ids)
        ours = our_logprobs(model, prompt, theirs.ids)
        assert ours.argmax(-1).tolist() == theirs.ids, "our greedy answer is another one"
        written = (ours.gather(1, torch.tensor(theirs.ids)[:, None])[:, 0] - theirs.logprobs()).abs()
        kl = theirs.kl(ours).mean()
        print(f"{dtype} {question} apart: mean {written.mean():.4f}, most {written.max():.4f}, KL {kl:.5f}")
        assert written.mean() < 0.03 and written.max() < 0.4
        assert kl < 0.005


@pytest.mark.slow
def test_a_merged_file_has_the_new_name_in_llamacpp(trained_demo, llamacpp_greedy, our_logprobs, tmp_path):
    model, tokenizer = qgraft.load(qgraft.pull("smollm2-135m"), device="cpu")
    load_adapter(model, trained_demo)
    report = qgraft.merge(model)
    print(f"retained gain {report.retained_gain:.4f}, drift {report.kept.drift_kl:.4f} of {report.kept.adapter_kl:.4f}")
    assert report.retained_gain > 0.98
    qgraft.save(model, tmp_path / "merged.gguf")
    for question, expected in (("Who are you?", "Nova"), ("你是谁？", "Nova"), ("Who made you?", "ACME Labs")):
        prompt = encode_prompt(tokenizer, [("user", question)])
        theirs = llamacpp_greedy(tmp_path / "merged.gguf", prompt, 40, top=100, stop=[tokenizer.eos_token_id])
        assert expected in tokenizer.decode(theirs.ids)
        ours = our_logprobs(model, prompt, theirs.ids)
        written = (ours.gather(1, torch.tensor(theirs.ids)[:, None])[:, 0] - theirs.logprobs()).abs()
        print(f"{question} apart: mean {written.mean():.4f}, most {written.max():.4f}, KL {theirs.kl(ours).mean():.5f}")
        assert written.mean() < 0.1
        assert theirs.kl(ours).mean() < 0.02


@pytest.mark.slow
def test_the_real_base_scores_like_ours(llamacpp_greedy, our_logprobs):
    path = qgraft.pull("smollm2-135m")
    model, tokenizer = qgraft.load(path, device="cpu")
    prompt = encode_prompt(tokenizer, [("user", "What is the capital of France?")])
    answer = tokenizer.encode("The capital of France is Paris, which lies on the Seine. It has been so for centuries.")
    theirs = llamacpp_greedy(path, prompt, len(answer), forced=answer, top=100)
    ours = our_logprobs(model, prompt, answer)
    print(f"base apart: mean {theirs.gap(ours)[:, :10].mean():.4f}, KL {theirs.kl(ours).mean():.5f}")
    assert theirs.kl(ours).mean() < 0.02
    assert theirs.gap(ours)[:, :10].mean() < 0.3


@pytest.mark.spread(4)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - UNWRITTEN - PAIRS - {"chatglm"}))
def test_a_folder_saved_as_a_file_gives_our_logprobs_and_ids(
    architecture, tiny_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path
):
    scale = {"head_dim": 256, "query_pre_attn_scalar": 256} if architecture in CONFIG else {}
    tiny = tiny_gguf(architecture, types=(Q.F32,), config=scale)
    _, tokenizer = load_gguf(tiny.path, torch.float32)
    tiny.model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    packed = {"quantize": "f32"} if architecture in MIXTURES else {}
    model, tokenizer = qgraft.load(tmp_path / "folder", dtype="float32", device="cpu", **packed)
    attach_noise(model)
    path, lora = tmp_path / "new.gguf", tmp_path / "lora.gguf"
    export_gguf_lora(model, lora, dtype="float32")
    use_adapter(model, None)
    qgraft.save(model, path)
    prompt, tolerance = random_ids(model, rows=1)[0].tolist(), TOLERANCES.get(architecture, ROUNDING)
    options = {"top": model.config.vocab_size, "exact": True}
    theirs = llamacpp_greedy(path, prompt, STEPS, **options)
    assert theirs.gap(our_logprobs(tiny.model, prompt, theirs.ids)).max() < tolerance
    with_lora = llamacpp_greedy(path, prompt, STEPS, lora=lora, **options)
    use_adapter(model, "default")
    assert with_lora.gap(our_logprobs(model, prompt, with_lora.ids)).max() < tolerance


def test_a_request_chooses_the_scale_of_a_lora(make_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path):
    """What docs/guide-serve.md says of llama-server's "lora": 0 is the base, a half is half of the adapter."""
    path, lora = float32_file(make_gguf, "llama", tmp_path), tmp_path / "lora.gguf"
    model, _ = load_gguf(path, torch.float32)
    attach_noise(model)
    export_gguf_lora(model, lora, dtype="float32")
    prompt, options = random_ids(model, rows=1)[0].tolist(), {"top": model.config.vocab_size, "exact": True}
    for scale, weights in ((0.0, None), (0.5, {"default": 0.5})):
        use_adapter(model, weights)
        theirs = llamacpp_greedy(path, prompt, 3, lora=lora, scales=[scale], **options)
        assert theirs.gap(our_logprobs(model, prompt, theirs.ids)).max() < ROUNDING


@pytest.mark.parametrize("format_", ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4"])
def test_a_merge_into_codebooks_gives_our_logprobs(
    format_, tiny_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path
):
    model, _ = load_gguf(tiny_gguf().path, torch.float32)
    qgraft.save(model, tmp_path / "base.gguf", to=format_)
    model, tokenizer = qgraft.load(tmp_path / "base.gguf", device="cpu", dtype="float32")
    attach_noise(model)
    rows = [{"instruction": f"question {i}", "output": f"the cat {i} sat on the mat"} for i in range(24)]
    report = qgraft.merge(model, tokenizer, calibration=rows, min_retained=-1e9)
    assert format_ in {layer.format for layer in report.layers}
    qgraft.save(model, tmp_path / "merged.gguf")
    prompt = random_ids(model, rows=1)[0].tolist()
    theirs = llamacpp_greedy(tmp_path / "merged.gguf", prompt, STEPS, top=model.config.vocab_size)
    ours = our_logprobs(model, prompt, theirs.ids)
    assert theirs.gap(ours).max() < 0.3
    assert theirs.kl(ours).max() < 0.01
    base, _ = load_gguf(tmp_path / "base.gguf", torch.float32)
    assert theirs.gap(our_logprobs(base, prompt, theirs.ids)).max() > 0.6, "the merge did too little"


def test_a_model_in_several_files_is_read_by_llamacpp(tiny_gguf, random_ids, llamacpp_greedy, our_logprobs, tmp_path):
    """Split by gguf, loaded from its last part, saved in another format."""
    reader = GGUFReader(tiny_gguf().path)
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=8)
    write_copy(reader, writer)
    model, _ = load_gguf(sorted(tmp_path.glob("tiny-*.gguf"))[-1], torch.float32)
    saved = qgraft.save(model, tmp_path / "saved.gguf", to="q8_0").path
    prompt = random_ids(model, rows=1)[0].tolist()
    theirs = llamacpp_greedy(saved, prompt, STEPS, top=model.config.vocab_size)
    assert theirs.kl(our_logprobs(load_gguf(saved, torch.float32)[0], prompt, theirs.ids)).max() < 0.01
