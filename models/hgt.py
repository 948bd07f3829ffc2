"""The heterogeneous graph transformer of GNN-LM (Meng et al., ICLR 2022, section 2.3; Hu et al.,
WWW 2020), computed in two ways with equal results.

`HGT.forward` passes messages over any graph of tokens and neighbours. `HGT.fast` computes the same
from a `Neighborhood`, for the graphs of GNN-LM alone: each distinct neighbour once, causal
attention among tokens by torch's fused kernels, and attention from tokens to their gathered
neighbours.

With d = width / heads, node type t and relation e, per head:

    score(s -> t) = (Q_t h_t) . (K_s h_s A_e) pri_e / sqrt(d)        softmax over sources of one e
    m_t           = mean over e of  sum over s of softmax(score) (V_s h_s M_e)
    h_t'          = LayerNorm_t(h_t + O_t m_t)
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neighborlm.models.neighbor_states import NeighborStates

NODE_TYPES = ("token", "neighbor")
RELATIONS = ("intra", "inter")
GATHERED_AT_ONCE = 1 << 25
"""Most elements of gathered neighbour states that are held at a time: 128 MiB in fp32."""
QUERIES_AT_ONCE = 1 << 16
"""Elements of the queries that `ChainAttention` processes at a time on a CPU: 256 KiB in fp32."""

Nodes = Mapping[str, Tensor]
Edges = Mapping[tuple[str, str, str], Tensor]


def attention_over_edges(
    q: Tensor, k: Tensor, v: Tensor, edge_index: Tensor, dropout: float
) -> Tensor:
    """Messages `[N, heads, d]` over the edges of one type, added up.

    Args:
        q: `[N, heads, d]`, scaled.
        k: `[M, heads, d]`.
        v: `[M, heads, d]`.
        edge_index: int64 `[2, E]`, from the M sources to the N targets.
        dropout: on the attention weights.
    """
    # It takes seconds to load, and `HGT.fast`, by which all programs compute, does without it.
    from torch_geometric.utils import scatter, softmax

    source, target = edge_index
    weight = softmax((q[target] * k[source]).sum(-1), target, num_nodes=len(q))
    return scatter(F.dropout(weight, dropout)[..., None] * v[source], target, 0, len(q))


class ChainAttention(torch.autograd.Function):
    """Attention of each neighbour to the row on its left, itself and the row on its right.

    It processes a few rows at a time, so that gathered keys and values stay in the CPU's cache, and
    gathers them again in the backward pass instead of keeping them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, both: Tensor, chain: Tensor, kept: Tensor | None) -> Tensor:
        """Messages `[m, width]`.

        Args:
            q: `[m, heads, d]`, scaled.
            both: `[n, 2 width]`, keys and values.
            chain: int64 `[m, 3]`, rows of `both`, -1 where there is none.
            kept: `[m, 3, heads]`, factors by which dropout multiplies the weights.
        """
        message = q.new_empty(len(q), both.shape[1] // 2)
        weights = q.new_empty(len(q), 3, q.shape[1])
        for rows in _slices(q):
            k, v = _gathered(both, chain[rows], q.shape[1])
            scores = (q[rows, None] * k).sum(-1).masked_fill_(chain[rows, :, None] < 0, -torch.inf)
            weights[rows] = scores.softmax(dim=1)
            used = weights[rows] if kept is None else weights[rows] * kept[rows]
            message[rows] = (used[..., None] * v).sum(dim=1).flatten(1)
        ctx.save_for_backward(q, both, chain, kept, weights)
        return message

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to q and both."""
        q, both, chain, kept, weights = ctx.saved_tensors
        of_q, of_both = torch.empty_like(q), torch.zeros_like(both)
        for rows in _slices(q):
            k, v = _gathered(both, chain[rows], q.shape[1])
            of_message = gradient[rows].view(-1, 1, *q.shape[1:])
            weight = weights[rows]
            used = weight if kept is None else weight * kept[rows]
            of_weight = (of_message * v).sum(-1)
            if kept is not None:
                of_weight *= kept[rows]
            of_score = weight * (of_weight - (weight * of_weight).sum(1, keepdim=True))
            of_q[rows] = (of_score[..., None] * k).sum(dim=1)
            parts = torch.stack(
                [of_score[..., None] * q[rows, None], used[..., None] * of_message], 2
            )
            # A missing row has weight zero, so that what is added to row 0 in its stead is zero.
            of_both.index_add_(0, chain[rows].clamp(min=0).flatten(), parts.view(-1, both.shape[1]))
        return of_q, of_both, None, None


def _slices(q: Tensor) -> list[slice]:
    """Slices of the rows of q: all on an accelerator, on a CPU as many as fit into its cache."""
    step = len(q) if q.device.type != "cpu" else QUERIES_AT_ONCE // (q.shape[1] * q.shape[2])
    step = max(step, 1)
    return [slice(first, first + step) for first in range(0, len(q), step)]


def _gathered(both: Tensor, chain: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[m, 3, heads, d]` of the rows in chains int64 `[m, 3]`."""
    rows = both.index_select(0, chain.clamp(min=0).flatten())
    k, v = rows.view(len(chain), 3, 2, heads, -1).unbind(2)
    return k, v


class HGTLayer(nn.Module):
    """One layer, with parameters for each node type and each relation.

    Args:
        width: of the states.
        heads: of the attention.
        dropout: on the messages, after their output projection.
        attention_dropout: on attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        head_width = width // heads

        def per_type(make) -> nn.ModuleDict:
            return nn.ModuleDict({node_type: make() for node_type in NODE_TYPES})

        def per_relation(*shape: int) -> nn.ParameterDict:
            return nn.ParameterDict({e: nn.Parameter(torch.empty(shape)) for e in RELATIONS})

        # Keys need no bias: it would add the same to all scores of a softmax.
        self.key = per_type(lambda: nn.Linear(width, width, bias=False))
        self.query = per_type(lambda: nn.Linear(width, width))
        self.value = per_type(lambda: nn.Linear(width, width))
        self.output = per_type(lambda: nn.Linear(width, width))
        self.norm = per_type(lambda: nn.LayerNorm(width))
        self.prior = per_relation(heads)
        self.attention = per_relation(heads, head_width, head_width)
        self.message = per_relation(heads, head_width, head_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Priors: one; relation matrices: Xavier, drawn as one tensor for both relations."""
        for relation in RELATIONS:
            nn.init.ones_(self.prior[relation])
        for matrices in (self.attention, self.message):
            both = torch.empty(len(RELATIONS), *matrices["intra"].shape)
            nn.init.xavier_uniform_(both)
            for relation, matrix in zip(RELATIONS, both, strict=True):
                matrices[relation].data.copy_(matrix)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _scale(self, relation: str) -> Tensor:
        """The factor of the queries, `[heads, 1]`."""
        prior = self.prior[relation]
        return (prior / math.sqrt(self.attention[relation].shape[-1]))[:, None]

    def _queries(self, x: Tensor, node_type: str) -> Tensor:
        return self._split(self.query[node_type](x))

    def _update(self, x: Tensor, message: Tensor, node_type: str) -> Tensor:
        message = F.dropout(self.output[node_type](message), self.dropout, self.training)
        return self.norm[node_type](x + message)

    @property
    def _weight_dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    # -- any graph -------------------------------------------------------------------------------

    def forward(self, x: Nodes, edges: Edges) -> dict[str, Tensor]:
        """From the states `[N, width]` of each node type to those after this layer."""
        messages: dict[str, list[Tensor]] = {node_type: [] for node_type in x}
        for (source, relation, target), edge_index in edges.items():
            q = self._queries(x[target], target) * self._scale(relation)
            k = torch.einsum(
                "nhi,hij->nhj", self._split(self.key[source](x[source])), self.attention[relation]
            )
            v = torch.einsum(
                "nhi,hij->nhj", self._split(self.value[source](x[source])), self.message[relation]
            )
            message = attention_over_edges(q, k, v, edge_index, self._weight_dropout)
            messages[target].append(message.flatten(1))
        return {
            node_type: self._update(states, torch.stack(messages[node_type]).mean(0), node_type)
            for node_type, states in x.items()
        }

    # -- the graph of GNN-LM ---------------------------------------------------------------------

    def update_neighbors(self, states: Tensor, chain: Tensor) -> Tensor:
        """One update of the neighbours along their chains.

        The relation's matrices are multiplied into the projections once, not into every state.

        Args:
            states: `[n, width]`.
            chain: int64 `[m, 3]`, rows of `states`: left, self and right, -1 where there is none.

        Returns:
            `[m, width]`.
        """
        own = F.embedding(chain[:, 1], states)
        q = self._queries(own, "neighbor") * self._scale("intra")
        key, value = self.key["neighbor"], self.value["neighbor"]
        weight = torch.cat(
            [
                self._folded(key.weight, self.attention["intra"]),
                self._folded(value.weight, self.message["intra"]),
            ]
        )
        bias = self._folded(value.bias[:, None], self.message["intra"])[:, 0]
        both = F.linear(states, weight, F.pad(bias, (len(bias), 0)))
        kept = None
        if self._weight_dropout:
            kept = F.dropout(q.new_ones(len(chain), 3, self.heads), self._weight_dropout)
        message = ChainAttention.apply(q, both, chain, kept)
        return self._update(own, message, "neighbor")

    @staticmethod
    def _folded(weight: Tensor, relation: Tensor) -> Tensor:
        """A projection `[width, c]` and the matrices `[heads, d, d]` of a relation that follows, as
        one projection `[width, c]`."""
        per_head = weight.unflatten(0, (relation.shape[0], -1))
        return (relation.transpose(1, 2) @ per_head).flatten(0, 1)

    def update_tokens(
        self, x: Tensor, centres: Tensor, neighbors: Tensor, intra_context: int | None
    ) -> Tensor:
        """One update of the tokens.

        Args:
            x: `[B, T, width]`; padding on the right.
            centres: `[C, width]`, states of the distinct neighbours.
            neighbors: int64 `[B, T, k]`, rows of `centres`, -1 where missing.
            intra_context: see `datamodules.graphs.hetero_graph`.

        Returns:
            `[B, T, width]`.
        """
        q = self._queries(x, "token")
        message = self._from_neighbors(q, centres, neighbors)
        if intra_context != 0:
            message = (message + self._from_tokens(x, q, intra_context)) / 2
        return self._update(x, message, "token")

    def _from_tokens(self, x: Tensor, q: Tensor, intra_context: int | None) -> Tensor:
        """Causal attention among tokens."""
        q = (q * self._scale("intra")).transpose(1, 2)
        k = self._split(self.key["token"](x)).transpose(1, 2) @ self.attention["intra"]
        v = self._split(self.value["token"](x)).transpose(1, 2) @ self.message["intra"]
        mask = None
        if intra_context is not None:
            here = torch.arange(x.shape[1], device=x.device)
            back = here[:, None] - here
            mask = (back >= 0) & (back < intra_context)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self._weight_dropout, is_causal=mask is None, scale=1.0
        )
        return out.transpose(1, 2).flatten(2)

    def _from_neighbors(self, q: Tensor, centres: Tensor, neighbors: Tensor) -> Tensor:
        """Attention of each token to its own neighbours.

        Keys and values of neighbours are never computed: scores are (q A^T K) . h, and messages are
        V (sum of weights times h). So only tokens are projected, and only states are gathered.
        """
        batch, length, heads, _ = q.shape
        if len(centres) == 0:
            return q.new_zeros(batch, length, centres.shape[1])
        key = self.key["neighbor"].weight.unflatten(0, (heads, -1))
        q = torch.einsum("bthj,hij->bthi", q * self._scale("inter"), self.attention["inter"])
        absorbed = torch.einsum("bthi,hid->bthd", q, key).flatten(0, 1)
        flat = neighbors.flatten(0, 1)
        at_once = max(GATHERED_AT_ONCE // (flat.shape[1] * centres.shape[1]), 1)
        parts = list(zip(absorbed.split(at_once), flat.split(at_once), strict=True))
        if len(parts) == 1:
            gathered, total = self._gather(absorbed, flat, centres)
        else:  # states are gathered again in the backward pass instead of being kept
            done = [checkpoint(self._gather, *p, centres, use_reentrant=False) for p in parts]
            gathered, total = (torch.cat(column) for column in zip(*done, strict=True))
        value = self.value["neighbor"]
        message = torch.einsum(
            "nhd,hid->nhi", gathered, value.weight.unflatten(0, (heads, -1))
        ) + total[..., None] * self._split(value.bias)
        message = torch.einsum("nhi,hij->nhj", message, self.message["inter"])
        return message.flatten(1).view(batch, length, -1)

    def _gather(self, q: Tensor, neighbors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of the states of each token's neighbours.

        Args:
            q: `[n, heads, width]`.
            neighbors: int64 `[n, k]`, rows of `centres`, -1 where missing.
            centres: `[C, width]`.

        Returns:
            The sums `[n, heads, width]`, and the sum of the weights `[n, heads]`, 0 for a token
            without neighbours.
        """
        states = F.embedding(neighbors.clamp(min=0), centres)
        missing = (neighbors < 0)[:, None]
        scores = (q @ states.transpose(1, 2)).masked_fill(missing, -torch.inf)
        weights = scores.softmax(dim=-1).masked_fill(missing, 0.0)
        weights = F.dropout(weights, self._weight_dropout)
        return weights @ states, weights.sum(-1)


class HGT(nn.Module):
    """The stack of layers between the LM's features and its softmax.

    Args:
        input_width: of the features and of the output.
        width: of the states; where it is not `input_width`, features and output are projected.
        layers: number of layers.
        heads: attention heads per layer.
        dropout: see `HGTLayer`.
        attention_dropout: see `HGTLayer`.
    """

    def __init__(
        self,
        input_width: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HGTLayer(width, heads, dropout, attention_dropout) for _ in range(layers)
        )
        self.adapt = self.out = None
        if width != input_width:
            self.adapt = nn.ModuleDict({t: nn.Linear(input_width, width) for t in NODE_TYPES})
            self.out = nn.Linear(width, input_width)

    def freeze_unused(self, intra_context: int | None) -> None:
        """Excludes the parameters that `fast` does not use from training."""
        last = self.layers[-1]
        unused = [last.query["neighbor"], last.output["neighbor"], last.norm["neighbor"]]
        if intra_context == 0:
            for layer in self.layers:
                unused += [layer.key["token"], layer.value["token"]]
            for parameters in (last.prior, last.attention, last.message):
                parameters["intra"].requires_grad_(False)
        for module in unused:
            module.requires_grad_(False)

    @torch.no_grad()
    def begin_as_identity(self, features: Tensor) -> None:
        """Initialises the network near the identity on tokens: messages are zero, and the last
        layer norm undoes its normalisation as well as a scale and a shift per column can (least
        squares). Does nothing where the states are not as wide as the features.

        Args:
            features: fp32 `[n, input_width]`, of a sample of tokens.
        """
        if self.out is not None:
            return
        for layer in self.layers:
            nn.init.zeros_(layer.output["token"].weight)
            nn.init.zeros_(layer.output["token"].bias)
        norm = self.layers[-1].norm["token"]
        normed = F.layer_norm(features, features.shape[1:], eps=norm.eps)
        centred = normed - normed.mean(0)
        scale = (centred * (features - features.mean(0))).mean(0) / centred.square().mean(0)
        norm.weight.copy_(scale)
        norm.bias.copy_(features.mean(0) - scale * normed.mean(0))

    def _adapted(self, features: Tensor, node_type: str) -> Tensor:
        return features if self.adapt is None else F.gelu(self.adapt[node_type](features))

    def forward(self, x: Nodes, edges: Edges) -> list[dict[str, Tensor]]:
        """Message passing.

        Args:
            x: features `[N, input_width]` of `token` and `neighbor` nodes.
            edges: int64 `[2, E]` by (source, relation, target), as `HeteroData.edge_index_dict`.

        Returns:
            By node type: the adapted features, the states after each layer, and the last states
            projected to `[N, input_width]`.
        """
        states = [{t: self._adapted(features, t) for t, features in x.items()}]
        for layer in self.layers:
            states.append(layer(states[-1], edges))
        if self.out is not None:
            states.append({t: self.out(last) for t, last in states[-1].items()})
        else:
            states.append(states[-1])
        return states

    def fast(
        self,
        tokens: Tensor,
        features: Tensor | Callable[[Tensor | slice], Tensor],
        neighborhood,
        intra_context: int | None = None,
        computed: NeighborStates | None = None,
    ) -> Tensor:
        """The output of `forward` for the tokens, on the graph of a `Neighborhood`.

        Args:
            tokens: features `[B, T, input_width]`; padding on the right.
            features: `[n_0, input_width]`, decoded features of the neighbourhood's rows, or a
                function that decodes some of them, given their numbers int64 `[n]` or a slice.
            neighborhood: a `datamodules.graphs.Neighborhood` made for this number of layers.
            intra_context: see `datamodules.graphs.hetero_graph`.
            computed: a cache of states of neighbours, to read and to fill; without gradients only.

        Returns:
            `[B, T, input_width]`.
        """
        tokens = self._adapted(tokens, "token")
        if not callable(features):
            features = features.__getitem__
        states = (
            self._states(features, neighborhood)
            if computed is None
            else self._missing_states(features, neighborhood, computed)
        )
        for layer, numbers, of_rows in zip(self.layers, neighborhood.centres, states, strict=False):
            centres = F.embedding(numbers, of_rows)
            tokens = layer.update_tokens(tokens, centres, neighborhood.neighbors, intra_context)
        return tokens if self.out is None else self.out(tokens)

    def _states(
        self, features: Callable[[Tensor | slice], Tensor], neighborhood
    ) -> Iterator[Tensor]:
        """States of neighbours after 0, 1, … updates, `[n_s, width]`."""
        states = self._adapted(features(slice(None)), "neighbor")
        yield states
        for layer, chain in zip(self.layers[:-1], neighborhood.chains, strict=False):
            states = layer.update_neighbors(states, chain)
            yield states

    def _missing_states(
        self, features: Callable[[Tensor | slice], Tensor], neighborhood, computed: NeighborStates
    ) -> Iterator[Tensor]:
        """As `_states`, but computes only states that are not cached; those that neither a centre
        nor a state to compute needs are left undefined."""
        levels = range(len(self.layers) - 1, 0, -1)
        sizes = [len(neighborhood.rows), *map(len, neighborhood.chains)]
        needed = _marked(neighborhood.centres[len(levels)], sizes[len(levels)])
        plan = []
        for level in levels:  # from the last update to the first
            numbers = needed.nonzero()[:, 0]
            identities = neighborhood.identities[level - 1][numbers]
            found, slots = computed.find(level, identities)
            missing = numbers[~found], identities[~found]
            below = _marked(neighborhood.chains[level - 1][missing[0]], sizes[level - 1])
            plan.append((numbers[found], slots[found], *missing, below))
            needed = below | _marked(neighborhood.centres[level - 1], sizes[level - 1])
        numbers = needed.nonzero()[:, 0]
        new_states = self._adapted(features(numbers), "neighbor")
        states = new_states.new_empty(sizes[0], new_states.shape[1])
        states[numbers] = new_states
        yield states
        for level, layer in zip(reversed(levels), self.layers, strict=False):
            old, slots, new, identities, below = plan.pop()
            chain = neighborhood.chains[level - 1][new]
            among_below = (below.cumsum(0) - 1)[chain.clamp(min=0)].where(chain >= 0, -1)
            new_states = layer.update_neighbors(states[below], among_below)
            states = new_states.new_empty(sizes[level], new_states.shape[1])
            states[new] = new_states
            if len(old):
                states[old] = computed.get(level, slots)
            computed.put(level, identities, new_states)
            yield states


def _marked(numbers: Tensor, size: int) -> Tensor:
    """bool `[size]`, True at the given indices, of which negative ones are ignored."""
    marks = numbers.new_zeros(size, dtype=torch.bool)
    marks[numbers[numbers >= 0]] = True
    return marks
