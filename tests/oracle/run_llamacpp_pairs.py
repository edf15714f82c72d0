"""Run an encoder-decoder through llama.cpp, in a process of its own: JSON on stdin, JSON as the last line of stdout.

in      {"model": path, "loras": [path], "source": [ids], "target": [ids], "tokens": size of the vocabulary}
out     [[logit, ...], ...]     the decoder's logits at each id of the target, which begins with the start token

Through the C interface that the library of the xllamacpp package exports: its server takes decoders only. Keys and values
are float16, as they are there by default.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp

NUMBER, POINTER = ctypes.c_int32, ctypes.c_void_p


class Parameters(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * 512)]  # more than they have, which is harmless in C's calling convention


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", NUMBER), ("token", ctypes.POINTER(NUMBER)), *((f"of_{n}", POINTER) for n in range(5))]


def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (Parameters, []),
        "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, Parameters]),
        "llama_context_default_params": (Parameters, []),
        "llama_init_from_model": (POINTER, [POINTER, Parameters]),
        "llama_adapter_lora_init": (POINTER, [POINTER, ctypes.c_char_p]),
        "llama_set_adapters_lora": (NUMBER, [POINTER, POINTER, ctypes.c_size_t, POINTER]),
        "llama_batch_get_one": (Batch, [ctypes.POINTER(NUMBER), NUMBER]),
        "llama_encode": (NUMBER, [POINTER, Batch]),
        "llama_decode": (NUMBER, [POINTER, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, NUMBER]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def check(done: bool, what: str) -> None:
    if not done:
        raise SystemExit(f"llama.cpp refused: {what}")


def main() -> None:
    job, llama = json.load(sys.stdin), library()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(job["model"].encode(), llama.llama_model_default_params())
    check(model, "the model")
    loras = [llama.llama_adapter_lora_init(model, path.encode()) for path in job["loras"]]
    check(all(loras), "a LoRA")
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    check(context, "the context")
    if loras:
        adapters, scales = (POINTER * len(loras))(*loras), (ctypes.c_float * len(loras))(*[1.0] * len(loras))
        check(not llama.llama_set_adapters_lora(context, adapters, len(loras), scales), "the LoRAs")
    source = (NUMBER * len(job["source"]))(*job["source"])
    check(not llama.llama_encode(context, llama.llama_batch_get_one(source, len(source))), "the source")
    logits = []
    for token in job["target"]:
        one = (NUMBER * 1)(token)
        check(not llama.llama_decode(context, llama.llama_batch_get_one(one, 1)), "the target")
        logits.append(llama.llama_get_logits_ith(context, -1)[: job["tokens"]])
    print("\n" + json.dumps(logits))


if __name__ == "__main__":
    main()
