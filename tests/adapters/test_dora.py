"""DoRA: values, gradients, files and learned losses beside PEFT's on the same float weights; what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

import qgraft
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import load_adapter, save_adapter
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.combine import combine
from qgraft.adapters.dora import DoraLora
from qgraft.adapters.lora import LoraConfig, LoraLinear
from qgraft.adapters.lora_function import drop_by_seed
from qgraft.adapters.states import load_lora_state_dict, lora_state_dict
from qgraft.errors import AdapterError, CheckpointError, OptionError, UnsupportedError
from qgraft.formats import quantize
from qgraft.jobs.segments import Segment, serving_segments
from qgraft.jobs.train import train_jobs
from qgraft.linear import QuantizedLinear
from qgraft.merging.merge import unmerge
from qgraft.passes.decoding import fast_decoding
from qgraft.storage import remove_folder
from qgraft.training.adapter import decaying_vectors, trained_parameters
from qgraft.training.arguments import TrainArguments
from qgraft.training.optimization import Optimization
from qgraft.training.run import train

Maker = Callable[..., Any]
PREFIX = "base_model.model."


def float_model(tiny: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)


def by_peft(tiny: Any, **options: Any) -> Any:
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True, **options}
    return peft.get_peft_model(float_model(tiny), peft.LoraConfig(**chosen)).eval()


def learned(parameters: Any) -> None:
    """Numbers as training leaves them: far enough from the start to be seen, magnitudes as well."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.normal_(0, 0.1, generator=generator)


def dora_model(tiny: Any, name: str = "default", **options: Any) -> Any:
    model, _ = qgraft.load(tiny.path)
    return with_dora(model, name, **options)


def with_dora(model: Any, name: str = "default", **options: Any) -> Any:
    attach_lora(model, **{"r": 4, "lora_alpha": 8, "use_dora": True, "name": name, **options})
    learned(parameter for _, parameter in find_adapter(model, name).named_parameters())
    return model


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize(
    "name", [pytest.param("llama", marks=pytest.mark.slow), "qwen2"]
)  # without biases, and with them
def test_files_go_both_ways_and_logits_are_pefts(
    name: str, tiny_gguf: Maker, tmp_path: Path, random_ids: Maker
) -> None:
    tiny = tiny_gguf(name)
    theirs = by_peft(tiny, rank_pattern={"up_proj": 2}, use_rslora=True)
    learned(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = qgraft.load(tiny.path)
    ids = random_ids(model)
    base, expected = logits(model, ids), logits(theirs, ids)
    load_adapter(model, tmp_path / "theirs")
    got = logits(model, ids)
    assert float((expected - base).norm() / base.norm()) > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    ours, stored = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == stored.keys() and all(torch.equal(ours[key], stored[key]) for key in ours)
    back = peft.PeftModel.from_pretrained(float_model(tiny), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back, ids), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("format", ["q4_1", "q6_k", "float"])
def test_output_and_gradients_are_those_of_the_formula_in_float64(format: str, dropout: float) -> None:
    """Also beside a LoRA, with a weight, and on a part of the tokens, where the layer's output is not simply scaled."""
    torch.manual_seed(0)
    dense = torch.randn(6, 256)
    base = nn.Linear(256, 6) if format == "float" else QuantizedLinear(quantize(dense, format), torch.randn(6))
    layer = LoraLinear(base)
    options: dict[str, Any] = {"r": 3, "lora_alpha": 7, "lora_dropout": dropout}
    layer.add("dora", DoraLora(layer, LoraConfig(**options, use_dora=True)))
    layer.add("lora", layer.make(LoraConfig(r=2)))
    learned(layer.loras.parameters())
    dora, lora = layer.loras["dora"], layer.loras["lora"]
    x, grad = torch.randn(2, 5, 256, requires_grad=True), torch.randn(2, 5, 6)
    weight, scaling = layer.dequantize(torch.float64).detach(), 7 / 3

    def expected(weights: dict[str, float], seed: int) -> list[Tensor]:
        x64 = x.detach().double().requires_grad_()
        A, B, m = (p.detach().double().requires_grad_() for p in dora.parameters())
        own = weight + scaling * B @ A
        change = (m / own.detach().norm(dim=1))[:, None] * own - weight
        dropped = drop_by_seed(x.detach().reshape(-1, 256), dropout, seed).double().view_as(x) / x.detach().double()
        y = x64 @ weight.T + base.bias.double() + weights["dora"] * ((x64 * dropped) @ change.T)
        if "lora" in weights:
            y = y + weights["lora"] * (x64 @ lora.delta().double().T)
        return [y.detach(), *torch.autograd.grad(y, [x64, A, B, m], grad.double())]

    for weights in ({"dora": 1.0}, {"dora": -0.5}, {"dora": 1.0, "lora": 2.0}):
        layer.active = weights
        torch.manual_seed(4)
        y = layer(x)
        torch.manual_seed(4)
        seed = int(torch.randint(2**62, ()).item())
        got = [y, *torch.autograd.grad(y, [x, *dora.parameters()], grad)]
        for ours, theirs in zip(got, expected(weights, seed), strict=True):
            assert ours.dtype == torch.float32
            assert float((ours - theirs).norm() / theirs.norm()) < 2e-6
    torch.testing.assert_close(dora.delta(slice(2, 5), base), dora.delta(base=base)[2:5])


def test_lengths_follow_whatever_changes_them(tiny_gguf: Maker, random_ids: Maker) -> None:
    """They are kept between calls: not beyond a change of A, of B (in ways that torch does not count) or of the base."""
    model = dora_model(tiny_gguf("llama"))
    part: Any = find_adapter(model).parts["model.layers.0.mlp.up_proj"]
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    dense = layer.dequantize()

    def right() -> bool:
        own = layer.dequantize() + 2 * part.lora_B @ part.lora_A
        return torch.allclose(part.scale(layer.base) * own.norm(dim=1), part.lora_magnitude_vector, rtol=1e-5)

    with torch.no_grad():
        assert right() and part.scale(layer.base) is not None
        part.lora_A.data[0] *= 3
        assert right()
        part.lora_B.data.mul_(-2)
        assert right()
        layer.replace(quantize(dense * torch.rand(len(dense), 1), layer.packed.format))
        assert right()


def test_a_row_of_zeros_stays_finite() -> None:
    weight = torch.randn(4, 32)
    weight[1] = 0
    layer = LoraLinear(QuantizedLinear(quantize(weight, "q8_0")))
    layer.add("a", DoraLora(layer, LoraConfig(use_dora=True)))
    layer.active = {"a": 1.0}
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.loras["a"].parameters() if p.grad is not None)


