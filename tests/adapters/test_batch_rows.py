"""One batch with an adapter for each row: every row comes out as it does alone, in forward and in generate()."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.adapters.attach import attach_lora, detach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import active_adapters, use_adapter
from qgraft.adapters.targets import lora_layers
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import AdapterError, OptionError, UnsupportedError

Maker = Callable[..., Any]
Names = Sequence[str | None]
TARGETS: dict[str, dict[str, Any]] = {  # adapters of different ranks and layers, one of them on the output layer
    "law": {"r": 4, "lora_alpha": 8},
    "med": {"r": 2, "use_rslora": True, "target_modules": r".*(layers|h)\.1\..*|lm_head"},
}
MIXED = ["law", None, "med", "law", None]


def attach(model: nn.Module) -> None:
    for seed, (name, options) in enumerate(TARGETS.items()):
        attach_lora(model, name=name, **options)
        generator = torch.Generator().manual_seed(seed)
        for lora in find_adapter(model, name).parts.values():
            lora.lora_B.data.normal_(0, 0.1, generator=generator)


def with_adapters(tiny: Any) -> PreTrainedModel:
    model = load_gguf(tiny.path, torch.float32)[0].eval()
    attach(model)
    return model


@pytest.fixture
def model(tiny_gguf: Maker) -> PreTrainedModel:
    return with_adapters(tiny_gguf("llama"))


def alone(model: nn.Module, name: str | None, ids: Tensor, **inputs: Any) -> Tensor:
    """The logits of rows that all use one adapter, in the ordinary way."""
    before = active_adapters(model)
    use_adapter(model, name)
    with torch.no_grad():
        logits = model(ids, **inputs).logits
    use_adapter(model, before)
    return logits


def each_alone(model: nn.Module, names: Names, ids: Tensor) -> Tensor:
    return torch.cat([alone(model, name, ids[row : row + 1]) for row, name in enumerate(names)])


def mixed(model: nn.Module, names: Names, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, adapter_names=names, **inputs).logits


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3", "stablelm"])
def test_each_row_is_what_it_is_alone(tiny_gguf: Maker, random_ids: Maker, architecture: str) -> None:
    model = with_adapters(tiny_gguf(architecture))
    ids = random_ids(model, rows=5)
    got, expected = mixed(model, MIXED, ids), each_alone(model, MIXED, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for wrong in ("law", "med", None):  # the rows do differ
        assert not torch.allclose(got, alone(model, wrong, ids), rtol=1e-2, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from(["law", "med", "tax", None]), min_size=1, max_size=9), bias=st.booleans())
def test_values_in_float64(names: list[str | None], bias: bool) -> None:
    """On plain layers without any transformer: y = W x + s B A x, row by row, in any grouping."""
    layers = nn.Sequential(nn.Linear(6, 5, bias), nn.Linear(5, 4, bias)).double()
    attach_lora(layers, r=2, lora_alpha=3, target_modules="0,1", name="law")
    attach_lora(layers, r=1, use_rslora=True, target_modules="1", name="med")
    attach_lora(layers, r=3, target_modules="0", name="tax")
    for lora in (lora for name in ("law", "med", "tax") for lora in find_adapter(layers, name).parts.values()):
        nn.init.normal_(lora.lora_B)
    x = expected = torch.randn(len(names), 6, dtype=torch.float64)
    for _, layer in lora_layers(layers):
        weights = [layer.base.weight] * len(names)
        for row, name in enumerate(names):
            if name in layer.loras:
                weights[row] = weights[row] + layer.loras[name].delta().double()
        products = [weight @ value for weight, value in zip(weights, expected, strict=True)]
        expected = torch.stack(products) + (layer.base.bias if bias else 0)
    torch.testing.assert_close(layers(x, adapter_names=names), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["law", "med", None])
def test_one_adapter_for_all_rows_is_that_adapter_bit_for_bit(
    model: PreTrainedModel, random_ids: Maker, name: str | None
) -> None:
    ids = random_ids(model, rows=3)
    assert torch.equal(mixed(model, [name] * 3, ids), alone(model, name, ids))


def test_what_is_active_does_not_matter_and_stays(model: PreTrainedModel, random_ids: Maker) -> None:
    ids = random_ids(model, rows=5)
    results = []
    for active in (None, "law", {"law": 0.3, "med": -2.0}):
        use_adapter(model, active)
        before = active_adapters(model)
        plain = model(ids).logits
        results.append(mixed(model, MIXED, ids))
        assert active_adapters(model) == before
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_padded_rows_and_embeddings_as_inputs(model: PreTrainedModel, random_ids: Maker) -> None:
    ids, mask = random_ids(model, rows=3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = mask[2, :2] = 0
    names = ["med", "law", None]
    got = mixed(model, names, ids, attention_mask=mask)
    for row, name in enumerate(names):
        short = int(mask[row].sum())
        expected = alone(model, name, ids[row : row + 1, -short:])
        torch.testing.assert_close(got[row : row + 1, -short:], expected, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        again = model(inputs_embeds=embeds, attention_mask=mask, adapter_names=names).logits
    torch.testing.assert_close(again, got)


def test_the_base_runs_once_for_the_whole_batch(model: PreTrainedModel, random_ids: Maker) -> None:
    calls: list[int] = []
    for _, layer in lora_layers(model):
        layer.base.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    mixed(model, MIXED, random_ids(model, rows=5))
    assert calls == [5] * len(list(lora_layers(model)))


def test_a_padding_free_batch_is_one_row(model: PreTrainedModel, random_ids: Maker) -> None:
    ids = random_ids(model, rows=1)
    positions = torch.tensor([[*range(7), *range(5)]])
    expected = alone(model, "law", ids, position_ids=positions)
    assert torch.equal(mixed(model, ["law"], ids, position_ids=positions), expected)
    with pytest.raises(OptionError, match="got 2 names, expected 1"):
        mixed(model, ["law", "med"], ids, position_ids=positions)


def test_autocast(model: PreTrainedModel, random_ids: Maker) -> None:
    ids = random_ids(model, rows=5)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = mixed(model, MIXED, ids), each_alone(model, MIXED, ids)
    assert float((got - expected).norm() / expected.norm()) < 0.02


# ---------------------------------------------------------------- gradients


@pytest.fixture
def trainable(model: PreTrainedModel) -> PreTrainedModel:
    use_adapter(model, {"law": 1.0, "med": 1.0})
    return model.train()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_the_sum_over_rows_alone(trainable: PreTrainedModel, random_ids: Maker) -> None:
    ids = random_ids(trainable, rows=5)
    got = gradients(trainable, trainable(ids, adapter_names=MIXED).logits.square().sum())
    expected: dict[str, Tensor] = {}
    for row, name in enumerate(MIXED):
        if name is not None:
            use_adapter(trainable, name)
            loss = trainable(ids[row : row + 1]).logits.square().sum()
            for key, grad in gradients(trainable, loss).items():
                expected[key] = expected.get(key, 0) + grad
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        assert grad is not None, key
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-4 * float(expected[key].abs().max()))


def test_gradient_checkpointing_is_refused_in_training_and_nowhere_else(
    trainable: PreTrainedModel, random_ids: Maker
) -> None:
    """The layers would run a second time after the forward, for the active adapters instead of the rows'."""
    enable = getattr(trainable, "activation_checkpointing_enable", None) or trainable.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    ids = random_ids(trainable, rows=5)
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        trainable(ids, adapter_names=MIXED)
    trainable(ids).logits.sum().backward()
    assert mixed(trainable.eval(), MIXED, ids).shape[0] == 5


