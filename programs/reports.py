"""The figures of an evaluation, and the table and sentences in which the user sees them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.common.contracts import TextSize
from neighborlm.common.units import size_of

WIDTH = 110
"""Columns of a table in a file or pipe."""
OF_TEXT = {
    "word_ppl": "of a\nword",
    "bits_per_byte": "bits / byte",
    "bits_per_character": "bits / char",
}
"""Columns of the figures that compare whatever a token is."""


def figures(loss: float, tokens: int, seconds: float) -> dict[str, float]:
    """The figures that every way of predicting is reported by.

    Args:
        loss: mean negative log-likelihood of a token, in nats.
    """
    ppl = math.exp(loss) if loss < 700 else math.inf
    rate = tokens / seconds if seconds else math.inf
    return {"loss": loss, "ppl": ppl, "seconds": seconds, "tokens_per_second": rate}


def with_text_figures(results: dict[str, Any], size: TextSize) -> dict[str, Any]:
    """Results with figures that compare whatever a token is: `word_ppl`, exp of the loss of a word
    in nats, and `bits_per_byte` of every way of predicting, and how many there are of both.

    Args:
        results: see `programs.subject.Evaluated`.
        size: of the raw text that was scored.
    """
    tokens = results["tokens"]

    def of_text(found: dict[str, Any]) -> dict[str, float]:
        nats = found["loss"] * tokens
        per_word = nats / size.words if size.words else math.inf
        per_byte = nats / math.log(2) / size.bytes if size.bytes else math.inf
        word_ppl = math.exp(per_word) if per_word < 700 else math.inf
        return {"word_ppl": word_ppl, "bits_per_byte": per_byte}

    return _with_figures(results, of_text) | size._asdict()


def with_bits_per_character(results: dict[str, Any]) -> dict[str, Any]:
    """Results whose tokens are characters, with `bits_per_character` of every way of predicting."""
    return _with_figures(results, lambda found: {"bits_per_character": found["loss"] / math.log(2)})


def _with_figures(
    results: dict[str, Any], further: Callable[[dict[str, Any]], dict[str, float]]
) -> dict[str, Any]:
    """Results with further figures of every way of predicting.

    Args:
        further: gives them from those of one way.
    """
    parts = {name: results[name] for name in ("gnn", "knn", "mixture") if name in results}
    found = results | further(results)
    found |= {name: part | further(part) for name, part in parts.items()}
    if "table" in results:
        found["table"] = [row | further(row) for row in results["table"]]
    return found


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, which reads well as it stands too.

    >>> print(as_markdown(["", "ppl"], [["LM", "12.5"], ["a|b", "9"]]))
    |      | ppl  |
    | ---- | ---- |
    | LM   | 12.5 |
    | a\\|b | 9    |
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(f"| {line} |" for line in padded)


def show(results: dict[str, Any]) -> None:
    """Prints the figures.

    Args:
        results: see `programs.subject.Evaluated`.
    """
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(as_table(results))
    for remark in remarks(results):
        print(remark)


def as_table(results: dict[str, Any]) -> Table:
    """The figures of each way of predicting, a row each; with memories also the mean weight of each
    of them, what they take on disk and how many queries they searched for."""
    rows = results.get("table") or plain_rows(results)
    title = ", ".join(filter(None, (f"{results['split']} split", results.get("part"))))
    title += f", {results['unit']} level"
    if "words" in results:
        title += f"; {results['words']:,} words, {results['bytes']:,} bytes"
    by_text = [name for name in OF_TEXT if name in rows[0]]
    more = ("weights", "on disk", "searches") if "table" in results else ()
    names = ("perplexity", *map(OF_TEXT.get, by_text), "nats / token", "tokens / s", *more)
    knn = results.get("knn")
    caption = f"kNN: lmbda {knn['lmbda']:g}, temperature {knn['temperature']:g}" if knn else None
    table = Table(box=SIMPLE, pad_edge=False, title=title, caption=caption)
    table.add_column("")
    for name in names:
        table.add_column(name.replace(" / ", "\n/ "), justify="right", no_wrap=True)
    for r in rows:
        of_text = (f"{r[name]:.{2 if name == 'word_ppl' else 4}f}" for name in by_text)
        rates = (f"{r['loss']:.4f}", f"{r['tokens_per_second']:,.0f}")
        figures = (f"{r['ppl']:.2f}", *of_text, *rates)
        if more:
            weights = " ".join(f"{weight:.2f}" for weight in r["weights"].values())
            on_disk, searches = r["bytes_on_disk"], r["searches"]
            figures += (
                weights,
                size_of(on_disk) if on_disk else "",
                f"{searches:,}" if searches else "",
            )
        table.add_row(r["name"], *figures)
    return table


def plain_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table without memories."""
    models = {"LM": results, "GNN-LM": results.get("gnn")}
    return [{"name": name, **found} for name, found in models.items() if found]


def remarks(results: dict[str, Any]) -> list[str]:
    """What must be said of figures lest they be misread, a sentence each."""
    name = "GNN-LM" if "gnn" in results else "LM"
    base = results.get("gnn", results)
    said = []
    for mixture in filter(None, (results.get("knn"), results.get("mixture"))):
        if mixture["ppl"] > base["ppl"]:
            figures = f"{mixture['ppl']:.2f} against {base['ppl']:.2f}"
            said.append(
                f"The mixture is worse than the {name} ({figures}): {_reason_of_worse(mixture)}."
            )
    if results["split"] == "valid" and results.get("knn", {}).get("tuned"):
        said.append(
            "lmbda and temperature were tuned on this very split, so expect a little less of "
            "others: --split test evaluates one."
        )
    return said


def _reason_of_worse(mixture: dict[str, Any]) -> str:
    """And the flag to try."""
    if "skip" in mixture:
        skipped = f"{1 - mixture['adaptive.searched']:.0%}"
        return f"the gate skips {skipped} of the searches; a smaller --adaptive.skip makes more"
    if "mixer" in mixture:
        return f"so {mixture['mixer']} weighs the memories; --mixer names others"
    chosen = f"lmbda {mixture['lmbda']:g} and temperature {mixture['temperature']:g}"
    if mixture["tuned"]:
        return (
            f"{chosen} are the best of the validation split, but not of this one; a smaller "
            "--knn.lmbda trusts the neighbours less"
        )
    return f"{chosen} were not tuned; --knn.lmbda auto finds the best of the validation split"
