"""Whole runs on a GPU that is pretended (pretended_gpu.py): no tensor is on the wrong device, and results are the CPU's."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_classifiers
import tiny_pairs
import torch
from gguf import GGMLQuantizationType as Q
from pretended_gpu import DeviceMixed, OnGpu, pretended_gpu
from torch import Tensor

import qgraft
from qgraft.attention import SAMPLES, attending
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.kernels.cuda_graphs import recorded
from qgraft.passes.decoder import padding_free
from qgraft.passes.fused import fused_modules
from qgraft.passes.loss import batch_loss
from qgraft.training.precision import check_device

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(10)]
PAIRS = [{"prompt": f"question {i}", "chosen": f"yes {i % 3}", "rejected": f"no {i % 4}"} for i in range(10)]
SINGLE = [{"prompt": f"question {i}", "completion": f"yes {i % 3}", "label": i % 2 == 0} for i in range(10)]
TOKENS = [
    {"instruction": "call", "output": "<tool> ab </tool>"},
    {"instruction": "who", "output": "<tool>b</tool>"},
] * 5
TRANSLATED = [{"instruction": f"the service was {word}", "output": word} for word in ("good", "bad")] * 5
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "r": 2, "save_strategy": "no",
         "plot_loss": False, "val_size": 2, "lr_scheduler_type": "constant"}  # fmt: skip


def test_what_a_gpu_refuses_is_refused_and_what_it_is_waited_for_is_noted() -> None:
    with pretended_gpu() as gpu:
        x, on_cpu = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
        layer = torch.nn.Linear(4, 4).to("cuda")
        gpu.waits.clear()
        assert x.is_cuda and layer.weight.device == x.device and isinstance(x * 2 + 1.0, OnGpu)
        layer(x).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_cuda and not gpu.waits
        for mixed in (
            lambda: x + on_cpu,
            lambda: torch.cat([x, on_cpu]),
            lambda: layer(on_cpu),
            lambda: x.add_(on_cpu),
        ):
            with pytest.raises(DeviceMixed):
                mixed()
        with pytest.raises(DeviceMixed):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError):
            x.numpy()
        assert not gpu.waits
        expected = []
        for what, wait in (
            ("copy to the CPU", x.cpu), ("tolist", x.tolist), ("nonzero", x.nonzero), ("mask", lambda: x[x > 0]),
            ("_local_scalar_dense", x.sum().item), ("_local_scalar_dense", lambda: bool(x[0, 0])),
            ("numbers of Python", lambda: x.new_tensor([1, 2])), ("copy from the CPU", lambda: on_cpu.to("cuda")),
            ("copy from the CPU", lambda: x.copy_(on_cpu)), ("equal", lambda: torch.equal(x, x)),
            ("numbers of Python", lambda: torch.tensor([1, 2], device="cuda")),
        ):  # fmt: skip
            wait()
            expected.append(what)
            assert [each for each, _ in gpu.waits] == expected
        on_cpu.to("cuda", non_blocking=True)
        assert len(gpu.waits) == len(expected)


def test_a_graph_that_is_pretended_computes_again_and_cannot_wait() -> None:
    with pretended_gpu():
        x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = x[1:] * 2
            total += x
        assert total.tolist() == [0.0, 0.0, 0.0], "recording computes nothing"
        x.fill_(5.0)
        graph.replay()
        assert y.tolist() == [10.0, 10.0] and total.tolist() == [5.0, 5.0, 5.0]
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(other, capture_error_mode="thread_local"):
            x.sum().item()


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def learned(
    path: Path, device: str, dtype: str, checkpointing: bool, experts: Sequence[str] = ()
) -> tuple[float, Tensor]:
    """(loss, gradients) of a packed step, with LoRAs on these parameters of experts, too."""
    rows = [Sample(list(range(3, 3 + n)), [-100, -100, *range(5, 3 + n)], "") for n in (20, 9, 31)]
    model, _ = qgraft.load(path, device=device, dtype=dtype)
    qgraft.attach_lora(model, r=2, target_parameters=experts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    for parameter in trained:
        parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with padding_free(model, rows) as problem, fused_modules(model):
        assert problem is None
        loss = batch_loss(model, collate(rows))
        loss.backward()
    return loss.item(), torch.cat([p.grad.float().cpu().flatten() for p in trained if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [
        ("llama", False),
        *((name, name == "llama") for name in ("llama", "qwen3", "gemma3", "phi3")),
        ("qwen3moe", False),
    ],
)
def test_a_packed_step(architecture: str, checkpointing: bool, tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf(architecture).path
    loss, gradient = learned(path, "cpu", "float32", checkpointing)
    with pretended_gpu():
        got_loss, got = learned(path, "cuda", "bfloat16", checkpointing)
    assert got_loss == pytest.approx(loss, rel=0.03)
    assert float(torch.cosine_similarity(got, gradient, dim=0)) > 0.97


def test_work_is_recorded_on_its_own_gpu_whichever_is_the_current_one() -> None:
    """Of another nothing would be in the graph, and each replay would leave the result of the first."""
    with pretended_gpu() as gpu:
        x, gpu.current = torch.zeros(3, device="cuda"), 1
        replay = recorded(lambda: x.add_(1), x.device)
        assert x.tolist() == [0.0, 0.0, 0.0] and gpu.current == 1
        for _ in range(2):
            replay()
        assert x.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("use_cpu", "device", "current", "refused"),
    [
        (False, "cpu", 0, "the model is on cpu, and the run is to be on a GPU"),
        (True, "cuda:0", 0, "the model is on cuda:0, and the run is to be on the CPU"),
        (False, "cuda:0", 1, "the model is on cuda:0, and the current GPU is cuda:1"),
        (False, "cuda:0", 0, None),
        (True, "cpu", 1, None),
    ],
)
def test_a_model_on_another_device_than_its_run_is_refused(
    use_cpu: bool, device: str, current: int, refused: str | None, tmp_path: Path
) -> None:
    with pretended_gpu() as gpu:
        args, model = qgraft.TrainArguments(output_dir=str(tmp_path), use_cpu=use_cpu), torch.nn.Linear(2, 2).to(device)
        gpu.current = current
        placed = SimpleNamespace(device=model.weight.device)
        with nullcontext() if refused is None else pytest.raises(qgraft.OptionError, match=refused):
            check_device(args, placed)  # type: ignore[arg-type]


def waits_of_a_packed_pass(path: Path, experts: Sequence[str] = ()) -> list[str]:
    """Where the second one, forward and backward, waits: the file, or transformers."""
    with pretended_gpu() as gpu:
        model, _ = qgraft.load(path, device="cuda", dtype="bfloat16")
        qgraft.attach_lora(model, r=2, target_parameters=experts)
        model.train()
        with attending(model, SAMPLES), fused_modules(model):
            for _ in range(2):
                gpu.waits.clear()
                batch_loss(
                    model, collate([Sample(list(range(3, 3 + n)), [-100, *range(4, 3 + n)], "") for n in (5, 7)])
                ).backward()
    return [where.partition(" in ")[2].partition("/")[0] or where.partition(":")[0] for _, where in gpu.waits]


def test_a_packed_pass_waits_for_its_masks_alone(tiny_gguf: Callable[..., Any]) -> None:
    """transformers asks once whether samples share the row, and what it makes of it is looked at once."""
    path = tiny_gguf("llama", config={"num_hidden_layers": 1}).path
    assert waits_of_a_packed_pass(path) == ["transformers", "attention.py"]


def run(device: str, path: Any, rows: Any, folder: Path, load: dict[str, Any], options: dict[str, Any]) -> Any:
    cpu = {"use_cpu": True, "compute": "float32"} if device == "cpu" else {}
    if device == "cpu":
        options = {name: value for name, value in options.items() if name != "fp16"}  # which no CPU computes in
    args = qgraft.TrainArguments(output_dir=str(folder), **{**STEPS, **cpu, **options})
    model, tokenizer = qgraft.load(path, device=device, **load)
    report = qgraft.train(model, tokenizer, rows, args)
    return model, tokenizer, report


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


FEATURES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "qwen35": ("qwen35", ROWS[:3], {"val_size": 1}),
    "mixture": ("qwen3moe", ROWS, {"target_parameters": "mlp.experts.gate_up_proj,mlp.experts.down_proj"}),
    "neftune": ("llama", ROWS, {"neftune_noise_alpha": 5.0}),
    "dropout": ("llama", ROWS, {"lora_dropout": 0.1}),
    "dpo": ("llama", PAIRS, {"stage": "dpo"}),
    "orpo": ("llama", PAIRS, {"stage": "orpo"}),
    "kto": ("llama", SINGLE, {"stage": "kto"}),
    "dora": ("llama", ROWS, {"use_dora": True}),
    "pissa": ("llama", ROWS, {"init_lora_weights": "pissa"}),
    "exact": ("llama", ROWS, {"exact": True}),
    "token rows": ("llama", TOKENS, {"add_tokens": ["</tool>"], "add_special_tokens": ["<tool>"]}),
    "distill": ("llama", ROWS, {"stage": "distill", "loss_top_k": 16}),
    "on policy": ("llama", ROWS, {"stage": "distill", "loss_top_k": 16, "lmbda": 1.0, "max_new_tokens": 4}),
    "prefix": ("llama", ROWS, {"pre_seq_len": 4}),
    "projected prefix": ("llama", ROWS, {"pre_seq_len": 4, "prefix_projection": True}),
    "checkpointing": ("llama", ROWS, {"gradient_checkpointing": True}),
    "fp16": ("llama", ROWS, {"fp16": True}),
}
TYPES = {"exact": (Q.Q4_1,)}


def alike(tmp_path: Path, expected: Any, got: Any, loosely: bool = False) -> None:
    rel = 0.5 if loosely else 0.1
    assert got.metrics["eval_loss"] == pytest.approx(expected.metrics["eval_loss"], rel=rel, abs=0.02)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=rel, abs=0.02)


def run_on_both(
    path: Any, rows: Any, tmp_path: Path, load: dict[str, Any], options: dict[str, Any], loosely: bool = False
) -> tuple[Any, Any]:
    """A run on the CPU and one on the GPU that is there: the same losses. The model and tokenizer of the latter."""
    expected = run("cpu", path, rows, tmp_path / "cpu", load, options)[2]
    model, tokenizer, got = run("cuda", path, rows, tmp_path / "gpu", load, options)
    alike(tmp_path, expected, got, loosely)
    return model, tokenizer


def seen(tiny_images: Any) -> list[dict[str, Any]]:
    """Rows with an image each."""
    return [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": tiny_images.picture(number)},
                                                   {"type": "text", "text": f"what is {number}?"}]},
                      {"role": "assistant", "content": "red and blue"}]} for number in range(4)
    ]  # fmt: skip


def merged_after_a_run(path: Path, method: str, tmp_path: Path, **options: Any) -> None:
    """On the GPU; the file is read on the CPU."""
    model, tokenizer, _ = run("cuda", path, ROWS, tmp_path / "out", {}, {"max_steps": 4, **options})
    report = qgraft.merge(model, tokenizer, calibration=ROWS, method=method, min_retained=-1e9)
    qgraft.save(model, tmp_path / "merged.gguf")
    assert report.kept is not None


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_a_run(feature: str, tiny_gguf: Callable[..., Any], tmp_path: Path) -> None:
    architecture, rows, options = FEATURES[feature]
    path = tiny_gguf(architecture, **({"types": TYPES[feature]} if feature in TYPES else {})).path
    if options.get("stage") == "distill":
        options = {**options, "teacher_model_name_or_path": str(tiny_gguf(architecture, seed=3).path)}
    with pretended_gpu():
        run_on_both(path, rows, tmp_path, {}, options)


@pytest.mark.slow
def test_passes_are_recorded_and_replayed(tiny_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path, options = tiny_gguf("llama").path, {"max_steps": 5, "per_device_train_batch_size": 3}
    expected = run("cpu", path, ROWS, tmp_path / "cpu", {}, options)[2]
    with pretended_gpu():
        got = run("cuda", path, ROWS, tmp_path / "gpu", {}, {**options, "cuda_graphs": "yes"})[2]
    assert any("replayed" in note for note in got.notes), got.notes
    alike(tmp_path, expected, got)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_pairs(kind: str, tmp_path: Path) -> None:
    tiny_pairs.write_pairs_model(kind, tmp_path / "model")
    with pretended_gpu():
        run_on_both(tmp_path / "model", TRANSLATED, tmp_path, {"quantize": "q8_0"}, {"target_modules": "all-linear"})


@pytest.mark.slow
def test_a_classifier(tmp_path: Path) -> None:
    folder = tiny_classifiers.write_encoder(tmp_path)
    rows, names = tiny_classifiers.rows_of(12), {"task_type": "SEQ_CLS", "labels": ["good", "bad"]}
    with pretended_gpu():
        model, tokenizer = run_on_both(folder, rows, tmp_path, {**names, "quantize": "q8_0"}, {"learning_rate": 1e-3})
        assert "accuracy" in qgraft.evaluate(model, tokenizer, rows).metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_images(kind: str, tmp_path: Path) -> None:
    tiny_images = pytest.importorskip("tiny_images")
    tiny_images.write_image_model(kind, tmp_path / "model")
    with pretended_gpu():
        run_on_both(tmp_path / "model", seen(tiny_images), tmp_path, {}, {"val_size": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "types"),
    [("auto", Q.Q4_0), ("nearest", Q.Q4_0), ("auto", Q.Q4_K), ("auto", Q.Q8_0), ("auto", "iq4_nl")],
)
def test_a_merge(method: str, types: Q | str, tiny_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """Its rows come from the run, and its calibration is taken on the GPU."""
    path = tiny_gguf("llama", types=(Q.Q8_0 if isinstance(types, str) else types,)).path
    if isinstance(types, str):  # which gguf does not write
        qgraft.save(qgraft.load(path, device="cpu")[0], tmp_path / "base.gguf", to=types)
        path = tmp_path / "base.gguf"
    with pretended_gpu():
        merged_after_a_run(path, method, tmp_path)
    ids = torch.arange(3, 20)[None]
    assert torch.isfinite(qgraft.load(tmp_path / "merged.gguf", device="cpu")[0](ids).logits).all()


@pytest.mark.slow
def test_a_merge_into_experts(tiny_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path = tiny_gguf("qwen3moe", config={"num_hidden_layers": 1}).path
    with pretended_gpu():
        merged_after_a_run(path, "auto", tmp_path, target_parameters=",".join(EXPERTS))
    assert torch.isfinite(
        qgraft.load(tmp_path / "merged.gguf", device="cpu")[0](torch.arange(3, 20)[None]).logits
    ).all()
