"""Factory strings with numbers that faiss cannot work with: each of these ends the process, hangs
or takes all memory where it is given to faiss."""

import faiss
import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.retrieval.neighbors.codec import check_codec
from neighborlm.retrieval.search.factory import check_factory, warn_of_lists
from neighborlm.retrieval.search.index import check_index, make_index


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("IVF0,SQ8", "1 to 2147483647 in the place of the 0 in IVF0"),
        ("IVF99999999999,SQ8", "in IVF99999999999"),
        ("IVF8_HNSW1,Flat", "2 to 1024 in the place of the 1 in HNSW1"),
        ("HNSW100000,Flat", "in HNSW100000"),
        ("NSG4,Flat", "16 to 1024 in the place of the 4 in NSG4"),
        ("RR0,IVF8,SQ8", "in RR0"),
        ("RR9999999,IVF8,SQ8", "1 to 65536"),
        ("PCA0,IVF8,SQ8", "in PCA0"),
        ("PCAR17,IVF8,SQ8", "1 to 16 in the place of the 17 in PCAR17"),
        ("IVF8,RQ0x0", "in RQ0"),
        ("IVF8,PQ4x0", "1 to 16 in the place of the 0 in x0"),
        ("IVF8,PQ4x25", "in x25"),
        ("IMI2x40,PQ4", "in x40"),
        ("IVF8,SQ0", "4, 6 or 8 in the place of the 0 in SQ0"),
        ("HNSW8_SQ0", "in SQ0"),
        ("PQ4x4fs_0", "in _0"),
        ("IVF8,PQ4+0", "in 0"),
    ],
)
def test_numbers_that_faiss_must_not_see(factory, expected):
    with pytest.raises(InputError, match=r"--knn\.index ") as refused:
        check_index(factory, 16, "l2")
    assert expected.replace("_0", "0") in str(refused.value)
    with pytest.raises(InputError, match="codec "):
        check_codec(factory, 16)


@pytest.mark.parametrize(
    "factory",
    [
        *("IVF64,SQ8", "IVF64_HNSW32,SQfp16", "OPQ4_8,IVF64,PQ4", "RR32,IVF64,RaBitQfs"),
        *(
            "PCAWR8,IVF64,PQ4x4fs",
            "IMI2x4,PQ4",
            "IVF64,SQbf16",
            "HNSW32,Flat",
            "LSH16",
            "Pad32,Flat",
        ),
        *("IVF64(IVF4,Flat),Flat", "IVF64,PQ4+4", "IVF64,PQ8x12", "IVF64,Flat,Refine(SQ8)"),
    ],
)
def test_numbers_that_faiss_takes(factory):
    check_factory(factory, 16)


def test_more_lists_than_keys():
    check_index("IVF1000,SQ8", 16, "l2", 1000)
    with pytest.raises(InputError, match=r"IVF1001,SQ8 has 1,001 lists but .* only 1,000 keys"):
        check_index("IVF1001,SQ8", 16, "l2", 1000)
    with pytest.raises(InputError, match="has 4,096 lists"):
        check_index("IMI2x6,PQ4", 16, "l2", 1000)


@pytest.mark.parametrize("factory", ["IVF40,Flat", "PQ4x4", "RQ2x6"])
def test_faiss_does_not_say_it_too(capfd, factory):
    """In its own words, on stderr, for each part that it trains; what it trains is the same."""
    keys = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    index, loud = make_index(16, factory, "l2"), faiss.index_factory(16, factory)
    index.train(keys)
    assert capfd.readouterr().err == ""
    loud.train(keys)
    assert "WARNING" in capfd.readouterr().err
    for one in (index, loud):
        one.add(keys)
    np.testing.assert_array_equal(index.search(keys[:9], 5)[1], loud.search(keys[:9], 5)[1])


def test_few_keys_a_list_are_said(capsys):
    warn_of_lists("IVF100,SQ8", 100, 1000)
    assert capsys.readouterr().err == ""
    warn_of_lists("IVF100000,SQ8", 100_000, 101_252)
    assert "100,000 lists for 101,252 keys leave 1.0 to a list" in capsys.readouterr().err
