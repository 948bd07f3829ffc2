"""The dictionary's order, which follows from the counts, and its file, which is fairseq's."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from neighborlm.common.contracts import Vocabulary
from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarize import TokenStream, binarize
from neighborlm.datamodules.dictionary import BOS, EOS, PAD, UNK, Dictionary

ORIGINAL = Path(__file__).parents[2] / ".." / "shared" / "parity" / "knnlm"


def test_order_threshold_and_padding():
    counts = Counter({"b": 3, "B": 3, "é": 3, "c": 5, "two": 2, "once": 1, "<unk>": 9, "</s>": 4})
    dictionary = Dictionary.from_counts(counts, threshold=2)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    padding = [f"madeupword{i:04d}" for i in range(7)]
    assert dictionary.symbols == [*special, "c", "B", "b", "é", "two", *padding]
    assert dictionary.counts == [0, 0, 0, 0, 5, 3, 3, 3, 2, *[0] * 7]
    assert [dictionary.ids[symbol] for symbol in special] == [BOS, PAD, EOS, UNK] == [0, 1, 2, 3]
    assert all(dictionary.ids[symbol] == i for i, symbol in enumerate(dictionary.symbols))
    assert len(dictionary) == 16


@pytest.mark.parametrize("words", range(3, 13))
def test_padded_to_a_multiple_of_eight(words):
    counts = Counter({f"w{i}": 1 for i in range(words)})
    dictionary = Dictionary.from_counts(counts)
    assert len(dictionary) == (8 if words <= 4 else 16)
    assert len(Dictionary.from_counts(counts, padding_factor=1)) == words + 4


def test_padding_takes_no_name_that_a_word_has(tmp_path):
    dictionary = Dictionary.from_counts(Counter({"madeupword0001": 2, "a": 1}))
    assert dictionary.symbols[4:] == ["madeupword0001", "a", "madeupword0000", "madeupword0002"]
    dictionary.save(tmp_path / "dict.txt")
    assert Dictionary.load(tmp_path / "dict.txt").symbols == dictionary.symbols


def test_file_is_one_line_a_symbol_without_the_special_ones(tmp_path):
    path = tmp_path / "dict.txt"
    # A line separator, a next line and a carriage return are symbols where tokens are characters.
    Dictionary(["the", "▁", "\u2028", "\x85", "\r", "a\xa0b"], [7, 6, 5, 4, 3, 0]).save(path)
    assert path.read_bytes() == "the 7\n▁ 6\n\u2028 5\n\x85 4\n\r 3\na\xa0b 0\n".encode()
    again = Dictionary.load(path)
    assert again.symbols[4:] == ["the", "▁", "\u2028", "\x85", "\r", "a\xa0b"]
    assert again.counts == [0, 0, 0, 0, 7, 6, 5, 4, 3, 0]


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="the original's outputs are not beside it")
def test_the_originals_dictionary_from_its_text_and_back(tmp_path):
    written = (ORIGINAL / "dict.txt").read_bytes()
    counts = Counter((ORIGINAL / "text" / "wiki.train.tokens").read_text("utf-8").split())
    lines = written.decode().splitlines()
    threshold = int(lines[-20].split()[1])
    Dictionary.from_counts(counts, threshold).save(tmp_path / "counted.txt")
    assert (tmp_path / "counted.txt").read_bytes() == written
    Dictionary.load(ORIGINAL / "dict.txt").save(tmp_path / "loaded.txt")
    assert (tmp_path / "loaded.txt").read_bytes() == written


@pytest.mark.parametrize("content", [b"a 2\r\nb 1\r\n", b"a 2\nb 1"])
def test_line_ends_of_other_systems(tmp_path, content):
    (tmp_path / "dict.txt").write_bytes(content)
    dictionary = Dictionary.load(tmp_path / "dict.txt")
    assert (dictionary.symbols[4:], dictionary.counts[4:]) == (["a", "b"], [2, 1])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a 2\nb 1\na 1\n", "line 3: 'a' is listed twice"),
        (b"a 2\n<unk> 1\n", "line 2: '<unk>' is listed twice"),
        (b"a 2\nb\n", "line 2: found 'b', expected 'symbol count'"),
        (b"a 2\n\nb 1\n", "line 2: found '', expected 'symbol count'"),
        (b"a many\n", "line 1: found 'a many', expected 'symbol count'"),
        (b"a 1.5\n", "line 1: found 'a 1.5', expected 'symbol count'"),
        (b"a 1 #fairseq:other\n", "line 1: found 'a 1 #fairseq:other', expected"),
        (b"a " + b"9" * 5000 + b"\n", "line 1: found 'a 999"),
        (b" 1\n", "line 1: found ' 1', expected 'symbol count'"),
        (b"", "line 1: found '', expected 'symbol count'"),
        (b"a 2\n\xff 1\n", "byte 4 is not UTF-8"),
    ],
)
def test_what_is_no_dictionary(tmp_path, content, sentence):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Dictionary.load(path)
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"dict\.txt: no such dictionary"):
        Dictionary.load(tmp_path / "dict.txt")
    with pytest.raises(InputError, match="is a folder; expected a dict"):
        Dictionary.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "symbols"),
    [
        ("\ufeffa 2\nb 1\n", ["a", "b"]),
        ("\ufeffa 2\r\nb 1\r\n", ["a", "b"]),
        ("\ufeff 2\nb 1\n", ["\ufeff", "b"]),  # of characters: the mark is one of them
        ("a 2\n\ufeff 1\n", ["a", "\ufeff"]),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_symbol(tmp_path, content, symbols):
    (tmp_path / "dict.txt").write_text(content)
    assert Dictionary.load(tmp_path / "dict.txt").symbols[4:] == symbols


def test_counts_below_zero_and_symbols_that_come_again_with_leave(tmp_path):
    """As in dictionaries of fairseq's pretrained models, the last id of a symbol encodes it."""
    content = "a -1\n<unk> 3 #fairseq:overwrite\nb 2\na 1 #fairseq:overwrite\n"
    (tmp_path / "dict.txt").write_text(content)
    dictionary = Dictionary.load(tmp_path / "dict.txt")
    assert dictionary.symbols[4:] == ["a", "<unk>", "b", "a"]
    assert dictionary.counts[4:] == [-1, 3, 2, 1]
    assert dictionary.encode("a <unk> b other") == [7, 5, 6, UNK]
    dictionary.save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_text() == content


