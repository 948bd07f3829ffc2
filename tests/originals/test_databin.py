"""The data-bin against files that fairseq itself wrote, and the errors for bad ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from neighborlm.common.contracts import Corpus
from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarize import TokenStream, binarize
from neighborlm.datamodules.binarized import CorpusSettings, fingerprint_of_tokens
from neighborlm.datamodules.dictionary import Dictionary
from neighborlm.originals.databin import (
    HEADER,
    MAGIC,
    DataBin,
    check_ids,
    is_databin,
    open_databin,
    write_databin,
)

ORIGINAL = Path(__file__).parents[2] / ".." / "shared" / "parity" / "knnlm"
needs_original = pytest.mark.skipif(
    not ORIGINAL.is_dir(), reason="the original's outputs are not beside the checkout"
)
INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


@pytest.fixture
def stream():
    """Four lines, the third of them without tokens."""
    return TokenStream(np.array([5, 9, 2, 2, 77, 2], np.uint8), np.array([0, 3, 4, 4, 6]))


@pytest.fixture
def written(stream, tmp_path):
    """The split `train` of a data-bin."""
    prefix = tmp_path / "train"
    write_databin(stream, prefix, vocab_size=80)
    return prefix


@needs_original
@pytest.mark.parametrize("split", ["valid", "valid1", "test1"])
def test_same_ids_as_fairseqs_own_binarisation(split, tmp_path):
    dictionary = Dictionary.load(ORIGINAL / "data-bin" / "dict.txt")
    binarize(ORIGINAL / "text" / f"wiki.{split}.tokens", dictionary, tmp_path, workers=1)
    ours, theirs = TokenStream.open(tmp_path), open_databin(ORIGINAL / "data-bin" / split)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.line_starts, theirs.line_starts)


@needs_original
@pytest.mark.parametrize("split", ["train", "valid", "test", "valid1", "test1"])
def test_written_files_are_fairseqs_byte_for_byte(split, tmp_path):
    folder = ORIGINAL / "data-bin"
    vocab_size = len(Dictionary.load(folder / "dict.txt"))
    write_databin(open_databin(folder / split), tmp_path / split, vocab_size)
    for ending in ("bin", "idx"):
        name = f"{split}.{ending}"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@needs_original
def test_the_originals_folder_is_a_databin_and_its_ids_are_in_its_dictionary():
    folder = ORIGINAL / "data-bin"
    assert is_databin(folder)
    assert not is_databin(ORIGINAL / "text")
    check_ids(open_databin(folder / "train"), len(Dictionary.load(folder / "dict.txt")), "train")


@pytest.mark.parametrize("dtype", INTEGERS)
def test_round_trip(stream, tmp_path, dtype):
    write_databin(stream, tmp_path / "new" / "wiki.en", vocab_size=80, dtype=dtype)
    again = open_databin(tmp_path / "new" / "wiki.en")
    assert again.tokens.dtype == dtype
    assert isinstance(again.tokens, np.memmap)
    assert again.line_starts.dtype == np.int64
    np.testing.assert_array_equal(again.tokens, stream.tokens)
    np.testing.assert_array_equal(again.line_starts, stream.line_starts)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["wiki.en.bin", "wiki.en.idx"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_the_type_is_the_one_that_fairseq_takes(stream, tmp_path, vocab_size, dtype):
    write_databin(stream, tmp_path / "train", vocab_size)
    assert open_databin(tmp_path / "train").tokens.dtype == dtype


def corpus(folder: Path, **settings) -> DataBin:
    """The data-bin as a corpus."""
    return DataBin(CorpusSettings(str(folder), **settings))


@pytest.fixture
def symbols() -> Dictionary:
    """A dictionary of the data-bin's size."""
    return Dictionary([f"w{i}" for i in range(76)], [1] * 76)


def test_what_a_databin_is(written, symbols, tmp_path):
    assert is_databin(written.parent)
    assert is_databin(str(written.parent))
    Path(f"{written}.bin").unlink()
    assert not is_databin(written.parent)  # some other .idx
    symbols.save(written.parent / "dict.txt")
    assert is_databin(written.parent)
    assert not is_databin(tmp_path / "nowhere")


def test_a_databin_is_a_corpus(written, stream, symbols):
    symbols.save(written.parent / "dict.txt")
    write_databin(
        TokenStream(stream.tokens[:3], stream.line_starts[:2]), written.parent / "odd", 80
    )
    found: Corpus = corpus(written.parent)
    assert found.name == written.parent.name
    assert found.dictionary.symbols == symbols.symbols
    assert [found.has(split) for split in ("train", "odd", "valid")] == [True, True, False]
    np.testing.assert_array_equal(found.stream("train").tokens, stream.tokens)
    assert found.fingerprint("train") == fingerprint_of_tokens(stream) != found.fingerprint("odd")
    with pytest.raises(InputError, match=r"valid\.idx: no such file"):
        found.stream("valid")


def test_a_databin_without_a_dictionary_needs_one(written, stream, symbols, tmp_path):
    with pytest.raises(InputError, match=r"without dict\.txt; pass .* as --data\.dictionary"):
        corpus(written.parent).stream("train")
    symbols.save(tmp_path / "other.txt")
    found = corpus(written.parent, dictionary=str(tmp_path / "other.txt"))
    np.testing.assert_array_equal(found.stream("train").tokens, stream.tokens)
    Dictionary(["a"], [1]).save(tmp_path / "small.txt")
    with pytest.raises(InputError, match=r"train\.bin: has token id 9; expected 0 to 4|id 77"):
        corpus(written.parent, dictionary=str(tmp_path / "small.txt")).stream("train")


