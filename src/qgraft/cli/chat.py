"""qgraft chat: talk to a model and switch its adapters while talking."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from qgraft.cli.options import Parser, load_with_adapters, number_in, print_note, true_or_false
from qgraft.errors import DataError, OptionError, QgraftError
from qgraft.ranges import COUNT, SEED, SHARE_ABOVE_0, TEMPERATURE
from qgraft.serving.text import AnswerText, until_word

HELP = """/adapter NAME          answer with this adapter
/adapter a=0.7 b=0.3   with a weighted few
/adapters              which there are
/base                  answer as the base
/clear                 forget the conversation
/quit                  leave"""


class WordPrinter:
    """A streamer for generate() that prints an answer by words; Chinese and Japanese, which have no blanks, by characters."""

    def __init__(self, text: AnswerText) -> None:
        self.text = text
        self.word = ""  # what is not printed yet of what can be shown
        self.prompted = False

    def put(self, ids: Any) -> None:
        """The prompt's ids [1, n] at first, then each new one [1]."""
        if not self.prompted:
            self.prompted = True
            return
        shown = self.word + "".join(map(self.text.push, ids.reshape(-1).tolist()))
        end = len(shown) if self.text.rewrites else until_word(shown)
        print(shown[:end], end="", flush=True)
        self.word = shown[end:]

    def end(self) -> None:
        """The answer is complete."""
        print(self.word + self.text.end(), flush=True)


def run(words: Sequence[str]) -> int:
    """Parse, load, answer one prompt or converse."""
    parser = Parser("chat", f"Talk to a model. While chatting:\n\n{HELP}")
    parser.add_model()
    parser.add_argument("--prompt", help="ask this one question and leave")
    parser.add_argument(
        "--image", action="append", default=[], help="an image in front of the first question; repeatable"
    )
    parser.add_argument("--audio", help="Whisper: write down this recording and leave")
    parser.add_speech()
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--template", help="chat template: auto, plain, chatml, a training variant, or a .jinja file")
    parser.add_argument("--source_prefix", help="text in front of every question (default: as in training)")
    parser.add_argument("--enable_thinking", type=true_or_false, help="what a reasoning model's template is told")
    parser.add_argument("--max_new_tokens", type=number_in(COUNT), default=256, help="longest answer (default 256)")
    likeliest, share = (
        "0 (default): always the likeliest token",
        "with a temperature: sample from this share (default 0.9)",
    )
    parser.add_argument("--temperature", type=number_in(TEMPERATURE), default=0.0, help=likeliest)
    parser.add_argument("--top_p", type=number_in(SHARE_ABOVE_0), default=0.9, help=share)
    parser.add_argument("--seed", type=number_in(SEED), default=42, help="of the sampling (default 42)")
    options = parser.parse_args(words)

    import torch

    from qgraft.model_parts import hears
    from qgraft.passes.decoding import fast_decoding

    model, tokenizer, names = load_with_adapters(options, writes="qgraft chat")
    if len(names) > 1:
        print_note(f"{_speaker(model)} answers")
    torch.manual_seed(options.seed)
    with fast_decoding(model):
        if options.audio is not None or hears(model.config):
            _answer(model, tokenizer, [("user", options.prompt)] if options.prompt else [], options)
            return 0
        if options.prompt is not None:
            _answer(model, tokenizer, [("user", options.prompt)], options)
            return 0
        return _converse(model, tokenizer, options)


def _converse(model: Any, tokenizer: Any, options: argparse.Namespace) -> int:
    from qgraft.adapters.base import adapter_names
    from qgraft.model_parts import is_encoder_decoder

    messages: list[tuple[str, str]] = []
    print_note(f"adapters: {', '.join(adapter_names(model)) or 'none'}; /help shows the commands")
    while True:
        try:
            line = _line(f"{_speaker(model)}> ").strip()
        except EOFError:
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line == "/clear":
            messages.clear()
        elif line.startswith("/"):
            _command(model, line)
        elif line:
            try:
                said = _answer(model, tokenizer, [*messages, ("user", line)], options)
            except DataError as error:  # what cannot be asked; the conversation goes on without it
                print_note(f"error: {error}")
                continue
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print_note("\ninterrupted: the conversation goes on without this question; /quit leaves")
                continue
            if not is_encoder_decoder(model.config):  # which reads one text, and no conversation
                messages += [("user", line), ("assistant", said)]


def _line(prompt: str) -> str:
    """What somebody writes; who writes through a pipe gets answers alone. Raises EOFError."""
    if not sys.stdin.isatty():
        return input("")
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits with it; without it a terminal cuts a line at 4096 bytes)
    return input(prompt)


def _speaker(model: Any) -> str:
    """Who answers: the active adapters, with their weights where these are not 1; nothing where there are none at all."""
    from qgraft.adapters.base import adapter_names
    from qgraft.adapters.choose import active_adapters

    active = [name if weight == 1 else f"{name}={weight:g}" for name, weight in active_adapters(model).items()]
    return "+".join(active) or ("base" if adapter_names(model) else "")


def _command(model: Any, line: str) -> None:
    """Carry out a line that begins with a slash; a mistake in it is told, not fatal."""
    from qgraft.adapters.base import adapter_names
    from qgraft.adapters.choose import active_adapters, use_adapter

    command, _, rest = line.partition(" ")
    try:
        if command == "/base":
            use_adapter(model, None)
        elif command == "/adapter" and rest.strip():
            use_adapter(model, parse_mixture(rest))
        elif command not in ("/adapter", "/adapters"):
            print_note(HELP)
            return
        active = ", ".join(f"{name}={weight:g}" for name, weight in active_adapters(model).items())
        print_note(f"active: {active or 'the base'}; attached: {', '.join(adapter_names(model)) or 'none'}")
    except QgraftError as error:
        print_note(f"error: {error}")


def parse_mixture(text: str) -> dict[str, float]:
    """{"law": 0.7, "med": 0.3} from "law=0.7 med=0.3"; a name alone weighs 1. Raises OptionError."""
    mixture = {}
    for word in text.split():
        name, equals, weight = word.partition("=")
        try:
            mixture[name] = float(weight) if equals else 1.0
        except ValueError:
            raise OptionError(f"{word!r}: expected NAME or NAME=NUMBER") from None
    return mixture


def _answer(model: Any, tokenizer: Any, messages: list[tuple[str, str]], options: argparse.Namespace) -> str:
    """Generate one answer, printed word by word; returns it."""
    from qgraft.serving.answering import answer

    sampling = {"do_sample": False} if options.temperature == 0 else {
        "do_sample": True, "temperature": options.temperature, "top_p": options.top_p,
    }  # fmt: skip
    said = answer(
        model,
        tokenizer,
        messages,
        template=options.template,
        system=options.system,
        enable_thinking=options.enable_thinking,
        source_prefix=options.source_prefix or "",
        max_new_tokens=options.max_new_tokens,
        images=options.image,
        audio=options.audio,
        language=options.language,
        task=options.task,
        streaming=WordPrinter,
        **sampling,
    )
    if said.note:
        print_note(said.note)
    return said.text
