"""A mixture of experts in full size, with random weights, on this machine: gpt-oss-20b as GGUF, its experts in MXFP4.

    python benchmarks/experts_full_size.py                  # 13 GB of disk, and as much memory for the pages of the experts
    python benchmarks/experts_full_size.py --layers 2       # two blocks of the 24, to try it
    python benchmarks/experts_full_size.py --shape qwen3-30b-a3b --layers 12

The file is written tensor by tensor into a temporary folder. Then, each in a process of its own:

    load            seconds, resident memory after it, peak
    train           LoRA r=8 on the attention, two steps of one sample of 128 tokens; the first reads the file's pages
    train_experts   the same with LoRAs of rank 4 on all experts, too
    generate        16 tokens after a prompt of 32

touched_mb is what of the mapped file the process has read (RssFile): random tokens are routed to nearly all experts.
peak_mb is all that it held at once; over_touched is their ratio. Random weights take the time and the memory of trained
ones; nothing is said about losses. Results go to benchmarks/results/experts_full_size.csv.
"""

import argparse
import csv
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, in_own_process

RESULTS = Path(__file__).with_name("results") / "experts_full_size.csv"
SAMPLE, PROMPT, ANSWER = 128, 32, 16
MXFP4, Q8_0, Q4_K, Q6_K, F32 = "MXFP4", "Q8_0", "Q4_K", "Q6_K", "F32"
SHAPES: dict[str, dict[str, Any]] = {  # as released
    "gpt-oss-20b": {
        "architecture": "gpt-oss", "block_count": 24, "context_length": 131072, "embedding_length": 2880,
        "feed_forward_length": 2880, "expert_feed_forward_length": 2880, "attention.head_count": 64,
        "attention.head_count_kv": 8, "attention.key_length": 64, "attention.value_length": 64, "expert_count": 32,
        "expert_used_count": 4, "attention.sliding_window": 128, "rope.freq_base": 150000.0,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        "attention.layer_norm_rms_epsilon": 1e-5, "vocabulary": 201088, "dense": Q8_0, "experts": MXFP4, "down": MXFP4,
    },
    "qwen3-30b-a3b": {
        "architecture": "qwen3moe", "block_count": 48, "context_length": 40960, "embedding_length": 2048,
        "feed_forward_length": 6144, "expert_feed_forward_length": 768, "attention.head_count": 32,
        "attention.head_count_kv": 4, "attention.key_length": 128, "attention.value_length": 128, "expert_count": 128,
        "expert_used_count": 8, "rope.freq_base": 1000000.0, "attention.layer_norm_rms_epsilon": 1e-6,
        "vocabulary": 151936, "dense": Q8_0, "experts": Q4_K, "down": Q6_K,
    },
    "olmoe-1b-7b": {
        "architecture": "olmoe", "block_count": 16, "context_length": 4096, "embedding_length": 2048,
        "feed_forward_length": 1024, "expert_feed_forward_length": 1024, "attention.head_count": 16,
        "attention.head_count_kv": 16, "attention.key_length": 128, "attention.value_length": 128, "expert_count": 64,
        "expert_used_count": 8, "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-5,
        "vocabulary": 50304, "dense": Q8_0, "experts": Q4_K, "down": Q6_K,
    },
}  # fmt: skip


