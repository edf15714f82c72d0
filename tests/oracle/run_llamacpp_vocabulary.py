"""What llama.cpp makes of texts with the vocabularies of GGUF files, in a process of its own: JSON in, JSON out.

in      [{"model": path, "texts": [text], "special": bool}, ...]       special: with bos and eos as the file says
out     [{"ids": [[id], ...], "kinds": [attributes of each token], "ends": [tokens that end generation]}
         or {"error": what it logged}, ...]

Only the vocabulary is loaded (milliseconds), through the C interface that the library of the xllamacpp package exports:
its server would load a model for each file. `Parameters` is llama_model_params as bytes, because that structure grows from
release to release; `vocab_only` is where this release has it, and that is checked by whether tensors are asked for.
A crash of llama.cpp ends this process, not the tests.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp

VOCAB_ONLY = 72  # bytes from the start


class Parameters(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * 512)]  # more than it has, which is harmless in C's calling convention


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Parameters]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_vocab_get_attr": (number, [pointer, number]),
        "llama_vocab_is_eog": (ctypes.c_bool, [pointer, number]),
        "llama_tokenize": (number, [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
        "llama_log_set": (None, [Log, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def tokenize(llama: ctypes.CDLL, vocabulary: int, text: str, special: bool) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (2 * len(raw) + 16))()
    count = llama.llama_tokenize(vocabulary, raw, len(raw), room, len(room), special, True)
    assert count >= 0
    return list(room[:count])


def main() -> None:
    llama = library()
    logged: list[str] = []
    log = Log(lambda level, text, _: logged.append(text.decode(errors="replace")))
    llama.llama_log_set(log, None)
    llama.llama_backend_init()
    answers: list[dict[str, Any]] = []
    for job in json.load(sys.stdin):
        parameters = llama.llama_model_default_params()
        assert parameters.raw[VOCAB_ONLY] == 0
        parameters.raw[VOCAB_ONLY] = 1
        logged.clear()
        model = llama.llama_model_load_from_file(job["model"].encode(), parameters)
        if not model:
            answers.append({"error": "".join(logged)})
            continue
        vocabulary = llama.llama_model_get_vocab(model)
        ids = [tokenize(llama, vocabulary, text, job["special"]) for text in job["texts"]]
        tokens = range(llama.llama_vocab_n_tokens(vocabulary))
        kinds = [llama.llama_vocab_get_attr(vocabulary, token) for token in tokens]
        ends = [token for token in tokens if llama.llama_vocab_is_eog(vocabulary, token)]
        answers.append({"ids": ids, "kinds": kinds, "ends": ends})
        llama.llama_model_free(model)
    sys.stdout.write("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