# -- text and ids -------------------------------------------------------------------------------

TEXT = "the cat\n\nsat on a naïve 猫\n"


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_a_vocabulary_encodes_as_the_binarisation_does_and_decodes_to_the_text(tmp_path, level):
    shown = TEXT if level != "byte" else TEXT.encode().decode("latin-1")
    symbols = TEXT.split() if level == "word" else sorted({*shown.replace(" ", "▁")} - {"\n"})
    dictionary: Vocabulary = Dictionary(symbols, [1] * len(symbols), level)
    assert (dictionary.pad, dictionary.eos) == (PAD, EOS)
    ids = dictionary.encode(TEXT)
    assert UNK not in ids
    assert dictionary.decode(ids) == TEXT
    (tmp_path / "text.txt").write_text(TEXT)
    binarize(tmp_path / "text.txt", dictionary, tmp_path, workers=1)
    np.testing.assert_array_equal(TokenStream.open(tmp_path).tokens, ids)
    # A text that does not end its line, such as a prompt, is not ended.
    assert dictionary.encode(TEXT.rstrip()) == ids[:-1]
    assert dictionary.decode(ids[:-1]) == TEXT.rstrip()
    assert dictionary.encode("") == []
    assert dictionary.encode("Ω")[-1] == UNK
    assert dictionary.decode([]) == ""


def test_what_is_unknown_is_shown_as_such():
    assert Dictionary(["a"], [1]).decode([4, UNK, EOS, EOS, 4]) == "a <unk>\n\na"
    assert Dictionary(["a"], [1], "char").decode([4, UNK, 4]) == "a<unk>a"
    assert Dictionary(["a"], [1], "byte").decode([4, UNK, 4]) == "a<unk>a"
    lone = Dictionary(["Ã", "©"], [1, 1], "byte")
    assert lone.decode([4, 5]) == "é"
    assert lone.decode([4]) == "\ufffd"  # not a whole character


# -- levels -------------------------------------------------------------------------------------

WORDS, CHARACTERS, BYTES = ["the", "a"], ["▁", "a", "猫"], ["▁", "a", "Ã"]


@pytest.mark.parametrize("recorded", ["word", "char", "byte"])
@pytest.mark.parametrize("wanted", ["word", "char", "byte"])
def test_a_dictionary_of_another_level_is_refused(tmp_path, recorded, wanted):
    """A recorded level counts, whatever the symbols look like."""
    path = tmp_path / "dict.txt"
    Dictionary(["a", "b"], [2, 1], recorded).save(path)
    assert Dictionary.load(path).level == recorded
    if wanted == recorded:
        assert Dictionary.load(path, wanted).level == wanted
        return
    with pytest.raises(InputError) as error:
        Dictionary.load(path, wanted)
    assert str(path) in str(error.value)
    assert f"but --data.level is {wanted}; expected --data.level {recorded}" in str(error.value)


@pytest.mark.parametrize(
    ("symbols", "wanted", "shown"),
    [
        *((WORDS, "word", "word"), (WORDS, "char", "word"), (WORDS, "byte", "word")),
        *((CHARACTERS, "word", "char"), (CHARACTERS, "char", "char"), (CHARACTERS, "byte", "char")),
        *((BYTES, "word", "char"), (BYTES, "byte", "byte"), (BYTES, "char", "char")),
        (["A", "C", "madeupword0000"], "word", "word"),  # words of one letter
        (["▁", "C", "madeupword0000"], "char", "char"),
        (["▁", "▁the"], "word", "word"),  # pieces of words
    ],
)
def test_a_level_that_is_not_recorded_shows_in_the_symbols(tmp_path, symbols, wanted, shown):
    path = tmp_path / "dict.txt"
    path.write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    if wanted == shown:
        assert Dictionary.load(path, wanted).level == wanted
        return
    with pytest.raises(
        InputError, match=f"--data.level is {wanted}; expected --data.level {shown}"
    ):
        Dictionary.load(path, wanted)


def test_a_record_of_another_dictionary_is_none(tmp_path):
    path = tmp_path / "dict.txt"
    Dictionary(["a", "b"], [2, 1], "char").save(path)
    path.write_text("the 2\ncat 1\n")
    assert Dictionary.load(path, "word").level == "word"


def test_fingerprint_tells_symbols_and_order_apart_but_not_counts():
    one = Dictionary(["a", "b"], [2, 1])
    assert one.fingerprint == Dictionary(["a", "b"], [9, 9]).fingerprint
    assert one.fingerprint != Dictionary(["b", "a"], [2, 1]).fingerprint
    assert one.fingerprint != Dictionary(["a", "b", "c"], [2, 1, 1]).fingerprint
