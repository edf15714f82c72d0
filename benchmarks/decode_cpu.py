"""Decoding one sequence on a CPU, side by side: qgraft, transformers, transformers + bitsandbytes, llama.cpp.

    python benchmarks/decode_cpu.py                        # five rounds of each contestant, alternating
    python benchmarks/decode_cpu.py --rounds 1 --contestants qgraft,llama.cpp

Greedy, batch 1, SmolLM2-135M, the same questions with the same ids for all, torch's number of threads for all:

    qgraft            the packed Q4_1 file, by what `qgraft chat` calls for an answer
    qgraft-adapter    the same with a LoRA r=8 on all linear layers
    transformers      generate() on the float32 model that the file stands for
    nf4, nf4-bf16     generate() on bitsandbytes NF4, compute dtype float32 and bfloat16; on a CPU with AVX512-BF16 the
                      library computes the layers of both in bfloat16
    llama.cpp         through xllamacpp, the same file; its server, without its prompt cache
    llama.cpp-adapter the same with that LoRA, in float32 as ours is

    decode     64 tokens after a short question: the time of 65 tokens less that of one, so the question does not count
    prefill    one token after a question of about 512 tokens

Each contestant runs in a process of its own, warms up once and repeats each measurement three times; the best counts for
the round, the median of the rounds for the table. Nobody is asked for a least number of tokens, which costs generate() two
passes over the vocabulary for each: the answers do not end before, or nothing ends them. Written to
benchmarks/results/decode_cpu.csv.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import peers

RESULTS = Path(__file__).with_name("results") / "decode_cpu.csv"
CONTESTANTS = ("qgraft", "qgraft-adapter", "transformers", "nf4", "nf4-bf16", "llama.cpp", "llama.cpp-adapter")
PACKAGES = ("qgraft", "torch", "transformers", "bitsandbytes", "xllamacpp")
QUESTION = "What does json.dumps do in Python?"
NEW_TOKENS, PREFILL_TOKENS = 64, 512
REPEATS = 3
Prompt = dict[str, Any]  # the "question", and the "ids" of the prompt that training makes of it
Generate = Callable[[Prompt, int], None]  # (prompt, new tokens)


def main() -> None:
    """Run all contestants in turn, print medians and ratios, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="comma list")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.folder)))
        return
    names = options.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"unknown contestants {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        peers.prepare(Path(folder), [])
        (Path(folder) / "prompts.json").write_text(json.dumps(prompts()))
        for number in range(options.rounds):
            for name in names:
                run = machine.in_own_process(__file__, ["--only", name, "--folder", folder])
                runs.append({"round": number, "contestant": name, **run})
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in runs[-1].items()}, flush=True)
    about = machine.describe(*PACKAGES)
    options.output.parent.mkdir(exist_ok=True)
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *runs[0]])
        writer.writeheader()
        writer.writerows({**about, **run} for run in runs)
    report(runs)


def report(runs: list[dict[str, Any]]) -> None:
    """Medians, and ours against each."""
    keys = ("decode_tokens_per_second", "prefill_tokens_per_second", "peak_mb")
    table = {
        name: {key: statistics.median(run[key] for run in runs if run["contestant"] == name) for key in keys}
        for name in dict.fromkeys(run["contestant"] for run in runs)
    }
    first = next(iter(table))
    for name, figures in table.items():
        decode, prefill = (table[first][key] / figures[key] for key in keys[:2])
        print(
            f"{name:<15} decode {figures[keys[0]]:7.1f} tokens/s ({first} x {decode:5.2f})"
            f"   prefill {figures[keys[1]]:7.1f} tokens/s ({first} x {prefill:5.2f})   peak {figures['peak_mb']:5.0f} MB"
        )


