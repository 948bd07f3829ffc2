from retrieval.compiled import compiled


def test_where_nothing_can_be_kept_functions_are_compiled_anew():
    """Such as one without a file."""
    names = {}
    exec("def twice(number): return 2 * number", names)
    assert compiled(names["twice"])(21) == 42
