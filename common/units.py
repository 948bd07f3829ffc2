"""Amounts in units that people read."""


def size_of(n_bytes: float) -> str:
    """A number of bytes in the unit that leaves one to three digits before the point.

    >>> size_of(211_000_000_000), size_of(999_600), size_of(15_300), size_of(128)
    ('211 GB', '1 MB', '15.3 kB', '128 bytes')
    """
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    amount, units = n_bytes / 1000, list("TGMk")
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop()
    return f"{amount:.3g} {units[-1]}B"
