"""Write docs/reference.md from what `qgraft COMMAND --help` prints; a test fails when the file is stale."""

import contextlib
import io
import os
from pathlib import Path

from qgraft.cli.main import COMMANDS, main

HEADER = """# Reference: the command line

Written by docs/make_reference.py from `--help`; do not edit.
"""


def reference() -> str:
    """The whole text of docs/reference.md."""
    parts = [HEADER, _section("qgraft", ["--help"])]
    parts += [_section(f"qgraft {command}", [command, "--help"]) for command in COMMANDS]
    return "\n".join(parts)


def _section(title: str, words: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(words)
    return f"## {title}\n\n```\n{printed.getvalue().rstrip()}\n```\n"


os.environ["COLUMNS"] = "80"  # argparse wraps to the terminal's width

if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(reference(), encoding="utf-8")
