"""ChatGLM2-6B-INT4 and ChatGLM-6B-INT4 in full size, with random weights, on this machine.

    python benchmarks/chatglm_full_size.py                          # both generations: an hour on two cores, 16 GB of disk
    python benchmarks/chatglm_full_size.py --models chatglm2        # one of them

A checkpoint in the published layout (names, shapes and dtypes of the releases; about 3.9 GB) is written tensor by tensor
into a temporary folder, once as safetensors and once as pytorch_model.bin. Then, each in a process of its own:

    load        from safetensors and from .bin: seconds, resident memory after it, peak
    train       LoRA r=8 on query_key_value, 3 steps of one sample of 256 tokens, gradient checkpointing
    train512    the same with one step of one sample of 512 tokens
    p_tuning    P-Tuning v2 with a prefix of 128 tokens, one step of one sample of 192 tokens, gradient checkpointing
    generate    16 tokens after a prompt of 32, the adapter active
    merge       a LoRA on query_key_value of the last two layers into their INT4 weights, method auto, 288 tokens
    merge_all   not unless asked for, half an hour or more: qgraft.merge of a LoRA on every linear layer of all blocks, with
                as many tokens as it takes for a model of this size (1,408), layers kept in a folder, all measured but
                not distilled; then saved. With --folder, one that was killed goes on.
    serve_1     not unless asked for: the server's engine answers one client, 16 tokens after 32, under a LoRA r=8
    serve_2     likewise two clients at once, each under a LoRA of its own; tokens/s are those of both together
    save        the model with these weights; it is loaded again and compared byte for byte

Memory is what the process holds, mapped pages of the weights that it touched included (peak_mb, resident_mb); without them
it is anonymous_mb, the most that was seen 20 times a second, for which there must be room. Random weights take the time and
the memory of trained ones; nothing is said about losses. Results go to benchmarks/results/chatglm_full_size.csv.
"""

import argparse
import csv
import datetime
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import cpu_name

