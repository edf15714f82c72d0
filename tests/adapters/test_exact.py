"""Exact LoRAs: values and gradients against the dense delta that they stand for, in float64; what is refused."""

from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

import qgraft
from qgraft.adapters import exact
from qgraft.adapters.attach import attach_layers, attach_lora, detach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.combine import combine
from qgraft.adapters.exact import BlockLora, MinimumLora, minimums_of
from qgraft.adapters.lora import Lora, LoraConfig, LoraLinear
from qgraft.adapters.lora_function import LayerSegment, drop_by_seed
from qgraft.adapters.states import load_lora_state_dict, lora_state_dict
from qgraft.compat import CACHE
from qgraft.errors import AdapterError, UnsupportedError
from qgraft.formats import FORMATS, PackedTensor, unpack
from qgraft.jobs.segments import Segment, serving_segments
from qgraft.kernels import native_status
from qgraft.kernels.cpu import decode
from qgraft.linear import QuantizedLinear
from qgraft.passes.decoding import fast_decoding

Maker = Callable[..., Any]
WITH_MINIMUMS = {"q4_1": (32, 1), "q5_1": (32, 1), "q2_k": (256, 16), "q4_k": (256, 8), "q5_k": (256, 8)}
REALS = {"q4_1": (0, [0.02, -0.15]), "q5_1": (0, [0.01, -0.15]), "q2_k": (80, [0.007, 0.01]),
         "q4_k": (0, [0.0006, 0.004]), "q5_k": (0, [0.0003, 0.004])}  # fmt: skip
IN, OUT = 512, 6


