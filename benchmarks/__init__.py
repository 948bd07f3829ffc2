import before_numpy  # noqa: F401
