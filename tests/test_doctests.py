"""The examples in docstrings give what they say."""

import doctest
from importlib import import_module

import pytest
from small import ROOT

EXAMPLES = [
    ".".join(("neighborlm", *path.relative_to(ROOT).with_suffix("").parts))
    for room in sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"})
    for path in sorted((ROOT / room).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    failed, tried = doctest.testmod(import_module(module.removesuffix(".__init__")))
    assert tried > 0
    assert failed == 0
