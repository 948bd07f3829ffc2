"""What a run shows of itself in TensorBoard besides the curves of its training: settings beside the
figures that they gave, the tuning as an image, sampled tokens as text and histograms, keys as
points. Other loggers of Lightning are given the figures and settings, and nothing else."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from neighborlm.callbacks.lightning_files import Events, errors_at
from neighborlm.programs.evaluation import SEARCHING
from neighborlm.programs.inspection import stored_contexts, text_before, text_of
from neighborlm.programs.run import Run
from neighborlm.programs.subject import Evaluated, Subject
from neighborlm.retrieval.memories import KNNMemory
from neighborlm.retrieval.memories.tuning import Tuning

if TYPE_CHECKING:  # Lightning loads it where something is logged
    from torch.utils.tensorboard import SummaryWriter

KEYS = 1000
"""Keys of a datastore that are shown as points."""
NEIGHBORS = 5
"""Neighbours that are shown of a token."""
CONTEXT = 8
"""Tokens that are shown before a token, and before each of its neighbours."""
COLORS = 20
"""Of points: the most frequent tokens have one each, and the others share one."""
SECTIONS = ("model", "data", "neighbors")
"""Settings that are logged of every stage."""
TRAINING = ("max_steps", "max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val")
"""Settings of the trainer that change what is learned."""


def log_training(
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    run: Run,
    step: int,
    loggers: Sequence[Logger],
) -> None:
    """Logs the settings of a training with its final figures.

    Args:
        settings: all of them, by section.
        step: updates that were made.
        loggers: of the trainer.
    """
    chosen = flat({"seed": run.seed, "trainer": some(settings.get("trainer") or {}, TRAINING)})
    log_settings(chosen | flat(some(settings, SECTIONS)), figures, step, loggers)
    finish(loggers)


def log_evaluation(subject: Subject, evaluated: Evaluated, settings: Mapping[str, Any]) -> None:
    """Logs an evaluation at the number of updates that its model was trained with.

    Args:
        subject: what was evaluated.
        evaluated: what came of it.
        settings: all of them, by section; of a model that was trained here its own are taken.
    """
    loggers, results = evaluated.trainer.loggers, evaluated.results
    step = getattr(subject.model, "updates", 0)
    memories = list(evaluated.memories)
    searching = ("knn",) if SEARCHING & set(memories) else ()
    chosen = some(settings, (*SECTIONS, *(("mixer",) if memories else ()), *searching, *memories))
    if hasattr(subject.model, "hparams"):  # of its training, whatever the settings say
        chosen["model"] = dict(subject.model.hparams)
    chosen |= {"split": results["split"], "memories": "+".join(memories)}
    figures = logged(results)
    final = {name: of for name, of in figures.items() if is_final(name)}
    log_settings(flat(chosen), final, step, loggers)
    log({name: of for name, of in figures.items() if name not in final}, step, loggers)
    knn = evaluated.memories.get("knn")
    tuning = knn.tuning if isinstance(knn, KNNMemory) else None
    if tuning is not None:
        log_tuning(tuning, step, loggers)
    alone = evaluated.trainer.world_size == 1  # several search together, or a part each
    for board in boards(loggers):
        writer, split = board.experiment, results["split"]
        with errors_at(board.log_dir):
            if evaluated.sample is not None:
                log_histograms(evaluated.sample, split, step, writer)
            if isinstance(knn, KNNMemory) and alone and has_text(subject, knn):
                if evaluated.shown is not None:
                    writer.add_text(f"{split}/tokens", tokens_as_text(subject, evaluated), step)
                log_keys(subject, knn)
    finish(loggers)


def boards(loggers: Sequence[Logger]) -> list[TensorBoardLogger]:
    """Those that can show more than figures."""
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def finish(loggers: Sequence[Logger]) -> None:
    """Has them write what they hold."""
    for logger in loggers:
        logger.finalize("success")


# -- figures and settings ------------------------------------------------------------------------


def log(values: Mapping[str, float], step: int, loggers: Sequence[Logger]) -> None:
    """Logs figures."""
    for logger in loggers:
        logger.log_metrics(dict(values), step)


def log_settings(
    settings: dict[str, Any], figures: Mapping[str, float], step: int, loggers: Sequence[Logger]
) -> None:
    """Logs settings and the figures that they gave, which TensorBoard shows in one table."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings, dict(figures), step)
        else:
            logger.log_hyperparams(settings)
            logger.log_metrics(dict(figures), step)