def test_a_databin_has_its_own_dictionary(written, symbols, tmp_path):
    symbols.save(written.parent / "dict.txt")
    symbols.save(tmp_path / "same.txt")
    assert len(corpus(written.parent, dictionary=str(tmp_path / "same.txt")).dictionary) == 80
    Dictionary(["a"], [1]).save(tmp_path / "other.txt")
    with pytest.raises(InputError, match=r"other\.txt is another one than that of the data-bin"):
        corpus(written.parent, dictionary=str(tmp_path / "other.txt")).stream("train")


def test_large_ids_of_newer_versions(tmp_path):
    """fairseq 0.10 writes uint32 from 65,500 words on."""
    large = TokenStream(np.array([4, 70_000, 2], np.uint32), np.array([0, 3]))
    write_databin(large, tmp_path / "train", 70_001, "uint32")
    assert Path(f"{tmp_path}/train.idx").read_bytes()[17] == 9
    assert open_databin(tmp_path / "train").tokens.tolist() == [4, 70_000, 2]
    with pytest.raises(InputError, match="has token id 70000; expected 0 to 69999"):
        check_ids(open_databin(tmp_path / "train"), 70_000, "train")


def change(path, offset, new):
    """Overwrites bytes of a file."""
    data = bytearray(path.read_bytes())
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def test_files_that_are_missing(tmp_path, written):
    with pytest.raises(InputError, match=r"valid\.idx: no such file; expected a split"):
        open_databin(tmp_path / "valid")
    Path(f"{written}.bin").unlink()
    with pytest.raises(InputError, match=r"train\.bin: no such file"):
        open_databin(written)


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"NPYnpynpy", r"train\.idx: begins with b'NPYnpynpy'; expected b'MMIDIDX"),
        (0, b"TNTIDX\0\0\1", r"train\.idx: is of fairseq's format TNTIDX; expected MMIDIDX"),
        (9, b"\2", r"train\.idx: is of version 2; expected 1"),
        (17, b"\6", r"train\.idx: has type code 6, floating-point numbers; expected one of"),
        (17, b"\7", r"train\.idx: has type code 7, floating-point numbers; expected one of"),
        (17, b"\x0b", r"train\.idx: has type code 11, an unknown type; expected one of"),
        (18, b"\5", r"train\.idx: has 74 bytes; expected 86 for 5 lines"),
        (26, b"\4", r"train\.idx: its pointers do not agree with its line lengths"),
        (26, b"\xff\xff\xff\xff", r"train\.idx: its pointers do not agree with its line lengths"),
        (17, b"\4", r"train\.idx: its pointers do not agree with its line lengths"),
    ],
)
def test_an_index_that_is_wrong(written, offset, new, message):
    change(Path(f"{written}.idx"), offset, new)
    with pytest.raises(InputError, match=message):
        open_databin(written)


def test_an_index_that_is_cut_off(written):
    index = Path(f"{written}.idx")
    data = index.read_bytes()
    index.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"has 73 bytes; expected 74 for 4 lines"):
        open_databin(written)
    index.write_bytes(data[:20])
    with pytest.raises(InputError, match=r"has 20 bytes; expected a header of 26"):
        open_databin(written)
    index.write_bytes(b"")
    with pytest.raises(InputError, match=r"begins with b''; expected b'MMIDIDX"):
        open_databin(written)


def test_data_that_is_cut_off(written):
    data = Path(f"{written}.bin")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=r"train\.bin: has 11 bytes; expected 12, for the 6 tokens of type uint16"
    ):
        open_databin(written)


def test_a_split_without_tokens(tmp_path):
    (tmp_path / "train.bin").touch()
    (tmp_path / "train.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 0))
    with pytest.raises(InputError, match=r"train\.bin: has no tokens"):
        open_databin(tmp_path / "train")


def test_ids_beyond_the_dictionary(stream, written):
    check_ids(stream, 78, "train")
    with pytest.raises(InputError, match=r"train: has token id 77; expected 0 to 76, the ids of"):
        check_ids(stream, 77, "train")
    shutil.copy(f"{written}.bin", f"{written}-signed.bin")
    shutil.copy(f"{written}.idx", f"{written}-signed.idx")
    change(Path(f"{written}-signed.idx"), 17, b"\3")
    change(Path(f"{written}-signed.bin"), 0, b"\xff\xff")
    with pytest.raises(InputError, match=r"train: has token id -1; expected 0 to 79"):
        check_ids(open_databin(f"{written}-signed"), 80, "train")


def test_types_that_cannot_be_written(stream, tmp_path):
    with pytest.raises(InputError, match=r"found type float32; expected one of uint8, int8"):
        write_databin(stream, tmp_path / "train", 80, dtype="float32")
    with pytest.raises(InputError, match=r"found type int8; expected one that holds 200 ids"):
        write_databin(stream, tmp_path / "train", 200, dtype="int8")
    with pytest.raises(InputError, match=r"train: has token id 77; expected 0 to 76"):
        write_databin(stream, tmp_path / "train", 77)
    assert list(tmp_path.iterdir()) == []
