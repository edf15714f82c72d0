"""One contestant of LoRA training on a GPU, on random weights of a model's shape: a line of gpu_train.csv.

    python benchmarks/gpu_train.py qgraft 7b --out results [--checkpointing] [--steps 6] [--graphs] [--keep]

Contestants: qgraft (on packed q4_1), peft-nf4 (PEFT with bitsandbytes), peft-bf16 (PEFT on bfloat16 weights). All with
the same shape, r 16 on every linear layer, AdamW, the same tokens in samples of 512, a quarter of each prompt. PEFT's batch
has no padding at all, its best case. tokens/s counts all tokens of a step; a step is forward, backward and optimizer.
With --graphs qgraft replays its passes as CUDA graphs, whatever their size; peak_gib is then what the allocator held, for
a graph's memory is held between two replays.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {  # hidden, inner, layers, heads, groups, vocabulary: a llama-2-7b, a qwen3-0.6b, one that a test has time for
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "0.6b": (1024, 3072, 28, 16, 8, 151936),
    "tiny": (64, 96, 2, 4, 2, 96),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(shape: str, layers: int | None) -> LlamaForCausalLM:
    """The model with random weights, in bfloat16 on the GPU; in float32 where there is none."""
    hidden, inner, count, heads, groups, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or count, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def swap(model: nn.Module, make: Callable[[nn.Linear], nn.Module], skip: tuple[str, ...] = ()) -> None:
    """Another layer in the place of each linear one."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in skip:
            model.set_submodule(path, make(module))


