"""A corpus as token ids: the files it is made from, when it is made again, how damage is detected,
and what is reported."""

import hashlib
import json
import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small import write_corpus

from neighborlm.common.contracts import Corpus
from neighborlm.common.errors import InputError
from neighborlm.common.files import Lock
from neighborlm.datamodules import binarize as binarize_module
from neighborlm.datamodules import binarized
from neighborlm.datamodules.binarized import BinarizedCorpus, CorpusSettings
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.dictionary import EOS, UNK, Dictionary

ARRAYS = {"tokens.npy", "line_starts.npy"}


@pytest.fixture
def own(tmp_path) -> Callable[..., BinarizedCorpus]:
    """Opens a corpus that a test may change, as another process would."""
    write_corpus(tmp_path / "words")
    return lambda folder="words", **settings: BinarizedCorpus(
        CorpusSettings(str(tmp_path / folder), cache_dir=tmp_path / "cache", **settings)
    )


def naive_stream(corpus: BinarizedCorpus, split: str) -> list[int]:
    """The ids of a split, from its text, word by word."""
    symbols = corpus.dictionary.symbols
    ids = []
    for line in corpus.files.split(split).read_text("utf-8-sig").splitlines():
        ids += [symbols.index(w) if w in symbols else UNK for w in line.split()]
        ids.append(EOS)
    return ids


def check_streams(corpus: BinarizedCorpus) -> None:
    for split in SPLITS:
        assert list(corpus.stream(split).tokens) == naive_stream(corpus, split)


def refuse(*args, **kwargs):
    raise AssertionError("must not be called")


def refusal(corpus: Corpus, split: str = "train") -> str:
    """The message with which a corpus is refused, which must be one sentence."""
    with pytest.raises(InputError) as error:
        corpus.stream(split)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- making it ----------------------------------------------------------------------------------


def test_binarised_once(own, monkeypatch):
    folder = own().folder
    assert {p.name for p in folder.iterdir()} == {
        *("dict.txt", "dict.txt.json", "meta.json"),
        *SPLITS,
    }
    assert {p.name for p in (folder / "train").iterdir()} == ARRAYS
    monkeypatch.setattr(binarized, "binarize", refuse)
    assert own("words/").folder == folder
    check_streams(own())


@pytest.mark.parametrize("change", ["train", "valid", "test", "level", "threshold", "dictionary"])
def test_what_changes_the_ids_gets_a_folder_of_its_own(own, tmp_path, change):
    before = own()
    kept = before.folder, before.fingerprint("test")
    settings = {}
    if change in SPLITS:
        with open(tmp_path / "words" / f"{change}.txt", "a") as file:
            file.write("w1\n")
    elif change == "dictionary":
        Dictionary(["w3", "w1"], [2, 1]).save(tmp_path / "dict.txt")
        settings = {"dictionary": str(tmp_path / "dict.txt")}
    else:
        settings = {"level": "char"} if change == "level" else {"threshold": 25}
    after = own(**settings)
    assert after.folder != kept[0]
    assert after.folder.name.startswith("words-")
    assert before.fingerprint("test") == kept[1]
    if change != "level":
        check_streams(after)
    if change in ("valid", "test"):
        assert (after.fingerprint("test") == kept[1]) == (change == "valid")


def test_a_corpus_of_an_older_version_is_used(own, tmp_path, monkeypatch):
    """Its name and fingerprints are the same as then; its meta.json holds nothing else."""
    digest = hashlib.blake2b(json.dumps([1, "word", 0]).encode(), digest_size=8)
    for split in SPLITS:
        text = (tmp_path / "words" / f"{split}.txt").read_bytes()
        digest.update(hashlib.blake2b(text).digest())
    corpus = own()
    assert corpus.folder.name == f"words-{digest.hexdigest()}"
    fingerprints = {}
    for split in SPLITS:
        ids = hashlib.blake2b(digest_size=8)
        ids.update(np.array(naive_stream(corpus, split), dtype="<i8").tobytes())
        ids.update(corpus.stream(split).line_starts.tobytes())
        fingerprints[split] = ids.hexdigest()
    (corpus.folder / "meta.json").write_text(json.dumps({"fingerprints": fingerprints}))
    (corpus.folder / "dict.txt.json").unlink()
    monkeypatch.setattr(binarized, "binarize", refuse)
    check_streams(own())
    assert own().fingerprint("valid") == fingerprints["valid"]


