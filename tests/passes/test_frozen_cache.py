"""--cache_frozen_layers: a run with it ends where one without does, to rounding, and the layers below run once."""

import json
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from transformers import TrainerCallback

import qgraft
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import OptionError, StorageError, UnsupportedError
from qgraft.model_parts import decoder_layers
from qgraft.passes import frozen_cache as frozen
from qgraft.passes.frozen_cache import frozen_layers_cached
from qgraft.passes.loss import batch_loss
from qgraft.training import passes
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i} " * (1 + i % 5), "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(14)]
ARCHITECTURES = ["llama", "gemma3", "phi3", "qwen3"]
NEAR = (
    torch.finfo(torch.float32).eps ** 0.5
)  # half of the digits: sums are rounded in every step, and Adam divides by roots


class Losses(TrainerCallback):
    """The losses of every step, unrounded."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append({key: value for key, value in logs.items() if "loss" in key})


def arguments(folder, **options):
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1,
                "use_cpu": True, "compute": "float32", "learning_rate": 1e-2, "r": 2, "val_size": 3,
                "layers_to_transform": "1", "plot_loss": False}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**defaults, **options})


def tokens_through(model, layer):
    """A list that grows by the tokens of each pass through a layer."""
    seen = []
    first = next(module for module in decoder_layers(model)[layer].modules() if "Norm" in type(module).__name__)
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
    return seen


def run_once(source, folder, monkeypatch, **options):
    """(tokens through layer 0, losses of every step, report, adapter) of one run."""
    model, tokenizer = qgraft.load(source)
    below, losses = tokens_through(model, 0), Losses()
    report = train(model, tokenizer, ROWS, arguments(folder, **options), callbacks=[losses])
    return sum(below), losses.seen, report, safetensors.torch.load_file(folder / "adapter_model.safetensors")


def assert_same_run(source, tmp_path, monkeypatch, **options):
    plain = run_once(source, tmp_path / "plain", monkeypatch, **options)
    cached = run_once(source, tmp_path / "cached", monkeypatch, cache_frozen_layers=True, **options)
    assert len(plain[1]) == len(cached[1]) >= 9
    for mine, expected in zip(cached[1], plain[1], strict=True):
        assert mine == pytest.approx(expected, rel=NEAR)
    for key in ("train_loss", "eval_loss"):
        assert cached[2].metrics[key] == pytest.approx(plain[2].metrics[key], rel=NEAR)
    assert plain[3].keys() == cached[3].keys()
    for key, tensor in plain[3].items():
        torch.testing.assert_close(cached[3][key], tensor, rtol=NEAR, atol=NEAR * float(tensor.abs().max()))
    assert any(tensor.abs().max() > 0 for key, tensor in plain[3].items() if "lora_B" in key)
    return plain, cached


@pytest.mark.spread(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_adapter_are_those_of_a_run_without_it(tiny_gguf, tmp_path, monkeypatch, architecture):
    plain, cached = assert_same_run(tiny_gguf(architecture).path, tmp_path, monkeypatch)
    assert cached[0] < 0.6 * plain[0]  # three epochs and four evaluations, of which one has to compute
    assert not [path for path in (tmp_path / "cached").iterdir() if path.name.startswith(".")]


@pytest.mark.spread(1)
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_both_chatglms(tiny_chatglm, tmp_path, monkeypatch, generation):
    plain, cached = assert_same_run(tiny_chatglm(generation), tmp_path, monkeypatch, quantize="chatglm-int8")
    assert cached[0] < 0.6 * plain[0]


@pytest.mark.spread(2)
@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 1}, {"gradient_checkpointing": True, "lora_dropout": 0.2},
    {"gradient_accumulation_steps": 2, "max_tokens_per_pass": 60}, {"max_tokens_per_pass": 10_000},
    {"target_modules": "lm_head", "layers_to_transform": None},
], ids=lambda options: " ".join(options))  # fmt: skip
def test_whatever_the_run_does_beside_it(tiny_gguf, tmp_path, monkeypatch, options):
    assert_same_run(tiny_gguf("llama").path, tmp_path, monkeypatch, **options)


@pytest.mark.spread(1)
@pytest.mark.parametrize("architecture", ["stablelm", "gemma2"])
def test_where_attention_is_masked(tiny_gguf, tmp_path, monkeypatch, architecture):
    source = tiny_gguf(architecture).path
    plain = run_once(source, tmp_path / "plain", monkeypatch)
    cached = run_once(source, tmp_path / "cached", monkeypatch, cache_frozen_layers=True)
    for key in ("train_loss", "eval_loss"):
        assert cached[2].metrics[key] == pytest.approx(plain[2].metrics[key], rel=1e-4)
    assert cached[0] < 0.7 * plain[0]


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_one_does(tiny_gguf, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 3}
    *_, whole = run_once(tiny_gguf("llama").path, tmp_path / "whole", monkeypatch, **options)
    *_, report, first = run_once(
        tiny_gguf("llama").path, tmp_path / "cut", monkeypatch, cache_frozen_layers=True, **options
    )
    assert report.steps == 9
    shutil.rmtree(tmp_path / "cut" / "checkpoint-9")  # as a kill leaves it: a finished run is not taken up again
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    again = run_once(tiny_gguf("llama").path, tmp_path / "cut", monkeypatch, cache_frozen_layers=True,
                     resume_from_checkpoint="true", **options)  # fmt: skip
    assert len([entry for entry in again[1] if "loss" in entry]) == 3  # steps 7 to 9
    for key, tensor in whole.items():
        for other in (first[key], again[3][key]):
            torch.testing.assert_close(other, tensor, rtol=NEAR, atol=NEAR * float(tensor.abs().max()))


def test_each_sample_passes_the_lower_layers_once_and_the_file_is_as_large_as_said(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    below, above = tokens_through(model, 0), tokens_through(model, 1)
    report = train(model, tokenizer, ROWS, arguments(tmp_path / "out", val_size=0, cache_frozen_layers=True))
    tokens = report.metrics["tokens"] / 3
    note = next(note for note in report.notes if note.startswith("cache_frozen_layers"))
    assert f"layers 0 to 0 of 2 run once for each sample; {tokens:.0f} tokens x 256 bytes" in note
    assert sum(above) - sum(below) == pytest.approx(2 * tokens, abs=300)  # beside it there are trials on few samples
    assert "layers_to_transform" in json.dumps(json.loads((tmp_path / "out" / "run.json").read_text())["arguments"])


@pytest.fixture
def upper(tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2, layers_to_transform=[1])
    return model


SAMPLES = [Sample([5 + i % 50, 9, 11, *range(20, 40 + i)], [-100, *range(20, 42 + i)], "") for i in range(6)]


def hooks(model):
    """All hooks on the first layer and on the decoder."""
    return [
        list(module._forward_hooks) + list(module._forward_pre_hooks)
        for module in (decoder_layers(model)[0], model.base_model)
    ]


def test_the_file_has_no_name_while_it_is_used_and_equal_samples_share_a_place(upper, tmp_path):
    before = hooks(upper)
    with frozen_layers_cached(upper, SAMPLES, tmp_path / "new") as notes:
        assert list((tmp_path / "new").iterdir()) == []
        with frozen_layers_cached(upper, [*SAMPLES, *SAMPLES], tmp_path / "twice") as doubled:
            tokens = sum(len(sample.input_ids) for sample in SAMPLES)
            assert f"{tokens} tokens x 256 bytes" in notes[0] and f"{tokens} tokens" in doubled[0]
    assert "forward" not in vars(decoder_layers(upper)[0])
    assert hooks(upper) == before


def test_a_forward_that_was_there_before_comes_back(upper, tmp_path):
    layer = decoder_layers(upper)[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = layer.forward
    with frozen_layers_cached(upper, SAMPLES, tmp_path):
        assert layer.forward is not mine
    assert layer.forward is mine


def test_no_room_on_the_disk_ends_the_run_before_its_first_step(tiny_gguf, tmp_path, monkeypatch):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    train(model, tokenizer, ROWS, arguments(tmp_path / "out", save_strategy="epoch"))
    before = {path.name for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        StorageError, match=r"frozen-states: No space left on device, \d+ bytes to write, 1000 bytes free"
    ):
        train(model, tokenizer, ROWS, arguments(tmp_path / "out", cache_frozen_layers=True, overwrite_output_dir=True))
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_room_that_the_system_refuses_leaves_nothing(upper, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="frozen-states"), frozen_layers_cached(upper, SAMPLES, tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_below_is_frozen_it_is_refused(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    options = {"cache_frozen_layers": True, "layers_to_transform": None}
    with pytest.raises(OptionError, match="the adapter is in layer 0") as caught:
        train(model, tokenizer, ROWS, arguments(tmp_path / "out", **options))
    assert "layers_to_transform='1-1'" in str(caught.value)
    with pytest.raises(OptionError, match="a prefix is in every layer"):
        arguments(tmp_path / "out", cache_frozen_layers=True, pre_seq_len=4)
    qgraft.detach_adapter(model)
    qgraft.attach_prefix(model, 4)
    with pytest.raises(OptionError, match="default is a prefix"):
        frozen.first_adapted_layer(model)
    qgraft.detach_adapter(model)
    with pytest.raises(OptionError, match="the adapter is nowhere"):
        frozen.first_adapted_layer(model)


def test_trained_weights_below_are_refused(upper):
    decoder_layers(upper)[0].input_layernorm.weight.requires_grad_()
    with pytest.raises(OptionError, match=r"below layer 1 weights are trained: input_layernorm\.weight"):
        frozen.first_adapted_layer(upper)


def test_layers_that_drop_at_random_are_refused(tiny_gguf, tmp_path):
    model, _ = qgraft.load(tiny_gguf("gpt2").path)
    qgraft.attach_lora(model, r=2, layers_to_transform=[1])
    model.config.attn_pdrop = model.config.resid_pdrop = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with frozen_layers_cached(model, SAMPLES, tmp_path):
        pass
    decoder_layers(model)[0].mlp.dropout.p = 0.1
    with pytest.raises(OptionError, match="drop at random"), frozen_layers_cached(model, SAMPLES, tmp_path):
        pass


def test_layers_that_take_more_from_below_than_states_are_refused(tmp_path):
    config = transformers.Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_kv_shared_layers=1,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["full_attention"] * 4, laurel_rank=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Gemma3nForCausalLM(config).eval()
    qgraft.attach_lora(model, r=2, layers_to_transform=[3], target_modules=["up_proj"])
    with pytest.raises(UnsupportedError, match="hand on"), frozen_layers_cached(model, SAMPLES, tmp_path):
        pass
    assert "forward" not in vars(decoder_layers(model)[0])


class Looks(torch.nn.Module):
    """A layer that looks at what the first one computed."""

    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.seen = layer, []
        first.mlp.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs) + self.seen.pop()


def test_a_layer_that_looks_below_is_refused(upper, tmp_path):
    layers = decoder_layers(upper)
    upper.base_model.layers[1] = Looks(layers[1], layers[0])
    with pytest.raises(UnsupportedError, match="take more from below"), frozen_layers_cached(upper, SAMPLES, tmp_path):
        pass


def test_short_passes_take_part_too(upper, tmp_path):
    below = tokens_through(upper, 0)
    short = [Sample([5, 6, 7, 8 + i], [-100, -100, 7, 8], "") for i in range(3)]
    with frozen_layers_cached(upper, short, tmp_path):
        below.clear()
        for _ in range(2):
            batch_loss(upper, collate(short[:1]))
        assert below == [4]


def test_states_of_the_file_are_those_that_were_computed(upper, tmp_path):
    """In whatever order and company samples come again."""
    with frozen_layers_cached(upper, SAMPLES, tmp_path):
        first = [batch_loss(upper, collate([sample])).item() for sample in SAMPLES]
        again = batch_loss(upper, collate([SAMPLES[4], SAMPLES[1], SAMPLES[4]])).item()
    assert again == pytest.approx(2 * first[4] + first[1], rel=1e-5)


def test_samples_that_cannot_share_a_pass_have_their_own(tiny_gguf, tmp_path, monkeypatch):
    @contextmanager
    def apart(model, samples):
        yield "this model does not keep samples apart"

    monkeypatch.setattr(passes, "padding_free", apart)
    plain, cached = assert_same_run(tiny_gguf("llama").path, tmp_path, monkeypatch)
    assert cached[0] < 0.65 * plain[0]  # two passes of the longest sample come first
