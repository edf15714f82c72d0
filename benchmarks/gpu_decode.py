"""One contestant of decoding on a GPU, on random weights of a model's shape: lines of gpu_decode.csv.

    python benchmarks/gpu_decode.py qgraft 7b --out results [--rows 1 8 64] [--lora]

Contestants: qgraft (on packed q4_1; one row by generate(), several as the server passes them), transformers-bf16 and
transformers-nf4 (bitsandbytes), by generate(). After a prompt of 128 random tokens each; greedy. tokens/s counts those of
all rows; the prompt's pass is measured by itself and taken off. `share` is what one row's weights as they are stored would
take to be read at the card's rate, of what a token took.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_train import SHAPES, append, build, four_bits, swap
from torch import Tensor, nn

MEMORY_RATE = 3.0e12  # bytes a second that an H100 copies, both ways counted: gpu_kernels.csv


def packed(model: Any) -> None:
    """q4_1 in the place of every linear layer."""
    from qgraft.formats import quantize
    from qgraft.linear import QuantizedLinear

    swap(model, lambda layer: QuantizedLinear(quantize(layer.weight.detach(), "q4_1"), dtype=layer.weight.dtype))


def with_lora(model: Any) -> None:
    """A LoRA that adds something, r 16 on every linear layer of the decoder."""
    import qgraft

    qgraft.attach_lora(model, r=16, lora_alpha=16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


def generating(model: Any, ids: Tensor) -> Callable[[int], None]:
    """generate() of so many tokens."""

    def run(count: int) -> None:
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return run


def passing(model: Any, ids: Tensor, with_adapter: bool) -> Callable[[int], None]:
    """The same as the server does it: all rows in one pass for each token."""
    from qgraft.attention import attending
    from qgraft.passes.batched import CACHED, Piece, next_logits
    from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
    from qgraft.passes.native_texts import NativeTexts

    def run(count: int) -> None:
        length = ids.shape[1] + count
        blocks = -(-length // BLOCK)
        memory = KeyValues(blocks * BLOCK * len(ids))
        slots = [slots_of(list(range(row * blocks, (row + 1) * blocks)), length, ids.device) for row in range(len(ids))]
        texts, loras = [row.tolist() for row in ids], {"default": 1.0} if with_adapter else {}
        native, past = NativeTexts(model), 0
        with torch.inference_mode(), attending(model, CACHED):
            for _ in range(count):
                pieces = [
                    Piece(text, past, slot[: len(text)], loras=loras) for text, slot in zip(texts, slots, strict=True)
                ]
                logits = native.next_logits(memory, pieces)
                if logits is None:
                    logits = next_logits(model, memory, pieces)
                past = len(texts[0])
                for text, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
                    text.append(token)
        assert not count > 1 or native.steps == count - 1

    return run


def measure(options: argparse.Namespace, model: Any, rows: int, note: str) -> dict[str, Any]:
    """Medians of the prompt alone and of the prompt with tokens behind it."""
    from contextlib import nullcontext

    ids = torch.randint(3, model.config.vocab_size, (rows, options.prompt), device="cuda")
    alone: Any = nullcontext()
    run = generating(model, ids)
    if options.who == "qgraft":
        from qgraft.passes.decoding import fast_decoding

        alone, run = (fast_decoding(model), run) if rows == 1 else (alone, passing(model, ids, options.lora))
    times: dict[int, list[float]] = {1: [], options.tokens: []}
    with torch.inference_mode(), alone as problem:
        if problem is not None:
            raise SystemExit(problem)
        run(4)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(options.repeats):
            for count, taken in times.items():
                torch.cuda.synchronize()
                begun = time.time()
                run(count)
                torch.cuda.synchronize()
                taken.append(time.time() - begun)
    first, whole = (statistics.median(taken) for taken in times.values())
    seconds = (whole - first) / (options.tokens - 1)
    stored = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in weights_of(model)}.values())
    return {
        "who": options.who, "shape": options.shape, "lora": int(options.lora), "rows": rows, "prompt": options.prompt,
        "tokens": options.tokens, "prompt_ms": round(1e3 * first, 1), "token_ms": round(1e3 * seconds, 3),
        "tokens_per_s": round(rows / seconds, 1), "share": round(stored / MEMORY_RATE / seconds, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "note": note,
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def weights_of(model: Any) -> list[Tensor]:
    """What a token reads: all but the embedding, of which it reads a row."""
    return [
        tensor
        for name, module in model.named_modules()
        if "embed_tokens" not in name
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


def main() -> None:
    """Parse, measure, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=["qgraft", "transformers-nf4", "transformers-bf16"])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", default=".")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, note = build(options.shape, options.layers).eval(), ""
    if options.who == "qgraft":
        packed(model)
    elif options.who == "transformers-nf4":
        note = four_bits(model)
    if options.lora:
        with_lora(model)
    path = Path(options.out) / "gpu_decode.csv"
    for rows in options.rows:
        row = measure(options, model, rows, note)
        append(row, path)


if __name__ == "__main__":
    main()