def random_weight(format: str, rows: int = OUT, width: int = IN) -> PackedTensor:
    """Random codes and integers; one block has no minimum at all."""
    block, generator = FORMATS[format].block_size, torch.Generator().manual_seed(3)
    size = FORMATS[format].parts[0].shape(1, block)[1]
    at, reals = REALS[format]
    blocks = torch.randint(0, 256, (rows, width // block, size), dtype=torch.uint8, generator=generator)
    blocks[..., at : at + 4] = torch.tensor(reals, dtype=torch.float16).view(torch.uint8)
    if format == "q2_k":
        blocks[0, 0, :16] &= 15
    return PackedTensor(format, (rows, width), (blocks.flatten(1),))


def make_layer(format: str, names: tuple[str, ...] = ("default",), **options: Any) -> LoraLinear:
    """A layer with exact LoRAs whose B is not zero."""
    layer = LoraLinear(QuantizedLinear(random_weight(format), torch.randn(OUT)))
    for number, name in enumerate(names):
        config = LoraConfig(**{"r": 2 + number, "lora_alpha": 7, "exact": True, **options})
        layer.add(name, exact.make_part(layer, config))
        nn.init.normal_(layer.loras[name].lora_B)
    layer.active = dict.fromkeys(names, 1.0)
    return layer


def delta_of(lora: Any, grid: Any, A: Tensor, B: Tensor) -> Tensor:
    """The definition, [out, in]: dm = scaling B A unit; constant in a group, or times the integers of its sub-groups."""
    dm = lora.config.scaling * (B @ A)
    if grid.sub_minimums is None:
        return (dm * exact.SPREAD).repeat_interleave(IN // dm.shape[1], 1)
    n = grid.sub_minimums.double()
    rms = n.unflatten(1, (dm.shape[1], -1)).square().mean(2).sqrt()
    dm = torch.where(rms > 0, dm * exact.SPREAD / rms.clamp(min=1e-9), 0.0)
    return dm.repeat_interleave(IN // dm.shape[1], 1) * n.repeat_interleave(IN // n.shape[1], 1)


def test_which_formats_have_minimums() -> None:
    found = {name: minimums_of(name) for name in FORMATS}
    assert {name: (each.width, each.subs) for name, each in found.items() if each} == WITH_MINIMUMS


@pytest.mark.parametrize("format", WITH_MINIMUMS)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,)], ids=str)
def test_output_and_gradients_are_those_of_the_dense_delta_in_float64(format: str, leading: tuple[int, ...]) -> None:
    layer = make_layer(format)
    lora, grid = layer.loras["default"], unpack(layer.packed)
    x, grad = torch.randn(*leading, IN, requires_grad=True), torch.randn(*leading, OUT)
    y = layer(x)
    got = (y, *torch.autograd.grad(y, [x, lora.lora_A, lora.lora_B], grad))

    x64 = x.detach().double().requires_grad_()
    A, B = (tensor.detach().double().requires_grad_() for tensor in (lora.lora_A, lora.lora_B))
    weight = layer.dequantize(torch.float64) + delta_of(lora, grid, A, B)
    y64 = x64 @ weight.T + layer.base.bias.double()
    expected = (y64, *torch.autograd.grad(y64, [x64, A, B], grad.double()))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(1 + theirs.detach().abs().sum() / 100)
        )
    torch.testing.assert_close(lora.delta().double(), delta_of(lora, grid, A, B), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("format", ["q2_k", "q4_k"])
def test_gradcheck_of_the_function(format: str, dropout: float) -> None:
    lora = make_layer(format).loras["default"].double()
    x = torch.randn(1, IN, dtype=torch.float64, requires_grad=True)
    A, B = (tensor.detach().requires_grad_() for tensor in (lora.lora_A, lora.lora_B))

    def added(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return exact._MinimumFunction.apply(x, A, B, lora.integers, lora.unit, 1.7, dropout, 5)

    assert torch.autograd.gradcheck(added, (x, A, B))
    dropped = drop_by_seed(x.detach(), dropout, 5)  # the mask is that of an ordinary LoRA
    torch.testing.assert_close(added(x, A, B), dropped @ (lora.delta().double() * 1.7 / lora.config.scaling).T,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_the_backward_pass_keeps_sums_of_the_inputs_and_nothing_as_large_as_the_weight() -> None:
    layer, saved = make_layer("q4_k"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(1000, IN, requires_grad=True))
    assert max(saved) == 1000 * IN // 32


@pytest.mark.parametrize("format", ["q4_1", "q4_k"])
def test_tokens_and_rows_with_adapters_of_their_own(format: str) -> None:
    layer = make_layer(format, ("law", "med"))
    x = torch.randn(1, 7, IN)
    alone = {}
    for name in ("law", "med", None):
        layer.active = {} if name is None else {name: 1.0}
        alone[name] = layer(x)
    served = [(layer.loras[name], LayerSegment(start, stop, layer.loras[name].config.scaling, 0.0, 0))
              for name, start, stop in (("law", 0, 2), ("med", 3, 7))]  # fmt: skip
    expected = torch.cat([alone["law"][:, :2], alone[None][:, 2:3], alone["med"][:, 3:]], dim=1)
    torch.testing.assert_close(layer.with_segments(x, served), expected, rtol=1e-4, atol=1e-4)
    model = nn.Sequential(layer)
    model[0].active = {"law": 1.0, "med": 1.0}
    torch.testing.assert_close(model(x), alone["law"] + alone["med"] - alone[None], rtol=1e-4, atol=1e-4)


def k_model(tiny_gguf: Maker, format: str) -> Any:
    """A tiny llama in one format, but for its last down_proj in q4_k."""
    kind = gguf.GGMLQuantizationType[format.upper()]
    tiny = tiny_gguf("llama", types=(kind,), config={"hidden_size": 256, "head_dim": 64})
    return qgraft.load(tiny.path)[0]


def with_exact(model: Any, name: str = "default", **options: Any) -> Any:
    attach_lora(model, **{"r": 3, "exact": True, "name": name, **options})
    for number, part in enumerate(find_adapter(model, name).parts.values()):
        part.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number + len(name)))
    return model


@pytest.mark.parametrize("format", ["q5_1", "q2_k"])
def test_rows_of_a_batch_and_jobs_are_what_they_are_alone(tiny_gguf: Maker, random_ids: Maker, format: str) -> None:
    model = with_exact(with_exact(k_model(tiny_gguf, format), "law"), "med")
    ids, names = random_ids(model, rows=3), ["law", None, "med"]
    alone = []
    for row, name in enumerate(names):
        use_adapter(model, name)
        with torch.no_grad():
            alone.append(model(ids[row : row + 1]).logits)
    use_adapter(model, None)
    with torch.no_grad():
        got = model(ids, adapter_names=names).logits
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-3, atol=1e-3)
    layer, x = model.get_submodule("model.layers.0.mlp.up_proj"), torch.randn(1, 5, 256)
    segments = [Segment("law", 0, 2, torch.Generator()), Segment("med", 2, 5, torch.Generator())]
    with serving_segments(model, segments):
        together = layer(x)
    for segment in segments:
        use_adapter(model, segment.adapter)
        part = slice(segment.start, segment.stop)
        torch.testing.assert_close(together[:, part], layer(x[:, part]), rtol=1e-4, atol=1e-4)


