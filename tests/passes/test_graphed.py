"""Static passes against the ordinary ones of the same batches, on a CPU; and which batch takes which graph."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qgraft
from qgraft import attention
from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.kernels import varlen_attention
from qgraft.kernels.summed_lora import casts_kept, kept_casts
from qgraft.passes import graphed, static_pass
from qgraft.passes.decoder import padding_free
from qgraft.passes.fused import fused_modules
from qgraft.passes.graphed import GraphedPasses, why_changing, why_eager
from qgraft.passes.loss import batch_loss
from qgraft.passes.static_pass import Shape, StaticPass, Tables, bucket_of


def sample(length, prompt=2, weight=None, first=3):
    ids = [3 + (first + 7 * i) % 200 for i in range(length)]
    weights = None if weight is None else [0.0] * prompt + [weight] * (length - prompt)
    return Sample(ids, [IGNORED] * prompt + ids[prompt:], "made", weights)


BATCHES = {  # together they fill tables of one shape, with several samples and with none that fill them up
    "one sample": [sample(40)],
    "several": [sample(31, 5), sample(9, 2, first=11), sample(60, 50)],
    "many short": [sample(3, 1, first=i) for i in range(20)],
    "weighed": [sample(31, 5, 0.5), sample(9, 2), sample(60, 50, 3.0)],
    "full": [sample(64), sample(64, first=5)],
    "no label": [sample(9, 9), sample(5, 5)],
}
SHAPE = Shape(128, 128, 32, 128)


@pytest.fixture
def trained(tiny_gguf, request):
    """A model as it is about to train, with a LoRA that is not zero."""
    model, _ = qgraft.load(tiny_gguf(getattr(request, "param", "llama")).path, device="cpu")
    qgraft.attach_lora(model, r=2)
    torch.manual_seed(1)
    for parameter in trained_of(model):
        nn.init.normal_(parameter, std=0.05)
    model.train()
    with padding_free(model, BATCHES["several"]) as problem, fused_modules(model):
        assert problem is None
        yield model


def trained_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def clear(model):
    for parameter in trained_of(model):
        parameter.grad = torch.zeros_like(parameter)


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in trained_of(model)])


def usual(model, batch, count, smoothing=0.0):
    clear(model)
    loss = batch_loss(model, batch, smoothing) / count
    loss.backward()
    return loss.detach(), gradients(model)


def alike(model, got, expected):
    loss, gradient = expected
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.fixture
def replaying(monkeypatch):
    """What a replay does on a GPU: the recorded work again, on tables that have been filled since."""
    monkeypatch.setattr(static_pass, "recorded", lambda work, device, pool: work)


@pytest.mark.parametrize("trained", ["llama", "qwen2", "qwen3", "gemma3"], indirect=True)
def test_a_static_pass_is_the_ordinary_pass_of_any_batch(trained, replaying):
    """gemma3 has a window of 16 tokens, which no sample that fills the tables up may open into another."""
    passing = StaticPass(trained, SHAPE)
    passing.record(None)
    for number, rows in enumerate(BATCHES.values()):
        expected = usual(trained, collate(rows), 10.0 + number)
        for run in (passing.run, passing.replay):
            clear(trained)
            passing.fill(collate(rows), 10.0 + number)
            run()
            alike(trained, passing.loss, expected)
    assert float(usual(trained, collate(BATCHES["several"]), 1.0)[1].abs().max()) > 1e-3


def test_a_recorded_pass_rounds_the_weights_of_its_adapter_itself(trained, replaying, monkeypatch):
    """Within a step whose other passes share theirs: these are of this step, and a replay is in many."""
    seen, states_at = [], static_pass.states_at

    def looked(*args, **kwargs):
        seen.append(kept_casts())
        return states_at(*args, **kwargs)

    monkeypatch.setattr(static_pass, "states_at", looked)
    passing = StaticPass(trained, SHAPE)
    passing.record(None)
    passing.fill(collate(BATCHES["several"]), 1.0)
    with casts_kept():
        step = kept_casts()
        passing.replay()
        assert kept_casts() is step
    assert len(seen) == 1 and seen[0] == {} and seen[0] is not step


def test_a_recorded_pass_does_not_look_at_the_samples_of_one_batch(trained, replaying, monkeypatch):
    """On a GPU their bounds cannot be read while a pass is recorded, nor when it is replayed."""
    passing = StaticPass(trained, SHAPE)
    passing.record(None)
    passing.fill(collate(BATCHES["several"]), 1.0)
    passing.run()

    def read(*_):
        raise AssertionError("bounds were read")

    monkeypatch.setattr(attention, "_checked_places", read)
    passing.replay()
    with pytest.raises(AssertionError):
        passing.run()


class Waiting(TorchDispatchMode):
    """Within the block: the operations that a GPU would have to be waited for, or be sent numbers of the CPU's."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.found, self.count = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += 1
        if name in self.NAMES or (name == "lift_fresh" and args[0].dim()):  # of one number, a kernel's argument
            self.found.add(name)
        return func(*args, **(kwargs or {}))


