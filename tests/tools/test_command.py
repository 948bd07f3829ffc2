"""`neighborlm`: what it says of its tools, and how it ends."""

import subprocess
import sys

import pytest
from small import ROOT

import neighborlm
from neighborlm.tools import TOOLS, main


def test_help_names_every_tool_and_its_purpose(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    for name, tool in TOOLS.items():
        assert f"  {name} " in said
        assert tool.purpose in said


def test_version(capsys):
    main(["--version"])
    version = capsys.readouterr().out.split()[1]
    assert version == neighborlm.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "usage: neighborlm TOOL"),
        (["datastor"], "no tool 'datastor'; did you mean datastore?"),
        (["make-tea", "--help"], "no tool 'make-tea'; expected one of prepare, datastore, recall"),
    ],
)
def test_what_is_no_tool_ends_with_status_2(args, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""


def test_the_command_line_is_read_where_no_other_is_given(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/neighborlm", "--version"])
    main()
    assert capsys.readouterr().out == f"neighborlm {neighborlm.__version__}\n"


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_explains_itself_under_its_name(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: neighborlm {name} ")


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("retrieval.datastore", "is now neighborlm datastore (python -m neighborlm datastore)"),
        ("models.fairseq", "is now neighborlm convert"),
        ("retrieval.index", "is no command; expected one of those that neighborlm --help"),
    ],
)
def test_commands_of_old_say_the_new_one(module, sentence):
    command = [sys.executable, "-m", module, "verify", "--path", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: python -m {module} {sentence}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("room", ["models", "datamodules", "retrieval", "callbacks", "tools"])
def test_rooms_are_not_imported_by_their_bare_names(room):
    with pytest.raises(ModuleNotFoundError, match=rf"^{room} is imported as neighborlm\.{room}$"):
        __import__(room)


def test_what_numpy_must_be_told_can_be_imported_before_anything_else():
    program = "import common.before_numpy, sys; assert 'numpy' not in sys.modules"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
