"""The memory of a run: counted on the model, compared with torch's profiler and with shapes; the choice of a setting."""

import json
from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import qgraft
from qgraft.data.batches import collate
from qgraft.errors import OptionError, UnsupportedError
from qgraft.memory.budget import GPU_TOKENS, training_tokens
from qgraft.memory.measure import SIZES, Activations, Growth, LiveBytes, measure_activations, sample_of
from qgraft.memory.settings import (
    GPU_UNPACKING,
    SPARE,
    Counted,
    Setting,
    base_bytes,
    estimate,
    fastest,
    limit_bytes,
    settle_noted,
)
from qgraft.passes import loss
from qgraft.passes.decoder import label_states, padding_free
from qgraft.passes.loss import summed_cross_entropy
from qgraft.sizes import UNITS, format_size, parse_size
from qgraft.training.adapter import prepare_adapter
from qgraft.training.run import train

MB = 10**6
ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(20)]


def arguments(**options):
    return qgraft.TrainArguments(use_cpu=True, **options)


@pytest.fixture
def model(tiny_gguf):
    loaded, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(loaded, r=2)
    return loaded


# --- counting


@given(st.integers(0, 10**9), st.integers(0, 10**7), st.integers(0, 10**4), st.integers(1, 4096))
def test_a_polynomial_of_the_tokens_is_found_from_three_passes(constant, slope, square, tokens):
    growth = Growth(tuple(constant + slope * n + square * n * n for n in SIZES))
    expected = constant + slope * tokens + square * tokens**2
    assert growth.at(tokens) == pytest.approx(expected, rel=1e-9, abs=2)
    assert growth.is_line == (square == 0)
    assert growth.straightened().is_line


def test_live_bytes_are_those_of_the_tensors_that_are_there():
    given_before = torch.ones(1000)
    with LiveBytes() as live:
        a = torch.zeros(1000)  # 4000
        view = a[10:].view(-1)
        a.add_(1)
        given_before.mul_(2)
        assert live.now == 4000
        b = a.double()  # 8000 more
        assert (live.now, live.peak, live.largest) == (12000, 12000, 8000)
        del a
        assert live.now == 12000  # the view holds it
        del view, b
        assert (live.now, live.peak) == (0, 12000)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3"])