def test_a_new_one_changes_nothing_and_its_a_is_as_large_as_that_of_a_lora(tiny_gguf: Maker, random_ids: Maker) -> None:
    model = k_model(tiny_gguf, "q4_1")
    ids = random_ids(model)
    base = model(ids).logits
    torch.manual_seed(0)
    attach_lora(model, r=64, exact=True)
    assert torch.equal(model(ids).logits, base)
    for path, part in find_adapter(model).parts.items():
        width, x = model.get_submodule(path).in_features, torch.randn(200, model.get_submodule(path).in_features)
        ordinary = torch.empty(64, width)
        nn.init.kaiming_uniform_(ordinary, a=5**0.5)
        if isinstance(part, BlockLora):
            assert 0.7 < float((x @ part.factors()[0].detach().T).std() / (x @ ordinary.T).std()) < 1.4


def test_layers_without_minimums_are_refused_and_the_hint_chooses_the_others(tiny_gguf: Maker) -> None:
    model = qgraft.load(tiny_gguf("llama").path)[0]  # a mix of formats
    with pytest.raises(UnsupportedError, match=r"exact: \d+ of 14 target layers hold no minimums") as caught:
        attach_lora(model, exact=True)
    message = str(caught.value)
    assert "mlp.gate_proj: q" in message or "q_proj: q" in message
    assert "q2_k, q4_1, q4_k, q5_1, q5_k" in message
    assert not qgraft.adapter_names(model)
    packed = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    fitting = [path for path, layer in packed.items() if layer.packed.format in WITH_MINIMUMS and path != "lm_head"]
    attach_lora(model, exact=True, target_modules=fitting)
    assert set(find_adapter(model).parts) == set(fitting)
    detach_lora(model)
    with pytest.raises(UnsupportedError, match=r"layers.*: not packed[\s\S]*leave exact out"):
        attach_lora(nn.ModuleDict({"layers": nn.Linear(64, 64)}), exact=True)


def test_experts_are_refused_as_what_they_are(tiny_gguf: Maker) -> None:
    model = qgraft.load(tiny_gguf("qwen3moe").path)[0]
    with pytest.raises(
        UnsupportedError, match=r"exact: .*mlp.experts.down_proj: .*experts.* have no exact LoRA"
    ) as caught:
        attach_lora(model, exact=True, target_parameters=["mlp.experts.down_proj"])
    assert "target_parameters" in str(caught.value)
    assert not qgraft.adapter_names(model)


def test_the_hint_names_layers_that_all_have_minimums(tiny_gguf: Maker) -> None:
    model = k_model(tiny_gguf, "q4_1")
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    layer.replace(qgraft.formats.quantize(layer.dequantize(), "q6_k"))
    with pytest.raises(
        UnsupportedError, match=r"1 of 14 target layers.*\n  model.layers.1.self_attn.v_proj: q6_k"
    ) as caught:
        attach_lora(model, exact=True)
    assert "target_modules='down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj'" in str(caught.value)
    assert "of v_proj some do" in str(caught.value)


