"""qgraft distill: ask a teacher about the rows of a training, once, and keep what it says on the disk."""

from collections.abc import Sequence

DESCRIPTION = """usage: qgraft distill --teacher_model_name_or_path TEACHER
                      --model_name_or_path STUDENT --dataset FILE
                      --output_dir FOLDER [options]
       qgraft distill CONFIG.yaml [option=value ...]

Ask a teacher about every answer token of the rows, and keep the likeliest
tokens that it names in FOLDER/teacher (or --teacher_cache). `qgraft train
--stage distill` with the same options then trains the student, without asking
again; where it finds nothing it asks itself, so this command is for a teacher
that runs on another machine, or for several students.

The options are those of training: `qgraft train --help`.
"""


def run(words: Sequence[str]) -> int:
    """Parse, load, ask, say where it is."""
    if not words or words[0] in ("-h", "--help", "--help_all"):
        print(DESCRIPTION, end="")
        return 0

    from pathlib import Path

    from rich.console import Console

    from qgraft.cli.options import print_note
    from qgraft.cli.train import UNSAID, load_with_adapter
    from qgraft.errors import OptionError
    from qgraft.training.arguments import parse_arguments
    from qgraft.training.distill import distill
    from qgraft.training.teacher_cache import TEACHER

    flags = words[0].startswith("-")
    said = any(word.lstrip("-").partition("=")[0] == "stage" for word in words)
    stage = [] if said else ["--stage=distill"] if flags else ["stage=distill"]
    arguments = parse_arguments([*words, *stage])
    if not arguments.model_name_or_path:
        raise OptionError("no student is given", hint="--model_name_or_path model.gguf")
    if arguments.output_dir == UNSAID and arguments.teacher_cache is None:
        raise OptionError("no output_dir is given", hint="--output_dir out, or --teacher_cache FOLDER")
    model, tokenizer = load_with_adapter(arguments)  # whose new tokens rows may hold
    for note in distill(model, tokenizer, None, arguments, progress=Console(stderr=True)):
        print_note(f"note: {note}")
    folder = Path(arguments.teacher_cache or Path(str(arguments.output_dir)) / TEACHER)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"what the teacher says is in {folder}, {size / 1e6:.1f} MB")
    return 0
