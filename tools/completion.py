"""`neighborlm completion`: a script by which bash and zsh complete tools, their commands, flags and
values at the Tab key.

    neighborlm completion >> ~/.bashrc        (or ~/.zshrc)

All words are in the script, read from the help of each tool, so that completing starts no Python.
"""

import re
from contextlib import redirect_stdout, suppress
from io import StringIO

from neighborlm import tools
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.exits import exit_with_one_sentence

FLAG = re.compile(r"^ +(?:-\w(?: [A-Z]+)?, )?(--[\w.]+)(?: \{([^}]*)\})?", re.MULTILINE)
COMMANDS = re.compile(r"\{([\w,-]+)\}\s+\.\.\.")
SCRIPT = """\
# Completion of neighborlm, by `neighborlm completion`.
if [ -n "$ZSH_VERSION" ]; then autoload -Uz compinit bashcompinit; compinit -u; bashcompinit; fi
_neighborlm() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" = 1 ]; then
    words="{tools}"
  else
    case "${{COMP_WORDS[1]}} $before" in
{values}
      *) case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{flags}
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _neighborlm neighborlm
"""


def help_of(*words: str) -> str:
    """What a tool, or a command of it, says of itself."""
    said = StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        tools.main([*words, "--help"])
    return said.getvalue()


def script() -> str:
    """The script."""
    values, flags = [], []
    for tool in tools.TOOLS:
        told = help_of(tool) if tool != "completion" else ""
        commands = COMMANDS.search(told)
        names = commands[1].split(",") if commands else []
        for name in names:
            found = FLAG.findall(help_of(tool, name))
            flags.append((f'"{tool} {name}"', [flag for flag, _ in found]))
            values += [(tool, *pair) for pair in found if pair[1]]
        found = FLAG.findall(told)
        flags.append((f'"{tool} "*', names or [flag for flag, _ in found]))
        values += [(tool, *pair) for pair in found if pair[1]]
    lines = {(tool, flag): choices.replace(",", " ") for tool, flag, choices in values}
    return SCRIPT.format(
        tools=" ".join(tools.TOOLS),
        values="\n".join(f'      "{t} {f}") words="{w}" ;;' for (t, f), w in lines.items()),
        flags="\n".join(f'        {key}) words="{" ".join(words)}" ;;' for key, words in flags),
    )


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Prints the script."""
    OneSentence(
        prog="neighborlm completion",
        description="Prints a script by which bash and zsh complete tools, flags and values at the "
        "Tab key: append it to ~/.bashrc or ~/.zshrc.",
    ).parse_args(args)
    print(script(), end="")
