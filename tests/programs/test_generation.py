"""Generation by the programs' own functions and command line: greedy text against a brute-force
mixture, texts that depend on nothing beside them, and what an evaluation keeps for it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.decoding import Decoding
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.evaluation import evaluate
from neighborlm.programs.generate import main
from neighborlm.programs.generation import ALONE, generate
from neighborlm.programs.kept_mixture import make_mixture
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import Evaluated, Subject
from neighborlm.retrieval.memories.recent import RecentSettings

CHECKPOINT = "runs/words/checkpoints/best.ckpt"
PROMPTS = ["w1 w2 w3 w4", "", "w9 w10\nw3", "w20 w21 w22 w23 w24 w25 w26"]
SETTINGS = MemorySettings(
    KNNSettings("generation-store", "flat", 16, dtype="fp32"),
    RecentSettings(size=16, temperature=2.0),
)
ALL = ["knn", "ngram", "recent", "automaton"]
GREEDY = Decoding(max_new_tokens=24, temperature=0)


def make_subject(run: Path) -> Subject:
    """The small LM; rows of 24 tokens, so that texts are longer than a row."""
    data = LMDataModule("words", tokens_per_sample=24, context_window=12, max_tokens=96)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    run = Run(run, {"accelerator": "cpu", "devices": 1, **quiet})
    return Subject.of(load_model(Path(CHECKPOINT)), data, run)


@pytest.fixture
def subject(workplace, monkeypatch, tmp_path) -> Subject:
    monkeypatch.chdir(workplace)
    return make_subject(tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(workplace, tmp_path_factory) -> tuple[Subject, Evaluated]:
    """An evaluation with all memories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        subject = make_subject(tmp_path_factory.mktemp("evaluated"))
        yield subject, evaluate(subject, "test", ALL, "constant", given("auto"))


def given(lmbda: float, temperature: float = 3.0) -> MemorySettings:
    return replace(SETTINGS, knn=replace(SETTINGS.knn, lmbda=lmbda, temperature=temperature))


def plain_distribution(subject: Subject, text: list[int], lmbda: float, temperature: float):
    """p of every next token, float64 `[V]`, from all keys of the datastore."""
    store = make_mixture(subject, ["knn"], "constant", given(lmbda)).memories["knn"].datastore
    with torch.inference_mode():
        hidden, features = subject.model.hidden(torch.tensor([text]), ("last_ffn_input",))
        p_lm = subject.model.log_prob(hidden[0, -1:])[0].double().exp().numpy()
    query = features["last_ffn_input"][0, -1].double().numpy()
    distances = np.square(store.keys[:].astype(np.float64) - query).sum(axis=1)
    nearest = np.argsort(distances)[: SETTINGS.knn.k]
    weights = np.exp(-(distances[nearest] - distances[nearest].min()) / temperature)
    p_knn = np.bincount(store.values[nearest], weights / weights.sum(), len(p_lm))
    return lmbda * p_knn + (1 - lmbda) * p_lm


def test_greedy_text_is_the_most_probable_of_a_brute_force_mixture(subject):
    mixture = make_mixture(subject, ["knn"], "constant", given(0.6))
    greedy = replace(GREEDY, max_new_tokens=10)
    found, alone = (generate(subject, PROMPTS[:1], greedy, m)[0] for m in (mixture, ALONE))
    text = [subject.data.dictionary.eos, *subject.data.dictionary.encode(PROMPTS[0])]
    for token, log_prob in zip(found.tokens, found.log_probs, strict=True):
        p = plain_distribution(subject, text, 0.6, 3.0)
        assert p.sum() == pytest.approx(1)
        assert token == p.argmax()
        assert log_prob == pytest.approx(np.log(p[token]), abs=1e-4)
        text.append(token)
    assert found.log_probs != alone.log_probs


@pytest.mark.parametrize(
    "decoding",
    [GREEDY, Decoding(24, 0.9, 20, 0.9), Decoding(24, beams=3)],
    ids=["greedy", "drawn", "beams"],
)
def test_a_text_is_the_same_alone_and_in_a_batch(evaluated, decoding):
    """Longer than a row, with memories that follow each text and beam."""
    subject, figures = evaluated
    mixture = make_mixture(subject, ALL, "constant", given("auto"))
    assert torch.equal(mixture.mixer.shares, figures.mixer.shares)
    together = generate(subject, PROMPTS, decoding, mixture)
    one_by_one = generate(subject, PROMPTS[:2], decoding, mixture, batch_size=1)
    assert [one.tokens for one in one_by_one] == [one.tokens for one in together[:2]]
    alone = generate(subject, PROMPTS, decoding)
    assert [one.text for one in together] != [one.text for one in alone]
    without_weight = make_mixture(subject, ["knn"], "constant", given(0.0))
    assert generate(subject, PROMPTS, decoding, without_weight) == alone


def test_another_seed_gives_another_text(subject):
    texts = set()
    for seed in (1, 2):
        subject.run.seed = seed
        texts.add(generate(subject, ["w1"], Decoding(20))[0].text)
    assert len(texts) == 2


