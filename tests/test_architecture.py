"""The ranks of the rooms: who may import whom, and the only places of heavy imports."""

import ast
import re
from itertools import product
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerBase

SOURCE = Path(__file__).parent.parent / "src" / "qgraft"

RANKS = [  # a lower rank never imports a higher one; rooms of the same rank never import each other
    {
        "errors",
        "storage",
        "mapped",
        "plots",
        "releases",
        "sizes",
        "json_files",
        "patterns",
        "locks",
        "progress",
        "ranges",
        "given",
        "targets",
    },
    {"formats"},
    {"kernels", "compat", "model_parts", "plain_layers", "shared_prompts"},
    {"linear", "attention", "rotary"},
    {"experts"},
    {"models", "adapters", "data"},
    {"checkpoints"},
    {"adapter_files", "passes"},
    {"memory"},
    {"training"},
    {"jobs", "merging", "serving"},
    {"diffusion"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# These are a floor of their own: everything, also their neighbours of rank 0, may stand on them.
FLOOR = {"errors", "storage", "releases", "json_files"}
ONLY_IN = {
    "triton": {"kernels"},
    "transformers": {
        *(
            "compat",
            "model_parts",
            "attention",
            "experts",
            "models",
            "data",
            "checkpoints",
            "passes",
            "memory",
            "training",
            "jobs",
            "merging",
        ),
        *("serving", "cli"),
    },
    "fastapi": {"serving"},
    "llguidance": {"serving", "cli"},
    "matplotlib": {"plots"},
    "datasets": {"data"},
    "diffusers": {"diffusion"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function, but for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and getattr(guard.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "qgraft" else {node.module}
            )
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def test_every_file_has_a_room():
    assert {room_of(path) for path in FILES} <= RANK.keys()


def test_no_room_imports_one_of_its_rank_or_above():
    broken = []
    for path in FILES:
        room = room_of(path)
        for module in imports(path):
            if not module.startswith("qgraft."):
                continue
            other = module.split(".")[1]
            allowed = other == room or other in FLOOR or RANK.get(other, 99) < RANK[room] or other == "__version__"
            if not allowed or (room in FLOOR and other not in FLOOR):
                broken.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert broken == []


def test_heavy_libraries_stay_in_their_rooms():
    broken = [
        f"{path.relative_to(SOURCE)} imports {module}"
        for path in FILES
        for module in imports(path)
        if room_of(path) not in ONLY_IN.get(module.split(".")[0], {room_of(path)})
    ]
    assert broken == []


def test_no_file_is_longer_than_a_sitting_and_no_function_than_a_page():
    long_files = {str(p.relative_to(SOURCE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert long_files == {}
    long_functions = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                long_functions[f"{path.relative_to(SOURCE)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert long_functions == {}


def test_no_room_holds_more_than_a_fifth_of_the_lines():
    lines: dict[str, int] = {}
    for path in FILES:
        lines[room_of(path)] = lines.get(room_of(path), 0) + len(path.read_text().splitlines())
    assert {room: n for room, n in lines.items() if n > sum(lines.values()) / 5} == {}


def test_nothing_catches_everything():
    broken = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
    ]
    assert broken == []


# -- private names of other libraries --

FLOOR_OF_NAMES = (nn.Module, PreTrainedModel, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizer)
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_attributes_of_the_libraries() -> set[str]:
    names = {name for kind in FLOOR_OF_NAMES for name in dir(kind)} | vars(nn.Module()).keys()
    return {name for name in names if is_private(name)}


def own_names(tree: ast.AST) -> set[str]:
    """What a file defines itself: functions, classes, fields, variables, attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("self", "cls", "ctx") else set()
    return found


def asked_by_name(node: ast.AST) -> str | None:
    """The attribute in getattr(x, "name"), vars(x)["name"], vars(x).get("name")."""
    found: ast.AST | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
        found = node.args[1]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and of_vars(node.func.value) and node.args:
        found = node.args[0]
    elif isinstance(node, ast.Subscript) and of_vars(node.value):
        found = node.slice
    return found.value if isinstance(found, ast.Constant) and isinstance(found.value, str) else None


def of_vars(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "vars"


def private_names(tree: ast.AST, own: set[str], libraries: set[str]) -> set[str]:
    """The private names of others that a file reads, sets, imports or overrides."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("qgraft"):
            found |= {node.module for part in node.module.split(".") if is_private(part)}
            found |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            found |= {node.attr} if node.attr in libraries or node.attr not in own else set()
        elif (name := asked_by_name(node)) is not None and is_private(name):
            found |= {name} if name in libraries or name not in own else set()
        elif isinstance(node, ast.ClassDef):
            found |= own_names(ast.Module(node.body, [])) & libraries
    return found


def test_private_names_of_other_libraries_are_those_of_the_table():
    """A new one is a decision: it is written into docs/architecture.md, with a contract test, or not used."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    own = set().union(*map(own_names, trees.values()))
    libraries = private_attributes_of_the_libraries()
    used = {
        (name, path.relative_to(SOURCE).as_posix())
        for path, tree in trees.items()
        for name in private_names(tree, own, libraries)
    }
    page = (SOURCE.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Private names of other libraries")[2].partition("\n## ")[0]
    said = set()
    for line in table.splitlines():
        if line.startswith("| `"):
            names, _, places, _ = (cell.strip() for cell in line.strip("| ").split("|"))
            said |= set(product(re.findall(r"`([^`]+)`", names), re.findall(r"`([^`]+)`", places)))
    assert used == said


def test_private_names_are_found():
    code = """
from torch.utils._pytree import tree_map
from torch._C import _functions
class Model(PreTrainedModel):
    _supports_sdpa = True
    def _own(self): return self._own, self._modules
a = model._is_stateful + getattr(x, "_name") + vars(m).get("_is_replica") + vars(m)["_there"] + hasattr(x, "public")
"""
    tree = ast.parse(code)
    assert private_names(tree, own_names(tree), private_attributes_of_the_libraries()) == {
        *("torch.utils._pytree", "torch._C", "_functions", "_supports_sdpa", "_modules", "_is_stateful"),
        *("_name", "_is_replica", "_there"),
    }
