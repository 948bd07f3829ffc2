"""Ranks that work on one datastore together.

This room's doors are `distributed.open_distributed`, for a search that all ranks make together;
`exchange.Exchange`, for rows that lie on other hosts; and `rank_watch`, by which the ranks notice
that one of them is lost.
"""
