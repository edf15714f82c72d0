"""The peer of merge_quality.py: PEFT's merge into bitsandbytes NF4 layers, on the same float weights, adapter and rows.

What a user of QLoRA does: load the float checkpoint in NF4, put the adapter on it, `merge_and_unload()`. The float weights
are those that the Q4_1 file stands for, so the adapter fits as well as it can.
"""

import tempfile
import time
from typing import Any

import torch


def merge_with_peft(
    model: Any, tokenizer: Any, adapter: str, rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Merge with PEFT and measure with the rows, samples and formulas that merge() measures with."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qgraft.merging.calibration import find_rows
    from qgraft.merging.measure import compare, states_of
    from qgraft.passes.decoder import output_head
    from qgraft.sizes import peak_memory_bytes

    chosen = find_rows(model, tokenizer, rows, held_out, [], {}, seed=0)
    assert chosen is not None
    with tempfile.TemporaryDirectory() as folder:
        float_model(model).save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        peer = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for module in peer.modules():  # 0.50 repacks weights in evaluation, and PEFT's merge then reads them wrongly
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    head = output_head(model)  # the same float32 values in both

    def states() -> tuple[Any, Any, Any]:
        peer.eval()
        return (*states_of(peer, chosen.measure), states_of(peer, chosen.drift)[0])

    base = states()
    wrapped = PeftModel.from_pretrained(peer, adapter)
    with_adapter = states()
    began = time.perf_counter()
    wrapped.merge_and_unload()
    seconds = time.perf_counter() - began
    merged = states()
    before, task = (compare(p[0], q[0], head, p[1]) for p, q in ((base, with_adapter), (with_adapter, merged)))
    losses = [*before.losses, task.losses[1]]
    return {
        "retained_gain": (losses[0] - losses[2]) / (losses[0] - losses[1]), "base": losses[0], "adapter": losses[1],
        "merged": losses[2], "task_kl": task.divergence,
        "drift_kl": compare(with_adapter[2], merged[2], head).divergence,
        "adapter_kl": compare(base[2], with_adapter[2], head).divergence, "rows": len(chosen.measure),
        "distilled_steps": 0, "calibration_tokens": 0, "seconds": seconds, "peak_mb": peak_memory_bytes() / 1e6,
    }  # fmt: skip


def float_model(model: Any) -> Any:
    """The float32 model that the packed one stands for."""
    from transformers import AutoModelForCausalLM

    from qgraft.kernels import dequantize

    floats = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    for path, module in floats.named_modules():
        ours = model.get_submodule(path)
        if hasattr(ours, "packed_weight"):
            module.weight.data = dequantize(ours.packed_weight.get(), torch.float32)
            if getattr(module, "bias", None) is not None:
                module.bias.data = ours.bias.data.float()
        elif "weight" in module._parameters and module._parameters["weight"] is not None:
            module.weight.data = ours.weight.data.float()
    return floats
