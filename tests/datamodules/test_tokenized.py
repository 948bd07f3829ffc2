"""Raw text as ids of a Hugging Face tokenizer: to the byte, by documents, split by split."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the extra hf is not installed")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from small_huggingface import write_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from neighborlm.common.errors import InputError
from neighborlm.datamodules import documents
from neighborlm.datamodules.binarized import CorpusSettings
from neighborlm.datamodules.hf_tokenizer import HuggingFaceVocabulary
from neighborlm.datamodules.tokenized import TokenizedCorpus
from neighborlm.programs.corpora import CorpusDataModule

TEXTS = {
    "train": "the cat sat\r\n\n  on the mat , \t the end  \nä 日本 x\u00a0y\n" * 20,
    "valid": "\nthe mat sat on ä cat\n\n",
    "test": "日本 the end, no newline",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), list(TEXTS.values()))


@pytest.fixture
def open_corpus(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 64)  # several pieces of a document

    def make(folder: Path, **settings) -> TokenizedCorpus:
        cache = {"cache_dir": tmp_path / "cache", "tokenizer": str(tokenizer)}
        return TokenizedCorpus(CorpusSettings(str(folder), **{**cache, **settings}))

    return make


def write_texts(folder: Path, texts: dict[str, str] = TEXTS) -> Path:
    folder.mkdir()
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    return folder


def documents_of(corpus: TokenizedCorpus, split: str) -> list[str]:
    """Decoded, without the end token that each must have."""
    stream = corpus.stream(split)
    found = []
    for start, end in zip(stream.line_starts[:-1], stream.line_starts[1:], strict=True):
        assert stream.tokens[end - 1] == corpus.dictionary.eos
        assert corpus.dictionary.eos not in stream.tokens[start : end - 1]
        found.append(corpus.dictionary.decode(stream.tokens[start : end - 1].tolist()))
    return found


def test_text_comes_back_to_the_byte(open_corpus, tmp_path, capsys):
    corpus = open_corpus(write_texts(tmp_path / "raw"))
    for split, text in TEXTS.items():
        assert documents_of(corpus, split) == [text]
        assert corpus.text_size(split) == (len(text.split()), len(text.encode()))
    assert "warning" not in capsys.readouterr().out
    again = open_corpus(tmp_path / "raw")
    assert again.stream("train").tokens.tolist() == corpus.stream("train").tokens.tolist()
    assert capsys.readouterr().out == ""  # made once


def test_sizes_of_a_part_are_those_of_what_it_is_decoded_to(open_corpus, tmp_path):
    corpus = open_corpus(write_texts(tmp_path / "raw"))
    tokens = corpus.stream("valid").tokens
    whole, compared = TEXTS["valid"], 0
    for cut in range(len(tokens)):
        text = corpus.dictionary.decode(tokens[:cut].tolist())
        found = corpus.text_size("valid", np.arange(cut))
        if whole.startswith(text):  # not in the middle of a character
            assert found == (len(text.split()), len(text.encode()))
            compared += 1
        rest = corpus.text_size("valid", np.arange(cut, len(tokens)))
        assert found.bytes + rest.bytes == len(whole.encode())
        assert found.words + rest.words == len(whole.split())
    assert compared > 8


def records_in(folder: Path, kind: str, texts: dict[str, list[str]]) -> Path:
    names = {"train": "train", "valid": "validation", "test": "test"}
    columns = {names[split]: {"id": list(range(len(t))), "text": t} for split, t in texts.items()}
    if kind == "saved":
        tables = {name: datasets.Dataset.from_dict(table) for name, table in columns.items()}
        datasets.DatasetDict(tables).save_to_disk(folder)
        return folder
    folder.mkdir()
    for name, table in columns.items():
        if kind == "parquet":
            half = len(table["text"]) // 2
            for part, rows in enumerate((slice(0, half), slice(half, None))):
                shard = folder / f"{name}-0000{part}-of-00002.parquet"
                pq.write_table(pa.table({c: v[rows] for c, v in table.items()}), shard)
        else:
            lines = (json.dumps({"id": i, "text": t}) for i, t in enumerate(table["text"]))
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_records_are_documents(open_corpus, tmp_path, kind):
    texts = {split: [text, "the cat", "ä" * 3] for split, text in TEXTS.items()}
    folder = records_in(tmp_path / "records", kind, texts)
    corpus = open_corpus(folder)
    for split, expected in texts.items():
        assert documents_of(corpus, split) == expected
    with pytest.raises(InputError, match=r"--data.text_column body: .* has no such column of text"):
        open_corpus(folder, text_column="body").stream("test")


def test_a_line_separates_documents(open_corpus, tmp_path):
    text = "one\ntwo\n\n\nthree\n"
    folder = write_texts(tmp_path / "raw", dict.fromkeys(TEXTS, text))
    corpus = open_corpus(folder, separator="")
    assert documents_of(corpus, "test") == ["one\ntwo\n", "three\n"]


def test_documents_without_splits_are_dealt(open_corpus, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    texts = [f"the cat {i} sat\n" for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / "raw" / f"{i:02}.txt").write_text(text)
    corpus = open_corpus(tmp_path / "raw")
    found = {split: documents_of(corpus, split) for split in TEXTS}
    assert sorted(chain(*found.values())) == sorted(texts)
    assert [len(found[split]) for split in TEXTS] == [54, 3, 3]
    assert (
        "60 documents are dealt to splits at random: train 54, valid 3" in capsys.readouterr().out
    )


def test_one_file_without_splits_is_cut_at_ends_of_lines(open_corpus, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    text = "".join(f"the cat {i} sat\n" for i in range(100))
    (tmp_path / "raw" / "dump.txt").write_text(text)
    corpus = open_corpus(tmp_path / "raw")
    parts = [documents_of(corpus, split) for split in TEXTS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == text
    assert min(part[0].count("\n") for part in parts) >= 4
    assert "holds 1 document, too few to be dealt" in capsys.readouterr().out


def test_groups_of_lines_lose_what_does_not_fill_a_window(open_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("neighborlm.datamodules.tokenized.LINES_OF_A_GROUP", 3)
    folder = write_texts(tmp_path / "raw")
    corpus = open_corpus(folder, protocol="knn-transformers", window=8)
    lines = TEXTS["train"].split("\n")[:-1]
    expected, starts = [], [0]
    for first in range(0, len(lines), 3):
        group = [corpus.dictionary.encode(f"{line}\n") for line in lines[first : first + 3]]
        ids = list(chain(*group))
        expected += ids[: len(ids) // 8 * 8] if len(ids) >= 8 else ids
        starts.append(len(expected))
    stream = corpus.stream("train")
    assert stream.tokens.tolist() == expected
    assert stream.line_starts.tolist() == starts


def test_the_fingerprint_is_of_what_the_tokenizer_does(tokenizer, tmp_path):
    one = HuggingFaceVocabulary.load(str(tokenizer))
    assert HuggingFaceVocabulary.load(str(tokenizer)).fingerprint == one.fingerprint
    one.save(tmp_path / "dict.txt")
    assert HuggingFaceVocabulary.load(str(tmp_path / "tokenizer")).fingerprint == one.fingerprint
    other = write_tokenizer(tmp_path / "other", ["the cat sat on the mat"])
    assert HuggingFaceVocabulary.load(str(other)).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds nothing; expected train.txt"),
        ({"test.txt": "a"}, "has text for test, but none for train and valid"),
        ({"train.txt": "a", "test.txt": "a"}, "but none for valid"),
        ({"train.jsonl": '{"text": "a"}\n{"text'}, "cannot be read"),
        ({"train.txt": "a", "valid.txt": "", "test.txt": "a"}, "has no text in its valid split"),
    ],
)
def test_what_is_no_corpus_is_said(open_corpus, tmp_path, files, sentence):
    (tmp_path / "raw").mkdir()
    for name, text in files.items():
        (tmp_path / "raw" / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        open_corpus(tmp_path / "raw").stream("train")


def test_what_is_no_tokenizer_is_said(tmp_path):
    with pytest.raises(InputError, match="no such directory; expected one with a tokenizer"):
        HuggingFaceVocabulary.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="transformers cannot read a tokenizer there"):
        HuggingFaceVocabulary.load(str(tmp_path))


def test_rows_begin_with_the_token_that_the_tokenizer_puts_in_front(tokenizer, tmp_path):
    with_start = AutoTokenizer.from_pretrained(tokenizer, bos_token="<s>")
    start = with_start.bos_token_id
    in_front = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    with_start.backend_tokenizer.post_processor = in_front
    with_start.save_pretrained(tmp_path / "with_start")
    folder, cache = write_texts(tmp_path / "raw"), str(tmp_path / "cache")
    settings = {"tokens_per_sample": 8, "context_window": 4, "cache_dir": cache}
    for name, expected in (("with_start", start), (tokenizer, None)):
        data = CorpusDataModule(str(folder), tokenizer=str(tmp_path / name), **settings)
        assert data.window_start == expected
        stream = data.stream("valid").tokens
        (batch,) = data.evaluation_dataloader("valid", in_text_order=True)
        for tokens, positions in zip(batch.tokens, batch.positions, strict=True):
            inside = positions >= 0
            before = [stream[p - 1] if p else data.dictionary.eos for p in positions[inside]]
            first = before[0] if expected is None else expected
            assert tokens[inside].tolist() == [first, *before[1:]]