class NoBounds:
    """An attention of the right shapes that reads no bounds, as the kernel of a GPU does in the CPU's eyes."""

    @staticmethod
    def attend(query, key, value, bounds, **options):
        groups = query.shape[1] // key.shape[1]
        both = torch.cat([key + value] * groups, dim=1)
        return (query + both).transpose(1, 2)


@pytest.mark.parametrize("trained", ["llama", "qwen2", "qwen3", "gemma3", "phi3"], indirect=True)
def test_nothing_in_a_recorded_pass_waits_for_the_gpu(trained, monkeypatch):
    """Forward and backward, as transformers and we compute while torch says that a stream is recorded."""
    passing = StaticPass(trained, SHAPE)
    passing.fill(collate(BATCHES["several"]), 1.0)
    monkeypatch.setattr(varlen_attention, "choose", lambda *_: SimpleNamespace(module=NoBounds))
    with Waiting() as usually:
        passing.run()
    assert usually.found >= {"_local_scalar_dense", "equal"}  # transformers asks for samples, attention.py checks masks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(static_pass, "recorded", lambda work, device, pool: work)
    passing.record(None)
    clear(trained)
    with Waiting() as recorded:
        passing.replay()
    assert recorded.found == set() and recorded.count > 100
    assert float(gradients(trained).abs().max()) > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_batch_passes_through_the_tables_of_its_bucket(trained, smoothing):
    for rows in BATCHES.values():
        batch = collate(rows)
        expected = usual(trained, batch, 7.0, smoothing)
        clear(trained)
        passing = StaticPass(trained, bucket_of(Shape.of(batch), 4096), smoothing)
        passing.fill(batch, 7.0)
        passing.run()
        alike(trained, passing.loss, expected)


def test_lora_on_the_output_layer_is_learned_by_the_labels_alone(tiny_gguf, replaying):
    model, _ = qgraft.load(tiny_gguf("llama").path, device="cpu")
    qgraft.attach_lora(model, r=2, target_modules=["q_proj", "lm_head"])
    for parameter in trained_of(model):
        nn.init.normal_(parameter, std=0.05)
    model.train()
    with padding_free(model, BATCHES["several"]):
        expected = usual(model, collate(BATCHES["weighed"]), 9.0)
        clear(model)
        passing = StaticPass(model, SHAPE)
        passing.fill(collate(BATCHES["weighed"]), 9.0)
        passing.run()
        alike(model, passing.loss, expected)


# --- shapes

shapes = st.builds(
    lambda lengths, share: Shape(sum(lengths), int(sum(lengths) * share), len(lengths), max(lengths)),
    st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.floats(0, 1),
)  # fmt: skip


@given(shapes, st.integers(1, 20000))
def test_a_bucket_holds_its_batch_and_wastes_little(batch, budget):
    bucket = bucket_of(batch, budget)
    assert bucket.holds(batch)
    assert batch.tokens <= bucket.tokens <= max(batch.tokens, budget)
    assert bucket.tokens - batch.tokens < max(static_pass.STEP, batch.tokens / 2)
    assert bucket.longest <= bucket.tokens and bucket.labels <= bucket.tokens
    assert bucket.longest < 2 * max(batch.longest, static_pass.STEP)
    assert bucket.samples <= max(static_pass.LEAST_SAMPLES, 3 * batch.samples + 4)


def test_tables_need_room_for_the_samples_that_fill_them_up():
    assert Shape(128, 128, 3, 64).holds(Shape(40, 38, 1, 40))  # 40, 64 and 24 tokens
    assert not Shape(128, 128, 2, 64).holds(Shape(40, 38, 1, 40))


