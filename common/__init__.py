"""What all rooms know: contracts, errors, files, and what numpy and faiss must be told first.

Alone of the rooms it may also be imported under its bare name, as whoever loads numpy before
`neighborlm` may import `common.before_numpy` first of all.
"""
