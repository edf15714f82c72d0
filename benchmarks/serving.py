"""Many requests at once on one base, with and without adapters, through the engine of `qgraft serve`; no HTTP.

    python benchmarks/serving.py [--model smollm2-135m] [--clients 16] [--tokens 128] [--rounds 3] [--llama]

    one           one request alone, base and one adapter; beside it generate() in fast_decoding, which `qgraft chat` uses
    together      all clients at once: base, one adapter for all, another adapter (r=8) for each
    llama.cpp     with --llama: its server on the same file (xllamacpp, in this process, as many slots as clients), all
                  clients at once: base, and adapters 1 to 4 in turn among the clients, given by each request; beside it
                  ours with these four. The time of all answers less that of answers of one token, as the prompts take it
    first token   of a prompt of 64 tokens: alone, and while all other clients decode; the time of one of their tokens
    load          an adapter by its name, as a request does, while all decode, and the longest time between two of their
                  tokens meanwhile
    memory        what the process grows by with 40 adapters more, against their files; and when each was answered with

Ways take turns within a round; the median of the rounds counts. Written to benchmarks/results/serving.csv.
"""

import argparse
import csv
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import describe

import qgraft
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.passes.decoding import fast_decoding
from qgraft.serving.catalogue import Catalogue
from qgraft.serving.engine import Engine
from qgraft.serving.requests import Finish, Request
from qgraft.serving.sampling import Sampling

RESULTS = Path(__file__).with_name("results") / "serving.csv"
GREEDY, PROMPT = Sampling(temperature=0), 64
HELD = 40  # adapters whose memory is measured
FEW = 4  # adapters among the clients, where they are compared with llama.cpp's server


def main() -> None:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama", action="store_true", help="llama.cpp's server beside it (xllamacpp)")
    options = parser.parse_args()
    model, tokenizer = qgraft.load(options.model, device="cpu")
    names = [f"user-{number}" for number in range(options.clients)]
    for name in names:
        _attach(model, name)
    use_adapter(model, None)
    bench = Bench(model, tokenizer, options.clients, options.tokens)
    found = {measure: [value] for measure, value in bench.memory(names[0]).items()}
    with tempfile.TemporaryDirectory() as folder:
        llama = LlamaServer(bench, options.model, names[:FEW], Path(folder)) if options.llama else None
        for _ in range(options.rounds):
            measured = bench.round(names) | ({} if llama is None else llama.round())
            for measure, value in measured.items():
                found.setdefault(measure, []).append(value)
    about = {**describe("qgraft", "torch", "transformers"), "model": options.model, "clients": options.clients}
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, "measure", "value"])
        writer.writeheader()
        for measure, values in found.items():
            value = statistics.median(values)
            print(f"{measure:<52}{value:10.2f}")
            writer.writerow({**about, "measure": measure, "value": f"{value:.4g}"})


