"""The same results on a GPU, through the reference kernels. Run with `pytest -m cuda` where there is one."""

import pytest
import torch

import qgraft
from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.kernels import choose, dequantize, linear, linear_grad_input

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(12)]


@pytest.mark.parametrize("name", sorted(name for name, each in FORMATS.items() if each.quantize is not None))
def test_every_op_equals_the_cpu(name):
    torch.manual_seed(0)
    width = max(64, FORMATS[name].block_size)
    packed = quantize(torch.randn(33, width), name)
    scale = None if packed.scale is None else packed.scale.cuda()
    on_gpu = PackedTensor(name, packed.shape, packed.data.cuda(), scale)
    assert choose("linear", name, "cuda").kernel == "reference"
    assert torch.equal(dequantize(on_gpu).cpu(), dequantize(packed))
    x, grad = torch.randn(5, width), torch.randn(5, 33)
    torch.testing.assert_close(linear(x.cuda(), on_gpu).cpu(), linear(x, packed), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        linear_grad_input(grad.cuda(), on_gpu).cpu(), linear_grad_input(grad, packed), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_logits_equal_the_cpu(architecture, tiny_gguf):
    path = tiny_gguf(architecture).path
    on_cpu, _ = qgraft.load(path, device="cpu")
    on_gpu, _ = qgraft.load(path, device="cuda", dtype="float32")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(on_gpu(ids.cuda()).logits.cpu(), on_cpu(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}])
def test_a_run_on_the_gpu_learns_and_its_adapter_works_on_the_cpu(options, tiny_gguf, tmp_path):
    path = tiny_gguf("llama").path
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        learning_rate=1e-2,
        r=2,
        save_strategy="no",
        val_size=3,
        **options,
    )
    model, tokenizer = qgraft.load(path, device="cuda", dtype=args.compute_dtype)
    report = qgraft.train(model, tokenizer, ROWS, args)
    assert report.metrics["eval_loss"] < report.metrics["eval_loss_before"]
    on_cpu, _ = qgraft.load(path, device="cpu")
    assert qgraft.load_adapter(on_cpu, tmp_path / "out").applied == 14
    assert torch.isfinite(on_cpu(torch.arange(3, 20)[None]).logits).all()