@given(shapes)
def test_few_buckets_are_for_many_sizes(batch):
    bucket = bucket_of(batch, 1 << 30)
    power = 1 << (bucket.tokens.bit_length() - 1)
    assert bucket.tokens % static_pass.STEP == 0
    assert bucket.tokens <= 4 * static_pass.STEP or bucket.tokens / power in (1.0, 1.25, 1.5, 1.75)
    assert bucket_of(Shape(bucket.tokens, 1, 1, 1), 1 << 30).tokens == bucket.tokens


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90)), min_size=1, max_size=12), st.booleans())
def test_tables_hold_the_batch_and_samples_that_nobody_learns(sizes, weighed):
    rows = [sample(length, min(prompt, length), 0.5 if weighed else None) for length, prompt in sizes]
    batch = collate(rows)
    shape = Shape.of(batch)
    assert shape == Shape(sum(n for n, _ in sizes), int((batch["labels"] != IGNORED).sum()), len(sizes), max(sizes)[0])
    bucket = bucket_of(shape, 4096)
    tables = Tables(bucket, torch.device("cpu"))
    tables.fill(batch, 4.0, bucket.longest)
    bounds = tables.bounds.tolist()
    assert bounds[0] == 0 and bounds[-1] == bucket.tokens and bounds == sorted(bounds)
    assert int(tables.bounds.diff().max()) <= bucket.longest
    own = [sum(n for n, _ in sizes[:i]) for i in range(len(sizes) + 1)]
    assert bounds[: len(own)] == own or shape.tokens == bucket.tokens == own[-1]
    assert torch.equal(tables.input_ids[: shape.tokens], batch["input_ids"][0])
    starts = (tables.position_ids == 0).nonzero()[:, 0].tolist()
    assert starts == [start for start in dict.fromkeys(bounds) if start < bucket.tokens]
    assert float(tables.weights.sum()) == pytest.approx(shape.labels * (0.5 if weighed else 1.0) / 4)
    labels = batch["labels"][0]
    learned = tables.weights != 0
    assert torch.equal(tables.labels[learned], labels[labels != IGNORED])
    if shape.labels:
        assert torch.equal(tables.labels, labels[tables.places])


# --- which batch takes which graph


def learned(passes, rows, count=5.0):
    """(the loss, the gradient) of a batch by graphs, or None."""
    clear_in_place(passes.model)
    loss = passes.learn(collate(rows), count)
    return None if loss is None else (loss.clone(), gradients(passes.model).clone())


def clear_in_place(model):
    for parameter in trained_of(model):
        parameter.grad.zero_()


def test_a_size_passes_eagerly_once_is_recorded_and_replayed(trained, replaying):
    clear(trained)
    said = []
    passes = GraphedPasses(trained, trained_of(trained), 4096, say=said.append)
    order = ["several", "weighed", "several", "full", "weighed", "full", "full"]
    for number, name in enumerate(order):
        rows = BATCHES[name]
        got = learned(passes, rows)
        loss = batch_loss(trained, collate(rows)) / 5.0
        clear_in_place(trained)
        loss.backward()
        torch.testing.assert_close(got[0], loss.detach(), rtol=1e-5, atol=1e-6, msg=f"{number} {name}")
        torch.testing.assert_close(got[1], gradients(trained), rtol=1e-5, atol=1e-6, msg=f"{number} {name}")
    assert (passes.recorded, passes.replayed) == (2, 5) and len(said) == 1


def test_a_graph_takes_a_batch_that_is_hardly_smaller(trained, replaying):
    clear(trained)
    passes = GraphedPasses(trained, trained_of(trained), 4096)
    large = [sample(100), sample(100), sample(55)]  # 255 tokens
    assert learned(passes, large) and learned(passes, large)
    assert learned(passes, [sample(100), sample(100), sample(40)]) and passes.replayed == 2  # of 240, the same bucket
    assert learned(passes, [sample(60), sample(40)]) and passes.replayed == 2  # 128 would be half of it


def test_beyond_the_most_graphs_batches_take_a_larger_one_or_pass_eagerly(trained, replaying, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 1)
    clear(trained)
    passes = GraphedPasses(trained, trained_of(trained), 4096)
    for _ in range(2):
        assert learned(passes, BATCHES["full"])
    assert learned(passes, BATCHES["one sample"]) and passes.replayed == 2  # in tables three times as large
    assert learned(passes, [*BATCHES["full"], sample(64)]) is None
    assert passes.recorded == 1


def test_a_pass_that_is_not_bound_by_the_cpu_is_not_replayed(trained, replaying):
    clear(trained)
    passes = GraphedPasses(trained, trained_of(trained), 4096, most=100)
    assert learned(passes, BATCHES["full"]) is None and learned(passes, BATCHES["one sample"]) is not None


