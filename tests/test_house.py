"""The plan of the house: which room imports which, no circles, one name for everything."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from small import ROOT

RETRIEVAL = frozenset(
    f"retrieval.{room}" for room in ("store", "search", "memories", "neighbors", "cluster")
)
"""The rooms of retrieval that others may enter: not its engine."""
MAKING = {"common", "datamodules", "models", "originals", "callbacks", *RETRIEVAL}
MAY_IMPORT = {
    "common": set(),
    "datamodules": {"common"},
    "models": {"common"},
    "retrieval": {"common"},
    "retrieval.store": {"common"},
    "retrieval.engine": {"common"},
    "retrieval.search": {"common", "retrieval.store", "retrieval.engine"},
    "retrieval.memories": {"common", "retrieval.store", "retrieval.engine", "retrieval.search"},
    "retrieval.neighbors": {"common", "retrieval.store", "retrieval.search"},
    "retrieval.cluster": {"common", "retrieval.store", "retrieval.search"},
    "originals": {"common", "datamodules", "models", *RETRIEVAL},
    "callbacks": {"common", "datamodules", "models", *RETRIEVAL},
    "programs": MAKING,
    "tools": MAKING | {"programs", "neighborlm"},
    "benchmarks": MAKING | {"programs", "tools"},
    "scripts": {"programs"},
    "neighborlm": {"common", "tools"},
}
"""By room, the other rooms that its modules may import."""
ROOMS = {room.partition(".")[0] for room in MAY_IMPORT} - {"scripts", "neighborlm"}


@cache
def modules() -> dict[str, ast.Module]:
    """The project's modules, parsed, by their names below `neighborlm`; a package has its own."""
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    paths += [*ROOT.glob("*.py"), *(ROOT / "neighborlm").glob("*.py")]
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def name_of(path: Path) -> str:
    """Of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room that a module is in; train.py and its like are scripts."""
    if (ROOT / f"{module}.py").is_file():
        return "scripts"
    first, *rest = module.split(".")
    inner = first == "retrieval" and rest and f"retrieval.{rest[0]}" in MAY_IMPORT
    return f"retrieval.{rest[0]}" if inner else first


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported anywhere in a piece of code; of `from a import b` both `a`
    and `a.b`, as the latter may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST) -> set[str]:
    """Modules of the project that a piece of code imports."""
    found = set()
    for name in imports(tree):
        if name.partition(".")[0] not in ("neighborlm", "benchmarks"):
            continue
        name = name.removeprefix("neighborlm.")
        # Of `from a.b import c`, c is a module or something in a.b.
        found.add(name if name in modules() else name.rpartition(".")[0] or name)
    return found


@cache
def graph() -> dict[str, set[str]]:
    """Which module imports which."""
    return {module: ours(tree) - {module} for module, tree in modules().items()}


def test_every_import_is_of_a_module_that_is_there():
    missing = {(module, other) for module, found in graph().items() for other in found}
    assert {pair for pair in missing if pair[1] not in modules()} == set()


def test_rooms_import_those_below_them_alone():
    found = {
        (module, other)
        for module, others in graph().items()
        for other in others
        if room_of(other) != room_of(module) and room_of(other) not in MAY_IMPORT[room_of(module)]
    }
    assert found == set()


def test_there_are_no_circles():
    left = {module: set(others) for module, others in graph().items()}
    while True:
        imported = set().union(*left.values())
        ends = {module for module, others in left.items() if not others or module not in imported}
        if not ends:
            break
        left = {module: others - ends for module, others in left.items() if module not in ends}
    assert left == {}


def test_no_import_of_ours_is_inside_a_function():
    found = {
        (module, other)
        for module, tree in modules().items()
        if room_of(module) != "benchmarks"  # ranks of one leave out what takes long to import
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for other in ours(node)
    }
    assert found == set()


@pytest.mark.parametrize("folder", [*sorted(ROOMS), "neighborlm", "tests"])
def test_no_room_is_imported_by_its_bare_name(folder):
    rooms = ROOMS - {"benchmarks"}  # which is no part of what is installed
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.partition(".")[0] in rooms
    }
    assert found == set()


def test_what_is_printed_keeps_its_brackets():
    """A path may hold some, which a console would take for markup."""
    found = {
        (module, node.lineno)
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) in ("Console", "TextColumn")
        and not any(keyword.arg == "markup" for keyword in node.keywords)
    }
    assert found == set()


def test_json_is_written_by_one_hand():
    """Which knows that JSON has no NaN and no Infinity."""
    for room in ("programs", "tools", "benchmarks"):
        for path in (ROOT / room).glob("*.py"):
            assert "write_text(json.dumps" not in path.read_text(), path
