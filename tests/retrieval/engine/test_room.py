"""Who may know the engine, and what it may know."""

import re

import pytest
from small import ROOT

IMPORTED = re.compile(r"^\s*(?:from|import) neighborlm\.([\w.]+)", re.MULTILINE)
ROOMS = ("callbacks", "common", "datamodules", "models", "originals", "programs", "retrieval")


def imports(path) -> set[str]:
    """Modules of ours that a file imports, as `retrieval.engine`."""
    return set(IMPORTED.findall(path.read_text("utf-8")))


def test_it_is_imported_by_search_and_memories_alone_and_by_its_door():
    files = [file for room in (*ROOMS, "tools") for file in (ROOT / room).rglob("*.py")]
    users = {
        (file.relative_to(ROOT).parent.as_posix(), name)
        for file in files
        for name in imports(file)
        if name.startswith("retrieval.engine") and file.parent.name != "engine"
    }
    allowed = {"retrieval/search", "retrieval/memories"}
    assert {room for room, _ in users} <= allowed
    assert {name for _, name in users} == {"retrieval.engine"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "retrieval" / "engine").glob("*.py")), ids=lambda file: file.name
)
def test_it_imports_nothing_of_ours_but_two_files_of_common(file):
    others = {name for name in imports(file) if not name.startswith("retrieval.engine")}
    assert others <= {"common.contracts", "common.interrupts"}