def test_dropout_is_drawn_in_training_only(model: PreTrainedModel, random_ids: Maker) -> None:
    attach_lora(model, name="tax", lora_dropout=0.5)
    for lora in find_adapter(model, "tax").parts.values():
        nn.init.normal_(lora.lora_B, 0, 0.1)
    ids, names = random_ids(model), ["tax", "law"]
    assert torch.equal(mixed(model, names, ids), mixed(model, names, ids))
    model.train()
    first, second = mixed(model, names, ids), mixed(model, names, ids)
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])


# ---------------------------------------------------------------- generate


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    tokens = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **tokens, **options)


@pytest.mark.parametrize(
    ("search", "repeated"),
    [({}, 1), ({"num_beams": 3}, 1), ({"num_beams": 4, "num_return_sequences": 2}, 2), ({"use_cache": False}, 1)],
    ids=["greedy", "beams", "several beams of each", "no cache"],
)
def test_generate_is_row_by_row_what_it_is_alone(
    model: PreTrainedModel, random_ids: Maker, search: dict[str, Any], repeated: int
) -> None:
    ids, names = random_ids(model, rows=4), ["law", None, "med", "law"]
    got = generate(model, ids, adapter_names=names, **search)
    rows = []
    for row, name in enumerate(names):
        use_adapter(model, name)
        rows.append(generate(model, ids[row : row + 1], **search))
    assert [len(row) for row in rows] == [repeated] * 4
    assert torch.equal(got, torch.cat(rows))
    use_adapter(model, None)
    assert not torch.equal(got, generate(model, ids, **search))


def test_generate_checks_the_names_and_forgets_them(model: PreTrainedModel, random_ids: Maker) -> None:
    ids = random_ids(model)
    use_adapter(model, "law")
    expected = generate(model, ids)
    generate(model, ids, adapter_names=[None, "med"])
    assert torch.equal(generate(model, ids), expected)
    with pytest.raises(OptionError, match="got 1 names, expected 2"):
        generate(model, ids, adapter_names=["med"])
    with pytest.raises(AdapterError, match="no adapter named 'tax'"):
        generate(model, ids, adapter_names=["med", "tax"])
    with pytest.raises(ValueError, match="nonsense"):
        generate(model, ids, adapter_names=[None, "med"], nonsense=1)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(model.generate(inputs=ids, adapter_names=["law"] * 2, max_new_tokens=2)[:, :12], ids)