def test_rows_of_a_batch_and_jobs_are_what_they_are_alone(tiny_gguf: Maker, random_ids: Maker) -> None:
    model = dora_model(tiny_gguf("qwen2"), "law")
    attach_lora(model, 2, name="med")
    learned(parameter for _, parameter in find_adapter(model, "med").named_parameters())
    with_dora(model, "art", r=2)
    ids, names = random_ids(model, rows=4), ["law", None, "med", "art"]
    alone = []
    for row, name in enumerate(names):
        use_adapter(model, name)
        alone.append(logits(model, ids[row : row + 1]))
    torch.testing.assert_close(logits(model, ids, adapter_names=names), torch.cat(alone), rtol=1e-4, atol=1e-4)
    layer, x = model.get_submodule("model.layers.0.self_attn.q_proj"), torch.randn(1, 7, 64)
    segments = [Segment(name, start, stop, torch.Generator()) for name, start, stop in
                (("law", 0, 2), ("med", 2, 5), ("art", 5, 7))]  # fmt: skip
    with serving_segments(model, segments):
        together = layer(x)
    for segment in segments:
        use_adapter(model, segment.adapter)
        part = slice(segment.start, segment.stop)
        torch.testing.assert_close(together[:, part], layer(x[:, part]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_new_one_changes_nothing_and_decoding_leaves_the_kernels_that_do_not_add_it(
    tiny_gguf: Maker, random_ids: Maker
) -> None:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    ids = random_ids(model)
    base = logits(model, ids)
    attach_lora(model, use_dora=True)
    torch.testing.assert_close(logits(model, ids), base, rtol=1e-5, atol=1e-5)
    learned(parameter for _, parameter in find_adapter(model).named_parameters())
    text = ids[:1, :5]
    with fast_decoding(model):
        got = model.generate(text, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, text)


def test_a_state_dict_holds_the_magnitudes(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    model = dora_model(tiny_gguf("llama"))
    ids, state = random_ids(model), {key: value.clone() for key, value in lora_state_dict(model).items()}
    expected = logits(model, ids)
    torch.save(state, tmp_path / "lora.pt")
    with torch.no_grad():
        for _, parameter in find_adapter(model).named_parameters():
            parameter.zero_()
    with pytest.raises(AdapterError, match=r"missing tensor .*up_proj.lora_magnitude_vector"):
        load_lora_state_dict(model, {key: value for key, value in state.items() if "up_proj.lora_magn" not in key})
    load_lora_state_dict(model, state)
    assert torch.equal(logits(model, ids), expected)
    detach_adapter(model)
    load_adapter(model, tmp_path / "lora.pt", lora_alpha=8)
    assert torch.equal(logits(model, ids), expected)


def test_what_has_no_magnitudes_refuses_it(tiny_gguf: Maker, tmp_path: Path) -> None:
    model = dora_model(tiny_gguf("llama"), "law")
    with pytest.raises(
        AdapterError, match=r"a DoRA, which llama.cpp cannot compute; merge it[\s\S]*hint: merge it and give"
    ):
        export_gguf_lora(model, tmp_path / "lora.gguf")
    with pytest.raises(UnsupportedError, match=r"combine: .*a DoRA is no product of two matrices"):
        combine(model, {"law": 1.0}, "made")
    save_adapter(model, tmp_path / "law")
    assert json.loads((tmp_path / "law" / "adapter_config.json").read_text())["use_dora"] is True
    with pytest.raises(UnsupportedError, match=r"combine: .*law: a DoRA is no product of two matrices"):
        combine_files({tmp_path / "law": 1.0}, tmp_path / "made")
    assert not (tmp_path / "lora.gguf").exists() and not (tmp_path / "made").exists()
    for wrong in ({"exact": True}, {"lora_alpha": 0}, {"init_lora_weights": "pissa"}):
        with pytest.raises(OptionError, match="use_dora"):
            attach_lora(model, use_dora=True, name="other", **wrong)
        with pytest.raises(OptionError, match="use_dora"):
            qgraft.TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, use_dora=True, **wrong)
    with pytest.raises(OptionError, match="use_dora: a prefix has no rows"):
        qgraft.TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, use_dora=True, pre_seq_len=4)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_it_learns_what_pefts_learns(dropout: float, tiny_gguf: Maker, random_ids: Maker) -> None:
    """20 steps of AdamW. With dropout, PEFT drops by our masks: each draws others."""
    tiny = tiny_gguf("qwen2")
    targets = ["q_proj", "down_proj"]
    theirs = by_peft(tiny, target_modules=targets, lora_dropout=dropout)
    model, _ = qgraft.load(tiny.path)
    ids = random_ids(model, rows=6)
    attach_lora(model, 4, 8, dropout, targets, use_dora=True)
    first = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, tensor in lora_state_dict(model).items():
            if key.endswith("vector"):
                torch.testing.assert_close(first[f"{key}.weight"], tensor, rtol=1e-6, atol=0)
            else:
                first[key].copy_(tensor)
    if dropout:
        for module in theirs.modules():
            if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
                module.lora_dropout["default"] = ByOurMask(dropout)

    def learn(model: Any, parameters: list[Any]) -> list[float]:
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
        torch.manual_seed(2)
        for step in range(20):
            rows = ids[step % 3 :: 3]
            loss = model.train()(rows, labels=rows).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    expected = learn(theirs, list(first.values()))
    got = learn(model, [parameter for _, parameter in find_adapter(model).named_parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert expected[-1] < 0.9 * expected[0]
    moved = find_adapter(model).parts["model.layers.0.mlp.down_proj"].lora_magnitude_vector
    torch.testing.assert_close(moved, first[f"{PREFIX}model.layers.0.mlp.down_proj.lora_magnitude_vector.weight"],
                               rtol=1e-3, atol=1e-4)  # fmt: skip


class ByOurMask(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, ()).item())
        return drop_by_seed(x.reshape(-1, x.shape[-1]), self.share, seed).view_as(x)


ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]


def arguments(folder: Path, **options: Any) -> Any:
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "use_cpu": True, "r": 2,
              "learning_rate": 1e-2, "plot_loss": False, "use_dora": True, **options}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **chosen)


