"""Decoding a mixture of experts on a CPU, side by side: qgraft in C, qgraft by transformers' pass, llama.cpp.

    python benchmarks/decode_experts.py                          # layers of Qwen3-30B-A3B
    python benchmarks/decode_experts.py --shape olmoe-1b-7b --rounds 1

Some layers in the released shape with random weights (experts_full_size.py) and a small vocabulary, so that nearly all of the
time is theirs; the same file and ids for all, torch's number of threads for all:

    in C            what `qgraft chat` does: the prompt by transformers' pass, each token in one call of decode.c
    packed layers   the same by transformers' pass over packed layers alone
    adapter         in C with a LoRA r=8 on all linear layers
    llama.cpp       through xllamacpp, its server, without its prompt cache

    decode     the time of 49 tokens after a prompt of 16 less that of one
    prompt     one token after a prompt of 256

Each contestant runs in a process of its own, warms up once and repeats each measurement; the best of a round counts, and the
median of the rounds. cpu_seconds is the process's CPU time of a token: what others take from the machine is not in it.
Written to benchmarks/results/decode_experts.csv.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import experts_full_size
import machine

RESULTS = Path(__file__).with_name("results") / "decode_experts.csv"
CONTESTANTS = ("in C", "packed layers", "adapter", "llama.cpp")
PACKAGES = ("qgraft", "torch", "transformers", "xllamacpp")
VOCABULARY, PROMPT, LONG, TOKENS, REPEATS = 8192, 16, 256, 48, 3
Generate = Callable[[list[int], int], None]  # (ids of the prompt, new tokens)


def main() -> None:
    """Run all contestants in turn, print medians and ratios, append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=experts_full_size.SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="comma list")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="where the file goes; kept there (default: a temporary one)")
    parser.add_argument("--only", nargs=2, metavar=("CONTESTANT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only[0], Path(options.only[1]))))
        return
    names, runs = options.contestants.split(","), []
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"unknown contestants {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        path = (options.folder or Path(temporary)) / f"{options.shape}-{options.layers}.gguf"
        if not path.exists():
            shape = {**experts_full_size.SHAPES[options.shape], "vocabulary": VOCABULARY}
            experts_full_size.write(path, shape, options.layers)
        for number in range(options.rounds):
            for name in names:
                run = machine.in_own_process(__file__, ["--only", name, str(path)])
                runs.append(
                    {"shape": options.shape, "layers": options.layers, "round": number, "contestant": name, **run}
                )
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in runs[-1].items()}, flush=True)
    about, new = machine.describe(*PACKAGES), not options.output.exists()
    with options.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *runs[0]])
        if new:
            writer.writeheader()
        writer.writerows({**about, **run} for run in runs)
    report(runs)


def report(runs: list[dict[str, Any]]) -> None:
    """Medians, and each against the first."""
    keys = ("decode_seconds", "decode_cpu_seconds", "prompt_seconds")
    table = {
        name: [statistics.median(run[key] for run in runs if run["contestant"] == name) for key in keys]
        for name in dict.fromkeys(run["contestant"] for run in runs)
    }
    first = next(iter(table.values()))
    for name, figures in table.items():
        ratios = [
            f"{key} {1e3 * got:8.2f} ms (x {got / own:5.2f})"
            for key, got, own in zip(keys, figures, first, strict=True)
        ]
        print(f"{name:<14} " + "   ".join(ratios))


def measure(name: str, path: Path) -> dict[str, float]:
    """Load the contestant in this process and time it, for one token each."""
    import torch

    generate = load_llama_cpp(path) if name == "llama.cpp" else load_qgraft(name, path)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(300, VOCABULARY, (LONG,), generator=draw).tolist()
    generate(ids[:PROMPT], 4)
    many, one, long = (best(generate, *given) for given in ((ids[:PROMPT], TOKENS + 1), (ids[:PROMPT], 1), (ids, 1)))
    return {
        "decode_seconds": (many[0] - one[0]) / TOKENS,
        "decode_cpu_seconds": (many[1] - one[1]) / TOKENS,
        "prompt_seconds": long[0] / LONG,
        "prompt_cpu_seconds": long[1] / LONG,
        "peak_mb": machine.peak_mb(),
    }


def best(generate: Generate, ids: list[int], tokens: int) -> tuple[float, float]:
    """(seconds, CPU seconds of the process), each the least of some runs."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter(), time.process_time()
        generate(ids, tokens)
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def load_qgraft(name: str, path: Path) -> Generate:
    """Ours."""
    import torch

    import qgraft
    from qgraft.passes.decoding import fast_decoding

    model, _ = qgraft.load(path, dtype="float32", device="cpu")
    model.generation_config.eos_token_id = None
    if name == "adapter":
        qgraft.attach_lora(model, r=8)
    model.eval()

    def generate(ids: list[int], tokens: int) -> None:
        prompt = torch.tensor([ids])
        with torch.inference_mode(), nullcontext() if name == "packed layers" else fast_decoding(model) as problem:
            assert problem is None, problem
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens, pad_token_id=0
            )
        assert out.shape[1] == len(ids) + tokens

    return generate


def load_llama_cpp(path: Path) -> Generate:
    """llama.cpp's server within this process, one slot."""
    import torch
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.warmup = params.fit_params = params.enable_chat_template = False
    server = xllamacpp.Server(params)

    def generate(ids: list[int], tokens: int) -> None:
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        assert answer["usage"]["completion_tokens"] == tokens, answer

    return generate


if __name__ == "__main__":
    sys.exit(main())
