"""What several commands share: the parser, the model-and-adapter options, loading what they name, answering."""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from qgraft.errors import OptionError, near_match
from qgraft.ranges import Range


class Parser(argparse.ArgumentParser):
    """argparse with our errors: an unknown option names the closest ones, before another one that is missing is asked for.

    Dashes and underscores within a name are the same, as in `qgraft train`.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"qgraft {command}",
            description="\n".join(
                textwrap.fill(line, 80, subsequent_indent=" " * 13 if line.startswith("  ") else "")
                for line in description.split("\n")  # an indented one is of a table
            ),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="--threads N and --debug (errors with a traceback) go with every command.",
        )

    def error(self, message: str) -> NoReturn:
        """Raise OptionError instead of printing the usage and leaving."""
        unknown = next((word for word in message.split() if word.startswith("--")), None)
        known = [name for action in self._actions for name in action.option_strings]
        hint = near_match(unknown, known) if unknown and "unrecognized" in message else None
        raise OptionError(f"{self.prog}: {message}", hint=hint or f"`{self.prog} --help` lists the options")

    def parse_args(self, words: Iterable[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """As in argparse."""
        known = {name.replace("-", "_"): name for action in self._actions for name in action.option_strings}
        spelt: list[str] = []
        for word in words:
            if spelt and spelt[-1].startswith("--") and "=" not in spelt[-1] and is_negative(word):
                spelt[-1] += f"={word}"  # argparse takes -1 for a number, and -1e9 for an option
                continue
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and flag != "--":
                flag = known.get(flag.replace("-", "_"), "")
                if not flag:
                    self.error(f"unrecognized arguments: {word}")
            spelt.append(flag + equals + value)
        return super().parse_args(spelt, namespace)

    def add_model(self, required: bool = True) -> None:
        """--model, --adapter, --force, --quantize, --dtype, --device."""
        self.add_argument(
            "--model", required=required, help="GGUF file, Hugging Face folder, hub id, or a known model's name"
        )
        self.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="PATH",
            help="adapter folder or GGUF-LoRA; may be given several times",
        )
        self.add_argument(
            "--force", action="store_true", help="load adapters although they do not fit, as far as they do"
        )
        self.add_argument("--quantize", metavar="FORMAT", help="pack a float checkpoint while loading, e.g. q4_1")
        self.add_argument("--dtype", default="auto", help="what to compute in: auto, float32, bfloat16, float16")
        self.add_argument("--device", default="auto", help="cpu or cuda; default: a GPU where there is one")

    def add_speech(self) -> None:
        """--language, --task."""
        self.add_argument("--language", help="Whisper: what texts are written in (default: as in training)")
        self.add_argument("--task", help="Whisper: transcribe or translate (default: as in training)")


def load_with_adapters(
    options: argparse.Namespace, prompts: bool = True, writes: str | None = None
) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, adapter names) with every --adapter attached, the last one active; says what was applied.

    Args:
        writes: what a model is needed for that writes; None where a classifier serves as well.
        prompts: take what prompts depend on from the last adapter, see prompt_as_in_training.

    A prefix that came with the model is not among the names; it is active where no --adapter is given.
    """
    from qgraft.adapter_files.folder import load_adapter
    from qgraft.adapter_files.told_task import told_labels
    from qgraft.adapters.base import adapter_names, find_adapter
    from qgraft.checkpoints.load import load
    from qgraft.errors import AdapterError
    from qgraft.model_parts import require_writer

    if missing := [folder for folder in options.adapter if not Path(folder).exists()]:  # before minutes of loading
        raise AdapterError(f"--adapter {missing[0]}: no such file or folder")
    about = told_labels(options.model, options.adapter[-1]) if options.adapter else {}
    model, tokenizer = load(
        options.model, quantize=options.quantize, dtype=options.dtype, device=options.device, **about
    )
    if writes is not None:
        require_writer(model, writes)
    if tokenizer is None:
        raise without_tokenizer(options.model, model, "this command")
    print_notes(model)
    names: list[str] = []
    if own := adapter_names(model):
        print_note(f"adapter {own[0]}: the model's own prefix (P-Tuning v2), from its folder")
    for folder in options.adapter:
        name = free_name(Path(folder).resolve().name, adapter_names(model))
        print_note(str(load_adapter(model, folder, name, force=options.force)))
        names.append(name)
    if options.adapter and prompts:
        prompt_as_in_training(options, find_adapter(model, names[-1]).trained)
    return model, tokenizer, names


def without_tokenizer(source: object, model: Any, who: str) -> OptionError:
    """The error where a model came without a tokenizer and `who` needs one; it says which file is missing."""
    from qgraft.models.find import architecture_of

    base, architecture = model.qgraft.info, architecture_of(model.config)
    why = "".join(f": {note}" for note in base.notes if "tokenizer" in note)
    file = "tokenizer.json or tokenizer.model" if architecture is None else architecture.vocabulary
    hint = None if (Path(base.source) / file).is_file() else f"put the release's {file} beside config.json"
    return OptionError(f"{source} has no tokenizer, which {who} needs{why}", hint=hint)


def true_or_false(text: str) -> bool:
    """The value of an option like --enable_thinking."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
    return text.lower() == "true"


def is_negative(word: str) -> bool:
    """Whether this is a number below 0, as words of a command line go."""
    try:
        return word.startswith("-") and float(word) <= 0
    except ValueError:
        return False


def number_in(allowed: Range) -> Callable[[str], Any]:
    """The `type` of an option that is a number of this range: looked at before anything is loaded."""

    def parse(text: str) -> Any:
        try:
            number = int(text) if allowed.whole else float(text)
        except ValueError:
            number = None
        if number not in allowed:
            raise argparse.ArgumentTypeError(f"got {text}, expected {allowed}")
        return number

    return parse


def prompt_as_in_training(options: Any, trained: dict[str, Any]) -> None:
    """Take what prompts depend on, where it is not given, from what the adapter was trained with, and say so.

    An option that a command has not is not missing: merge reads enable_thinking from the adapter itself, with its rows.
    """
    from qgraft.data.templates import PROMPT_OPTIONS, remembered_template

    lengths = {"max_source_length": "max_source_length", "max_target_length": "val_max_target_length"}
    for key in (*PROMPT_OPTIONS, *lengths):
        if getattr(options, key, key) not in (None, ""):  # given, or no option of this command
            continue
        value = remembered_template(trained) if key == "template" else trained.get(lengths.get(key, key))
        value = trained.get(key) if value is None and key in lengths else value
        if isinstance(value, str | bool | int):
            setattr(options, key, value)
            print_note(f"--{key} as in training: {value}")


def free_name(wanted: str, taken: list[str]) -> str:
    """A folder's or file's name as an adapter's name, with a number behind it if there is one already."""
    from qgraft.adapters.attach import is_reserved

    wanted = wanted.removesuffix(".gguf").removesuffix(".lora")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in wanted)[:60] or "adapter"
    return f"{name}-{len(taken) + 1}" if name in taken or is_reserved(name) else name


def comma_lines(parts: Iterable[str]) -> str:
    """The parts, with commas between them, in lines of at most 80 columns that end behind one."""
    line = ", ".join(part.replace(" ", "\xa0") for part in parts)
    return textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False).replace("\xa0", " ")


def print_note(text: str) -> None:
    """A line for people, on stderr: stdout is for results."""
    print(text, file=sys.stderr)


def print_notes(model: Any) -> None:
    """What a reader should know of how a base was loaded."""
    for note in model.qgraft.info.notes:
        print_note(f"{model.qgraft.info.source}: {note}")


def print_json(value: Any) -> None:
    """A result for programs, on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
