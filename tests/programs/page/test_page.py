"""Pages of an evaluation and of a cache, in the file and in a browser."""

import base64
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from small import SMALL

from neighborlm.programs.page.tokens import Candidates, PageTokens
from neighborlm.programs.page.writing import write_page
from neighborlm.retrieval.memories.slices import Slices

HERE = (*SMALL, "--data.corpus", "words", "--ckpt_path", "runs/words/checkpoints/best.ckpt")
KNN = (
    "--knnlm",
    "--knn.index",
    "flat",
    "--knn.cache",
    "page-kept",
    "--knn.datastore",
    "page-store",
)
ALL = ("--memories", "knn,ngram,recent", "--mixer", "gate")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def content_of(page) -> dict:
    """What a page holds, its arrays with their bytes."""
    text = page.read_text()
    found = re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)
    arrays = dict(re.findall(r'<script id="(\w+)" type="text/plain">(.*?)</script>', text))
    return json.loads(found[1], object_hook=lambda of: with_data(of, arrays))


def with_data(content: dict, arrays: dict[str, str]) -> dict:
    return {**content, "element": arrays[content["element"]]} if "element" in content else content


def unpacked(packed: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["element"]), dtype=packed["type"])


@pytest.fixture(scope="module")
def pages(workplace, run_program, tmp_path_factory):
    """Pages of kNN-LM with one weight, and of three memories weighed by a gate, with the figures
    and the scores of their evaluations."""
    folder = tmp_path_factory.mktemp("pages")
    for name, flags in (("knn", KNN), ("all", (*KNN, *ALL))):
        k = 8 if name == "knn" else 6  # of the neighbours that were kept
        run_program(
            *(workplace, "evaluate.py", *HERE, *flags, "--knn.k", k),
            *("--page", folder / f"{name}.html", "--output", folder / f"{name}.json"),
            *("--token_scores", folder / f"{name}.npz"),
        )
    return folder


@pytest.mark.parametrize("name", ["knn", "all"])
def test_a_page_holds_what_was_evaluated(pages, name):
    content, scores = content_of(pages / f"{name}.html"), np.load(pages / f"{name}.npz")
    np.testing.assert_array_equal(unpacked(content["positions"]), scores["position"])
    mixed = np.zeros(len(scores["position"]))
    for source in content["sources"]:
        log_probs = unpacked(content["log_probs"][source])
        np.testing.assert_allclose(log_probs, scores[f"{source}_log_prob"], atol=1e-4)
        mixed += unpacked(content["weights"][source]) * np.exp(log_probs)
    np.testing.assert_allclose(np.log(mixed), scores["log_prob"], atol=1e-4)
    words = np.array([*content["words"], ""])
    tokens = words[unpacked(content["tokens"])]
    for source in content["sources"]:  # a target among the candidates has its own probability
        candidates = content["candidates"][source]
        ids = words[unpacked(candidates["ids"]).reshape(-1, candidates["width"])]
        probs = unpacked(candidates["probs"]).reshape(ids.shape)
        rows, columns = np.nonzero((ids == tokens[:, None]) & (probs > 0))
        own = np.exp(unpacked(content["log_probs"][source]))[rows]
        np.testing.assert_allclose(probs[rows, columns], own, rtol=1e-4)
        assert len(rows) > len(tokens) / 4


def test_a_page_from_a_cache_is_that_of_the_evaluation(workplace, pages, run_program, tmp_path):
    """With the lmbda and the temperature that are best for the validation split."""
    kept = (
        "page",
        "--cache",
        "page-kept/test",
        "--output",
        tmp_path / "kept.html",
        "--neighbors",
        8,
    )
    array = ("--suffix_array", tmp_path / "suffix_array")
    run_program(workplace, "neighborlm", *kept, "--against", "page-kept/test", *array)  # itself
    found, expected = content_of(tmp_path / "kept.html"), content_of(pages / "knn.html")
    assert found["neighbors"]["temperature"] == expected["neighbors"]["temperature"]
    for name in ("tokens", "positions"):
        assert found[name] == expected[name]
    for name in ("lm", "knn"):
        both = (unpacked(of["log_probs"][name]) for of in (found, expected))
        np.testing.assert_allclose(*both, atol=1e-4)
    for name in ("scores", "values"):
        both = (unpacked(of["neighbors"][name]) for of in (found, expected))
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)
    with_ngrams = content_of(pages / "all.html")
    assert found["suffix_lengths"] == with_ngrams["suffix_lengths"]
    assert found["occurrences"] == with_ngrams["occurrences"]
    parts = (
        unpacked(found["weights"][name]) * np.exp(unpacked(found["log_probs"][name]))
        for name in ("lm", "knn")
    )
    other = unpacked(found["other"]["log_probs"]["mixture"])
    np.testing.assert_allclose(np.log(sum(parts)), other, atol=1e-6)


