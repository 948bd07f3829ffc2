"""The wheel: one importable name with every room in it, which works where no checkout is."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
from small import ROOT

import neighborlm
from neighborlm.tools import TOOLS

IMPORTING = """
import sys
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.models.transformer_lm import TransformerLM
import models
print(models.whose)
for name, module in sys.modules.items():
    if name.partition(".")[0] == "neighborlm":
        print(module.__file__)
"""
START = "neighborlm_lm_eval.pth"
"""What Python runs when it starts."""
ROOMS = (
    *("common", "datamodules", "models", "retrieval", "originals"),
    *("callbacks", "programs", "tools"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    nothing_else = shutil.ignore_patterns("__pycache__")
    for name in (*ROOMS, "neighborlm"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=nothing_else)
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *quiet, "--wheel-dir", folder, folder / "source"],
        check=True,
        timeout=120,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """A folder for PYTHONPATH."""
    with ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "installed")
    return wheel.parent / "installed"


@pytest.fixture
def python(installed, tmp_path) -> Callable[..., str]:
    """What Python prints in a folder that has a `models` of its own."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("whose = 'mine'\n")

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_module_is_in_it_and_nothing_else(wheel):
    modules = {
        f"neighborlm/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in ROOT.glob(f"{room}/**/*.py")
    }
    modules |= {f"neighborlm/{path.name}" for path in (ROOT / "neighborlm").glob("*.py")}
    modules |= {f"neighborlm/{path.relative_to(ROOT)}" for path in ROOT.glob("programs/page/*.*")}
    found = set(ZipFile(wheel).namelist())
    described = {name for name in found if name.split("/")[0].endswith(".dist-info")}
    assert found - described == modules | {START}
    assert {name.split("/")[0] for name in described} == {
        f"neighborlm-{neighborlm.__version__}.dist-info"
    }


@pytest.mark.parametrize(
    ("program", "is_it"),
    [
        ("python bin/lm_eval --tasks a", True),
        ("python -u -m lm_eval --tasks a", True),
        ("/usr/bin/lm-eval", True),
        ("python bin/neighborlm lm_eval", False),
        ("python -c lm_eval.x()", False),
        ("python", False),
        ("", False),
    ],
)
def test_lm_eval_alone_is_told_of_the_model_when_it_starts(installed, program, is_it, monkeypatch):
    whole = program.split()
    place = next(
        (i + 1 for i, word in enumerate(whole) if word in ("-m", "-c")), len(whole[:2]) - 1
    )
    monkeypatch.setattr(sys, "orig_argv", whole)
    monkeypatch.setattr(sys, "argv", whole[place:] or [""])
    told = []
    monkeypatch.setattr("neighborlm.programs.lm_eval.register", lambda: told.append(True))
    exec((installed / START).read_text())
    assert told == [True] * is_it


def test_every_room_of_the_checkout_is_known_here():
    """So that a new one cannot be forgotten in pyproject.toml."""
    others = {"benchmarks", "neighborlm", "tests"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - others == set(ROOMS)


def test_it_is_imported_beside_a_folder_of_the_same_name_as_a_room(python, installed):
    said = python("-c", IMPORTING)
    whose, *files = said.splitlines()
    assert whose == "mine"
    assert len(files) > 10
    # Where a checkout is installed too, it must not stand in for what the wheel lacks.
    assert [file for file in files if not file.startswith(f"{installed}/")] == []


def test_its_command_lists_the_tools(python):
    said = python("-m", "neighborlm", "--help")
    assert all(f"\n  {name} " in said for name in TOOLS)
    assert python("-m", "neighborlm", "--version") == f"neighborlm {neighborlm.__version__}\n"
