"""The releases that are tested: pyproject.toml, the locks and the code say the same; what is said of others."""

import ast
import re
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import qgraft
from qgraft import releases
from qgraft.cli.main import main
from qgraft.errors import UnsupportedError
from qgraft.releases import TAKEN, TESTED, check_releases, explain, lacking, range_of, untested

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("library", TESTED)
def test_the_ranges_of_pyproject_are_the_releases_that_are_tested(library):
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    ranges = {line for line in lines if re.match(rf"{library}\b(?!-)", line)}
    assert ranges == {library + range_of(library)}


@pytest.mark.parametrize("library", [library for library in TESTED if library != "torch"])
def test_the_locks_hold_the_ends_of_the_ranges(library):
    oldest, newest = TESTED[library]
    assert f"{pins('oldest.txt')[library]}.".startswith(f"{oldest}."), "make lock"
    assert f"{pins('lock.txt')[library]}.".startswith(f"{newest}."), "make lock"


@pytest.mark.parametrize("name", ["lock.txt", "oldest.txt"])
def test_a_lock_pins_every_dependency_and_says_nothing_of_hosts_or_builds(name):
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    wanted = {re.split(r"[>=<\[]", line)[0].lower() for line in (*PROJECT["dependencies"], "setuptools", "pytest")}
    assert wanted <= pins(name).keys()
    assert not re.search(r"://|@|\+", text)


def test_the_version_of_the_package_is_the_same_in_both_places():
    assert PROJECT["version"] == qgraft.__version__


def test_releases_within_the_range_are_tested_and_others_are_not():
    inside = {
        "transformers": "5.24.3",
        "torch": "2.13.0+cpu",
        "peft": "0.21.2",
        "safetensors": "0.8.0",
        "gguf": "0.17.1",
    }
    assert untested(inside) == {}
    assert untested({"transformers": "5.25.0.dev0", "torch": "2.10.1"}) == {
        "transformers": "transformers 5.25.0.dev0 (tested: 5.17 to 5.24)", "torch": "torch 2.10.1 (tested: 2.11 to 2.13)",
    }  # fmt: skip
    assert untested({"gguf": "0.17.0"})["gguf"] == "gguf 0.17.0 (tested: 0.17.1 to 0.19)"
    assert untested({"safetensors": "1.0"})["safetensors"] == "safetensors 1.0 (tested: 0.8)"
    assert range_of("transformers") == ">=5.17,<5.25"


def test_what_is_installed_here_is_tested():
    assert untested(releases.installed()) == {}
    assert releases.installed()["transformers"] == version("transformers")


def newer(monkeypatch, **more):
    monkeypatch.setattr(releases, "installed", lambda: {"transformers": "5.30.1", "torch": "2.13.0", **more})
    check_releases.cache_clear()


def test_load_warns_once_of_a_release_that_was_not_tested(tiny_gguf, monkeypatch):
    newer(monkeypatch)
    with pytest.warns(UserWarning, match="not tested") as caught:
        [qgraft.load(tiny_gguf("llama").path) for _ in range(2)]
    told = [str(warning.message) for warning in caught if "not tested" in str(warning.message)]
    assert told == [
        "qgraft was not tested with transformers 5.30.1 (tested: 5.17 to 5.24), so results may differ; "
        "pip install 'transformers>=5.17,<5.25'"
    ]
    assert {warning.filename for warning in caught if "not tested" in str(warning.message)} == {__file__}
    check_releases.cache_clear()


def test_load_refuses_a_release_that_lacks_something_and_says_what(tiny_gguf, monkeypatch):
    newer(monkeypatch)
    monkeypatch.setitem(TAKEN, "transformers.cache_utils", "DynamicLayer NoSuchLayer")
    monkeypatch.setitem(TAKEN, "transformers.utils.generic", "merge_with_config_defaults(no_such_parameter)")
    with pytest.raises(UnsupportedError) as caught:
        qgraft.load(tiny_gguf("llama").path)
    assert "transformers 5.30.1" in str(caught.value) and "pip install 'transformers>=5.17,<5.25'" in str(caught.value)
    assert "not there any more: transformers.cache_utils.NoSuchLayer, transformers.utils.generic." in str(caught.value)
    check_releases.cache_clear()


def test_tested_releases_warn_of_nothing(tiny_gguf):
    check_releases.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_releases()


@pytest.mark.parametrize("name", ["load", "train"])
def test_an_import_that_fails_in_another_release_is_one_error(name, monkeypatch):
    newer(monkeypatch)

    def fail(module):
        if module.startswith("qgraft.releases"):
            return releases
        raise ImportError(
            "cannot import name 'sdpa_mask' from 'transformers.masking_utils'", name="transformers.masking_utils"
        )

    monkeypatch.setattr(qgraft, "import_module", fail)
    monkeypatch.delitem(vars(qgraft), name, raising=False)
    with pytest.raises(UnsupportedError, match=r"transformers 5\.30\.1.*cannot import name 'sdpa_mask'"):
        getattr(qgraft, name)
    check_releases.cache_clear()


def test_the_command_line_says_it_too(monkeypatch, capsys):
    newer(monkeypatch)

    def fail(module):
        raise ImportError("cannot import name 'x' from 'transformers'", name="transformers")

    monkeypatch.setattr("qgraft.cli.main.import_module", fail)
    assert main(["chat", "--model", "x.gguf"]) == 2
    assert "transformers 5.30.1 (tested: 5.17 to 5.24): cannot import name 'x'" in capsys.readouterr().err
    check_releases.cache_clear()


def test_other_errors_of_imports_are_left_as_they_are(monkeypatch):
    explain(ImportError("no module named rich", name="rich"))
    explain(ImportError("of a release that is tested", name="transformers.nothing"))
    explain(ImportError("without a name"))


def test_everything_that_is_taken_is_there():
    assert lacking(TESTED) == []


def test_the_list_of_what_is_taken_has_every_import_from_within_a_library_and_no_other():
    libraries = {name.replace("-", "_") for name in TESTED} - {"torch", "peft", "safetensors", "gguf"}
    listed = {(module, re.split(r"[.(]", name)[0]) for module, names in TAKEN.items() for name in names.split()}
    imported = set()
    for path in (ROOT / "src" / "qgraft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if "." in module and module.partition(".")[0] in libraries:
                imported |= {(module, alias.name) for alias in node.names}
    assert imported == {(module, name) for module, name in listed if "." in module}
