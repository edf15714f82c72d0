"""qgraft ui: a page in the browser to chat, train, compare and merge; `qgraft serve` with a folder and a key of its own."""

import os
import secrets
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from qgraft.cli.options import Parser, print_note
from qgraft.cli.serve import add_serving, serve
from qgraft.errors import OptionError


def run(words: Sequence[str]) -> int:
    """Parse, find a model, serve, open the browser."""
    options = _parser().parse_args(words)
    options.model = options.model or find_model(Path(options.folder))
    if not options.admin_key:
        options.admin_key = secrets.token_urlsafe(18)

    def ready(address: str) -> None:
        page = f"{address}/#key={options.admin_key}"
        print_note(f"open {page}")
        if options.browser:
            threading.Timer(0.5, webbrowser.open, (page,)).start()

    return serve(options, ready)


def _parser() -> Parser:
    parser = Parser(
        "ui",
        "Open a page in the browser: chat with a base and its adapters side by side, train on a CSV file, watch the "
        "losses, merge and download. The same server as `qgraft serve`, with a folder to work in; the key in the address "
        "is made anew at every start, unless one is given.",
    )
    parser.add_model(required=False)
    add_serving(parser)
    parser.set_defaults(folder="qgraft-runs")
    parser.add_argument(
        "--no_browser", dest="browser", action="store_false", help="print the address, and open no browser"
    )
    return parser


def find_model(folder: Path) -> str:
    """The model where none is named: the only GGUF file here or in the folder, or the only known one that was fetched.

    Raises OptionError where there is none, or several.
    """
    from qgraft.checkpoints.pull import KNOWN_MODELS, cache_folder

    files = [path for place in (Path.cwd(), folder) if place.is_dir() for path in sorted(place.glob("*.gguf"))]
    found = list(dict.fromkeys(str(path) for path in files if not path.name.endswith(".lora.gguf")))
    if not found:
        found = [name for name, model in KNOWN_MODELS.items() if (cache_folder() / model.file).is_file()]
    if len(found) != 1:
        several = f"several models are here: {', '.join(os.path.relpath(each) for each in found)}"
        fetch = "give --model model.gguf, or fetch one: qgraft pull smollm2-135m"
        raise OptionError(several if found else "no model is named, and there is none here", hint=fetch)
    print_note(f"--model {found[0]}")
    return found[0]