# ---------------------------------------------------------------- mistakes, and what is left behind


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["law"], OptionError, "got 1 names, expected 2, one for each row"),
        (["law", None, "med"], OptionError, "got 3 names, expected 2"),
        ([], OptionError, "got 0 names, expected 2"),
        (["law", "lav"], AdapterError, "no adapter named 'lav'; attached: law, med\nhint: did you mean law"),
        ("law", OptionError, "adapter_names='law': expected a list"),
        (["law", 1], OptionError, r"adapter_names=\['law', 1\]: expected a list"),
    ],
)
def test_wrong_names_are_refused(
    model: PreTrainedModel, random_ids: Maker, names: Any, error: type[Exception], message: str
) -> None:
    ids = random_ids(model)
    expected = alone(model, "med", ids)
    with pytest.raises(error, match=message):
        model(ids, adapter_names=names)
    assert torch.equal(alone(model, "med", ids), expected)


def test_a_batch_must_be_there(model: PreTrainedModel) -> None:
    with pytest.raises(OptionError, match="there is no batch"):
        model(adapter_names=["law"])


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_nothing_behind(
    model: PreTrainedModel, random_ids: Maker, kind: type[BaseException]
) -> None:
    ids = random_ids(model)
    use_adapter(model, "law")
    expected = model(ids).logits

    def fail(*_: Any) -> None:
        raise kind

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(kind):
        model(ids, adapter_names=[None, "med"])
    hook.remove()
    assert torch.equal(model(ids).logits, expected)


class Flattening(nn.Module):
    """Mixes rows and tokens in one dimension, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, -2)).view(x.shape)


def test_layers_that_do_not_see_the_rows_are_refused() -> None:
    model = Flattening()
    attach_lora(model, target_modules="inner", name="law")
    with pytest.raises(UnsupportedError, match=r"gave \[6, 4\], expected 2 rows in 3 dimensions"):
        model(torch.ones(2, 3, 4), adapter_names=["law", None])
    with pytest.raises(UnsupportedError, match=r"gave \[2, 4\], expected 2 rows in 3 dimensions"):
        model(torch.ones(2, 1, 4), adapter_names=["law", None])
    x = torch.randn(2, 3, 4)
    assert torch.equal(model(x, adapter_names=["law", "law"]), model(x))  # one adapter for all needs no telling apart
    assert model(x[:, 0], adapter_names=["law", None]).shape == (2, 4)


def test_detaching_the_last_adapter_leaves_the_model_as_it_was(tiny_gguf: Maker) -> None:
    model = load_gguf(tiny_gguf("llama").path, torch.float32)[0]
    before, hooks = set(vars(model)), (len(model._forward_hooks), len(model._forward_pre_hooks))
    attach(model)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (hooks[0] + 1, hooks[1] + 1)
    detach_lora(model, "law")
    assert isinstance(vars(model).get("generate"), Callable)
    detach_lora(model, "med")
    assert set(vars(model)) == before
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_a_model_whose_inner_part_has_adapters_too(tiny_gguf: Maker, random_ids: Maker) -> None:
    """Both take the keyword; within the outer one's forward the inner one leaves the rows alone."""
    model = load_gguf(tiny_gguf("llama").path, torch.float32)[0].eval()
    attach_lora(model.model, name="law", r=2)
    attach_lora(model, name="med", r=2, target_modules="lm_head,q_proj")
    for name in ("law", "med"):
        for lora in find_adapter(model, name).parts.values():
            nn.init.normal_(lora.lora_B, 0, 0.1)
    ids = random_ids(model, rows=5)
    expected = each_alone(model, MIXED, ids)
    torch.testing.assert_close(mixed(model, MIXED, ids), expected, rtol=1e-4, atol=1e-3)
    generated = generate(model, ids, adapter_names=MIXED)
    assert torch.equal(generate(model, ids[2:3], adapter_names=["med"]), generated[2:3])
    with torch.no_grad():
        states = model.model(ids, adapter_names=MIXED).last_hidden_state
        use_adapter(model, "law")
        torch.testing.assert_close(states[:1], model.model(ids[:1]).last_hidden_state, rtol=1e-4, atol=1e-3)


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    yield torch.load(stored, weights_only=False)


def test_a_copy_is_switched_on_its_own(model: PreTrainedModel, random_ids: Maker) -> None:
    ids = random_ids(model, rows=5)
    use_adapter(model, "law")
    law, rows = model(ids).logits, mixed(model, MIXED, ids)
    for other in copies(model):
        assert torch.equal(mixed(other, MIXED, ids), rows)
        use_adapter(other, "med")
        detach_lora(other, "law")
        assert torch.equal(model(ids).logits, law)
        with pytest.raises(AdapterError, match="attached: med"):
            generate(other, ids, adapter_names=MIXED)
        assert generate(model, ids, adapter_names=MIXED).shape == (5, 18)
        detach_lora(other)
        assert torch.equal(mixed(model, MIXED, ids), rows)


def test_the_model_is_freed_as_before(tiny_gguf: Maker) -> None:
    """No reference cycle keeps gigabytes until the garbage collector comes by."""
    model = with_adapters(tiny_gguf("llama"))
    layer, reference = weakref.ref(model.model.layers[0].mlp.up_proj), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
        assert layer() is None
    finally:
        gc.enable()
