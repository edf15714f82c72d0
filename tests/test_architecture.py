"""The ranks of the rooms: who may import whom, and the only places of heavy imports."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "qgraft"

RANKS = [  # a lower rank never imports a higher one; rooms of the same rank never import each other
    {"errors", "storage", "plots", "releases", "sizes"},
    {"formats"},
    {"kernels", "compat", "model_parts"},
    {"linear", "attention", "rotary"},
    {"models", "adapters", "data"},
    {"checkpoints"},
    {"adapter_files", "passes"},
    {"memory"},
    {"training"},
    {"jobs", "merging", "serving"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# `errors`, `storage` and `releases` are a floor of their own: everything, also their neighbours of rank 0, may stand on them.
FLOOR = {"errors", "storage", "releases"}
ONLY_IN = {
    "triton": {"kernels"},
    "transformers": {
        *(
            "compat",
            "model_parts",
            "attention",
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
    "matplotlib": {"plots"},
    "datasets": {"data"},
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