@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_recorded_is_said_once_and_passes_eagerly(trained, monkeypatch, late):
    """`late`: what was recorded has taken too much memory."""

    def fails(self, pool):
        self.replay = (lambda: pytest.fail("replayed")) if late else None
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(StaticPass, "record", fails)
    said = []
    batch = collate(BATCHES["several"])
    loss, gradient = usual(trained, batch, 5.0)
    clear(trained)
    passes = GraphedPasses(trained, trained_of(trained), 4096, say=said.append)
    learned(passes, BATCHES["several"])
    got = learned(passes, BATCHES["several"])  # its gradient is there, once
    torch.testing.assert_close(got[0], loss)
    torch.testing.assert_close(got[1], gradient)
    assert learned(passes, BATCHES["several"]) is None and passes.problem == said[0].rpartition(": ")[2]
    assert said == [
        "cuda_graphs: passes go on one kernel after another: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("when", [1, 2])
def test_a_replay_that_comes_to_another_gradient_is_the_last(trained, monkeypatch, when):
    """Of the first batch, or after a step: what counts is the ordinary pass."""
    replays = []

    def lying(work, device, pool):
        def replay():
            replays.append(1)
            work()
            if len(replays) == when:
                trained_of(trained)[-1].grad.mul_(1.5)

        return replay

    monkeypatch.setattr(static_pass, "recorded", lying)
    said = []
    clear(trained)
    passes = GraphedPasses(trained, trained_of(trained), 4096, say=said.append)
    learned(passes, BATCHES["several"])
    for number in range(2):
        got = learned(passes, BATCHES["several"])
        loss = batch_loss(trained, collate(BATCHES["several"])) / 5.0
        clear_in_place(trained)
        loss.backward()
        torch.testing.assert_close(got[0], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], gradients(trained), rtol=1e-5, atol=1e-6)
        if number == when - 1:
            assert "% off" in said[-1] and learned(passes, BATCHES["several"]) is None
            break
        with torch.no_grad():
            trained_of(trained)[0].mul_(1.5)  # a step
    assert len(replays) == when


def test_gradients_that_have_moved_are_not_written_to_by_an_old_graph(trained, replaying):
    clear(trained)
    passes = GraphedPasses(trained, trained_of(trained), 4096)
    for _ in range(3):
        learned(passes, BATCHES["full"])
    assert passes.replayed == 2
    kept = [parameter.grad for parameter in trained_of(trained)]
    clear(trained)  # other tensors
    assert learned(passes, BATCHES["full"]) and passes.replayed == 2
    trained_of(trained)[0].grad = None
    assert passes.learn(collate(BATCHES["full"]), 1.0) is None
    assert len(kept)


# --- what is refused


def test_a_model_on_a_cpu_passes_eagerly(trained):
    assert why_eager(trained) == "the model is not on a GPU"
    assert why_changing(trained) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.set_attn_implementation("sdpa"), "sample by sample"),
        (lambda model: model.model.layers[0].register_forward_hook(lambda *_: None), r"model.layers.0 has a hook"),
        (lambda model: model.register_full_backward_hook(lambda *_: None), "the model has a hook"),
        (lambda model: setattr(model.config, "attention_dropout", 0.1), "drops at random"),
        (lambda model: setattr(model.model, "drop", nn.Dropout(0.1)), "drops at random"),
        (lambda model: setattr(model.config, "residual_dropout", 0.1), "drops at random"),  # Starcoder 2's
        (lambda model: setattr(model.config, "attention_chunk_size", 8), "other ways"),
        (lambda model: setattr(model.config, "layer_types", ["linear_attention"]), "other ways"),
        (lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"), "length of the text"),
    ],
)
def test_a_pass_that_is_another_one_each_time_is_refused(trained, change, reason, request):
    change(trained)
    try:
        assert reason in why_changing(trained)
    finally:
        trained.config.attention_dropout, trained.config.layer_types = 0.0, None


def test_dropout_of_the_adapter_and_prefixes_are_refused(tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path, device="cpu")
    qgraft.attach_lora(model, r=2, lora_dropout=0.1)
    with padding_free(model, BATCHES["several"]):
        assert "lora_dropout" in why_changing(model)
    qgraft.detach_lora(model)
    qgraft.attach_prefix(model, pre_seq_len=2)
    with padding_free(model, BATCHES["several"]):
        assert why_changing(model) == "a prefix is trained"