def _anonymous() -> int:
    """Bytes of the process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _attach(model: Any, name: str) -> None:
    attach_lora(model, r=8, name=name)
    for lora in find_adapter(model, name).parts.values():
        torch.nn.init.normal_(lora.lora_B, 0, 0.01)


class Bench:
    """One model with its adapters."""

    def __init__(self, model: Any, tokenizer: Any, clients: int, tokens: int) -> None:
        self.model, self.tokenizer, self.clients, self.tokens = model, tokenizer, clients, tokens
        self.size, self.draw = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)

    def request(self, adapters: dict[str, float], tokens: int | None = None) -> Request:
        """A prompt that nobody has asked before."""
        prompt = torch.randint(4, self.size, (PROMPT,), generator=self.draw).tolist()
        return Request(tuple(prompt), adapters, GREEDY, tokens or self.tokens, ignore_ends=True)

    def round(self, names: list[str]) -> dict[str, float]:
        """Each measure once."""
        found = {f"generate() alone, {what}, tokens/s": self.generated(mix) for what, mix in
                 (("base", {}), ("adapter", {names[0]: 1.0}))}  # fmt: skip
        engine = Engine(self.model, self.tokenizer, max_batch=self.clients, max_queue=self.clients)
        ways = {
            "one client, base": [{}], "one client, adapter": [{names[0]: 1.0}], "together, base": [{}] * self.clients,
            "together, one adapter": [{names[0]: 1.0}] * self.clients,
            "together, another adapter each": [{name: 1.0} for name in names],
            f"together, {FEW} adapters": [{names[number % FEW]: 1.0} for number in range(self.clients)],
        }  # fmt: skip
        for way, mixes in ways.items():
            found[f"{way}, tokens/s"] = self.rate(engine, mixes)
        found |= self.first_token(engine, names)
        engine.stop()
        return found | self.loading(names)

    def generated(self, mix: dict[str, float]) -> float:
        """Tokens a second after the prompt, as in `qgraft chat`."""
        use_adapter(self.model, mix)
        ids = torch.tensor([list(self.request({}).prompt)])
        with fast_decoding(self.model), torch.inference_mode():
            told = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
            begin = time.perf_counter()
            self.model.generate(ids, max_new_tokens=1, **told)
            prompt = time.perf_counter() - begin
            begin = time.perf_counter()
            self.model.generate(ids, max_new_tokens=self.tokens, min_new_tokens=self.tokens, **told)
            seconds = time.perf_counter() - begin - prompt
        use_adapter(self.model, None)
        return (self.tokens - 1) / seconds

    def rate(self, engine: Engine, mixes: list[dict[str, float]]) -> float:
        """Tokens a second of all together, from the first pass without a prompt on."""
        requests = [self.request(mix) for mix in mixes]
        for request in requests:
            engine.submit(request, lambda event: None)
        while engine.step() and any(each.new > 1 for each in engine.running):
            pass
        left = sum(self.tokens - each.answered for each in engine.running)
        begin = time.perf_counter()
        while engine.step():
            pass
        return left / (time.perf_counter() - begin)

    def first_token(self, engine: Engine, names: list[str]) -> dict[str, float]:
        """Milliseconds to the first token, alone and with the others, and of one token of theirs."""
        alone = self._first(engine, names[-1])
        for name in names[:-1]:
            engine.submit(self.request({name: 1.0}, 10**4), lambda event: None)
        while engine.step() and any(each.new > 1 for each in engine.running):
            pass
        begin = time.perf_counter()
        for _ in range(8):
            engine.step()
        token = (time.perf_counter() - begin) / 8 * 1e3
        beside = self._first(engine, names[-1])
        self._clear(engine)
        return {
            "first token alone, ms": alone,
            "first token beside the others, ms": beside,
            "a token of theirs, ms": token,
        }

    def _first(self, engine: Engine, name: str) -> float:
        done: list[float] = []
        begin = time.perf_counter()

        def listen(event: Any) -> None:
            if isinstance(event, Finish):
                done.append(time.perf_counter() - begin)

        engine.submit(self.request({name: 1.0}, 1), listen)
        while not done:
            engine.step()
        return done[0] * 1e3

    def loading(self, names: list[str]) -> dict[str, float]:
        """Milliseconds of a load while all decode, and the longest time between two tokens in it against the median one."""
        engine = Engine(self.model, self.tokenizer, max_batch=self.clients, max_queue=self.clients)
        passes: list[float] = []
        step = engine.step

        def timed() -> bool:
            was_one = step()
            passes.append(time.perf_counter())
            return was_one

        engine.step = timed  # type: ignore[method-assign]
        with tempfile.TemporaryDirectory() as folder:
            qgraft.save_adapter(self.model, Path(folder) / "loaded", names[0])
            catalogue = Catalogue(engine, "base", Path(folder))
            engine.start()
            for name in names:
                engine.submit(self.request({name: 1.0}, 10**4), lambda event: None)
            while any(each.new > 1 for each in (*engine.running, *engine.waiting)):
                time.sleep(0.01)
            start = len(passes)
            while len(passes) < start + 12:
                time.sleep(0.001)
            begin = time.perf_counter()
            catalogue.need(["loaded"])
            end, among = time.perf_counter(), len(passes)
            while len(passes) < among + 3:  # with the first pass that finds it
                time.sleep(0.001)
            engine.stop()
        detach_adapter(self.model, "loaded")
        apart = [later - earlier for earlier, later in pairwise(passes[start : among + 3])]
        usual = statistics.median(apart[:11])
        return {"load while serving, ms": (end - begin) * 1e3, "longest pause, in tokens": max(apart[11:]) / usual}

    def memory(self, name: str) -> dict[str, float]:
        """What the process grows by for each of many adapters, in sizes of their files. Once: it keeps what is freed."""
        engine = Engine(self.model, self.tokenizer, max_batch=1, cache_tokens=4 * PROMPT)
        for _ in range(8):  # until all keys and values have been written
            self._first(engine, name)
        with tempfile.TemporaryDirectory() as folder:
            qgraft.save_adapter(self.model, Path(folder) / "held", name)
            size = (Path(folder) / "held" / "adapter_model.safetensors").stat().st_size
            names = [f"held-{number}" for number in range(HELD)]
            for each in names:
                (Path(folder) / each).symlink_to("held")
            catalogue, before = Catalogue(engine, "base", Path(folder)), _anonymous()
            catalogue.need(names)
            held = _anonymous()
            for each in names:
                self._first(engine, each)
            answered = _anonymous()
        engine.stop()
        for each in names:
            detach_adapter(self.model, each)
        found = {"held": held - before, "answered with": answered - before}
        return {f"memory of an adapter {what}, in files": used / HELD / size for what, used in found.items()}

    def _clear(self, engine: Engine) -> None:
        for each in (*engine.running, *engine.waiting):
            engine.cancel(each)
        engine.step()


class LlamaServer:
    """llama.cpp's server with GGUF-LoRAs of the first adapters, and the same prompts."""

    def __init__(self, bench: Bench, name: str, adapters: list[str], folder: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(qgraft.pull(name))
        params.n_parallel, params.n_gpu_layers = bench.clients, 0
        params.n_ctx = bench.clients * (PROMPT + bench.tokens + 64)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.warmup = params.fit_params = params.enable_chat_template = False
        paths = [folder / f"{adapter}.gguf" for adapter in adapters]
        for adapter, path in zip(adapters, paths, strict=True):
            export_gguf_lora(bench.model, path, adapter)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in paths]
        self.bench, self.adapters, self.server = bench, adapters, xllamacpp.Server(params)
        self._seconds([None], 1)

    def round(self) -> dict[str, float]:
        """Tokens a second of all clients together."""
        clients = self.bench.clients
        ways: dict[str, list[int | None]] = {
            "base": [None] * clients,
            f"{FEW} adapters": [number % FEW for number in range(clients)],
        }
        return {f"llama.cpp, together, {way}, tokens/s": self._rate(mixes) for way, mixes in ways.items()}

    def _rate(self, mixes: list[int | None]) -> float:
        tokens = self.bench.tokens
        prompts = self._seconds(mixes, 1)
        return len(mixes) * (tokens - 1) / (self._seconds(mixes, tokens) - prompts)

    def _seconds(self, mixes: list[int | None], tokens: int) -> float:
        """Until the last of them is answered; a mix is the number of an adapter, or None."""
        requests = [
            {
                "prompt": list(self.bench.request({}).prompt), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True,
                "cache_prompt": False, "lora": [{"id": id, "scale": float(id == mix)} for id in range(len(self.adapters))],
            }
            for mix in mixes
        ]  # fmt: skip
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = list(pool.map(self.server.handle_completions, requests))
        seconds = time.perf_counter() - begin
        for answer in answers:
            assert answer["usage"]["completion_tokens"] == tokens, answer
        return seconds


if __name__ == "__main__":
    main()