def test_beams_find_a_text_at_least_as_probable_as_the_greedy_one(subject):
    mixture = make_mixture(subject, ["knn"], "constant", given(0.5))
    greedy = generate(subject, PROMPTS, replace(GREEDY, max_new_tokens=6), mixture)
    beams = generate(subject, PROMPTS, Decoding(6, beams=4), mixture)
    for one, other in zip(greedy, beams, strict=True):
        assert sum(other.log_probs) >= sum(one.log_probs) - 1e-5


@pytest.mark.parametrize("beams", [1, 3])
def test_sources_are_the_contexts_that_voted(subject, beams):
    decoding = GREEDY if beams == 1 else Decoding(24, beams=beams)
    mixture = make_mixture(subject, ["knn"], "constant", given(0.6))
    (found,) = generate(subject, PROMPTS[:1], decoding, mixture, sources=16)
    text = [subject.data.dictionary.eos, *subject.data.dictionary.encode(PROMPTS[0])]
    train = subject.data.stream("train").tokens
    for token, log_prob, sources in zip(found.tokens, found.log_probs, found.sources, strict=True):
        weights = [source.weight for source in sources]
        assert weights == sorted(weights, reverse=True)
        assert sum(weights) == pytest.approx(0.6, abs=1e-5)  # all sixteen neighbours
        of_token = sum(s.weight for s in sources if train[s.row] == token)
        assert of_token <= np.exp(log_prob) + 1e-5
        assert all(s.token == subject.data.dictionary.decode([int(train[s.row])]) for s in sources)
        text.append(token)


def test_a_mixture_is_the_one_that_was_evaluated(subject):
    knn = replace(SETTINGS, knn=replace(SETTINGS.knn, k=8))
    with pytest.raises(InputError, match=r"constant-knn.npz: no such mixture; expected an evalu"):
        make_mixture(subject, ["knn"], "constant", knn)
    results = evaluate(subject, "test", ["knn"], "constant", knn).results["knn"]
    mixture = make_mixture(subject, ["knn"], "constant", knn)
    assert mixture.memories["knn"].temperature == pytest.approx(results["temperature"])
    assert mixture.mixer.shares.tolist() == pytest.approx([1 - results["lmbda"], results["lmbda"]])
    kept = subject.run.directory / "generation"
    kept.rename(kept.with_name("mixtures"))  # as up to version 0.1
    assert make_mixture(subject, ["knn"], "constant", knn).memories["knn"].temperature == (
        mixture.memories["knn"].temperature
    )
    kept.with_name("mixtures").rename(kept)
    other = replace(knn, knn=replace(knn.knn, k=9))
    with pytest.raises(InputError, match=r"its knn is .*evaluate with these settings first"):
        make_mixture(subject, ["knn"], "constant", other)


def test_what_scores_alone_cannot_generate(subject):
    class Scores:
        max_target_positions, fingerprint, vocab_size = 100, "scores", subject.model.vocab_size

        def key_width(self, key_type): ...
        def score(self, batch, want): ...

    with pytest.raises(InputError, match="a Scores scores texts and cannot generate any"):
        generate(replace(subject, model=Scores()), ["w1"])


HERE = ("runs/words", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")


def test_the_command_shows_and_writes_what_it_generates(workplace, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(workplace)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("w1 w2\nw7 unheard\n")
    knn = ("--knnlm", "--knn.lmbda", "0.5", "--knn.temperature", "3", "--knn.k", "16")
    flags = ("--compare", "--sources", "2", "--temperature", "0", "--max_new_tokens", "5")
    main([*HERE, *knn, *flags, "--prompts", str(prompts), "--output", str(output)])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["by"] for one in written] == ["with knn"] * 2 + ["the model alone"] * 2
    assert [one["prompt"] for one in written] == ["w1 w2", "w7 unheard"] * 2
    shown = capsys.readouterr().out
    assert "1 of its 4 tokens are not in the dictionary" in shown
    for one in written:
        assert f"{one['prompt']}⟩{one['text']}\n" in shown
        assert len(one["tokens"]) == 5
    assert [len(sources) for sources in written[0]["sources"]] == [2] * 5
    # A single prompt is shown as it is made.
    main([*HERE, *knn, *flags[3:], "--prompt", "w1 w2", "--output", str(output)])
    one = json.loads(output.read_text())
    assert one["text"] == written[0]["text"]
    assert f"w1 w2⟩{one['text']}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompt", "a", "--prompts", "b"), "--prompt and --prompts b: are both given"),
        (("--prompts", "nowhere"), "--prompts nowhere: cannot be read"),
        (("--compare",), "--compare: has no effect without memories"),
        (("--top_p", "2"), "--top_p is 2.0; expected more than 0 and at most 1"),
        (("--memories", "adaptive"), "--memories adaptive: the network that it trains is not kept"),
        (("--knnlm", "--mixer", "meta_k"), "--mixer meta_k: weighs several distributions"),
        (("--knnlm",), "no such mixture; expected an evaluation with --memories knn"),
    ],
    ids=str,
)
def test_slips_get_one_sentence(workplace, monkeypatch, tmp_path, capsys, flags, said):
    monkeypatch.chdir(workplace)
    where = ("--trainer.default_root_dir", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit):
        main([*HERE, *where, "--knn.k", "7", *flags] if "--knnlm" in flags else [*HERE, *flags])
    assert said in capsys.readouterr().err