def main() -> None:
    """Write the file, run the phases, append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt-oss-20b", choices=SHAPES)
    parser.add_argument("--phases", default="load,train,train_experts,generate")
    parser.add_argument("--layers", type=int, help="so many blocks instead of all")
    parser.add_argument("--folder", type=Path, help="where the file goes; kept there (default: a temporary one)")
    parser.add_argument("--only", nargs=3, metavar=("PHASE", "SHAPE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        phase, shape, path = options.only
        print(json.dumps(run(phase, shape, Path(path))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        layers = options.layers or SHAPES[options.shape]["block_count"]
        path = (options.folder or Path(temporary)) / f"{options.shape}-{layers}.gguf"
        for phase in ["write", *options.phases.split(",")]:
            result = in_own_process(__file__, ["--only", phase, options.shape, str(path)])
            record({"shape": options.shape, "layers": layers, "phase": phase, **result})


def record(row: dict[str, Any]) -> None:
    """Append to the CSV and print."""
    fields = ("shape", "layers", "phase", "seconds", "again_seconds", "tokens_per_second", "file_mb", "resident_mb",
              "touched_mb", "peak_mb", "over_touched", *describe("qgraft", "torch", "transformers"))  # fmt: skip
    print(row, flush=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerow(row | describe("qgraft", "torch", "transformers"))


def run(phase: str, shape: str, path: Path) -> dict[str, float]:
    """One phase; see the docstring."""
    if phase == "write":
        return write(path, SHAPES[shape], int(path.stem.rpartition("-")[2]))
    import torch

    import qgraft

    began = time.perf_counter()
    model, _ = qgraft.load(path, dtype="float32", device="cpu")
    result: dict[str, float] = {"seconds": time.perf_counter() - began, "file_mb": path.stat().st_size / 1e6}
    ids = torch.randint(0, SHAPES[shape]["vocabulary"], (1, SAMPLE), generator=torch.Generator().manual_seed(0))
    if phase.startswith("train"):
        result |= steps(model, ids, phase == "train_experts")
    if phase == "generate":
        began, prompt = time.perf_counter(), ids[:, :PROMPT]
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, min_new_tokens=ANSWER,
                       do_sample=False, pad_token_id=0)  # fmt: skip
        result["seconds"] = time.perf_counter() - began
        result["tokens_per_second"] = ANSWER / result["seconds"]
    status = Path("/proc/self/status").read_text()
    held = {name: int(kb) / 1024 for name, kb in re.findall(r"(VmHWM|VmRSS|RssFile):\s+(\d+) kB", status)}
    touched, peak = held["RssFile"], held["VmHWM"]
    return result | {
        "resident_mb": held["VmRSS"],
        "touched_mb": touched,
        "peak_mb": peak,
        "over_touched": peak / touched,
    }


def steps(model: Any, ids: Any, experts: bool) -> dict[str, float]:
    """Two steps of one sample; the second finds the pages of the file in memory."""
    import torch

    import qgraft
    from qgraft.data.batches import collate
    from qgraft.data.tokenizing import Sample
    from qgraft.passes.loss import batch_loss

    qgraft.attach_lora(model, r=8, target_modules="q_proj,k_proj,v_proj,o_proj", name="attention")
    names = ["attention"]
    if experts:
        parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
        qgraft.attach_lora(model, r=4, target_modules=(), target_parameters=parameters, name="experts")
        names.append("experts")
    qgraft.use_adapter(model, dict.fromkeys(names, 1.0))
    trained = [p for name in names for _, p in model.qgraft.adapters[name].named_parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    sample, seconds = Sample(ids[0].tolist(), ids[0].tolist(), ""), []
    for _ in range(2):
        began = time.perf_counter()
        (batch_loss(model, collate([sample])) / SAMPLE).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[0], "again_seconds": seconds[1], "tokens_per_second": SAMPLE / seconds[1]}


def write(path: Path, shape: dict[str, Any], layers: int) -> dict[str, float]:
    """A GGUF file of these sizes, a tensor at a time in memory."""
    import gguf

    began = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, shape["architecture"])
    own = {"architecture", "vocabulary", "dense", "experts", "down"}  # which are no keys
    if shape["architecture"] == "olmoe":  # whose experts are as wide as feed_forward_length
        own.add("expert_feed_forward_length")
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**shape, "block_count": layers}.items():
        if key not in own:
            adders[type(value)](f"{shape['architecture']}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o" if shape["architecture"] == "gpt-oss" else "qwen2")
    writer.add_token_list(tokens(shape["vocabulary"]))
    writer.add_token_types([1] * shape["vocabulary"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    listed = list(tensors(shape, layers))
    for name, sizes, kind in listed:
        stored, raw = bytes_of(sizes, kind), None if kind == F32 else gguf.GGMLQuantizationType[kind]
        dtype = np.dtype(np.float32 if kind == F32 else np.uint8)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _, sizes, kind in listed:
        writer.write_tensor_data(numbers(generator, sizes, kind))
    writer.close()
    return {"seconds": time.perf_counter() - began, "file_mb": path.stat().st_size / 1e6}


def tokens(count: int) -> list[str]:
    """A byte-level vocabulary with names for the rest."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    bytes_ = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    return [*bytes_, "ab", *(f"<|{number}|>" for number in range(count - 257))]


