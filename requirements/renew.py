"""Writes lock.txt and oldest.txt anew: `make lock`. Needs a package index; takes some minutes.

    lock.txt      the newest releases that pyproject.toml allows, and all that they need. `make demo` and `make test`
                  install exactly these, so that both hold in a year as they do today.
    oldest.txt    the lower ends of the ranges in pyproject.toml, and all that they need: for `make contract`.

A user gives them to pip as constraints (`pip install -c requirements/lock.txt .`): they say which release, not what is
installed, so one file serves every subset of the extras and every platform; a package that only another platform needs
is not in it and comes as its newest. torch stands there without the suffix of its build (+cpu, +cu130): which build is
taken is a matter of the index that TORCH names in the Makefile.

Not chosen: `pip freeze` (it writes that suffix, and the paths of local files); pip-tools or uv (another tool to install,
for sixty lines).
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = (
    "combine",
    "predict",
    "serve",
    "speech",
    "dev",
)  # not `bench`: its packages are gigabytes, and no test needs them
LISTED = """
import importlib.metadata, re
for package in importlib.metadata.distributions():
    name = re.sub("[-_.]+", "-", package.metadata["Name"]).lower()
    print(name, package.version.partition("+")[0], sep="==")
"""
HEADER = "# {what}, and all that they need. Written by `make lock` with Python {version}.\n"


def main() -> None:
    """Resolve, install and list both sets, each in an environment of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help='words for pip, e.g. "torch==2.13.0 --index-url ..."')
    parser.add_argument("--ranges", action="store_true", help="print what pyproject.toml asks for, and do nothing else")
    options = parser.parse_args()
    if options.ranges:
        print(*ranges(), sep="\n")
        return
    words = options.torch.split()
    write("lock.txt", "The newest releases that pyproject.toml allows", words, [])
    write("oldest.txt", "The oldest releases that pyproject.toml allows", words, lower_ends())


def ranges() -> list[str]:
    """What the package, its extras but `bench`, its tests and its build ask for."""
    pyproject = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    optional = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return list(dict.fromkeys([*project["dependencies"], *optional, *pyproject["build-system"]["requires"]]))


def lower_ends() -> list[str]:
    """`name==lower end` of what the package runs with, torch excepted: there is one build here, the one TORCH names."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [line for extra in EXTRAS[:-1] for line in project["optional-dependencies"][extra]]
    found = [re.match(r"([\w-]+)>=([\w.]+)", line) for line in (*project["dependencies"], *optional)]
    return [f"{match[1]}=={match[2]}" for match in found if match is not None and match[1] != "torch"]


def write(name: str, what: str, torch: list[str], ends: list[str]) -> None:
    """Install everything into a fresh environment, with `ends` as constraints, and write down what came."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python, constraints = str(Path(folder) / "bin" / "python"), Path(folder) / "ends.txt"
        constraints.write_text("\n".join(ends))
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
        subprocess.run([*install, *torch], check=True)
        subprocess.run([*install, *ranges()], check=True)
        listed = subprocess.run([python, "-c", LISTED], check=True, capture_output=True, text=True).stdout
    pins = sorted(line for line in set(listed.splitlines()) if not line.startswith("pip=="))
    header = HEADER.format(what=what, version=sys.version.split()[0])
    (HERE / name).write_text(header + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"{name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
