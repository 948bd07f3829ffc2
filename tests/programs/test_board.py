"""What an evaluation leaves for TensorBoard, and for loggers that are none."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from pytorch_lightning.loggers import CSVLogger
from small import SMALL, logged_by
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from neighborlm.programs import board, evaluate
from neighborlm.retrieval.memories.tuning import Tuning

EVALUATING = (*SMALL, "--data.corpus", "words", "--memories", "knn,ngram", "--mixer", "buckets")


@pytest.fixture(scope="module")
def evaluated(workplace, tmp_path_factory):
    """The results, the scores of every token, what was logged, and what `keys/` holds."""
    folder = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(workplace)
        flags = ("--knn.k", "16", "--knn.index", "flat", "--knn.datastore", "board-store")
        files = ("--output", folder / "out.json", "--token_scores", folder / "scores.npz")
        evaluate.main([*EVALUATING, *flags, *map(str, files)])
    results = json.loads((folder / "out.json").read_text())
    events = EventAccumulator(str(logged_by(results, workplace)))
    (keys,) = (workplace / "runs/words/keys").glob("board-store-*")
    return results, np.load(folder / "scores.npz"), events.Reload(), keys


def text_of(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return make_ndarray(event.tensor_proto).item().decode()


def test_a_few_tokens_are_shown_with_their_neighbors(evaluated, workplace):
    _, scores, events, _ = evaluated
    words = (workplace / "words/test.txt").read_text().replace("\n", " ↵ ").split()
    train = (workplace / "words/train.txt").read_text().replace("\n", " ↵ ").split()
    keys = np.load(workplace / "board-store/keys.npy").astype(np.float32)
    lines = text_of(events, "test/tokens").splitlines()
    assert all(line.startswith("    ") for line in lines)  # code to Markdown, whatever it says
    tokens = [block.splitlines() for block in "\n".join(lines).split("\n    \n")]
    assert len(tokens) == 5
    for token, said, *neighbors in tokens:
        place, _, text = token.strip().partition(": ")
        position = int(place)
        assert text.rpartition(" ⟩ ")[2] == words[position]
        probs = dict(pair.split() for pair in said.strip().removeprefix("p: ").split(", "))
        for name in ("lm", "knn", "ngram"):
            expected = np.exp(scores[f"{name}_log_prob"][position])
            assert float(probs[name]) == pytest.approx(expected, abs=6e-5)
        assert float(probs["mixture"]) == pytest.approx(
            np.exp(scores["log_prob"][position]), abs=6e-5
        )
        distances = []
        for line in neighbors[:5]:
            distance, row = line.strip().rpartition("(distance ")[2].split(", row ")
            row = int(row.strip(")"))
            assert line.partition(" ⟩ ")[2].split("  (")[0] == train[row]
            distances.append(float(distance))
        assert distances == sorted(distances)
        # The nearest of all is the first: nothing else is as near to its key.
        nearest = scores["knn.nearest_distance"][position]
        assert distances[0] == pytest.approx(nearest, rel=1e-3, abs=1e-3)
    assert len(keys) == len(train)


def test_distances_and_weights_of_tokens_are_spread(evaluated):
    results, scores, events, _ = evaluated
    found = {tag: events.Histograms(tag)[-1].histogram_value for tag in events.Tags()["histograms"]}
    assert set(found) == {
        "test/knn.nearest_distance",
        *(f"test/weight.{source}" for source in ("lm", "knn", "ngram")),
    }
    nearest = found["test/knn.nearest_distance"]
    assert nearest.num == results["tokens"]  # fewer than are sampled
    assert nearest.sum == pytest.approx(scores["knn.nearest_distance"].sum(), rel=1e-4)
    mean = found["test/weight.ngram"].sum / results["tokens"]
    assert mean == pytest.approx(results["mixture"]["weight.ngram"], rel=1e-4)


def test_keys_are_points_with_their_tokens(evaluated, workplace):
    keys = evaluated[-1]
    (folder,) = (path.parent for path in keys.rglob("tensors.tsv"))
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    header, *lines = (folder / "metadata.tsv").read_text().splitlines()
    assert header == "token\tfrequent token"
    labels, colors = zip(*(line.split("\t") for line in lines), strict=True)
    assert len(set(colors)) == board.COLORS
    assert all(color in (label, "(others)") for label, color in zip(labels, colors, strict=True))
    stored = np.load(workplace / "board-store/keys.npy").astype(np.float64)
    assert len(points) == len(labels) == min(len(stored), board.KEYS) == board.KEYS
    words = (workplace / "words/train.txt").read_text().replace("\n", " ↵ ").split()
    rows = np.abs(points[:50, None] - stored[None]).sum(-1).argmin(axis=1)
    for label, row in zip(labels, rows, strict=False):
        assert label == words[row].replace("↵", r"'\n'")


TUNED = Tuning(
    *(0.5, 2.0, 1.0, np.array([0.0, 0.5]), np.array([1.0, 2.0])),
    np.array([[2.0, 1.5], [2.0, 1.0]]),
)


def test_the_tuning_has_real_axes():
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    axes, colors = board.figure_of(TUNED).axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (
        *("lmbda", "temperature"),
        "log",
    )
    assert axes.get_xlim()[1] >= 0.5
    assert "lmbda 0.50, temperature 2, perplexity 2.72" in axes.get_title()
    assert colors.get_ylim() == pytest.approx((np.exp(1.0), np.exp(2.0)))


def test_other_loggers_get_figures_and_settings(tmp_path):
    results = {"split": "test", "loss": 1.0, "ppl": np.e}
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = SimpleNamespace(loggers=[logger], world_size=1)
    subject = SimpleNamespace(model=SimpleNamespace(updates=7, hparams={"width": 16}))
    evaluation = SimpleNamespace(trainer=trainer, results=results, memories={}, sample=None)
    board.log_evaluation(subject, evaluation, {"data": {"level": "word"}})
    board.log_tuning(TUNED, 7, [logger])
    logger.save()
    found = (tmp_path / "metrics.csv").read_text()
    assert "test/ppl" in found
    assert "model.width: 16" in (tmp_path / "hparams.yaml").read_text()