def tensors(shape: dict[str, Any], layers: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape in rows first, type) of every tensor."""
    hidden, heads, groups = (
        shape[key] for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    width, experts, inner = (
        shape[key] for key in ("attention.key_length", "expert_count", "expert_feed_forward_length")
    )
    dense, biased = shape["dense"], shape["architecture"] == "gpt-oss"
    yield "token_embd.weight", (shape["vocabulary"], hidden), dense
    yield "output.weight", (shape["vocabulary"], hidden), dense
    yield "output_norm.weight", (hidden,), F32
    for block in range(layers):
        at = f"blk.{block}."
        outputs = {"attn_q": heads * width, "attn_k": groups * width, "attn_v": groups * width}
        for name, rows in outputs.items():
            yield f"{at}{name}.weight", (rows, hidden), dense
        yield f"{at}attn_output.weight", (hidden, heads * width), dense
        yield f"{at}attn_norm.weight", (hidden,), F32
        yield f"{at}{'post_attention_norm' if biased else 'ffn_norm'}.weight", (hidden,), F32
        yield f"{at}ffn_gate_inp.weight", (experts, hidden), F32
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            yield f"{at}{name}.weight", (experts, inner, hidden), shape["experts"]
        yield f"{at}ffn_down_exps.weight", (experts, hidden, inner), shape["down"]
        if not biased:
            wide = shape["architecture"] == "olmoe"  # norms of all heads together
            yield f"{at}attn_q_norm.weight", (heads * width if wide else width,), F32
            yield f"{at}attn_k_norm.weight", (groups * width if wide else width,), F32
            continue
        yield f"{at}attn_sinks.weight", (heads,), F32
        for name, rows in {**outputs, "attn_output": hidden, "ffn_gate_inp": experts}.items():
            yield f"{at}{name}.bias", (rows,), F32
        for name, rows in (("ffn_gate_exps", inner), ("ffn_up_exps", inner), ("ffn_down_exps", hidden)):
            yield f"{at}{name}.bias", (experts, rows), F32


BLOCKS: dict[str, tuple[int, int, dict[int, Any]]] = {  # weights, bytes; what is not random, by where it is in a block
    MXFP4: (32, 17, {0: np.uint8(120)}),
    Q8_0: (32, 34, {0: np.float16(0.0003)}),
    Q4_K: (256, 144, {0: np.float16(0.0001), 2: np.float16(0.0007)}),
    Q6_K: (256, 210, {208: np.float16(0.00002)}),
}


def bytes_of(sizes: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape of what is stored."""
    if kind == F32:
        return sizes
    weights, nbytes, _ = BLOCKS[kind]
    return (*sizes[:-1], sizes[-1] // weights * nbytes)


def numbers(generator: np.random.Generator, sizes: tuple[int, ...], kind: str) -> np.ndarray:
    """Random weights of about 0.02."""
    if kind == F32:
        return (generator.standard_normal(sizes) * 0.02 + float(len(sizes) == 1)).astype(np.float32)
    _, nbytes, fixed = BLOCKS[kind]
    stored = generator.integers(0, 256, (*bytes_of(sizes, kind)[:-1], sizes[-1] // BLOCKS[kind][0], nbytes), np.uint8)
    for at, value in fixed.items():
        stored[..., at : at + value.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
    return stored.reshape(bytes_of(sizes, kind))


if __name__ == "__main__":
    sys.exit(main())