def some(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of these names that there are."""
    return {name: settings[name] for name in names if name in settings}


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by the names of their flags, without those that are not set.

    >>> flat({"model": {"width": 16, "cutoffs": [4, 8]}, "knn": {"cache": None}})
    {'model.width': 16, 'model.cutoffs': '[4, 8]'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        elif value is not None:
            plain = isinstance(value, bool | int | float | str)
            found[f"{before}{name}"] = value if plain else str(value)
    return found


def is_final(name: str) -> bool:
    """Whether a figure of an evaluation is shown beside its settings.

    >>> [is_final(name) for name in ("test/knn/ppl", "test/table/knn/ppl", "test/loss")]
    [True, False, False]
    """
    return name.rpartition("/")[2] in ("ppl", "lmbda", "temperature") and "/table/" not in name


# -- TensorBoard alone ---------------------------------------------------------------------------


def log_tuning(tuned: Tuning, step: int, loggers: Sequence[Logger]) -> None:
    """Logs the perplexity of the validation split over lmbda at the best temperature as a curve, of
    all pairs as an image where matplotlib is installed, and of each temperature at its best lmbda
    as a table."""
    row = int(tuned.losses.min(axis=1).argmin())
    for lmbda, loss in zip(tuned.lmbdas, tuned.losses[row], strict=True):
        name = "tuning/valid_ppl_over_lmbda_percent"  # the step of the curve
        log({name: math.exp(loss)}, round(100 * lmbda), loggers)
    lines = ["| temperature | its best lmbda | perplexity of valid |", "| --- | --- | --- |"]
    for temperature, losses in zip(tuned.temperatures, tuned.losses, strict=True):
        best = int(losses.argmin())
        lines.append(
            f"| {temperature:.4g} | {tuned.lmbdas[best]:.2f} | {math.exp(losses[best]):.4f} |"
        )
    for board in boards(loggers):
        with errors_at(board.log_dir):
            board.experiment.add_text("tuning/temperatures", "\n".join(lines), step)
            if find_spec("matplotlib") is not None:
                board.experiment.add_figure("tuning/valid_ppl", figure_of(tuned), step)


def figure_of(tuned: Tuning) -> Any:
    """The perplexity of every pair of lmbda and temperature; those worse than the LM alone, which
    is lmbda 0, have one colour."""
    from matplotlib.figure import Figure  # an extra

    ppl = np.exp(tuned.losses)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    shown = axes.pcolormesh(
        tuned.lmbdas,
        tuned.temperatures,
        ppl,
        shading="nearest",
        cmap="viridis_r",
        vmin=ppl.min(),
        vmax=max(ppl[0, 0], ppl.min() * 1.001),
    )
    axes.plot(tuned.lmbda, tuned.temperature, "k+", markersize=14)
    axes.set(xlabel="lmbda", ylabel="temperature", yscale="log")
    axes.set_title(
        f"best: lmbda {tuned.lmbda:.2f}, temperature {tuned.temperature:.4g}, "
        f"perplexity {math.exp(tuned.loss):.2f}"
    )
    figure.colorbar(shown, label="perplexity of the validation split", extend="max")
    return figure


def log_histograms(
    sample: Mapping[str, np.ndarray], split: str, step: int, writer: "SummaryWriter"
) -> None:
    """Logs how the distances of the nearest neighbours and the weights of the mixture are spread
    over sampled tokens; a weight that all have in common is left out."""
    for name, column in sample.items():
        values = column[np.isfinite(column)] if column.ndim == 1 else column[:0]
        spread = np.ptp(values) > 0 if len(values) else False
        if spread and (name.startswith("weight.") or name.endswith(".nearest_distance")):
            writer.add_histogram(f"{split}/{name}", values, step)


def has_text(subject: Subject, memory: KNNMemory) -> bool:
    """Whether the rows of a datastore are the tokens of the training text."""
    if not subject.data.has("train"):
        return False
    text, datastore = subject.data.stream("train").tokens, memory.datastore
    rows, _ = datastore.sample(NEIGHBORS, seed=0)
    is_inside = (rows < len(text)).all()
    return len(rows) > 0 and is_inside and np.array_equal(text[rows], datastore.values_of(rows))


def tokens_as_text(subject: Subject, evaluated: Evaluated) -> str:
    """Some tokens, what each source says of them, and their neighbours, as Markdown that shows any
    text as it is. Their neighbours are searched for once more; the model is not asked."""
    data, split, sample = subject.data, evaluated.results["split"], evaluated.sample
    lines = []
    for i, position in enumerate(evaluated.shown.positions.tolist()):
        asked = evaluated.shown.some(slice(i, i + 1))
        place = int(np.searchsorted(sample["position"], position))
        sources = [name for name in sample if name.endswith("log_prob")]
        said = {name: np.exp(sample[name][place].reshape(-1)[-1]) for name in sources}
        names = (name.removesuffix("log_prob").removesuffix("_") or "mixture" for name in said)
        probs = ", ".join(f"{n} {p:.4f}" for n, p in zip(names, said.values(), strict=True))
        context = text_before(data, split, position, CONTEXT)
        lines += [f"{position}: {context} ⟩ {text_of(data, split, position)}", f"  p: {probs}"]
        memory = evaluated.memories["knn"]
        for found in stored_contexts(data, memory, asked, NEIGHBORS, CONTEXT):
            at = f"distance {found.distance:.4g}, row {found.row}"
            lines.append(f"  {found.weight:.3f}  {found.context} ⟩ {found.token}  ({at})")
        lines.append("")
    return "\n".join("    " + line.replace("\n", "↵").replace("\r", " ") for line in lines)


def log_keys(subject: Subject, memory: KNNMemory) -> None:
    """Logs some keys of a datastore with the tokens that followed for TensorBoard's projector, once
    for each datastore, beside the evaluations of the run."""
    datastore, data = memory.datastore, subject.data
    board = Events(subject.run.directory, f"keys/{datastore.path.name}-{datastore.fingerprint[:8]}")
    if (subject.run.directory / board.version).exists():
        return
    rows, keys = datastore.sample(KEYS, seed=subject.run.seed)
    tokens = (data.dictionary.decode([value]) for value in datastore.values_of(rows).tolist())
    labels = [" ".join(token.split()) or repr(token) for token in tokens]
    frequent = {label for label, _ in Counter(labels).most_common(COLORS - 1)}
    rows_of_labels = [[label, label if label in frequent else "(others)"] for label in labels]
    with errors_at(board.log_dir):
        header = ["token", "frequent token"]  # a column has colours if it has few values
        board.experiment.add_embedding(keys, rows_of_labels, tag="keys", metadata_header=header)
    board.finalize("success")


def logged(results: dict[str, Any]) -> dict[str, float]:
    """The figures by the names that TensorBoard shows."""
    split = f"{results['split']}-part" if "part" in results else results["split"]
    gnn, knn = results.get("gnn"), results.get("knn")
    found = {f"{split}/loss": results["loss"], f"{split}/ppl": results["ppl"]}
    if gnn:
        found |= {f"{split}/gnn/{name}": gnn[name] for name in ("loss", "ppl")}
    if knn:
        names = ("loss", "ppl", "lmbda", "temperature", "nearest_distance")
        names += ("kth_distance", "target_among_neighbors")
        found |= {f"{split}/knn/{name}": knn[name] for name in names}
    if mixture := results.get("mixture"):
        means = [name for name in mixture if "." in name]
        found |= {f"{split}/mixture/{name}": mixture[name] for name in ("loss", "ppl", *means)}
    for row in results.get("table", ()):
        name = "+".join(row["memories"]) or row["name"]
        columns = ("ppl", "tokens_per_second", "bytes_on_disk", "searches")
        found |= {f"{split}/table/{name}/{column}": row[column] for column in columns}
        weights = row["weights"].items()
        found |= {f"{split}/table/{name}/weight.{memory}": weight for memory, weight in weights}
    return found
