"""`NeighborStates`: a cache of states of neighbours, computed by earlier batches for later ones.

A neighbour's states depend on the datastore and the weights alone, and in evaluation the same
neighbours recur: a row shares context with the row before it, and frequent words share neighbours.
"""

import torch
from torch import Tensor

MULTIPLIER = 0x9E3779B97F4A7C1  # odd; spreads identities over the slots


class NeighborStates:
    """A hash table of fixed size, in which a new state replaces the old one of its slot.

    The weights must not change while it is in use.

    Args:
        levels: number of updates of the neighbours, each of which has a table.
        store: number of the feature store, see `datamodules.graphs.Neighborhood`.
        max_bytes: most that all states together may take.
    """

    def __init__(self, levels: int, store: int = 0, max_bytes: int = 512 << 20) -> None:
        self.levels = levels
        self.store = store
        self.max_bytes = max_bytes
        self.owners: list[Tensor] = []
        self.states: list[Tensor] = []

    def find(self, level: int, identities: Tensor) -> tuple[Tensor, Tensor]:
        """Which states of a level (from 1) are cached, bool `[n]`, and their slots, int64 `[n]`.

        Args:
            identities: int64 `[n]`, see `datamodules.graphs.Neighborhood`.
        """
        if not self.owners:
            return torch.zeros_like(identities, dtype=torch.bool), identities
        owners = self.owners[level - 1]
        slots = (identities * MULTIPLIER >> 16) % len(owners)
        return owners[slots] == identities, slots

    def get(self, level: int, slots: Tensor) -> Tensor:
        """States `[n, width]` that were found in slots."""
        return self.states[level - 1][slots]

    def put(self, level: int, identities: Tensor, states: Tensor) -> None:
        """Adds states `[n, width]`, which replace others in their slots."""
        if len(states) == 0:
            return
        if not self.owners:
            slots = max(self.max_bytes // (self.levels * states[0].nbytes), 1)
            self.owners = [identities.new_full((slots,), -1) for _ in range(self.levels)]
            self.states = [states.new_empty(slots, states.shape[1]) for _ in range(self.levels)]
        _, slots = self.find(level, identities)
        owners = self.owners[level - 1]
        owners[slots] = identities
        kept = owners[slots] == identities  # one of those that share a slot
        self.states[level - 1][slots[kept]] = states[kept]
