"""The `qgraft` command: find the sub-command, import only its file, print errors as people read them.

Each command is a file with `run(words) -> exit code`; what it does is one call of the library.
"""

import difflib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from qgraft.cli import streams
from qgraft.errors import OptionError, QgraftError, flags_spoken, near_match

COMMANDS = {
    "demo": "see it work: tune a real 4-bit model to a new identity",
    "pull": "fetch a known model",
    "train": "train an adapter on the packed weights of a model file",
    "diffuse": "train an adapter on an image model of diffusers (SD, SDXL, SD3, Flux)",
    "distill": "ask a teacher about rows once, for students to learn from",
    "estimate": "say how much memory training will take",
    "chat": "talk to a model, with or without adapters",
    "serve": "answer many people at once, each with own adapters (OpenAI's API)",
    "ui": "a page in the browser to chat, train, compare and merge",
    "eval": "measure the loss on held-out rows",
    "merge": "put adapters into the packed weights, and write the same kind of file",
    "combine": "make one adapter out of several",
    "export": "write an adapter for llama.cpp, or for PEFT",
    "inspect": "show what is in a model file, an adapter or a run",
    "doctor": "show versions, CPU features and which kernels serve",
}

_SERVE = "`qgraft serve` does that; other servers take what `qgraft export` and `merge` write: docs/guide-serve.md"
_UI = "`qgraft ui` opens a page to chat, train, compare and merge"
_TRAIN, _CHAT, _EXPORT = "`qgraft train` does that", "`qgraft chat` does that", "`qgraft export` does that"
MEANT = {  # what people type who know other tools -> what there is for it
    **dict.fromkeys(("server", "api", "deploy", "host"), _SERVE),
    **dict.fromkeys(("web", "webui", "gui", "page", "studio", "browser", "board"), _UI),
    **dict.fromkeys(("finetune", "fine-tune", "sft", "lora", "tune", "fit", "learn", "resume"), _TRAIN),
    **dict.fromkeys(("run", "generate", "ask", "talk", "answer", "cli", "infer", "inference", "prompt"), _CHAT),
    **dict.fromkeys(("convert", "modelfile", "ollama", "gguf", "save"), _EXPORT),
    **dict.fromkeys(("predict", "test"), "`qgraft train --do_predict` answers test rows"),
    **dict.fromkeys(("evaluate", "bench", "benchmark", "perplexity", "ppl"), "`qgraft eval` measures the loss on rows"),
    **dict.fromkeys(("download", "get", "fetch", "install"), "`qgraft pull` fetches a known model"),
    **dict.fromkeys(("list", "ls", "models"), "`qgraft pull` without a name lists the models that are known"),
    **dict.fromkeys(("show", "info", "describe", "dump"), "`qgraft inspect` shows what is in a file"),
    **dict.fromkeys(("memory", "vram", "ram"), "`qgraft estimate` says how much memory training will take"),
    **dict.fromkeys(("fuse", "bake", "apply"), "`qgraft merge` puts adapters into the file"),
    **dict.fromkeys(("upload", "push", "publish"), "`hf upload` publishes the folder that `qgraft train` has written"),
    **dict.fromkeys(("mix", "blend", "average"), "`qgraft combine` makes one adapter out of several"),
    **dict.fromkeys(
        ("check", "env", "status", "gpu"), "`qgraft doctor` shows what is installed and which kernels serve"
    ),
    **dict.fromkeys(("teach", "teacher", "student", "kd"), "`qgraft train --stage distill` learns from a teacher"),
    **dict.fromkeys(
        (
            "diffusion",
            "diffusers",
            "dreambooth",
            "image",
            "images",
            "text2image",
            "text-to-image",
            "sd",
            "sdxl",
            "flux",
        ),
        "`qgraft diffuse` trains on images",
    ),
    "quantize": "a float folder is packed while loading: --quantize q4_1 of `qgraft train`, `chat` and `export`",
}

USAGE = """usage: qgraft COMMAND [options]      (--threads N, --debug: for all commands)

Fine-tune the quantized model file you already have.

{commands}

`qgraft COMMAND --help` tells the options of a command.
"""


def entry_point() -> None:
    """The console script."""
    _be_a_good_neighbour()
    _be_interruptible()
    streams.make_lasting()
    sys.exit(streams.finish(main(sys.argv[1:])))


def main(words: Sequence[str]) -> int:
    """Run one command; returns the exit code. Errors of ours are printed without a traceback, except with --debug."""
    _be_a_good_neighbour()
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        with flags_spoken():
            words = _take_threads(words)
            return _dispatch(words)
    except QgraftError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=commands))
        return 0
    if words[0] in ("-V", "--version", "version"):
        from qgraft import __version__

        print(f"qgraft {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise OptionError(f"unknown command {words[0]!r}", hint=_meant(words[0].lower()))
    if sys.flags.optimize > 1:
        raise OptionError("Python runs with -OO, without the docstrings that transformers reads",
                          hint="unset PYTHONOPTIMIZE, or set it to 1")  # fmt: skip
    try:
        return int(import_module(f"qgraft.cli.{words[0]}").run(list(words[1:])))
    except ImportError as error:
        from qgraft.releases import explain

        explain(error)
        raise


def _meant(word: str) -> str:
    """The hint for a word that is no command: what there is for it, also where it is misspelt."""
    if word not in MEANT:
        closest = difflib.get_close_matches(word, [*COMMANDS, *MEANT], n=1, cutoff=0.75)
        if not closest or closest[0] in COMMANDS:
            return near_match(word, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
        word = closest[0]
    return MEANT[word]


def _take_threads(words: Sequence[str]) -> list[str]:
    """The words without --threads N, which is obeyed: by OpenMP, which torch and our C ask for how many there are."""
    rest, given = list(words), None
    for at, word in enumerate(words):
        if word == "--threads" or word.startswith("--threads="):
            given = word.partition("=")[2] or (words[at + 1] if at + 1 < len(words) else "")
            del rest[at : at + (1 if "=" in word else 2)]
            break
    if given is not None:
        if not given.isascii() or not given.isdigit() or not 1 <= int(given) <= 1024:
            raise OptionError(f"--threads {given}: expected a number from 1 on")
        os.environ["OMP_NUM_THREADS"] = given
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(int(given))
    return rest


def _be_interruptible() -> None:
    """Let Ctrl-C and SIGTERM end a command in order wherever it is; training has its own way while it takes steps.

    Python drops an exception that is raised within a `__del__` or a callback of a C library, and with it a Ctrl-C that comes
    just then, while a tokenizer is made for example. It tells a hook, which sends the interrupt once more.
    """

    def again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt | SystemExit):
            number = signal.SIGINT if issubclass(dropped.exc_type, KeyboardInterrupt) else signal.SIGTERM
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        else:
            sys.__unraisablehook__(dropped)

    def leave(number: int, frame: Any) -> None:
        print("terminated", file=sys.stderr)
        sys.exit(128 + number)

    sys.unraisablehook = again
    signal.signal(signal.SIGTERM, leave)


def _be_a_good_neighbour() -> None:
    """Defaults that libraries read when they are imported; a value the user has set stays.

    OpenMP's threads spin for milliseconds between two loops; with anything else running on the machine that costs more
    than it saves (a 2-core laptop with one busy core: 5 times slower), so they spin briefly and then sleep.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