def run(tiny_gguf: Maker, folder: Path, **options: Any) -> Any:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    return train(model, tokenizer, ROWS, arguments(folder, **options)), model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_goes_on_to_the_same_bytes_and_passes_in_parts(
    checkpointing: bool, tiny_gguf: Maker, tmp_path: Path
) -> None:
    options = {"lora_dropout": 0.1, "gradient_checkpointing": checkpointing, "loraplus_lr_ratio": 4.0}
    for name in ("whole", "part"):
        result, _ = run(tiny_gguf, tmp_path / name, **options)
    remove_folder(tmp_path / "part" / "checkpoint-6")
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="use_dora: was True, now None"):
        run(tiny_gguf, tmp_path / "part", resume_from_checkpoint="true", **{**options, "use_dora": False})
    run(tiny_gguf, tmp_path / "part", resume_from_checkpoint="true", **options)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert result.steps == 6 and weights[0] == weights[1]
    run(tiny_gguf, tmp_path / "one", max_tokens_per_pass=40, compute="float32")
    run(tiny_gguf, tmp_path / "two", max_tokens_per_pass=4000, compute="float32")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_job_among_others_learns_as_it_does_alone(tiny_gguf: Maker, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    jobs: dict[str, dict[str, Any]] = {"dora": {}, "plain": {"seed": 3, "use_dora": False}}
    told = {"dataset": str(tmp_path / "rows.jsonl"), "max_tokens_per_pass": 100, "save_strategy": "no",
            "compute": "float32", "learning_rate": 2e-3}  # fmt: skip
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    each = [arguments(tmp_path / "jobs" / name, adapter_name=name, **{**told, **own}) for name, own in jobs.items()]
    assert all(report.finished for report in train_jobs(model, tokenizer, each))
    for name, own in jobs.items():
        run_alone = arguments(tmp_path / "alone" / name, **{**told, **own})
        model, tokenizer = qgraft.load(tiny_gguf("llama").path)
        train(model, tokenizer, None, run_alone)
        together, alone = (
            load_file(tmp_path / where / name / "adapter_model.safetensors") for where in ("jobs", "alone")
        )
        assert together.keys() == alone.keys()
        for key, tensor in alone.items():
            assert float((together[key] - tensor).norm()) < 1e-4 * float(tensor.norm())


def test_merged_it_is_what_pefts_merge_makes(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    """In q8_0, where rounding is small; and taken out again it is as it was."""
    tiny = tiny_gguf("llama", types=(gguf.GGMLQuantizationType.Q8_0,))
    theirs = by_peft(tiny)
    learned(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = qgraft.load(tiny.path)
    load_adapter(model, tmp_path / "theirs")
    ids = random_ids(model)
    adapted = logits(model, ids)
    dense = {path: module.weight.detach() for path, module in theirs.merge_and_unload().named_modules()
             if path in find_adapter(model).parts}  # fmt: skip
    path = "model.layers.1.mlp.gate_proj"
    part: Any = find_adapter(model).parts[path]
    layer = model.get_submodule(path)
    torch.testing.assert_close(layer.dequantize() + part.delta(base=layer.base), dense[path], rtol=1e-5, atol=1e-6)
    qgraft.merge(model, method="nearest", calibration=ROWS, min_retained=-1e9)
    assert not qgraft.adapter_names(model)
    for path, weight in dense.items():
        layer = model.get_submodule(path)
        close = {"q8_0": 0.01, "q4_k": 0.1}[layer.packed.format]
        assert float((layer.dequantize() - weight).norm() / weight.norm()) < close
    unmerge(model)
    assert torch.equal(logits(model, ids), adapted)


@pytest.mark.slow
def test_a_merge_in_four_bits_keeps_what_it_learned(tiny_gguf: Maker, tmp_path: Path) -> None:
    """By the same machinery as a LoRA's."""
    tiny = tiny_gguf("llama", types=(gguf.GGMLQuantizationType.Q4_1,), config={"hidden_size": 256, "head_dim": 64})
    model, tokenizer = qgraft.load(tiny.path)
    train(model, tokenizer, ROWS, arguments(tmp_path / "out", num_train_epochs=8, r=4, save_strategy="no"))
    report = qgraft.merge(model, tokenizer, calibration=ROWS, min_retained=-1e9)
    assert report.retained_gain is not None and report.retained_gain > 0.95
    qgraft.save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf")
    ids = torch.arange(20)[None]
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_weight_decay_reaches_the_magnitudes(tiny_gguf, tmp_path):
    """As with transformers' Trainer; of its own vectors, norms and biases do not decay."""
    tiny = tiny_gguf("llama")
    theirs = by_peft(tiny)
    decaying = Trainer.get_decay_parameter_names(None, theirs)
    expected = Counter(
        (tuple(p.shape), 0.1 if n in decaying else 0.0) for n, p in theirs.named_parameters() if p.requires_grad
    )
    model, _ = qgraft.load(tiny.path)
    attach_lora(model, r=4, use_dora=True, target_modules="all-linear")
    args = TrainArguments(output_dir=str(tmp_path / "out"), weight_decay=0.1, use_cpu=True)
    vectors = decaying_vectors(model, "default")
    ours = Optimization(args, trained_parameters(model, "default"), 10, vectors=vectors).optimizer

    assert Counter((tuple(p.shape), g["weight_decay"]) for g in ours.param_groups for p in g["params"]) == expected
    assert any(len(shape) == 1 for shape, _ in expected)