def test_what_is_kept_is_what_torch_allocates_in_a_forward_pass(tiny_gguf, architecture):
    model, _ = qgraft.load(tiny_gguf(architecture).path)
    qgraft.attach_lora(model, r=2)
    tokens = 80
    with padding_free(model, [sample_of(model, 9), sample_of(model, 10)]):
        counted = measure_activations(model)
        model.train()
        batch = collate([sample_of(model, tokens)])
        label_states(model, batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            states, labels = label_states(model, batch)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    supposed = 2 * tokens * states.shape[1] * 4  # states of labels and their gradient, which come later
    kept = sum(layer.at(tokens) for layer in counted.layers) + counted.outside.at(tokens) - supposed
    returned = states.nbytes + labels.nbytes
    assert kept == pytest.approx(allocated - returned, rel=0.03)


def test_checkpointing_keeps_one_hidden_state_a_layer(model):
    with padding_free(model, [sample_of(model, 9), sample_of(model, 10)]):
        counted = measure_activations(model)
    hidden = model.config.hidden_size * 4
    first, second, _ = counted.inputs.values
    rotary = 2 * 16 * 4  # cos and sin of 16 numbers, shared by the layers
    assert second - first == (SIZES[1] - SIZES[0]) * (2 * hidden + rotary + 8)  # and positions
    assert all(layer.at(64) > 5 * 64 * hidden for layer in counted.layers)


def test_more_tokens_and_a_larger_adapter_take_more(tiny_gguf):
    def total(**options):
        model, _ = qgraft.load(tiny_gguf("llama").path)
        args = arguments(**options)
        prepare_adapter(model, args)
        return {each.setting.checkpointing: each for each in estimate(model, args)}

    small, large = total(r=2, max_tokens_per_pass=64), total(r=2, max_tokens_per_pass=640)
    assert small[False].activations < large[False].activations
    assert large[True].activations < large[False].activations
    assert small[False].layers[0] == pytest.approx(large[False].layers[0] / 10, rel=0.05)
    adamw, sgd = total(r=4), total(r=4, optim="sgd")
    assert adamw[False].adapter == 2 * small[False].adapter == 2 * sgd[False].adapter


def test_counting_leaves_no_trace(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with padding_free(model, [sample_of(model, 9), sample_of(model, 10)]):
        measure_activations(model)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_base_is_counted_once_and_without_an_embedding_of_its_own(tiny_gguf):
    tied, _ = qgraft.load(tiny_gguf("qwen2").path)
    packed = {buffer.data_ptr(): buffer.nbytes for buffer in [*tied.buffers(), *tied.parameters()]}
    table = tied.get_input_embeddings().packed_weight.get().parts[0]
    shared = table.data_ptr() == tied.get_output_embeddings().packed.parts[0].data_ptr()
    assert base_bytes(tied) == sum(packed.values()) - (0 if shared else table.nbytes)


def test_a_model_without_layers_is_refused():
    with pytest.raises(UnsupportedError, match="no layers"):
        measure_activations(nn.Linear(2, 2))


def test_no_tensor_of_the_loss_grows_with_vocabulary_times_labels():
    torch.manual_seed(0)
    weight = torch.randn(50_000, 16)
    peaks = []
    for labels in (1000, 2000):
        states = torch.randn(labels, 16, requires_grad=True)
        with LiveBytes() as live:
            summed_cross_entropy(states, torch.randint(50_000, (labels,)), lambda x: x @ weight.T).backward()
        assert live.largest <= loss.CHUNK_BYTES < labels * 50_000 * 4
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] < 1000 * 16 * 4 * 4  # states and gradients only


# --- choosing


def counted(process=400 * MB, base=100 * MB):
    def line(per_token):
        return Growth(tuple(per_token * n for n in SIZES))

    return Counted(
        Activations((line(100_000),) * 10, line(20_000), line(1000), line(50_000), 50 * MB), process, base, 0
    )


def chosen(limit, least=50, most=500, **options):
    return fastest(counted(), arguments(memory_limit=limit, **options), least, most)


def test_the_estimate_adds_up():
    found = counted().estimate(Setting(200))
    assert (found.activations, found.working) == (200 * 1_001_000, 50 * MB)
    assert found.total == 750_200_000 == sum(found.parts().values())
    saving = counted().estimate(Setting(2000, checkpointing=True))
    assert (saving.activations, saving.working) == (2000 * 21_000, 2000 * 150_000)


def test_the_fastest_setting_that_fits_is_chosen():
    assert chosen("2GB").setting == Setting(500)
    smaller = chosen("1GB").setting
    assert not smaller.checkpointing and 300 < smaller.tokens_per_pass < 400
    # passes of 39 tokens without it fit too, but take longer
    assert chosen("656MB", least=20).setting == Setting(500, checkpointing=True)
    assert chosen("2GB", gradient_checkpointing=True).setting == Setting(500, checkpointing=True)
    with_long_samples = chosen("900MB", least=450).setting
    assert with_long_samples.checkpointing


@given(st.integers(640, 3000), st.integers(10, 100), st.integers(0, 3000))
def test_what_is_chosen_fits_and_nothing_cheaper_does(limit, least, more):
    most = least + more
    found = chosen(f"{limit}MB", least, most)
    assert found.total <= (1 - SPARE) * limit * MB
    assert least <= found.setting.tokens_per_pass <= most
    others = [
        counted().estimate(Setting(tokens, ckpt)) for tokens in range(least, most + 1, 7) for ckpt in (False, True)
    ]
    assert all(other.setting.cost >= found.setting.cost for other in others if other.total <= (1 - SPARE) * limit * MB)


def test_graphs_hold_the_activations_of_a_pass_once_more():
    replaying = replace(counted(), graphed=200.0)
    found = replaying.estimate(Setting(200))
    assert found.graphs == found.activations + found.working == found.parts()["graphs"]
    assert found.total == 750_200_000 + found.graphs == sum(found.parts().values())
    for setting in (Setting(201), Setting(200, checkpointing=True)):
        assert replaying.estimate(setting) == counted().estimate(setting)
        assert "graphs" not in replaying.estimate(setting).parts()


def test_graphs_that_are_asked_for_have_room_and_others_take_what_is_left():
    replaying = replace(counted(), graphed=inf)

    def choose(cuda_graphs, limit):
        args = arguments(memory_limit=limit, cuda_graphs=cuda_graphs)
        return fastest(replaying, args, 50, 500)

    asked = choose("yes", "1GB")
    assert asked.graphs and asked.total <= 0.9e9 and asked.setting.tokens_per_pass < 200
    usual = choose("auto", "1GB")
    assert usual == chosen("1GB") and not usual.graphs  # the same pass as without, and no room for its graph
    assert choose("auto", "2GB").graphs and choose("auto", "2GB").setting == Setting(500)


def test_a_limit_that_nothing_fits_into_says_what_is_needed():
    with pytest.raises(OptionError, match=r"smallest setting needs 551 MB with 50 tokens.*\n.*longest sample has 50"):
        chosen("540MB")


# --- amounts


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("6 gb", 6 * 10**9), ("1.5GiB", 3 * 2**29), ("800MB", 800 * MB), ("512 MiB", 2**29)],
)
def test_amounts_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "six GB", "-1GB", "0GB", "6 parsecs", "1e3MB", "1..5GB", ""])
def test_other_amounts_are_refused(text):
    with pytest.raises(OptionError, match="amount of memory"):
        parse_size(text)
    with pytest.raises(OptionError):
        arguments(memory_limit=text)


