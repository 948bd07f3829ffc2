"""How command lines are read, those of the tools too: a slip gets one sentence, with the flag that
was probably meant, and no flag can be abbreviated."""

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from neighborlm.common.errors import InputError

IN_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'list'>": "a list such as [1,2] or [a,b]",
    "<class 'collections.abc.Sequence'>": "a list such as [1,2] or [a,b]",
    "<class 'dict'>": "a section of settings",
    "<class 'NoneType'>": "null",
}
"""What jsonargparse calls types, in the words of those who type values."""
MOST_OF_A_VALUE = 80
"""Characters of a wrong value that are shown."""


class OneSentence(argparse.ArgumentParser):
    """A parser whose errors are `InputError`; mixed into a class of jsonargparse or by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuses the command line.

        Raises:
            InputError: always.
        """
        if not getattr(self, "exit_on_error", True):  # a parser inside another one
            super().error(message, ex)
        raise InputError(in_one_sentence(message, self.prog, flags_of(self))) from None


class ToolParser(OneSentence, jsonargparse.ArgumentParser):
    """Of the tools whose flags are the parameters of a function."""


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """All flags that people type."""
    return [flag for action in parser._actions for flag in action.option_strings]


def in_one_sentence(message: str, prog: str, flags: Sequence[str]) -> str:
    """What a parser says of a command line or a config, for people.

    Args:
        message: of argparse or jsonargparse.
        prog: name of the program.
        flags: that it has.

    >>> in_one_sentence("unrecognized arguments: --knn.l 3", "evaluate.py", ["--knn.lmbda"])
    '--knn.l: evaluate.py has no such flag; did you mean --knn.lmbda?'
    >>> in_one_sentence('Parser key "k":\\n  Expected a <class \\'int\\'>. Got value: x', "p", [])
    '--k is x; expected a whole number'
    """
    prog = prog.replace(" [options]", "")
    if found := re.match(r"unrecognized arguments: (.*)", message, re.S):
        return f"{found[1].split()[0]}: {_unknown(found[1].split()[0], prog, flags)}"
    if found := re.search(r"(?:Group '(.*)' does not accept o|O)ption '(.*?)'", message):
        group, name = found[1], found[2]
        key = name if group is None or name.startswith(f"{group}.") else f"{group}.{name}"
        return f"{key}: {_unknown(f'--{key}', prog, flags)}"
    if found := re.match(r'Parser key "(.*?)":\s*(.*)', message, re.S):
        return _wrong_value(found[1], found[2])
    if found := re.match(r"(?:argument )?subcommand: invalid choice: '(.*?)' \((.*)\)", message):
        commands = re.findall(r"'(.*?)'", found[2])
        near = get_close_matches(found[1], commands, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands)}"
        return f"{found[1]}: {prog} has no such command; {hint}"
    if found := re.match(r"argument (\S+): (.*)", message, re.S):
        flag, said = found[1].split("/")[0], _joined(found[2])
        if said == "expected one argument":
            said = "expected a value behind it"
        if ignored := re.match(r"ignored explicit argument '(.*)'", said):
            said = f"takes no value, but {ignored[1]} is given"
        return f"{flag}: {said}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        names = [_as_typed(name, flags) for name in found[1].split(", ")]
        are, them = ("are", "them") if len(names) > 1 else ("is", "it")
        return f"{' and '.join(names)} {are} missing; {prog} --help explains {them}"
    if message.startswith('expected "subcommand"'):
        return f"{prog} needs a command; {prog} --help lists them"
    return _joined(message)


def _as_typed(name: str, flags: Sequence[str]) -> str:
    """A required argument as people type it: `FILES`, or `--path` for `list.path` of a command."""
    ways = (name, f"--{name}", f"--{name.partition('.')[2]}")
    return next((way for way in ways if way in flags), ways[2] if "." in name else name)


def _unknown(flag: str, prog: str, flags: Sequence[str]) -> str:
    """Why a flag is unknown, and what may have been meant."""
    if not flag.startswith("-"):
        return f"{prog} takes no such argument; expected flags, which begin with --"
    flag = flag.split("=")[0]
    section, dot, _ = flag.removeprefix("--").partition(".")
    sections = sorted({f[2:].partition(".")[0] for f in flags if "." in f})
    if dot and section not in sections and not get_close_matches(section, sections, 1):
        return f"{prog} has no section {section} here; it has {', '.join(sections)}"
    name = flag.rpartition(".")[2].lstrip("-")
    longer = [other for other in flags if other.startswith(flag)]
    elsewhere = [f for f in flags if f.rpartition(".")[2].lstrip("-") == name]
    near = get_close_matches(flag, flags, 1, cutoff=0.75)
    by_name = {f.rpartition(".")[2].lstrip("-"): f for f in reversed(flags)}
    same_name = [by_name[n] for n in get_close_matches(name, by_name, 1, cutoff=0.75)]
    meant = next(iter([*longer, *elsewhere, *near, *same_name]), None)
    hint = f"did you mean {meant}?" if meant else f"{prog} --help lists all"
    return f"{prog} has no such flag; {hint}"


def _wrong_value(key: str, said: str) -> str:
    """A value of the wrong type."""
    if found := re.match(r"File does not exist: '(.*)'|Path is not a file: '(.*)'", said):
        return f"--{key} {found[1] or found[2]}: {'no such file' if found[1] else 'is no file'}"
    value = re.search(r"(?:Given value|Got value): (.*)", said)
    problem = re.search(r"Problem with given class_path (.*?)\n\s*-?\s*(.*)", said)
    if problem:
        return f"--{key}: {problem[1]} {_joined(problem[2])}"
    if found := re.search(r"Unable to load config '(.*?)'", said):
        return f"--{key} {found[1]}: is no YAML file; expected one, or --{key}.NAME VALUE"
    if value is None:
        return f"--{key}: {_joined(said)}"
    expected = []
    for kind in re.findall(r"Expected an? (<class '.*?'>|typing\.Literal\[.*?\])", said):
        literal = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        values = literal[1].replace("'", "").split(", ") if literal else [IN_WORDS.get(kind)]
        expected += [value for value in values if value and value not in expected]
    if "Not of type PositiveInt" in said or "conform to restriction v>0" in said:
        expected.insert(0, "a whole number, at least 1")
    *others, last = [e for e in expected if e != "null" or len(expected) == 1] or ["another value"]
    either = f"{', '.join(others)} or {last}" if others else last
    return f"--{key} is {value[1][:MOST_OF_A_VALUE]}; expected {either}"


def _joined(message: str) -> str:
    return " ".join(message.split())[:400]


def read_config(path: str) -> dict[str, Any]:
    """The settings in a config file.

    Raises:
        InputError: no such file, or no YAML with sections of settings.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; expected a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: is no text; expected a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it holds characters that YAML has not"
        raise InputError(f"--config {path}{place}: is no YAML: {reason}") from None
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds {_joined(str(found))[:40]!r}"
        raise InputError(f"--config {path}: {what}; expected sections of settings, such as data:")
    for section in ("trainer", "model", "data", "knn", "neighbors", "recent", "automaton"):
        if section in found and not isinstance(found[section], dict | str):
            raise InputError(
                f"--config {path}: its section {section} is {found[section]}; expected settings, "
                "such as `name: value`, below it"
            )
    return found


def configs_of(args: Sequence[str] | None = None) -> list[str]:
    """The config files that a command line names, in order, and nothing else of it."""
    parser = OneSentence(add_help=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    return parser.parse_known_args(sys.argv[1:] if args is None else args)[0].config
