"""A corpus folder from raw files: whole documents, dealt by a draw, and read as a corpus."""

from pathlib import Path

import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.datamodules.corpora import SPLITS, resolve_corpus
from neighborlm.tools.prepare import deal, main, prepare, shares_of


@pytest.fixture
def raw(tmp_path) -> Path:
    """Fifty files, two of them alike, one without words, and what is no text."""
    folder = tmp_path / "raw" / "deep"
    folder.mkdir(parents=True)
    for i in range(48):
        lines = [f"Document {i}, isn't it?", "", *[f"  a line of {i}. "] * (i % 7)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    (folder / "mark.txt").write_bytes("\ufeffWith a mark\r\nand returns".encode())
    (folder / "copy.txt").write_bytes((folder / "13.txt").read_bytes())
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "raw"


def texts(folder: Path) -> dict[str, str]:
    assert {p.name for p in folder.iterdir()} == {f"{split}.txt" for split in SPLITS}
    return {split: (folder / f"{split}.txt").read_text() for split in SPLITS}


def test_documents_stay_whole_and_are_dealt_once(raw, tmp_path, capsys):
    main([str(raw), "--output", str(tmp_path / "new" / "corpus"), "--split", "80,10,10"])
    written = texts(tmp_path / "new" / "corpus")
    files = {p.name: p for p in (raw / "deep").glob("*.txt")}
    del files["blank.txt"], files["copy.txt"]
    documents = [path.read_text("utf-8-sig").rstrip("\n") + "\n" for path in files.values()]
    for document in documents:
        assert sum(document in of_split for of_split in written.values()) == 1
    total = sum(map(len, written.values()))
    assert total == sum(map(len, documents))
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(written[split]) / total - share) < 0.05
    said = capsys.readouterr().out
    assert "1 copies of documents are left out" in said
    n_words = len(written["train"].split())
    assert f"{written['train'].count(chr(10))} lines, {n_words} words" in said
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["corpus"]
    assert resolve_corpus(str(tmp_path / "new" / "corpus"), tmp_path).name == "corpus"


def test_tokens_are_separated_where_that_is_wanted(raw, tmp_path):
    main([str(raw), "--output", str(tmp_path / "corpus"), "--tokenize"])
    lines = "".join(texts(tmp_path / "corpus").values()).splitlines()
    assert "Document 7 , isn't it ?" in lines
    assert "a line of 8 ." in lines
    assert "" not in lines
    assert "With a mark" in lines


def test_the_draw_is_its_seed_s(raw, tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare([raw], tmp_path / name, seed=seed)
        made.append(texts(tmp_path / name))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("separator", ["<|endoftext|>", ""])
def test_one_file_of_many_documents(tmp_path, separator):
    documents = [f"first of {i}\nsecond of {i}\n" for i in range(20)]
    (tmp_path / "dump.txt").write_text(f"{separator}\n".join(documents))
    main([str(tmp_path / "dump.txt"), "--output", str(tmp_path / "c"), "--separator", separator])
    written = texts(tmp_path / "c")
    assert sorted(document for document in documents) == sorted(
        f"{first}\n{second}\n"
        for text in written.values()
        for first, second in np.array(text.splitlines()).reshape(-1, 2)
    )


@pytest.mark.parametrize("sizes", [[1, 1, 1], [1000, 1, 1], [1, 1, 1000], [5] * 7])
@pytest.mark.parametrize("seed", range(5))
def test_no_split_stays_empty(sizes, seed):
    splits = deal(np.array(sizes), shares_of("90,5,5"), seed)
    assert set(splits.tolist()) == {0, 1, 2}


def test_shares_are_of_the_text_and_not_of_the_documents():
    sizes = np.random.default_rng(0).integers(1, 1000, 5000)
    splits = deal(sizes, shares_of("2,1,1"), seed=3)
    shares = np.bincount(splits, weights=sizes) / sizes.sum()
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=1e-3)


def refusal(*args: object) -> str:
    with pytest.raises(InputError) as error:
        prepare(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "split", ["90,10", "90,5,5,0", "a,b,c", "90,10,0", "-1,1,1", "inf,1,1", ""]
)
def test_shares_that_are_none(raw, tmp_path, split):
    message = refusal([raw], tmp_path / "c", False, split)
    assert message == f"--split is {split}; expected three numbers above 0, such as 90,5,5"


def test_what_cannot_be_read_or_written(raw, tmp_path):
    assert "nowhere: no such file" in refusal([tmp_path / "nowhere"], tmp_path / "c")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no *.txt file" in refusal([tmp_path / "empty"], tmp_path / "c")
    assert "--separator LINE" in refusal([raw / "deep" / "1.txt"], tmp_path / "c")
    assert f"--output {raw}: is there already" in refusal([raw], raw)
    assert "1.txt is no folder" in refusal([raw], raw / "deep" / "1.txt" / "c")
    (raw / "deep" / "odd.txt").write_bytes(b"caf\xe9")
    assert "odd.txt: is not UTF-8" in refusal([raw], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob("*.making*"))