# -- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """Opens a page from disk without a network; nothing may go wrong in it."""
    context = browser.new_context(offline=True)
    wrong = []

    def see(path):
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield see
    context.close()
    assert not wrong


def total(page, name: str) -> float:
    return float(page.locator(f'#totals [data-name="{name}"]').get_attribute("data-value"))


@pytest.mark.parametrize("name", ["knn", "all"])
def test_totals_are_those_of_the_evaluation(pages, opened, name):
    said = json.loads((pages / f"{name}.json").read_text())
    page = opened(pages / f"{name}.html")
    assert total(page, "lm") == pytest.approx(said["ppl"], rel=1e-4)
    mixed = said["knn" if name == "knn" else "mixture"]["ppl"]
    assert total(page, "mixture") == pytest.approx(mixed, rel=1e-4)


def test_settings_give_the_perplexity_of_an_evaluation_with_them(
    workplace, pages, opened, run_program, tmp_path
):
    page = opened(pages / "knn.html")
    page.evaluate("setPage({weights: {knn: 0.4}, temperature: 3, k: 4})")
    given = ("--knn.lmbda", 0.4, "--knn.temperature", 3, "--knn.k", 4)
    run_program(workplace, "evaluate.py", *HERE, *KNN, *given, "--output", tmp_path / "r.json")
    expected = json.loads((tmp_path / "r.json").read_text())["knn"]["ppl"]
    assert total(page, "mixture") == pytest.approx(expected, rel=1e-4)
    page.locator("#weight-knn").fill("0")
    assert total(page, "mixture") == pytest.approx(total(page, "lm"), rel=1e-9)
    page.locator("#reset").click()
    page.locator("#on-knn").click()
    assert total(page, "mixture") == pytest.approx(total(page, "lm"), rel=1e-9)


def test_a_token_that_is_clicked_explains_itself(pages, opened):
    page, content = opened(pages / "all.html"), content_of(pages / "all.html")
    scores, chosen = np.load(pages / "all.npz"), 40
    page.locator(f"#t{chosen}").click()
    cells = page.locator("#probabilities tbody tr").all()
    for row, source in zip(cells, content["sources"], strict=False):
        said = row.locator("td").all_inner_texts()
        p = np.exp(scores[f"{source}_log_prob"][chosen])
        assert float(said[1]) == pytest.approx(p, rel=0.06, abs=6e-5)
    said, rank = cells[len(content["sources"])], unpacked(content["ranks"])[chosen]
    assert said.locator("td").all_inner_texts()[2] == str(rank)
    assert rank >= 1
    near = content["neighbors"]
    rows = unpacked(near["rows"]).reshape(-1, near["kept"])[chosen]
    shown = [
        int(row.get_attribute("data-row")) for row in page.locator(".neighbors tbody tr").all()
    ]
    assert set(shown) <= set(rows.tolist())
    assert len(shown) >= 1
    values = np.array([*content["words"], ""])[unpacked(near["values"])]
    followed = page.locator(".neighbors tbody tr").first.locator("b").inner_text()
    values = values.reshape(-1, near["kept"])[chosen]
    assert followed in {word.replace("\n", "↵") for word in values}
    page.locator("#on-ngram").click()
    assert said.locator("td").all_inner_texts()[2].startswith("≈")


def test_the_keyboard_walks_and_classes_filter(pages, opened):
    page = opened(pages / "all.html")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".chosen").get_attribute("id") == "t1"
    page.keyboard.press("ArrowLeft")
    assert page.locator(".chosen").get_attribute("id") == "t0"
    scores = np.load(pages / "all.npz")
    large = np.abs(scores["log_prob"] - scores["lm_log_prob"]) > 1
    page.keyboard.press("n")
    assert page.locator(".chosen").get_attribute("id") == f"t{np.flatnonzero(large[1:])[0] + 1}"
    button = page.locator("#slices button").first
    button.click()
    inside = unpacked(content_of(pages / "all.html")["slices"][0]["which"])
    label = int(page.locator('#slices button[aria-pressed="true"]').get_attribute("data-label"))
    assert total(page, "tokens") == (inside == label).sum()
    assert page.locator("#text .dim").count() == (inside != label).sum()
    page.keyboard.press("Escape")
    assert page.locator("#text .dim").count() == 0


