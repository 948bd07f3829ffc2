"""Makes one HTML file of the tokens of a page: it opens from disk, asks for nothing from elsewhere,
and holds its text as JSON and its numbers as base64, which the page's script shows as text only.
What the text and the totals need stands before the script, so that they are seen while a browser
still reads the rest."""

import base64
import hashlib
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from markupsafe import Markup

from neighborlm.common.files import write_whole
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.page.tokens import PageTokens

SCRIPTS = ("stored.js", "text.js", "token.js", "overview.js", "page.js")
"""Parts of the page's script, in their order."""
EARLY = ("tokens", "positions", "log_probs", "weights", "lm_alone", "other", "suffix_lengths")
"""Parts of the content whose arrays stand before the script."""
CONTEXT = 8
"""Tokens of the training text that a page shows before a neighbour."""
FOLLOWING = 4
"""Tokens that it shows after the one that followed."""


def write_page(path: Path, page: PageTokens, data: LMDataModule, title: str, made: str) -> None:
    """Writes the file.

    Args:
        path: of the file.
        page: what it shows.
        data: the corpus, for the text.
        title: what was evaluated.
        made: how the page was made.

    Raises:
        InputError: it cannot be written.
    """
    folder = files(__package__)
    style, template, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.html.j2", *SCRIPTS)
    )
    script = "\n".join(['"use strict";\n{', *scripts, "}\n"])  # a block keeps their names apart
    content = as_json(page, data) | {"title": title, "made": made}
    early, late = [], []
    content = {
        name: apart(part, early if name in EARLY else late, "e" if name in EARLY else "l")
        for name, part in content.items()
    }
    html = Template(template, autoescape=True).render(
        title=title,
        made=made,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        content=Markup(as_script(content)),
        early=early,
        late=late,
    )
    write_whole(path, html)


def apart(content: Any, arrays: list[tuple[str, str]], prefix: str) -> Any:
    """The same with the name of each packed array instead of its bytes. An array stands in an
    element of its own: browsers take long to read one large element.

    Args:
        content: JSON-able.
        arrays: where names and bytes are put.
        prefix: of the names.
    """
    if isinstance(content, list):
        return [apart(each, arrays, prefix) for each in content]
    if not isinstance(content, dict):
        return content
    if "data" in content:
        name = f"{prefix}{len(arrays)}"
        arrays.append((name, content["data"]))
        return {"type": content["type"], "element": name}
    return {name: apart(part, arrays, prefix) for name, part in content.items()}


def as_script(content: dict[str, Any]) -> str:
    """JSON that can stand in a script element, whatever is in its strings."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def packed(array: np.ndarray, dtype: str) -> dict[str, str]:
    """An array as little-endian bytes in base64."""
    content = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"type": dtype, "data": base64.b64encode(content).decode()}


def as_json(page: PageTokens, data: LMDataModule) -> dict[str, Any]:
    """All that the script needs. Tokens are numbers into `words`, which holds only those of the
    page."""
    train = data.stream("train")
    starts, lengths = windows_of(page, len(train.tokens))
    window_tokens = gathered(train.tokens, starts, lengths)
    shown = [page.targets, window_tokens]
    shown += [candidates.ids.ravel() for candidates in page.candidates.values()]
    if page.neighbors is not None:
        shown.append(page.neighbors.values.ravel())
    ids = np.unique(np.concatenate(shown).astype(np.int64))
    ids = ids[ids >= 0]

    def numbers(tokens: np.ndarray) -> dict[str, str]:
        """Tokens as numbers into the words, one past the last for none."""
        found = np.where(tokens < 0, len(ids), np.searchsorted(ids, tokens))
        return packed(found, "u2" if len(ids) < 2**16 else "u4")

    lines = np.searchsorted(train.line_starts, starts, side="right") - 1
    return {
        "words": [data.dictionary.decode([number]) for number in ids.tolist()],
        "joiner": joiner_of(data),
        "unit": data.settings.unit,
        "tokens": numbers(page.targets),
        "positions": packed(page.positions, "i4"),
        "sources": list(page.log_probs),
        "constant": page.constant,
        "log_probs": {name: packed(of, "f8") for name, of in page.log_probs.items()},
        "weights": {name: packed(of, "f4") for name, of in page.weights.items()},
        "candidates": {
            name: {
                "ids": numbers(of.ids),
                "probs": packed(of.probs, "f4"),
                "ranks": packed(of.ranks, "i4"),
                "width": of.ids.shape[1],
            }
            for name, of in page.candidates.items()
        },
        "neighbors": neighbors_as_json(page, numbers),
        "suffix_lengths": optional(page.suffix_lengths, "i4"),
        "occurrences": optional(page.occurrences, "i4"),
        "lm_alone": optional(page.lm_alone, "f8"),
        "windows": {
            "starts": packed(starts, "i4"),
            "lines": packed(lines, "i4"),
            "lengths": packed(lengths, "i4"),
            "tokens": numbers(window_tokens),
        },
        "model_top": page.model_top,
        "ranks": optional(page.ranks, "i4"),
        "context": CONTEXT,
        "following": FOLLOWING,
        "slices": [
            {"name": of.name, "labels": list(of.labels), "which": packed(of.which, "u1")}
            for of in page.slices
        ],
        "other": None
        if page.other is None
        else {
            "name": page.other.name,
            "base": page.other.base,
            "log_probs": {name: packed(of, "f8") for name, of in page.other.log_probs.items()},
        },
    }


def optional(array: np.ndarray | None, dtype: str) -> dict[str, str] | None:
    """An array that may be missing."""
    return None if array is None else packed(array, dtype)


def neighbors_as_json(page: PageTokens, numbers: Callable) -> dict[str, Any] | None:
    """Those of the memory `knn`."""
    of = page.neighbors
    if of is None:
        return None
    return {
        "scores": packed(of.scores, "f4"),
        "rows": packed(of.rows, "i4"),
        "values": numbers(of.values),
        "counts": optional(of.counts, "f4"),
        "kept": of.scores.shape[1],
        "k": of.k,
        "temperature": of.temperature,
    }


def windows_of(page: PageTokens, n_train: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the stretches of the training text that the page shows, ascending and
    apart."""
    rows = [np.empty(0, dtype=np.int64)]
    if page.neighbors is not None:
        rows.append(page.neighbors.rows.ravel())
    if page.occurrences is not None:
        rows.append(page.occurrences.ravel())
    rows = np.unique(np.concatenate(rows))
    rows = rows[rows >= 0]
    if not len(rows):
        return rows, rows
    starts = np.maximum(rows - CONTEXT, 0)
    ends = np.minimum(rows + 1 + FOLLOWING, n_train)
    begins = np.append(True, starts[1:] > ends[:-1])
    last = np.append(np.flatnonzero(begins)[1:] - 1, len(rows) - 1)
    return starts[begins], ends[last] - starts[begins]


def gathered(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The tokens of stretches, one behind the other, int64."""
    before = np.cumsum(lengths) - lengths
    at = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return tokens[at].astype(np.int64)


def joiner_of(data: LMDataModule) -> str:
    """What stands between tokens in a text: a space between words, nothing between others."""
    return " " if data.settings.unit == "word" else ""
