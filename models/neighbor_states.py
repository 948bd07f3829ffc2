"""`NeighborStates`: states of neighbours that earlier batches have computed, kept for later ones.

A neighbour's states depend on the datastore and the weights alone, and in evaluation the same
neighbours come again: those of the context that a row shares with the row before it, and those of
words that are frequent.
"""

import torch
from torch import Tensor

ODD = 0x9E3779B97F4A7C1  # spreads identities over the slots


class NeighborStates:
    """A table of bounded size, in which the last state that came to a slot stays.

    Weights must not change while it is used.

    Args:
        levels: how often neighbours are updated.
        store: which feature store they are of, see `datamodules.graphs.Neighborhood`.
        max_bytes: what all states together may take.
    """

    def __init__(self, levels: int, store: int = 0, max_bytes: int = 512 << 20) -> None:
        self.levels = levels
        self.store = store
        self.max_bytes = max_bytes
        self.owners: list[Tensor] = []
        self.states: list[Tensor] = []

    def find(self, level: int, identities: Tensor) -> tuple[Tensor, Tensor]:
        """Which states of a level, from 1, are there: bool `[n]`, and in which slots, int64 `[n]`.

        Args:
            identities: int64 `[n]`, see `datamodules.graphs.Neighborhood`.
        """
        if not self.owners:
            return torch.zeros_like(identities, dtype=torch.bool), identities
        owners = self.owners[level - 1]
        slots = (identities * ODD >> 16) % len(owners)
        return owners[slots] == identities, slots

    def get(self, level: int, slots: Tensor) -> Tensor:
        """States `[n, width]` that were found in slots."""
        return self.states[level - 1][slots]

    def put(self, level: int, identities: Tensor, states: Tensor) -> None:
        """Adds states `[n, width]`, in place of others that have their slots."""
        if len(states) == 0:
            return
        if not self.owners:
            slots = max(self.max_bytes // (self.levels * states[0].nbytes), 1)
            self.owners = [identities.new_full((slots,), -1) for _ in range(self.levels)]
            self.states = [states.new_empty(slots, states.shape[1]) for _ in range(self.levels)]
        _, slots = self.find(level, identities)
        owners = self.owners[level - 1]
        owners[slots] = identities
        last = owners[slots] == identities  # of several with one slot, one stays
        self.states[level - 1][slots[last]] = states[last]