@given(st.integers(1, 999), st.sampled_from(sorted(UNITS)))
def test_amounts_survive_writing_to_three_digits(number, unit):
    size = number * UNITS[unit]
    if size >= MB:
        assert parse_size(format_size(size)) == pytest.approx(size, rel=0.5 if size < 10 * MB else 0.05)


def test_auto_is_a_share_of_what_is_free():
    assert 0 < limit_bytes("auto", 0) <= limit_bytes("auto", 10**9)


# --- a run


def run(tiny_gguf, folder, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    options = {"max_steps": 3, "save_strategy": "no", "r": 2, "learning_rate": 1e-2, "lora_dropout": 0.1} | options
    return train(model, tokenizer, ROWS, arguments(output_dir=str(folder), **options))


@pytest.mark.slow
def test_a_run_with_a_limit_trains_the_same_and_reports_its_estimate(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "without", max_tokens_per_pass=100, val_size=4)
    report = run(tiny_gguf, tmp_path / "with", max_tokens_per_pass=100, val_size=4, memory_limit="900GB")
    saved = json.loads((tmp_path / "with" / "run.json").read_text())
    assert saved["metrics"]["estimated_memory_bytes"] == report.metrics["estimated_memory_bytes"] > 0
    assert saved["arguments"]["max_tokens_per_pass"] == 100 and saved["arguments"]["memory_limit"] == "900GB"
    assert any("memory_limit 900GB" in note and "100 tokens a pass" in note for note in saved["notes"])
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("without", "with")]
    assert adapters[0] == adapters[1]


def test_a_limit_that_is_too_small_ends_the_run_before_it_starts(tiny_gguf, tmp_path):
    with pytest.raises(OptionError, match="smallest setting needs"):
        run(tiny_gguf, tmp_path, memory_limit="1MB")
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_checkpointing_is_turned_on_where_the_limit_asks_for_it(tiny_gguf, tmp_path, monkeypatch):
    free = {"activations": 0}

    def remember(counted_model, args, least, most):
        free["activations"] = counted_model.estimate(Setting(least)).total
        needed = counted_model.estimate(Setting(least, checkpointing=True)).total / (1 - SPARE)
        args.memory_limit = f"{int(needed) // 1000 + 1} kB"
        return fastest(counted_model, args, least, most)

    monkeypatch.setattr("qgraft.memory.settings.fastest", remember)
    report = run(tiny_gguf, tmp_path, memory_limit="1GB", max_tokens_per_pass=2000)
    assert report.finished
    assert report.metrics["estimated_memory_bytes"] < free["activations"]
    assert any("gradient checkpointing on" in note for note in report.notes)


# --- a GPU, whose memory says how large a pass is


def test_on_a_gpu_the_memory_decides_where_nobody_says_how_large_a_pass_is(model, monkeypatch):
    """The choice itself, on a CPU that is taken for a GPU."""
    args = arguments(r=2, per_device_train_batch_size=4)
    assert training_tokens(args) == 384
    samples = [sample_of(model, n) for n in (40, 50, 60, 70, 80)]
    notes = []
    assert settle_noted(model, args, samples, False, notes, None) == (384, {}) and not notes
    monkeypatch.setattr("qgraft.memory.budget.on_gpu", lambda _: True)
    monkeypatch.setattr("qgraft.memory.settings.on_gpu", lambda _: True)
    assert training_tokens(args) == GPU_TOKENS
    with padding_free(model, samples):
        budget, metrics = settle_noted(model, args, samples, False, notes, None)
        assert budget == args.max_tokens_per_pass == 260  # the four longest: a batch is never larger
        assert metrics["estimated_memory_bytes"] > 0 and "memory_limit auto: " in notes[0]
        asked = arguments(r=2, max_tokens_per_pass=100)
        assert settle_noted(model, asked, samples, False, notes, None) == (100, {})
    assert len(notes) == 1
    assert Setting(2000, unpacking=GPU_UNPACKING).cost > Setting(2000).cost


def test_a_model_that_cannot_be_counted_gets_small_passes_on_a_gpu(model, monkeypatch):
    monkeypatch.setattr("qgraft.memory.budget.on_gpu", lambda _: True)
    monkeypatch.setattr("qgraft.memory.settings.on_gpu", lambda _: True)

    def refuse(*_):
        raise UnsupportedError("no layers")

    monkeypatch.setattr("qgraft.memory.settings.settle", refuse)
    notes = []
    args = arguments(r=2)
    assert settle_noted(model, args, [], False, notes, None) == (2048, {})
    assert notes == ["no layers; passes of 2048 tokens"]
    with pytest.raises(UnsupportedError):
        settle_noted(model, arguments(r=2, memory_limit="1GB"), [], False, notes, None)
