"""What the READMEs and guides tell people to type exists and parses."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from qgraft.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
GUIDES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("guide-*.md"))
PAGES = ["README.md", "README_zh.md", *GUIDES]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of this language ("" for none), in order."""
    parts = re.split(r"^```(.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    fences = zip(parts[1::4], parts[2::4], strict=True)  # text, language, body, "", text, ...
    return [body for found, body in fences if found.strip() == language]


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_and_their_options_are_known(page, monkeypatch, capsys):
    from qgraft.cli.main import main
    from qgraft.diffusion.arguments import DiffusionArguments
    from qgraft.training.arguments import TrainArguments, parse_options

    monkeypatch.chdir(ROOT)
    kinds = {"train": TrainArguments, "distill": TrainArguments, "diffuse": DiffusionArguments}
    seen = [words[1:] for words in commands(page) if words[0] == "qgraft"]
    assert seen or page.startswith("docs/guide-machines")  # whose commands are those of examples
    for command, *words in seen:
        assert command in COMMANDS
        if command in kinds:
            parse_options([*words, *(["--stage", "distill"] if command == "distill" else [])], kinds[command])
            continue
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in shown] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands(page) if words[0] == "make"}
    assert named <= targets
    if page.startswith("README"):
        assert {"demo", "test"} <= named


def test_both_readmes_show_the_same_commands():
    def without_texts(page):
        return [[word for word in words if word.isascii() and " " not in word] for words in commands(page)]

    assert without_texts("README.md") == without_texts("README_zh.md")


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_use_public_names(page):
    import qgraft

    for block in blocks(page, "python"):
        tree = ast.parse(block)
        used = {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "qgraft"
        }
        assert used <= set(qgraft.__all__)


def test_the_table_of_rooms_names_every_room():
    table = (
        (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("| `cli/` |")[0].rpartition("|---|---|")[2]
    )
    rooms = {path.parent.name for path in (ROOT / "src" / "qgraft").glob("*/__init__.py")}
    assert rooms - {"cli"} == set(re.findall(r"`(\w+)/`", table)) & rooms


def test_the_tree_names_every_file_and_no_other():
    tree = next(block for block in blocks("docs/architecture.md", "") if "src/qgraft/" in block)
    named = set(re.findall(r"[\w]+\.(?:py|c)\b", tree))
    tracked = subprocess.run(["git", "ls-files", "src/qgraft"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(line).name for line in tracked.stdout.splitlines() if line.endswith((".py", ".c"))}
    missing = files - named - {"__init__.py"} - {f"{name}.py" for name in [*COMMANDS, "main", "options"]}
    assert missing == set()
    assert named <= files | {"__init__.py"}


@pytest.mark.parametrize(
    "page", ["README.md", "README_zh.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
)
def test_links_lead_somewhere_and_no_figure_is_missing(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert "<<FIGURE" not in text


def test_the_example_configuration_parses_and_shows_every_option_of_ours(monkeypatch):
    import yaml

    from qgraft.training.arguments import TrainArguments, parse_arguments

    monkeypatch.chdir(ROOT)
    parse_arguments(["examples/train.yaml"])
    shown = set(yaml.safe_load((ROOT / "examples/train.yaml").read_text(encoding="utf-8")))
    assert set(TrainArguments.__annotations__) - {"remove_unused_columns"} - shown == set()


def test_the_example_rows_are_all_kept():
    from qgraft.data.reading import read_dataset, read_preferences

    _, accounting = read_dataset(str(ROOT / "examples" / "my_data.jsonl"), name="a", author="b")
    assert accounting.kept == accounting.read > 0
    _, accounting = read_preferences(str(ROOT / "examples" / "preferences.jsonl"))
    assert accounting.kept == accounting.read > 0


@pytest.mark.parametrize("page", PAGES[:2])
def test_the_readme_counts_the_architectures_of_the_tables(page):
    from qgraft.checkpoints.gguf_rules import ARCHITECTURES

    exact = re.search(r"^(\d+) exact", (ROOT / "docs/architectures.md").read_text(encoding="utf-8"), re.MULTILINE)
    said = re.search(r"GGUF\D{1,8}(\d+)\D{3,30}(\d+)", (ROOT / page).read_text(encoding="utf-8").replace("\n", " "))
    assert exact is not None and said is not None
    assert said.groups() == (str(len(ARCHITECTURES)), exact[1])


@pytest.mark.parametrize("page", ["docs/supported.md", "docs/supported_zh.md"])
def test_all_architectures_of_the_tables_are_named(page):
    from qgraft.checkpoints.gguf_rules import ARCHITECTURES

    (row,) = (
        line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "umT5" in line and "qwen35" in line
    )
    named = re.split(r", |、", re.sub(r" \(.*?\)|（.*?）", "", row.split("|")[2].partition("[")[0]).strip(" :："))
    assert sorted(named) == sorted(ARCHITECTURES)
