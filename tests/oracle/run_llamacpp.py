"""Run a prompt through llama.cpp, in a process of its own: JSON on stdin, JSON as the last line of stdout.

in      {"model": path, "loras": [path], "exact": bool, "prompt": [ids], "n": int, "top": int, "stop": [ids],
         "forced": [ids], "scales": [number] or null}     scales of the LoRAs that each request asks for
out     {"ids": [id], "top": [[[id, log-probability], ...], ...]}    of each step the `top` likeliest tokens, in order
in      {"files": [[path, [ids], context]]}
out     [[[id, log-probability], ...], ...]     of each file all tokens behind its prompt, computed exactly

A step's token is the likeliest one, or the next one of `forced`; one of `stop` is the last. A crash of llama.cpp (it
aborts on some bad files) ends this process, not the tests. "exact" keeps keys and values in float32 and leaves flash
attention and repacked weights out, so that a float32 model is computed in float32.

Each step is a request of its own for one token (llama.cpp keeps the cache in between), and that token is biased to one
that is text by itself: the server leaves out the probabilities of tokens that are no whole UTF-8 character. What it
reports is of the plain logits, without the bias.
"""

import json
import sys
from typing import Any

import xllamacpp

CONTEXT = 1024


def parameters(job: dict[str, Any], context: int = CONTEXT) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in job["loras"]]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.enable_chat_template = False  # prompts come as token ids
    if job["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_extra_bufts = True
    return params


def step(
    server: xllamacpp.Server, prompt: list[int], top: int, clean: int, scales: list[float] | None = None
) -> list[list[float]]:
    """The likeliest tokens after `prompt`; [] if the token `clean` is not text by itself."""
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "logprobs": top, "logit_bias": [[clean, 1e4]]}
    if scales is not None:
        request["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    answer = server.handle_completions(request)
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp refused: {answer}")
    content = answer["choices"][0]["logprobs"]["content"]
    return [[other["id"], other["logprob"]] for entry in content for other in entry["top_logprobs"]]


def behind(path: str, prompt: list[int], context: int) -> list[list[float]]:
    """The log-probabilities of all tokens behind `prompt`."""
    server = xllamacpp.Server(parameters({"model": path, "loras": [], "exact": True}, context))
    return next(found for token in range(3, 300) if (found := step(server, prompt, 1_000_000, token)))


def main() -> None:
    job = json.load(sys.stdin)
    if "files" in job:
        print("\n" + json.dumps([behind(*each) for each in job["files"]]))
        return
    server = xllamacpp.Server(parameters(job))
    ids, top, forced = job["prompt"], job["top"], job["forced"]
    clean = next(token for token in range(3, 300) if step(server, ids, 1, token))
    written, likeliest = [], []
    while len(written) < job["n"] and not (written and written[-1] in job["stop"]):
        likeliest.append(step(server, ids + written, top, clean, job["scales"]))
        written.append(forced.pop(0) if forced else likeliest[-1][0][0])
    print(json.dumps({"ids": written, "top": likeliest}))


if __name__ == "__main__":
    main()