def prompts() -> list[Prompt]:
    """A short question, and one of as many words as PREFILL_TOKENS hold."""
    import tasks

    import qgraft
    from qgraft.data.tokenizing import encode_prompt, resolve_template

    _, tokenizer = qgraft.load(peers.MODEL)
    template = resolve_template(tokenizer, None)

    def prompt(question: str) -> Prompt:
        return {"question": question, "ids": encode_prompt(tokenizer, [("user", question)], template=template)}

    words = " ".join(row["messages"][1]["content"] for row in tasks.docstrings()[0][:30]).split()
    long = prompt(" ".join(words))
    while len(long["ids"]) > PREFILL_TOKENS:
        words.pop()
        long = prompt(" ".join(words))
    return [prompt(QUESTION), long]


def measure(name: str, folder: Path) -> dict[str, float]:
    """Load the contestant in this process and time it."""
    short, long = json.loads((folder / "prompts.json").read_text())
    began = time.perf_counter()
    loaders = {"qgraft": load_qgraft, "llama.cpp": load_llama_cpp}
    generate = loaders.get(name.removesuffix("-adapter"), load_transformers)(name, folder)
    load_seconds = time.perf_counter() - began
    generate(short, 4)
    many, one = best_seconds(generate, short, NEW_TOKENS + 1), best_seconds(generate, short, 1)
    return {
        "decode_tokens_per_second": NEW_TOKENS / (many - one),
        "prefill_tokens_per_second": len(long["ids"]) / best_seconds(generate, long, 1),
        "first_token_seconds": one,
        "load_seconds": load_seconds,
        "peak_mb": machine.peak_mb(),
    }


def best_seconds(generate: Generate, prompt: Prompt, tokens: int) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        generate(prompt, tokens)
        times.append(time.perf_counter() - began)
    return min(times)


def load_qgraft(name: str, folder: Path) -> Generate:
    """Ours."""
    import qgraft
    from qgraft.passes.decoding import fast_decoding
    from qgraft.serving.answering import answer

    model, tokenizer = qgraft.load(peers.MODEL)
    if name == "qgraft-adapter":
        qgraft.load_adapter(model, folder / "adapter")
    model.eval()
    session = ExitStack()  # as long as `generate` lives, like a chat
    session.enter_context(fast_decoding(model))

    class Counter:
        """A streamer: the prompt comes in one piece, each token in another."""

        def __init__(self) -> None:
            self.tokens = -1

        def put(self, _: object) -> None:
            self.tokens += 1

        def end(self) -> None:
            pass

    def generate(prompt: Prompt, tokens: int, session: ExitStack = session) -> None:
        counter = Counter()
        answer(model, tokenizer, [("user", prompt["question"])], do_sample=False, max_new_tokens=tokens,
               streaming=lambda _: counter)  # fmt: skip
        assert counter.tokens == tokens, f"the answer ends after {counter.tokens} tokens, expected {tokens}"

    return generate


def load_transformers(name: str, folder: Path) -> Generate:
    """The peers that are models of transformers."""
    import torch

    model = peers.load_peer("peft" if name == "transformers" else name, folder / "float").eval()
    model.generation_config.eos_token_id = None

    def generate(prompt: Prompt, tokens: int) -> None:
        ids = torch.tensor([prompt["ids"]])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        assert out.shape[1] == ids.shape[1] + tokens

    return generate


def load_llama_cpp(name: str, folder: Path) -> Generate:
    """llama.cpp's server within this process, one slot."""
    import torch
    import xllamacpp

    import qgraft

    params = xllamacpp.CommonParams()
    params.model.path = str(qgraft.pull(peers.MODEL))
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.warmup = params.fit_params = params.enable_chat_template = False
    if name == "llama.cpp-adapter":
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / "adapter.gguf"), 1.0)]
    server = xllamacpp.Server(params)

    def generate(prompt: Prompt, tokens: int) -> None:
        request = {"prompt": prompt["ids"], "n_predict": tokens, "temperature": 0.0, "ignore_eos": True,
                   "cache_prompt": False}  # fmt: skip
        answer = server.handle_completions(request)
        assert answer["usage"]["completion_tokens"] == tokens, answer

    return generate


if __name__ == "__main__":
    main()