def test_two_results_side_by_side(workplace, pages, opened, run_program, tmp_path):
    """What the cache gives, beside the evaluation with all memories."""
    scores, n = np.load(pages / "all.npz"), 300
    kept = ("page", "--cache", "page-kept/test", "--tokens", n, "--output", tmp_path / "all.html")
    run_program(workplace, "neighborlm", *kept, "--against", pages / "all.npz")
    page = opened(tmp_path / "all.html")
    own = np.log(total(page, "mixture"))
    mixed = scores["log_prob"][:n].astype(np.float64)
    gains = mixed - scores["lm_log_prob"][:n]
    assert total(page, "other-mixture") == pytest.approx(np.exp(-mixed.mean()), rel=1e-5)
    assert total(page, "other-gain") == pytest.approx(gains.mean(), abs=1e-5)
    assert total(page, "other-hurt") == pytest.approx((gains < -0.01).mean(), abs=1e-9)
    assert total(page, "over-gain") == pytest.approx(-mixed.mean() - own, abs=1e-5)
    page.locator("#t40").click()
    said = {
        cells[0]: cells[-1]
        for row in page.locator("#probabilities tbody tr").all()
        for cells in [row.locator("td").all_inner_texts()]
    }
    for source in ("lm", "knn", "ngram", "recent"):
        expected = np.exp(scores[f"{source}_log_prob"][40])
        assert float(said[source.replace("lm", "LM")]) == pytest.approx(expected, rel=0.06)
    assert float(said["mixture"]) == pytest.approx(np.exp(mixed[40]), rel=0.06)
    slices = content_of(tmp_path / "all.html")["slices"][0]
    figures = page.locator("#slices button").first.locator(".figure").all_inner_texts()
    first = int(page.locator("#slices button").first.get_attribute("data-label"))
    inside = unpacked(slices["which"]) == first
    assert float(figures[1].replace("−", "-")) == pytest.approx(gains[inside].mean(), abs=0.006)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "&amp;",
    "\u2028",
    "w",
]


def hostile_page(path) -> None:
    """A page of words that look like HTML and script."""
    n = len(HOSTILE)
    targets, lm = np.arange(n), np.log(np.full(n, 0.5))
    candidates = Candidates(targets[:, None], np.full((n, 1), 0.5, np.float32), np.ones(n, int))
    page = PageTokens(
        *(np.arange(n), targets, {"lm": lm}, {"lm": np.ones(n)}, True, {"lm": candidates}),
        slices=[Slices(HOSTILE[0], [HOSTILE[1]], np.zeros(n, int))],
    )
    data = SimpleNamespace(
        dictionary=SimpleNamespace(decode=lambda ids: HOSTILE[ids[0]]),
        settings=SimpleNamespace(unit="word"),
        stream=lambda split: SimpleNamespace(tokens=targets, line_starts=np.array([0, n])),
    )
    write_page(path, page, data, HOSTILE[0], HOSTILE[1])


def test_text_is_shown_and_never_run(tmp_path, opened):
    hostile_page(tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.locator("#text span").all_inner_texts()[:2] == HOSTILE[:2]
    assert page.locator("h1").inner_text() == HOSTILE[0]
    page.locator("#t1").click()
    assert page.locator(".token .word").inner_text() == HOSTILE[1]
    assert page.locator("img").count() == 0


def test_a_generated_text(workplace, pages, run_program, tmp_path):
    """The mixture says of its tokens what they were drawn by."""
    prompt = ("--prompt", "w1 w2 w3", "--max_new_tokens", 12, "--output", tmp_path / "text.jsonl")
    knn = ("--knn.datastore", "page-store", "--knn.index", "flat", "--knn.k", 6)
    page = ("--page", tmp_path / "page.html")
    run_program(workplace, "generate.py", *HERE, *ALL, *knn, *prompt, *page)
    made = json.loads((tmp_path / "text.jsonl").read_text().splitlines()[0])
    content = content_of(tmp_path / "page.html")
    shares = sum(
        unpacked(content["weights"][name]) * np.exp(unpacked(content["log_probs"][name]))
        for name in content["sources"]
    )
    np.testing.assert_allclose(np.log(shares[-12:]), made["log_probs"], atol=1e-4)
    words = np.array([*content["words"], ""])[unpacked(content["tokens"])]
    assert words[:3].tolist() == ["w1", "w2", "w3"]