@pytest.mark.parametrize("format", ["q4_1", "q5_k"])
def test_a_state_dict_comes_back_bit_for_bit_and_another_is_refused(
    tiny_gguf: Maker, random_ids: Maker, format: str
) -> None:
    model = with_exact(k_model(tiny_gguf, format))
    ids, state = random_ids(model), {name: value.clone() for name, value in lora_state_dict(model).items()}
    before, own = model(ids).logits, [p.detach().clone() for _, p in find_adapter(model).named_parameters()]
    for _, parameter in find_adapter(model).named_parameters():
        parameter.data.zero_()
    load_lora_state_dict(model, state)
    assert all(torch.equal(p, o) for (_, p), o in zip(find_adapter(model).named_parameters(), own, strict=True))
    assert torch.equal(model(ids).logits, before)
    if format == "q4_1":
        name = next(key for key in state if "lora_A" in key)
        broken = {**state, name: state[name] + torch.linspace(0, 1, state[name].shape[1])}
        with pytest.raises(AdapterError, match=r"an A that differs within 32 columns, expected an exact LoRA's"):
            load_lora_state_dict(model, broken)
        assert torch.equal(model(ids).logits, before)


def test_linear_sums_stay_exact_and_cut_ones_do_not(tiny_gguf: Maker, random_ids: Maker) -> None:
    model = with_exact(with_exact(k_model(tiny_gguf, "q4_1"), "law", target_modules="q_proj,up_proj"), "med",
                       target_modules="up_proj")  # fmt: skip
    ids = random_ids(model)
    use_adapter(model, {"law": 0.5, "med": -2.0})
    with torch.no_grad():
        expected = model(ids).logits
    combine(model, {"law": 0.5, "med": -2.0}, "both")
    assert all(isinstance(part, BlockLora) for part in find_adapter(model, "both").parts.values())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    combine(model, {"law": 0.5, "med": -2.0}, "cut", method="svd")
    assert {type(part) for part in find_adapter(model, "cut").parts.values()} == {Lora}
    attach_lora(model, name="ordinary", target_modules="up_proj")
    combine(model, {"law": 1.0, "ordinary": 1.0}, "mixed")
    kinds = {path.rpartition(".")[2]: type(part) for path, part in find_adapter(model, "mixed").parts.items()}
    assert kinds == {"q_proj": BlockLora, "up_proj": Lora}


def test_k_quants_cannot_be_combined(tiny_gguf: Maker) -> None:
    model = with_exact(with_exact(k_model(tiny_gguf, "q4_k"), "law"), "med")
    with pytest.raises(UnsupportedError, match=r"combine: model.*exact LoRA on a K-quant[\s\S]*hint: use_adapter"):
        combine(model, {"law": 1.0, "med": 1.0}, "both")


@pytest.mark.skipif(not native_status()[0], reason="the native kernels are not built")
@pytest.mark.parametrize("format", ["q4_1", "q4_k"])
def test_decoding_follows_when_a_is_written_to(
    tiny_gguf: Maker, random_ids: Maker, monkeypatch: Any, format: str
) -> None:
    """The C decoder holds an A that was made of the trained one, and has to notice; minimums of K-quants it leaves alone."""
    model = with_exact(k_model(tiny_gguf, format), target_modules="q_proj,up_proj").eval()
    ids, steps = random_ids(model, rows=1, length=9), []
    step = decode.step
    monkeypatch.setattr(decode, "step", lambda *given: (steps.append(1), step(*given)))

    def last(fast: bool) -> Tensor:
        if not fast:
            return model(ids, use_cache=False).logits[:, -1]
        held = model(ids[:, :-1], use_cache=True)
        return model(ids[:, -1:], use_cache=True, **{CACHE: getattr(held, CACHE)}).logits[:, -1]

    with torch.inference_mode(), fast_decoding(model):
        for _ in range(2):
            torch.testing.assert_close(last(True), last(False), rtol=1e-2, atol=1e-2)
            with torch.inference_mode(False), torch.no_grad():
                for part in find_adapter(model).parts.values():
                    part.lora_A.mul_(-3.0)
    assert bool(steps) == (format == "q4_1")


def test_layers_may_differ_in_it(tiny_gguf: Maker) -> None:
    model = k_model(tiny_gguf, "q4_1")
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    attach_layers(model, "mixed", {up: LoraConfig(r=2), down: LoraConfig(r=1, exact=True)})
    parts = find_adapter(model, "mixed").parts
    assert (type(parts[up]), type(parts[down])) == (Lora, MinimumLora)