@pytest.mark.parametrize("moment", ["count_symbols", "binarize", "statistics_of"])
def test_a_killed_binarisation_is_done_again(own, monkeypatch, tmp_path, moment):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(
            binarized, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL), raising=True
        )
        own().folder  # noqa: B018
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((tmp_path / "cache").glob("*.making-*"))) == 1
    check_streams(own())
    assert not list((tmp_path / "cache").glob("*.making-*"))


def test_a_folder_without_its_mark_is_made_again(own):
    folder = own().folder
    os.remove(folder / "meta.json")
    shutil.rmtree(folder / "test")
    check_streams(own())


def test_a_complete_cache_is_used_where_nothing_can_be_written(own, monkeypatch):
    folder = own().folder
    Path(f"{folder}.lock").unlink()
    monkeypatch.setattr(Lock, "acquire", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    check_streams(own())


def test_a_given_dictionary_is_used_as_it_is(own, tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("w7 1\nnowhere 5\nw2 3\n")
    corpus = own(dictionary=str(path), threshold=4)
    assert (corpus.folder / "dict.txt").read_bytes() == path.read_bytes()
    assert len(corpus.dictionary) == 7
    stream = corpus.stream("train").tokens
    assert stream.dtype == np.uint8
    words = corpus.files.train.read_text().replace("\n", " </s> ").split()
    assert stream.tolist() == [{"w7": 4, "w2": 6, "</s>": EOS}.get(w, UNK) for w in words]


@pytest.mark.parametrize("name", ["missing.txt", "words/train.txt", "words"])
def test_a_dictionary_that_is_none(own, tmp_path, name):
    assert str(tmp_path / name) in refusal(own(dictionary=str(tmp_path / name)))
    assert not (tmp_path / "cache").exists()


def test_the_dictionary_of_a_run_at_another_level_is_refused(own, tmp_path):
    """Without the right --data.level every word would be <unk>."""
    path = tmp_path / "dict.txt"
    own(level="char").dictionary.save(path)
    assert "expected --data.level char" in refusal(own(dictionary=str(path)))
    path.with_name("dict.txt.json").unlink()  # as older runs left it
    assert "expected --data.level char" in refusal(own(dictionary=str(path)))
    own().dictionary.save(path)
    assert "expected --data.level word" in refusal(own(dictionary=str(path), level="byte"))


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_a_byte_order_mark_is_no_text(own, tmp_path, level):
    before = own(level=level)
    kept = {split: before.stream(split).tokens.tolist() for split in SPLITS}
    for split in SPLITS:
        path = tmp_path / "words" / f"{split}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    after = own(level=level)
    for split in SPLITS:
        tokens = after.stream(split).tokens
        if level == "byte":  # which are what they are
            assert len(tokens) == after.files.split(split).stat().st_size
        else:
            assert tokens.tolist() == kept[split]
    if level != "byte":
        assert after.dictionary.fingerprint == before.dictionary.fingerprint
        # A cache of a version that took the mark for text is not used for this one.
        digest = hashlib.blake2b(json.dumps([1, level, 0]).encode(), digest_size=8)
        for split in SPLITS:
            digest.update(hashlib.blake2b(after.files.split(split).read_bytes()).digest())
        assert digest.hexdigest() not in after.folder.name


def test_texts_are_the_same_corpus_under_other_names(own, tmp_path):
    expected = own().folder.name.removeprefix("words-")
    for pattern, valid in (("{}.txt", "val"), ("wiki.{}.raw", "valid")):
        folder = tmp_path / f"other-{valid}"
        folder.mkdir()
        for split in SPLITS:
            name = pattern.format(valid if split == "valid" else split)
            shutil.copy(tmp_path / "words" / f"{split}.txt", folder / name)
        corpus = own(folder.name)
        assert corpus.folder.name == f"{folder.name}-{expected}"
        check_streams(corpus)


def test_a_folder_with_some_of_the_splits(own, tmp_path):
    """Serves whatever needs no others; the dictionary is that of the training text or given."""
    dictionary, whole = tmp_path / "dict.txt", own()
    whole.dictionary.save(dictionary)
    tokens = {split: whole.stream(split).tokens.tolist() for split in SPLITS}
    (tmp_path / "words" / "valid.txt").unlink()
    (tmp_path / "words" / "test.txt").rename(tmp_path / "words" / "kept.txt")
    assert own().stream("train").tokens.tolist() == tokens["train"]
    sentence = refusal(own(), "valid")
    assert f"--data.corpus {tmp_path / 'words'}: has no valid split" in sentence
    (tmp_path / "words" / "kept.txt").rename(tmp_path / "words" / "test.txt")
    (tmp_path / "words" / "train.txt").unlink()
    assert "has no train split, of whose symbols the dictionary is made" in refusal(own(), "test")
    given = own(dictionary=str(dictionary))
    assert given.stream("test").tokens.tolist() == tokens["test"]


@pytest.fixture
def token_files(tmp_path) -> dict[str, np.ndarray]:
    """What nanoGPT prepares, with a pickle that would write a file if it were opened."""
    rng = np.random.default_rng(0)
    (tmp_path / "ids").mkdir()
    arrays = {
        "train": rng.zipf(1.5, 5000) % 65536,
        "val": np.append(rng.integers(0, 9, 700), 65535),
    }
    for split, ids in arrays.items():
        ids.astype("<u2").tofile(tmp_path / "ids" / f"{split}.bin")

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    (tmp_path / "ids" / "meta.pkl").write_bytes(pickle.dumps(Evil()))
    return arrays


@pytest.mark.parametrize("chunk_bytes", [151, 1 << 20])
def test_token_files_of_nanogpt(own, token_files, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(binarize_module, "CHUNK_BYTES", chunk_bytes)
    corpus = own("ids")
    counts = Counter(map(str, token_files["train"].tolist()))
    assert corpus.dictionary.symbols == Dictionary.from_counts(counts).symbols
    assert [corpus.has(split) for split in (*SPLITS, "val")] == [True, True, False, False]
    for split, name in (("train", "train"), ("valid", "val")):
        stream, ids = corpus.stream(split), token_files[name].tolist()
        assert stream.tokens.tolist() == [corpus.dictionary.ids.get(str(i), UNK) for i in ids]
        assert stream.line_starts.tolist() == [0, len(ids)]
        shown = corpus.dictionary.decode(stream.tokens[:99])
        assert shown.split() == [str(i) if str(i) in counts else "<unk>" for i in ids[:99]]
    assert "has no test split, which this command needs" in refusal(corpus, "test")
    assert "--split is val; expected one of train, valid" in refusal(corpus, "val")
    assert not (tmp_path / "opened").exists()


def test_token_files_with_a_dictionary_and_a_test_split(own, token_files, tmp_path):
    np.array([7, 9], "<u2").tofile(tmp_path / "ids" / "test.bin")
    (tmp_path / "dict.txt").write_text("9 1\n8 1\n7 1\n")
    corpus = own("ids", dictionary=str(tmp_path / "dict.txt"), level="char")  # of what is no text
    assert corpus.stream("test").tokens.tolist() == [6, 4]


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_token_files_that_are_none(own, token_files, tmp_path, content):
    (tmp_path / "ids" / "val.bin").write_bytes(content)
    message = refusal(own("ids"))
    assert message.startswith(f"{tmp_path / 'ids' / 'val.bin'} has {len(content)} bytes; expected")


# -- damage -------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:128] + bytes(len(data) - 128))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, zero, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["train/tokens.npy", "train/line_starts.npy"])
def test_damaged_arrays_are_refused(own, damage, name):
    folder = own().folder
    damage(folder / name)
    message = refusal(own())
    assert message.startswith(f"{folder / 'train'}: is damaged")
    assert f"remove {folder}" in message
    shutil.rmtree(folder)
    check_streams(own())


@pytest.mark.parametrize("damage", [flip, zero, cut, empty])
def test_a_damaged_mark_is_refused(own, damage):
    damage(own().folder / "meta.json")
    with pytest.raises(InputError, match=r"meta\.json: is damaged"):
        own().stream("train")


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("w1 ", "x1 "), lambda t: t.partition("\n")[2]]
)
def test_a_damaged_dictionary_is_refused(own, change):
    path = own().folder / "dict.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=r"dict\.txt: is damaged"):
        own().dictionary  # noqa: B018


def test_a_copy_is_checked_and_used(own, tmp_path, monkeypatch):
    name = own().folder.name
    shutil.copytree(tmp_path / "cache", tmp_path / "other")
    copy = BinarizedCorpus(CorpusSettings(str(tmp_path / "words"), cache_dir=tmp_path / "other"))
    check_streams(copy)
    flip(tmp_path / "other" / name / "valid" / "tokens.npy")
    again = BinarizedCorpus(copy.settings)
    check = again.stream("train")
    assert len(check.tokens)
    assert "valid: is damaged" in refusal(again, "valid")


def test_damage_shows_whatever_the_time_of_a_file_says(own):
    corpus = own()
    path = corpus.folder / "train" / "tokens.npy"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    own().verify("valid")
    for use in (own().stream, own().verify):
        with pytest.raises(InputError, match="train: is damaged"):
            use("train")


def test_what_was_unlinked_under_an_open_corpus_changes_nothing(own):
    corpus = own()
    before = corpus.stream("train").tokens.tolist()
    shutil.rmtree(corpus.folder)
    own().folder  # noqa: B018
    assert corpus.stream("train").tokens.tolist() == before


# -- what is said -------------------------------------------------------------------------------


def test_the_first_use_says_what_the_corpus_is(own, capsys):
    corpus = own()
    streams = {split: corpus.stream(split) for split in SPLITS}
    said = capsys.readouterr().out.strip().splitlines()
    assert said[0] == f"corpus words: a vocabulary of {len(corpus.dictionary)} symbols"
    for line, (split, stream) in zip(said[1:], streams.items(), strict=True):
        n_lines = len(stream.line_starts) - 1
        assert line == (
            f"  {split}: {len(stream.tokens):,} tokens in {n_lines} lines, 0.0% of them <unk>"
        )
    own().stream("train")
    assert capsys.readouterr().out == ""
    recorded = own().meta["statistics"]["test"]
    assert recorded == {"tokens": len(streams["test"].tokens), "lines": 30, "unknown": 0}


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "prepare FILES --output FOLDER --tokenize"),
        ({"threshold": 3}, "a --data.threshold below 3"),
        ({"level": "char"}, "lacks these symbols"),
        ({"dictionary": "dict.txt"}, "dict.txt was made from another text"),
    ],
)
@pytest.mark.parametrize("unknown", [10, 11])
def test_much_that_is_unknown_is_warned_of(
    own, tmp_path, capsys, monkeypatch, settings, advice, unknown
):
    monkeypatch.chdir(tmp_path)
    words = ["w0"] * (99 - unknown) + ["ξ"] * unknown
    if settings.get("level") == "char":
        text = "w" * (99 - unknown) + "ξ" * unknown + "\n"
    else:
        text = " ".join(words) + "\n"
    (tmp_path / "words" / "valid.txt").write_text(text)
    (tmp_path / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(40)))
    own(**settings).stream("valid")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == (unknown > 10)
    for line in warnings:
        assert line.startswith("warning: 11.0% of the valid split is <unk>")
        assert advice in line
