"""A table of all trainings and evaluations below a folder of runs: what was done, when, with which
perplexities, in which settings they differ, and how long it took.

    neighborlm runs [FOLDER] [--sort ppl] [--where split=test --where knn.k=64] [--format markdown]

It reads what train.py and evaluate.py leave in each run: evaluations/*.json, training.json and
config.yaml. A record that cannot be read is named in a line and left out.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.common.errors import InputError
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json
from neighborlm.programs.reports import WIDTH, as_markdown

OF_TRAINER = ("max_steps", "max_epochs", "max_time", "precision", "accumulate_grad_batches")
OF_TRAINER += ("gradient_clip_val", "accelerator", "devices", "num_nodes", "strategy")
OF_TRAINER += ("limit_train_batches", "limit_val_batches")
"""Settings of the trainer that matter to figures and times; others say how it tells of itself."""
OF_PLACES = {"config", "run", "output", "token_scores", "page", "page_tokens", "page_neighbors"}
OF_PLACES |= {"page_against", "verify", "lost_after", "checkpoint_every", "data.cache_dir"}
OF_PLACES |= {"data.num_workers", "knn.cache", "ckpt_path"}
"""Settings that change no figure."""
OF_WHAT = {"arch", "split", "memories", "knnlm", "mixer"}
"""Settings that have a column of their own."""
KEYS = ("run", "kind", "arch", "split", "memories", "mixer")
"""Columns that `--where` knows, besides settings."""


@dataclass(frozen=True)
class Entry:
    """A training or an evaluation.

    Attributes:
        run: name of its folder.
        kind: `training` or `evaluation`.
        arch: what kind of model.
        split: that the perplexities are of.
        part: of the split, where not all of it was evaluated; else empty.
        memories: joined by `+`; empty without.
        mixer: that weighs them; empty without.
        time: when it began, or a training ended; local time where the record names no zone.
        ppl: of the model: the LM, or the GNN-LM.
        mixed_ppl: of its mixture with the memories; None without.
        seconds: of the pass and of all that had to be made and tuned for it; None where unknown.
        settings: all of them, by dotted name.
        record: the file.
    """

    run: str
    kind: str
    arch: str
    split: str
    part: str
    memories: str
    mixer: str
    time: datetime
    ppl: float | None
    mixed_ppl: float | None
    seconds: float | None
    record: Path
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def best_ppl(self) -> float:
        """The mixture's perplexity, or the model's; infinite where there is none."""
        found = [ppl for ppl in (self.mixed_ppl, self.ppl) if ppl is not None]
        return found[0] if found else float("inf")


# -- what lies in runs ---------------------------------------------------------------------------


def entries_of(folder: Path) -> tuple[list[Entry], list[str]]:
    """All that was done in the runs of a folder, and a line for each record that cannot be read.

    Raises:
        InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds runs of train.py")
    found, damaged = [], []
    for path in sorted([*folder.glob("*/evaluations/*.json"), *folder.glob("*/training.json")]):
        read = training_of if path.name == "training.json" else evaluation_of
        try:
            found.append(read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            damaged.append(f"left out {path}: is no record of this program's ({reason})")
    return found, damaged


def evaluation_of(path: Path) -> Entry:
    """From a file in evaluations/, see `programs.records`."""
    record = json.loads(path.read_text(encoding="utf-8"))
    results, settings = record["results"], record["settings"]
    mixed = results.get("knn") or results.get("mixture")
    base = results.get("gnn") or results
    memories = (mixed or {}).get("memories", ["knn"]) if mixed else []
    given = Path(str(settings.get("mixer") or "constant")).stem
    spent = [(mixed or base)["seconds"], *(results.get("stage_seconds") or {}).values()]
    return Entry(
        run=path.parent.parent.name,
        kind="evaluation",
        arch=str(settings.get("arch") or "lm"),
        split=results["split"],
        part=results.get("part", ""),
        memories="+".join(memories),
        mixer=given if mixed else "",
        time=datetime.fromisoformat(record["time"]).astimezone(),
        ppl=number(base["ppl"]),
        mixed_ppl=number(mixed["ppl"]) if mixed else None,
        seconds=sum(map(float, spent)),
        record=path,
        settings=flat(settings),
    )


def training_of(path: Path) -> Entry:
    """From training.json, with the settings in config.yaml."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    config = path.with_name("config.yaml")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    ended = figures.get("time")
    time = datetime.fromisoformat(ended) if ended else datetime.fromtimestamp(path.stat().st_mtime)
    seconds = figures.get("seconds")
    if seconds is not None:
        seconds = float(seconds) + sum(figures["stage_seconds"].values())
    return Entry(
        run=path.parent.name,
        kind="training",
        arch=str(settings.get("arch") or "lm"),
        split="valid",
        part="",
        memories="",
        mixer="",
        time=time.astimezone(),
        ppl=number(figures["best_valid_ppl"]),
        mixed_ppl=None,
        seconds=seconds,
        record=path,
        settings=flat(settings),
    )


def number(value: Any) -> float | None:
    """A perplexity, which JSON has as null where it is not finite."""
    return None if value is None else float(value)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted names, of the trainer those of `OF_TRAINER` alone."""

    def pairs(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from pairs(value, f"{prefix}{name}.")
            elif prefix != "trainer." or name in OF_TRAINER:
                yield f"{prefix}{name}", value

    return dict(pairs(settings, ""))


# -- which of it is shown ------------------------------------------------------------------------


def as_typed(value: Any) -> str:
    """A setting as people type it."""
    return value if isinstance(value, str) else json.dumps(value)


def chosen(entries: Sequence[Entry], conditions: Sequence[str]) -> list[Entry]:
    """The entries that fulfil all conditions `key=value`.

    Raises:
        InputError: a condition is none, or no entry has its key.
    """
    for condition in conditions:
        key, equals, value = condition.partition("=")
        known = {*KEYS, *(name for entry in entries for name in entry.settings)}
        if not equals or key not in known:
            near = get_close_matches(key, known, n=1)
            others = f"expected {', '.join(KEYS)}, or a setting such as knn.k, then = and its value"
            hint = f"did you mean {near[0]}=VALUE?" if near else others
            raise InputError(f"--where {condition}: names nothing that a record has; {hint}")
        memories = "+".join(value.split(",")) if key == "memories" else value
        entries = [
            entry
            for entry in entries
            if (
                getattr(entry, key) == memories
                if key in KEYS
                else key in entry.settings and as_typed(entry.settings[key]) == value
            )
        ]
    return list(entries)


def ordered(entries: Sequence[Entry], by: str) -> list[Entry]:
    """By the best perplexity, the smallest first; by time, the latest first; or by name."""
    keys = {
        "ppl": lambda entry: (entry.best_ppl, entry.run),
        "time": lambda entry: -entry.time.timestamp(),
        "name": lambda entry: (entry.run, entry.time.timestamp()),
    }
    return sorted(entries, key=keys[by])


def differing(entries: Sequence[Entry]) -> list[str]:
    """Settings that have more than one value among the trainings, or among the evaluations."""
    values: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        for name in entry.settings.keys() - OF_PLACES - OF_WHAT:
            values.setdefault((entry.kind, name), set()).add(as_typed(entry.settings[name]))
    return sorted({name for (_, name), found in values.items() if len(found) > 1})


# -- how it is shown -----------------------------------------------------------------------------

COLUMNS = ("run", "what", "when", "perplexity", "with memories", "settings that differ", "took")


def row_of(entry: Entry, settings: Sequence[str], between: str = ", ") -> list[str]:
    """An entry in words, with something between its settings."""
    mixer = "" if entry.mixer == "constant" else entry.mixer
    split = f"{entry.split} ({entry.part})" if entry.part else entry.split
    what = " ".join(filter(None, (entry.kind, split, entry.arch, entry.memories, mixer)))
    own = {name: entry.settings.get(name) for name in settings}
    differ = [f"{name} {as_typed(value)}" for name, value in own.items() if value is not None]
    return [
        entry.run,
        what,
        f"{entry.time:%Y-%m-%d %H:%M}",
        "" if entry.ppl is None else f"{entry.ppl:.2f}",
        "" if entry.mixed_ppl is None else f"{entry.mixed_ppl:.2f}",
        between.join(differ),
        "" if entry.seconds is None else duration(entry.seconds),
    ]


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> [duration(seconds) for seconds in (0.26, 75, 7330)]
    ['0.3 s', '1 min 15 s', '2 h 2 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def show(entries: Sequence[Entry], form: str) -> None:
    """Prints the entries as a table, in Markdown or as JSON."""
    settings = differing(entries)
    if form == "json":
        rows = [asdict(entry) | {"time": entry.time.isoformat()} for entry in entries]
        differ = [{n: row["settings"][n] for n in settings if n in row["settings"]} for row in rows]
        found = [row | {"differing": own} for row, own in zip(rows, differ, strict=True)]
        print(as_json(found).decode(), end="")
        return
    if form == "markdown":
        print(as_markdown(COLUMNS, [row_of(entry, settings) for entry in entries]))
        return
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(box=SIMPLE, pad_edge=False)
    for name in COLUMNS:
        figure = name in ("perplexity", "with memories", "took")
        table.add_column(name, justify="right" if figure else "left", overflow="fold")
    for entry in entries:
        table.add_row(*row_of(entry, settings, between="\n"))
    console.print(table)


def parsed(args: list[str] | None) -> Namespace:
    """The command line."""
    parser = OneSentence(
        "neighborlm runs",
        description="A table of all trainings and evaluations in the runs of a folder.",
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("runs"), help="of runs (default: runs)")
    add(
        "--sort",
        choices=("ppl", "time", "name"),
        default="time",
        help="smallest perplexity first, latest first, or by name (default: time)",
    )
    add(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"shows only these; KEY is {', '.join(KEYS)}, or a setting such as knn.k; all of "
        "several must hold",
    )
    add("--format", choices=("table", "markdown", "json"), default="table", help="default: table")
    return parser.parse_args(args)


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = parsed(args)
    entries, damaged = entries_of(options.folder)
    for line in damaged:
        print(line, file=sys.stderr)
    if not entries:
        raise InputError(f"{options.folder}: holds no record of a training or an evaluation")
    entries = chosen(entries, options.where)
    if not entries:
        raise InputError(f"--where {' '.join(options.where)}: no record fulfils it")
    show(ordered(entries, options.sort), options.format)
