"""Says before anything is run what a memory of so many keys will take: bytes on disk and in memory,
time for each stage, queries per second, and what does not fit with what would make it fit.

    neighborlm plan --tokens 103e6 --dim 1024 --k 1024 --hosts 4 --memory 64GB --disk 2TB

The formulas are in retrieval/plan_costs.py, and the rates that `benchmarks/constants.py` has
measured in retrieval/plan_settings.py; docs/scaling.md explains both.
"""

import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

from jsonargparse import ArgumentParser
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.tools.plan_costs import Costs
from neighborlm.tools.plan_settings import Constants, Wanted

LONG = 7 * 86400
"""Seconds after which a stage is said to take long."""


# -- what does not fit -----------------------------------------------------------------------------


def shortages(costs: Costs) -> dict[str, tuple[float, float]]:
    """Bytes that are needed and that there are, of the disk and of memory by stage, where there
    are too few."""
    needs = {"disk": (costs.disk_needs["at the most"], costs.disk)}
    for stage, needed in costs.memory_needs.items():
        needs[f"memory for {stage}"] = needed, costs.memory
    return {what: (needed, there) for what, (needed, there) in needs.items() if needed > there}


def changes(costs: Costs) -> list[dict[str, Costs]]:
    """What could be done otherwise, one flag at a time: of each kind the smallest change first."""
    w, factory = costs.wanted, costs.factory
    kinds: list[tuple[str, list]] = [("dtype", ["fp16"] if w.dtype == "fp32" else [])]
    if costs.shape:
        lists = costs.shape.lists
        others = (f"IVF{lists},SQ8", f"RR{w.dim},IVF{lists},RaBitQfs")
        kinds += [("index", [other]) for other in others if other != factory]
        fewer = (lists >> shift for shift in range(1, 6) if lists >> shift >= 1024)
        kinds.append(("index", [re.sub(r"IVF\d+", f"IVF{n}", factory) for n in fewer]))
    kinds.append(("table_k", [w.table_k // part for part in (2, 4, 8) if w.table_k // part]))
    kinds.append(("hosts", [w.hosts * n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)]))
    as_it_is = replace(w, index=factory)  # `auto` does not choose anew
    return [
        {
            f"--{flag} {value}": Costs(replace(as_it_is, **{flag: value}), costs.constants)
            for value in values
        }
        for flag, values in kinds
    ]


def advice(costs: Costs) -> list[dict[str, Any]]:
    """Each shortage with the changes that would end it, the smallest of each kind."""
    short = shortages(costs)
    if not short:
        return []
    kinds = [
        {change: shortages(changed) for change, changed in kind.items()} for kind in changes(costs)
    ]
    found = []
    for what, (needed, there) in short.items():
        ending = [[change for change, left in kind.items() if what not in left] for kind in kinds]
        smallest = [suitable[0] for suitable in ending if suitable]
        found.append({"what": what, "needed": needed, "there": there, "change": smallest})
    return found


def notes(costs: Costs) -> list[str]:
    """What takes long, and what would shorten it."""
    shape, found = costs.shape, []
    long = {stage for stage, seconds in costs.seconds.items() if seconds > LONG}
    if "datastore" in long:
        found.append("the datastore takes long: more hosts, or a GPU in each (--tokens_per_second)")
    if {"index training", "index adding"} & long and not shape.graph:
        graph = re.sub(r"IVF(\d+)", r"IVF\1_HNSW32", costs.factory)
        found.append(f"the index takes long: --index {graph} to add, faiss on GPUs to train")
    if {"neighbour table", "codes"} & long:
        found.append("tables and codes take long: more hosts")
    if costs.evaluation_parts["disk"] > sum(costs.evaluation_parts.values()) / 2:
        found.append("searches wait for the disk: --distances index, more hosts, or more memory")
    if shape and not shape.fast_scan and not costs.shares_lists:
        found.append("so few queries share a list that faiss visits them one by one")
    return found


# -- what is said ----------------------------------------------------------------------------------


def described(costs: Costs) -> dict[str, Any]:
    """All figures, for JSON."""
    return {
        "wanted": vars(costs.wanted),
        "index": costs.factory,
        "keys_per_host": costs.rows,
        "bytes_per_host": costs.bytes,
        "disk_per_host": costs.disk_needs,
        "memory_per_host": costs.memory_needs,
        "seconds": costs.seconds,
        "search_seconds_per_query": costs.evaluation_parts,
        "queries_per_second": costs.queries_per_second,
        "network_bytes_per_query": costs.network_bytes,
        "does_not_fit": advice(costs),
        "notes": notes(costs),
        "constants": asdict(costs.constants),
    }


def size_of(number: float) -> str:
    """Bytes for people.

    >>> size_of(211e9), size_of(128)
    ('211 GB', '128 B')
    """
    power = min(max(int(math.log10(max(number, 1))) // 3, 0), 5)
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}B"


def time_of(seconds: float) -> str:
    """Seconds for people.

    >>> time_of(5400), time_of(0.00013)
    ('1.5 h', '130 us')
    """
    units = {86400 * 2: (86400, "days"), 3600: (3600, "h"), 60: (60, "min"), 1: (1, "s")}
    units |= {1e-3: (1e-3, "ms"), 0: (1e-6, "us")}
    scale, unit = next(value for limit, value in units.items() if seconds >= limit)
    return f"{seconds / scale:.3g} {unit}"


def show(costs: Costs, console: Console) -> None:
    """Prints the figures as tables, then what does not fit."""
    w = costs.wanted
    console.print(
        f"{costs.keys:,} keys of {w.dim} {w.dtype}, index {costs.factory}, {w.hosts} "
        f"host{'s' if w.hosts > 1 else ''} with {costs.rows:,} keys each"
    )
    groups = {
        "on the disk of a host": {k: size_of(v) for k, v in costs.bytes.items() if v},
        f"… of {size_of(costs.disk)}": {k: size_of(v) for k, v in costs.disk_needs.items()},
        f"memory of a host, of {size_of(costs.memory)}": {
            k: size_of(v) for k, v in costs.memory_needs.items()
        },
        "time": {k: time_of(v) for k, v in costs.seconds.items()},
        "a query in a search": {k: time_of(v) for k, v in costs.evaluation_parts.items() if v},
        "all hosts together": {
            "queries per second": f"{costs.queries_per_second:,.0f}",
            "network per query": size_of(costs.network_bytes),
        },
    }
    for title, lines in groups.items():
        table = Table(box=SIMPLE, show_header=False, title=title, title_justify="left")
        table.add_column(no_wrap=True, min_width=24)
        table.add_column(justify="right", no_wrap=True)
        for line in lines.items():
            table.add_row(*line)
        console.print(table)
    short = advice(costs)
    console.print("What does not fit:" if short else "Everything fits.")
    for s in short:
        change = " or ".join(s["change"]) or "no single change ends it; several together may"
        console.print(f"  {s['what']}: {size_of(s['needed'])} of {size_of(s['there'])}; {change}")
    for note in notes(costs):
        console.print(f"  {note}")


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Prints the plan, and writes it as JSON where that is wanted."""
    parser = ArgumentParser(prog="neighborlm plan", description=__doc__)
    parser.add_class_arguments(Wanted)
    wanted: Wanted = Wanted(**parser.parse_args(args).as_dict())
    constants = Constants.read(wanted.constants) if wanted.constants else Constants()
    costs = Costs(wanted, constants)
    show(costs, Console(highlight=False))
    if wanted.output:
        wanted.output.write_text(json.dumps(described(costs), indent=1, default=str) + "\n")