def checkpoint(model: Any) -> None:
    """Gradient checkpointing as each of them is told to do it."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def qgraft_step(model: Any, ids: Tensor, options: argparse.Namespace) -> tuple[Any, Callable[[], Tensor], Any, str]:
    """(the model, its loss of a step, a block to be in, a note)."""
    import qgraft
    from qgraft.data.batches import collate, split_batch
    from qgraft.data.tokenizing import Sample
    from qgraft.formats import quantize
    from qgraft.kernels import choose
    from qgraft.kernels.summed_lora import casts_kept
    from qgraft.linear import QuantizedLinear
    from qgraft.passes.decoder import padding_free
    from qgraft.passes.fused import fused_modules
    from qgraft.passes.graphed import GraphedPasses, why_eager
    from qgraft.passes.loss import batch_loss
    from qgraft.training.gradients import Gradients

    swap(model, lambda layer: QuantizedLinear(quantize(layer.weight.detach(), "q4_1")))
    qgraft.attach_lora(model, r=16, lora_alpha=16)
    if options.checkpointing:
        checkpoint(model)
    rows, prompt = ids.tolist(), ids.shape[1] // 4  # the batch is on the CPU, as in a run
    samples = [Sample(row, [-100] * prompt + row[prompt:], "") for row in rows]
    batch = collate(samples)
    count = int((batch["labels"] != -100).sum())
    block = padding_free(model, samples[:2])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, note = Gradients(trained), choose("linear", "q4_1", ids.device.type).kernel
    graphs = GraphedPasses(model, trained, options.tokens_per_pass, say=print)

    def replay(part: dict[str, Tensor]) -> Tensor | None:
        if not options.graphs:
            return None
        if graphs.recorded == 0 and (reason := graphs.problem or why_eager(model)) is not None:
            raise SystemExit(reason)
        return graphs.learn(part, count)

    def step() -> Tensor:
        total = torch.zeros((), device=ids.device)
        gradients.clear()
        with casts_kept():
            for part in split_batch(batch, options.tokens_per_pass):
                loss = replay(part)
                if loss is None:
                    loss = batch_loss(model, part) / count
                    loss.backward()
                total += loss.detach()
        return total

    from qgraft.kernels.unpacked import kept_unpacked

    weights = [module.packed for module in model.modules() if isinstance(module, QuantizedLinear)]
    stack = _both(block, fused_modules(model), kept_unpacked(weights, torch.bfloat16, 1 << 60 if options.keep else 0))
    return model, step, stack, f"{note}{', graphs' * options.graphs}{', kept' * options.keep}"


def _both(first: Any, *others: Any) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    if (problem := stack.enter_context(first)) is not None:
        raise SystemExit(problem)
    for each in others:
        stack.enter_context(each)
    return stack


def estimated_gib(model: Any, options: argparse.Namespace) -> float:
    """What `qgraft estimate` says of this run, to stand beside what it took."""
    import qgraft
    from qgraft.memory.settings import Setting, count

    arguments = qgraft.TrainArguments(
        output_dir="unused", r=16, max_tokens_per_pass=options.tokens_per_pass,
        cuda_graphs="yes" if options.graphs else "no",
    )  # fmt: skip
    setting = Setting(min(options.tokens, options.tokens_per_pass), options.checkpointing)
    return round(count(model, arguments).estimate(setting).total / 2**30, 2)


def four_bits(model: Any) -> str:
    """bitsandbytes' NF4 in the place of every linear layer but the output layer, as transformers does it; its version."""
    import bitsandbytes as bnb

    def made(layer: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
        return new.to("cuda")

    swap(model, made, skip=("lm_head",))
    model.is_loaded_in_4bit = True
    return f"bitsandbytes {bnb.__version__}"


def peft_step(model: Any, ids: Tensor, options: argparse.Namespace) -> tuple[Any, Callable[[], Tensor], Any, str]:
    """The same for PEFT, with its loss and its optimizer."""
    from peft import LoraConfig, get_peft_model

    note = ""
    if options.who == "peft-nf4":
        note = four_bits(model)
    if options.checkpointing:
        checkpoint(model)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 4] = -100

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach()

    return model, step, nullcontext(), note


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The median of the steps after two that warm up."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    started, model = time.time(), build(options.shape, options.layers)
    device = next(model.parameters()).device
    ids = torch.randint(3, model.config.vocab_size, (options.tokens // options.length, options.length), device=device)
    make = qgraft_step if options.who == "qgraft" else peft_step
    model, step, block, note = make(model, ids, options)
    model.train()
    if on_gpu:
        torch.cuda.empty_cache()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=on_gpu)
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    times: list[float] = []
    with block:
        estimated = estimated_gib(model, options) if options.who == "qgraft" else ""
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            for number in range(options.steps + 2):
                wait()
                begun = time.time()
                loss = step()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                wait()
                if number >= 2:
                    times.append(time.time() - begun)
                if times and time.time() - started > options.seconds:
                    break
        except KeyboardInterrupt:  # cut: what was measured counts
            if not times:
                raise
        if options.profile and on_gpu:
            _profile(step, Path(options.out) / f"profile-{options.who}-{options.shape}.txt")
    median = statistics.median(times)
    peak_of = torch.cuda.max_memory_reserved if options.graphs else torch.cuda.max_memory_allocated
    return {
        "who": options.who, "shape": options.shape, "layers": model.config.num_hidden_layers, "tokens": options.tokens,
        "tokens_per_pass": options.tokens_per_pass if options.who == "qgraft" else options.tokens,
        "length": options.length, "checkpointing": int(options.checkpointing), "ms": round(median * 1e3, 1),
        "tokens_per_s": round(options.tokens / median), "steps": len(times),
        "peak_gib": round(peak_of() / 2**30, 2) if on_gpu else 0, "estimated_gib": estimated,
        "loss": round(float(loss), 4), "note": note, "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__, "seconds": round(time.time() - started, 1),
    }  # fmt: skip


def _profile(step: Callable[[], Tensor], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    averages = profiled.key_averages()
    with path.open("w") as file:
        for key in ("self_cuda_time_total", "self_cpu_time_total"):
            print(averages.table(sort_by=key, row_limit=40, max_name_column_width=60), file=file)


def append(row: dict[str, Any], path: Path) -> None:
    """A line of a CSV, kept and printed."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def main() -> None:
    """Parse, measure, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=["qgraft", "peft-nf4", "peft-bf16"])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", default=".")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tokens_per_pass", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep all weights unpacked")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    row = measure(options)
    append(row, Path(options.out) / "gpu_train.csv")


if __name__ == "__main__":
    main()
