"""The scores of all candidates at once, from tables of partial logits.

Pruning for every candidate anew would cost one matrix product each. But candidates that share a
sensitivity overlap. Rank the K·L weights by their sensitivity: a candidate that prunes the lowest
and the highest percentages keeps the ranks between two cuts, [low, high). Choose a middle rank that
lies above every low cut and at or below every high cut, so that each candidate keeps a low part
[low, middle) and a high part [middle, high). Divide the neurons in the same way. The logits of a
candidate are then the sum of four partial products, plus the bias:

    f(wl, wh, nl, nh) = [wl, nl] + [wl, nh] + [wh, nl] + [wh, nh] + b,

where [wl, nl] is the product over the weights that are in the low part wl and belong to neurons in
the low part nl. There are few such products, since each depends on one cut of the weights and one
of the neurons; growing the parts outwards from the middle makes each from the one before. They are
like the four corners of a summed-area table (Crow, SIGGRAPH 1984), but nothing is subtracted.

The energy needs Σ exp(f) over the classes. The exponential of a sum is a product, so

    Σ_i exp(f_i) = Σ_i exp([wl, nl]_i + [wh, nl]_i + b_i) · exp([wl, nh]_i + [wh, nh]_i):

one small matrix product over the classes gives the energies of all cuts of the neurons, and
exponentials are taken only once for each partial product.

Example: 10 classes, 256 features and the default grid give 4 × 4 pairs of cuts of the weights and
4 × 5 of the neurons, 320 masks, from (4 + 4) × (4 + 5) = 72 partial products.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor, nn

from opnp.metrics.separation import fpr95_auroc
from opnp.pruning.candidates import Candidate, Trial
from opnp.pruning.energy import bias_of
from opnp.pruning.masks import Percentages, pruned_count
from opnp.pruning.sensitivity import Sensitivity
from opnp.pruning.settings import NeuronSensitivity

MEMORY = 2**30  # bytes
BLOCK = 2**21  # numbers in the table of a block of samples; larger tables exceed the caches
TINY = 1e-30  # a sum of exponentials below this may have lost digits to rounding in float32


@dataclass(frozen=True)
class Judge:
    """Measures candidates on in-distribution (ID) samples and sets of outliers.

    Attributes:
        weight: head weight W, shape (K, L).
        bias: head bias b, shape (K,).
        samples: features of the ID samples, then of each outlier set, shape (N, L), not clipped.
        inside: number of ID samples.
        sizes: number of samples of each outlier set, by its name.
        labels: classes of the ID samples, shape (inside,), if they are known.
        memory: approximate bytes that blocks and scores may take.
    """

    weight: Tensor
    bias: Tensor
    samples: Tensor
    inside: int
    sizes: dict[str, int]
    labels: Tensor | None
    memory: int

    @classmethod
    def of(
        cls,
        head: nn.Linear,
        id_features: Tensor,
        outliers: Mapping[str, Tensor],
        labels: Tensor | None = None,
        memory: int = MEMORY,
    ) -> "Judge":
        """A judge for a head, with features of ID samples (N, L) and of each outlier set."""
        return cls(
            head.weight.detach(),
            bias_of(head),
            torch.cat([id_features, *outliers.values()]),
            len(id_features),
            {name: len(features) for name, features in outliers.items()},
            labels,
            memory,
        )

    def trials(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> Iterator[Trial]:
        """The trial of each candidate, in the order in which tables give them.

        Args:
            measured: the sensitivities, one for each clip and temperature of the candidates.
            candidates: what to measure, in any order.
        """
        for group, scores, hits, pruned in self.scored(measured, candidates):
            fpr95, auroc = fpr95_auroc(
                scores[:, : self.inside], scores[:, self.inside :], list(self.sizes.values())
            )
            for row, candidate in enumerate(group):
                yield Trial(
                    candidate,
                    dict(zip(self.sizes, fpr95[row].tolist(), strict=True)),
                    dict(zip(self.sizes, auroc[row].tolist(), strict=True)),
                    float("nan") if self.labels is None else 100 * int(hits[row]) / self.inside,
                    float(pruned[row]),
                )

    def scores(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> dict[Candidate, Tensor]:
        """The outlier scores of all samples, shape (N,), for each of a few candidates."""
        found = {
            candidate: row
            for group, scores, _, _ in self.scored(measured, candidates)
            for candidate, row in zip(group, scores, strict=True)
        }
        return {candidate: found[candidate] for candidate in candidates}

    def scored(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> Iterator[tuple[list[Candidate], Tensor, Tensor, Tensor]]:
        """Groups of G candidates: outlier scores (G, N), ID hits (G,), pruned shares (G,).

        Candidates with the same sensitivity and the same definition for neurons share a table.
        """
        order = {(s.clip, s.temperature): place for place, s in enumerate(measured)}
        kinds = list(dict.fromkeys(candidate.neuron_sensitivity for candidate in candidates))

        def table(candidate: Candidate) -> tuple[int, int]:
            setting = order[candidate.clip, candidate.temperature]
            return setting, kinds.index(candidate.neuron_sensitivity)

        for (setting, kind), sharing in groupby(sorted(candidates, key=table), table):
            yield from self.of_table(measured[setting], kinds[kind], list(sharing))

    def of_table(
        self, sensitivity: Sensitivity, kind: NeuronSensitivity, candidates: list[Candidate]
    ) -> Iterator[tuple[list[Candidate], Tensor, Tensor, Tensor]]:
        """As `scored`, for candidates that share a table; in parts that fit in the memory."""
        neurons = Cuts.of([candidate.neurons for candidate in candidates], self.weight.shape[1])
        row_bytes = len(neurons.kept) * len(self.samples) * self.samples.element_size()
        step = max(1, self.memory // 2 // row_bytes)  # half for scores, half for blocks
        pairs = list(dict.fromkeys(candidate.weights for candidate in candidates))
        for start in range(0, len(pairs), step):
            part = pairs[start : start + step]
            scores, hits, pruned = self.table(sensitivity, kind, part, neurons)
            found = [candidate for candidate in candidates if candidate.weights in part]
            cells = [
                part.index(candidate.weights) * len(neurons.kept) + neurons.cell(candidate.neurons)
                for candidate in found
            ]
            yield found, scores.flatten(0, 1)[cells], hits.flatten()[cells], pruned.flatten()[cells]

    def table(
        self,
        sensitivity: Sensitivity,
        kind: NeuronSensitivity,
        weights: list[Percentages],
        n: "Cuts",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What every pair of cuts of the weights and every pair of cuts of the neurons give.

        Args:
            sensitivity: decides which weights and neurons are cut first.
            kind: the definition of the neuron sensitivity.
            weights: W pairs of percentages of the weights.
            n: the cuts of the neurons; its C cells are the pairs of a low and a high cut.

        Returns:
            Outlier scores (W, C, N), ID hits (W, C) and the share of weights pruned (W, C).
        """
        device, dtype = self.samples.device, self.samples.dtype
        k, width = self.weight.shape
        w, t = Cuts.of(weights, k * width), sensitivity.temperature
        # Neurons in ascending order of their sensitivity: all columns below are in this order.
        ascending = torch.argsort(sensitivity.neurons(kind), stable=True).to(device)
        # The rank of each weight by its sensitivity, (K, L).
        rank = torch.empty(k * width, dtype=torch.int64)
        rank[torch.argsort(sensitivity.weights.flatten(), stable=True)] = torch.arange(k * width)
        rank = rank.reshape(k, width).to(device)[:, ascending]
        head, bias = (part.to(device, dtype) / t for part in (self.weight, self.bias))
        head = head[:, ascending]
        kept = [(rank >= low) & (rank < high) for low, high in w.intervals]
        # The head with the weights of each part of the weights alone, stacked: (parts · K, L).
        heads = torch.cat([head * part for part in kept])
        # Every candidate has one low part of the weights and one of the neurons: where these meet,
        # the bias is added.
        biases = torch.zeros(len(w.intervals), k, device=device, dtype=dtype)
        biases[: len(w.low)] = bias
        # The share pruned: count the weights that stay in the first 0, 1, … L neurons.
        columns = torch.stack([part.sum(dim=0) for part in kept]).cumsum(dim=1)
        columns = nn.functional.pad(columns, (1, 0))
        bounds = torch.tensor(n.kept, device=device)
        pruned = torch.stack(
            [
                1 - (columns[low] + columns[high])[bounds].diff().squeeze(1).double() / (k * width)
                for low, high in map(w.parts, weights)
            ]
        )

        lows, corners = len(n.low), (len(w.intervals), len(n.intervals))
        block = min(BLOCK, self.memory // 4 // self.samples.element_size()) // (k * prod(corners))
        block = max(64, block)
        # Blocks of samples hold either ID samples or outliers, since only the former have labels.
        starts = [*range(0, self.inside, block), *range(self.inside, len(self.samples), block)]
        scores = self.samples.new_empty(len(weights), len(n.kept), len(self.samples))
        hits = torch.zeros(len(weights), len(n.kept), device=device, dtype=torch.int64)
        # For each part of the weights, sample and part of the neurons: the greatest partial logit,
        # and the exponentials of all K partial logits relative to it.
        tops = self.samples.new_empty(corners[0], block, corners[1])
        powers = self.samples.new_empty(corners[0], block, corners[1], k)
        votes: Iterator[Tensor]
        for start, stop in zip(starts, [*starts[1:], len(self.samples)], strict=True):
            h = self.samples[start:stop].index_select(1, ascending)
            if sensitivity.clip is not None:
                h = h.clamp(max=sensitivity.clip)
            power, top = powers[:, : len(h)], tops[:, : len(h)]
            # Parts of the neurons grow outwards from the middle, to the low and to the high side.
            for side, outermost in ((n.outwards[:lows], biases), (n.outwards[lows:], 0 * biases)):
                partial_logits = outermost.flatten()
                for place, (a, b) in side:
                    partial_logits = torch.addmm(partial_logits, h[:, a:b], heads[:, a:b].T)
                    corner = partial_logits.view(len(h), -1, k)
                    greatest = corner.amax(dim=2, keepdim=True)
                    top[:, :, place] = greatest.squeeze(2).T
                    power[:, :, place] = (corner - greatest).exp_().transpose(0, 1)
            for row, (low, high) in enumerate(map(w.parts, weights)):
                terms = power[low] * power[high]  # (B, parts of the neurons, K)
                shift = top[low] + top[high]
                # Σ over the classes, for each low with each high part of the neurons.
                sums = terms[:, :lows] @ terms[:, lows:].transpose(1, 2)
                if sums.min() > TINY:
                    energy = sums.log_().add_(shift[:, :lows, None]).add_(shift[:, None, lows:])
                    pairs = product(range(lows), range(lows, corners[1]))
                    votes = (terms[:, a] * terms[:, b] for a, b in pairs)
                else:  # rare: exponentials underflowed, so take one product for each cell instead
                    pruned_head = head * (kept[low] | kept[high])
                    cells = [h[:, a:b] @ pruned_head[:, a:b].T + bias for a, b in n.kept]
                    energy = torch.stack([cell.logsumexp(dim=1) for cell in cells], dim=1)
                    votes = iter(cells)
                scores[row, :, start:stop] = energy.mul_(-t).flatten(1).T
                if self.labels is not None and start < self.inside:
                    labels = self.labels[start:stop].to(device)
                    for cell, vote in enumerate(votes):
                        hits[row, cell] += (vote.argmax(dim=1) == labels).sum()
        return scores, hits, pruned


@dataclass(frozen=True)
class Cuts:
    """Where candidates cut an order of n weights or neurons, ascending by sensitivity.

    A candidate keeps the ranks [low, high). Every low cut must lie at or below every high cut, as
    it does in valid settings.

    Attributes:
        n: length of the order.
        low: ranks where what is kept begins, ascending.
        high: ranks where what is kept ends, ascending; the first is the middle.

    >>> cuts = Cuts.of([(0, 0), (10, 0), (10, 20)], 100)
    >>> cuts.low, cuts.high
    ([0, 10], [80, 100])
    >>> cuts.intervals
    [(0, 80), (10, 80), (80, 80), (80, 100)]
    >>> cuts.kept
    [(0, 80), (0, 100), (10, 80), (10, 100)]
    """

    n: int
    low: list[int]
    high: list[int]

    @classmethod
    def of(cls, percentages: Sequence[Percentages], n: int) -> "Cuts":
        """The cuts that pairs of (low, high) percentages make in an order of length n."""
        return cls(
            n,
            sorted({pruned_count(n, low) for low, _ in percentages}),
            sorted({n - pruned_count(n, high) for _, high in percentages}),
        )

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """All low parts [low, middle), then all high parts [middle, high)."""
        middle = self.high[0]
        return [(a, middle) for a in self.low] + [(middle, b) for b in self.high]

    @property
    def outwards(self) -> list[tuple[int, tuple[int, int]]]:
        """The low parts, then the high parts, each side from the middle outwards.

        Each is its place among the `intervals`, and the ranks it adds to the part before it.
        """
        middle = self.high[0]
        lows = list(zip(self.low, [*self.low[1:], middle], strict=True))
        highs = list(zip([middle, *self.high[:-1]], self.high, strict=True))
        places = list(enumerate([*lows, *highs]))
        return places[: len(lows)][::-1] + places[len(lows) :]

    @property
    def kept(self) -> list[tuple[int, int]]:
        """The cells: the ranks [low, high) that each low cut keeps with each high cut."""
        return list(product(self.low, self.high))

    def parts(self, percentages: Percentages) -> tuple[int, int]:
        """The places, among the `intervals`, of the low and the high part that a pair keeps."""
        low, high = (pruned_count(self.n, percentage) for percentage in percentages)
        return self.low.index(low), len(self.low) + self.high.index(self.n - high)

    def cell(self, percentages: Percentages) -> int:
        """The place of a pair of percentages among the cells, see `kept`."""
        low, high = self.parts(percentages)
        return low * len(self.high) + high - len(self.low)