RESULTS = Path(__file__).with_name("results") / "chatglm_full_size.csv"
FIELDS = (
    "model", "phase", "seconds", "peak_mb", "resident_mb", "file_mb", "tokens_per_second",
    "date", "threads", "cpu", "qgraft", "torch", "transformers", "anonymous_mb",
)  # fmt: skip
STEPS, SAMPLE, LONG_SAMPLE, PREFIX_SAMPLE, PROMPT, ANSWER = 3, 256, 512, 192, 32, 16
CONFIGS: dict[str, dict[str, Any]] = {  # as released
    "chatglm2": {
        "model_type": "chatglm", "num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096,
        "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32, "seq_length": 32768,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "layernorm_epsilon": 1e-5, "rmsnorm": True,
        "apply_residual_connection_post_layernorm": False, "post_layer_norm": True, "add_bias_linear": False,
        "add_qkv_bias": True, "bias_dropout_fusion": True, "multi_query_attention": True, "multi_query_group_num": 2,
        "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "fp32_residual_connection": False,
        "original_rope": True, "use_cache": True, "torch_dtype": "float16", "tie_word_embeddings": False,
        "eos_token_id": 2, "pad_token_id": 0, "quantization_bit": 4,
    },
    "chatglm": {
        "model_type": "chatglm", "vocab_size": 130528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "inner_hidden_size": 16384, "layernorm_epsilon": 1e-5, "max_sequence_length": 2048, "position_encoding_2d": True,
        "use_cache": True, "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000,
        "gmask_token_id": 130001, "pad_token_id": 3, "torch_dtype": "float16", "quantization_bit": 4,
        "quantization_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    """Write the checkpoints, run the phases, append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="chatglm2,chatglm")
    parser.add_argument("--phases", default="load-safetensors,load-bin,train,train512,p_tuning,generate,merge,save")
    parser.add_argument("--layers", type=int, help="so many blocks instead of all 28, to try a phase")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; kept there (default: a temporary one)")
    parser.add_argument("--only", nargs=2, metavar=("PHASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        phase, folder = options.only[0], Path(options.only[1])
        print(json.dumps(write_checkpoint(folder) if phase == "write" else run_phase(phase, folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.models.split(","):
            name = model if options.layers is None else f"{model}-{options.layers}"
            folder = (options.folder or Path(temporary)) / name
            in_own_process("write", folder)
            for phase in options.phases.split(","):
                record(name, phase, folder)


def record(model: str, phase: str, folder: Path) -> None:
    """One phase in a process of its own, appended to the CSV and printed."""
    result = {"model": model, "phase": phase, **in_own_process(phase, folder)}
    print(result, flush=True)
    about = {
        "date": datetime.date.today().isoformat(), "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        "cpu": cpu_name(),
        **{package: version(package) for package in ("qgraft", "torch", "transformers")},
    }  # fmt: skip
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(result | about)


def in_own_process(phase: str, folder: Path) -> dict[str, float]:
    """Run one phase; the writing too, since a process begins with the peak memory of the one that started it."""
    command = [sys.executable, __file__, "--only", phase, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def config_of(name: str) -> dict[str, Any]:
    """Of a model, or with -N behind its name of its first N blocks."""
    model, _, layers = name.partition("-")
    return CONFIGS[model] | ({"num_layers": int(layers)} if layers else {})


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, safetensors' word for the dtype, shape) of every tensor of the released INT4 checkpoint."""
    hidden, second = config["hidden_size"], "padded_vocab_size" in config
    vocabulary = config["padded_vocab_size" if second else "vocab_size"]
    inner = config["ffn_hidden_size"] if second else config["inner_hidden_size"]
    layers, attention = (
        ("transformer.encoder.layers", "self_attention") if second else ("transformer.layers", "attention")
    )
    qkv = hidden + 2 * config["multi_query_group_num"] * config["kv_channels"] if second else 3 * hidden
    linears = {  # name: outputs, inputs, bias
        f"{attention}.query_key_value": (qkv, hidden, True), f"{attention}.dense": (hidden, hidden, not second),
        "mlp.dense_h_to_4h": (2 * inner if second else inner, hidden, not second),
        "mlp.dense_4h_to_h": (hidden, inner, not second),
    }  # fmt: skip
    norms = ("weight",) if second else ("weight", "bias")
    yield f"transformer.{'embedding.' if second else ''}word_embeddings.weight", "F16", (vocabulary, hidden)
    for number in range(config["num_layers"]):
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield from ((f"{layers}.{number}.{part}.{norm}", "F16", (hidden,)) for norm in norms)
        for part, (outputs, inputs, bias) in linears.items():
            yield f"{layers}.{number}.{part}.weight", "I8", (outputs, inputs // 2)
            yield f"{layers}.{number}.{part}.weight_scale", "F16", (outputs,)
            if bias:
                yield f"{layers}.{number}.{part}.bias", "F16", (outputs,)
    end = "transformer.encoder.final_layernorm" if second else "transformer.final_layernorm"
    yield from ((f"{end}.{norm}", "F16", (hidden,)) for norm in norms)
    yield "transformer.output_layer.weight" if second else "lm_head.weight", "F16", (vocabulary, hidden)


def write_checkpoint(folder: Path) -> dict[str, float]:
    """Random weights of about the size of trained ones, as `safetensors/` and as `bin/`; nothing is held but one tensor."""
    import numpy as np
    import torch
    from safetensors import safe_open

    config = config_of(folder.name)
    if (folder / "bin" / "pytorch_model.bin").is_file():
        return {}
    for kind in ("safetensors", "bin"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / "config.json").write_text(json.dumps(config, indent=2))
    tied = "lm_head.weight"  # stored once in the release's pickle, and read once here
    listed = [entry for entry in tensors_of(config) if entry[0] != tied]
    sizes = {name: math.prod(shape) * (1 if word == "I8" else 2) for name, word, shape in listed}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, word, shape in listed:
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with open(folder / "safetensors" / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, word, shape in listed:
            if word == "I8":
                file.write(generator.bytes(sizes[name]))
            elif name.endswith("_scale"):
                file.write(np.full(shape, 0.02 / 4.6, np.float16).tobytes())  # codes are -8..7: weights of about 0.02
            elif name.endswith(("layernorm.weight", "layernorm.bias")):
                file.write(np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float16).tobytes())
            else:
                file.write((generator.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16).tobytes())
    with safe_open(folder / "safetensors" / "model.safetensors", framework="pt") as source:
        state = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 (views of the file)
        if "padded_vocab_size" not in config:
            state[tied] = state["transformer.word_embeddings.weight"]
        torch.save(state, folder / "bin" / "pytorch_model.bin")
    return {}


def run_phase(phase: str, folder: Path) -> dict[str, float]:
    """One phase; seconds and memory of this process."""
    import psutil

    file = folder / ("bin/pytorch_model.bin" if phase == "load-bin" else "safetensors/model.safetensors")
    run = {
        "train": train,
        "train512": train512,
        "p_tuning": p_tuning,
        "generate": generate,
        "merge": merge,
        "merge_all": merge_all,
        "serve_1": serve_1,
        "serve_2": serve_2,
        "save": save,
    }.get(phase)
    import qgraft

    anonymous = [0.0]
    threading.Thread(target=watch, args=(anonymous,), daemon=True).start()
    load = qgraft.load  # the imports behind it happen here
    began = time.perf_counter()
    model, _ = load(file.parent, device="cpu")
    loaded = time.perf_counter() - began
    figures = {"seconds": loaded} if run is None else run(model, folder)
    resident = psutil.Process().memory_info().rss / 1e6
    sizes = {"peak_mb": peak_mb(), "resident_mb": resident, "anonymous_mb": anonymous[0]}
    return sizes | {"file_mb": file.stat().st_size / 1e6} | figures


def watch(most: list[float]) -> None:
    """Keep the most memory that is no file's in `most`."""
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        most[0] = max(most[0], held * 1024 / 1e6)
        time.sleep(0.05)


def peak_mb() -> float:
    """The most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def sample_of(model: Any, length: int, seed: int) -> Any:
    """A sample of random ids, the second half learned; the first generation's has its [gMASK] sop in the middle."""
    import torch

    from qgraft.data.tokenizing import IGNORED, Sample

    ids = torch.randint(100, 60000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    if hasattr(model.config, "gmask_token_id"):
        ids[length // 2 - 2 : length // 2] = [model.config.gmask_token_id, model.config.bos_token_id]
    return Sample(ids, [IGNORED] * (length // 2) + ids[length // 2 :], f"random:{seed}")


def train(model: Any, folder: Path) -> dict[str, float]:
    """LoRA; the adapter is kept for the next phases."""
    import qgraft

    qgraft.attach_lora(model, r=8, target_modules="query_key_value")
    figures = steps(model, [sample_of(model, SAMPLE, seed) for seed in range(STEPS)])
    qgraft.save_adapter(model, folder / "adapter")
    return figures


def train512(model: Any, folder: Path) -> dict[str, float]:
    """LoRA, a long sample."""
    import qgraft

    qgraft.attach_lora(model, r=8, target_modules="query_key_value")
    return steps(model, [sample_of(model, LONG_SAMPLE, 0)])


def p_tuning(model: Any, folder: Path) -> dict[str, float]:
    """A prefix in front of every layer."""
    import qgraft

    qgraft.attach_prefix(model, pre_seq_len=128)
    return steps(model, [sample_of(model, PREFIX_SAMPLE, 0)])


def steps(model: Any, samples: list[Any]) -> dict[str, float]:
    """A step of the trainer's own loss on each sample, with gradient checkpointing."""
    import torch

    from qgraft.data.batches import collate
    from qgraft.kernels.choice import has_fast_bf16
    from qgraft.linear import computing
    from qgraft.memory.settings import map_large_blocks
    from qgraft.passes.decoder import padding_free
    from qgraft.passes.fused import fused_modules
    from qgraft.passes.loss import batch_loss

    renamed = getattr(model, "activation_checkpointing_enable", None)  # in newer releases of transformers
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    map_large_blocks()  # as a run does
    seconds = []
    with padding_free(model, [sample_of(model, 8, 0), sample_of(model, 8, 1)]) as problem, ExitStack() as stack:
        assert problem is None, problem
        stack.enter_context(computing(model, "bf16" if has_fast_bf16() else "float32"))
        stack.enter_context(fused_modules(model))
        for sample in samples:
            began = time.perf_counter()
            loss = batch_loss(model, collate([sample])) / (len(sample.input_ids) // 2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            print(f"loss {loss.item():.3f}, {seconds[-1]:.1f} s", file=sys.stderr)
    tokens = sum(len(sample.input_ids) for sample in samples)
    return {"seconds": sum(seconds), "tokens_per_second": tokens / sum(seconds)}


def generate(model: Any, folder: Path) -> dict[str, float]:
    """Greedy tokens with the trained adapter active; end tokens do not end it."""
    import torch

    import qgraft

    qgraft.load_adapter(model, folder / "adapter")
    ids = torch.tensor([sample_of(model, 2 * PROMPT, 7).input_ids[:PROMPT]])
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)
    seconds = time.perf_counter() - began
    assert output.shape[1] == PROMPT + ANSWER
    return {"seconds": seconds, "tokens_per_second": ANSWER / seconds}


def serve_1(model: Any, folder: Path) -> dict[str, float]:
    """One client of a server."""
    return served(model, 1)


def serve_2(model: Any, folder: Path) -> dict[str, float]:
    """Two clients of a server, with different adapters."""
    return served(model, 2)


class Numbers:
    """Stands in for the tokenizer, which is not a part of the checkpoint: ids are written as numbers."""

    eos_token_id, eos_token, clean_up_tokenization_spaces, chat_template = 2, "</s>", False, None

    def decode(self, ids: list[int], **options: Any) -> str:
        """The ids with blanks between them."""
        return "".join(f"{token} " for token in ids)

    def get_added_vocab(self) -> dict[str, int]:
        """There are none."""
        return {}


def served(model: Any, clients: int) -> dict[str, float]:
    """As many requests at once, each under a LoRA with weights at random; a first token is not counted in."""
    import torch

    import qgraft
    from qgraft.serving.engine import Engine, answer_all
    from qgraft.serving.requests import Request
    from qgraft.serving.sampling import Sampling

    for number in range(clients):
        qgraft.attach_lora(model, r=8, target_modules="query_key_value", name=f"client-{number}")
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values.data, std=2e-3)
    qgraft.use_adapter(model, None)
    engine: Any = Engine(model, Numbers(), max_batch=clients, cache_tokens=1024)  # type: ignore[arg-type]

    def seconds_of(tokens: int) -> float:  # with prompts of their own: what is known of one is not computed again
        requests = [
            Request(tuple(sample_of(model, 2 * PROMPT, 7 * tokens + number).input_ids[:PROMPT]), {f"client-{number}": 1.0},
                    Sampling(temperature=0), tokens, ignore_ends=True)
            for number in range(clients)
        ]  # fmt: skip
        began = time.perf_counter()
        answers = answer_all(engine, requests)
        assert [each["finish"].tokens for each in answers] == [tokens] * clients
        return time.perf_counter() - began

    first = seconds_of(1)
    spent = time.process_time()
    whole = seconds_of(ANSWER + 1)
    spent = time.process_time() - spent
    print(f"shares passes: {engine.why_not_shared or True}; first tokens after {first:.1f} s; all of them in {whole:.1f} s, "
          f"{spent:.1f} CPU seconds, at a load of {os.getloadavg()[0]:.1f}", file=sys.stderr)  # fmt: skip
    return {"seconds": whole, "tokens_per_second": clients * ANSWER / (whole - first)}


def merge(model: Any, folder: Path) -> dict[str, float]:
    """A LoRA on the last two layers into their INT4 weights; what comes out is kept for the next phase."""
    import torch

    from qgraft.merging.lockstep import merge_in_step

    last = model.config.num_layers - 1
    deltas = random_lora(model, rf".*layers\.({last - 1}|{last})\..*query_key_value")
    fit, judge = [sample_of(model, 64, seed) for seed in range(4)], [sample_of(model, 32, 9)]
    began = time.perf_counter()
    with torch.no_grad():
        starts = {path: model.get_submodule(path).packed for path in deltas}
        packed, _ = merge_in_step(
            model, starts, deltas, fit, judge, "auto", lambda layer: print(layer, file=sys.stderr)
        )
    seconds = time.perf_counter() - began
    torch.save({path: each.parts for path, each in packed.items()}, folder / "merged.pt")
    return {"seconds": seconds}


def merge_all(model: Any, folder: Path) -> dict[str, float]:
    """What `qgraft merge` does, of every linear layer."""
    from unittest.mock import patch

    from rich.console import Console

    import qgraft
    from qgraft.merging.calibration import Calibration

    random_lora(model, "all-linear")
    samples = [sample_of(model, 64, seed) for seed in range(32)]
    rows = Calibration(samples[:20], samples[20:22], samples[22:28], samples[28:], held_out=True)
    console, work = Console(stderr=True), folder / "merging"
    began = time.perf_counter()
    find, wanting = "qgraft.merging.merge.find_rows", "qgraft.merging.finish.wanting"  # there is no vocabulary
    with patch(find, lambda *_: rows), patch(wanting, lambda _: False):
        report = qgraft.merge(model, min_retained=-1e9, work_dir=work, progress=console)
    report.print(console)
    print(spent(), file=sys.stderr)
    print(qgraft.save(model, folder / "merged", overwrite=True), spent(), file=sys.stderr)
    return {"seconds": time.perf_counter() - began}


def random_lora(model: Any, targets: str) -> dict[str, Any]:
    """A LoRA r=8 with weights at random; module path -> its delta."""
    import torch

    import qgraft
    from qgraft.adapters.targets import lora_layers

    qgraft.attach_lora(model, r=8, target_modules=targets)
    torch.manual_seed(0)  # one that was killed goes on with the same adapter
    parts = {path: layer.loras["default"] for path, layer in lora_layers(model)}
    for part in parts.values():
        torch.nn.init.kaiming_uniform_(part.lora_A, a=5**0.5)
        torch.nn.init.normal_(part.lora_B, std=2e-3)
    return {path: part.delta for path, part in parts.items()}


def spent() -> str:
    """CPU time and peak memory so far."""
    import psutil

    cpu = psutil.Process().cpu_times()
    return f"{cpu.user + cpu.system:.0f} CPU seconds, peak {peak_mb():.0f} MB"


def save(model: Any, folder: Path) -> dict[str, float]:
    """The merged model as a folder, loaded again and compared."""
    import torch

    import qgraft

    for path, (data, scale) in torch.load(folder / "merged.pt", weights_only=True).items():
        layer = model.get_submodule(path)
        layer.replace(qgraft.QuantizedLinear.from_params(4, data, scale).packed)
    began = time.perf_counter()
    print(qgraft.save(model, folder / "merged"), file=sys.stderr)
    figures = {"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}  # the comparison below holds both models
    again, _ = qgraft.load(folder / "merged", device="cpu")
    for path, layer in model.named_modules():
        if isinstance(layer, qgraft.QuantizedLinear):
            same = again.get_submodule(path).packed.parts[0].view(torch.uint8)
            assert torch.equal(same, layer.packed.parts[0].view(torch.uint8)), path
    return figures


if __name__ == "__main__":
    main()
