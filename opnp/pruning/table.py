"""The search for the best mask, without real OOD data.

Every combination of percentages, neuron sensitivity, clip and temperature is judged by how well the
pruned head's energy separates in-distribution (ID) validation features from proxy outliers: by the
mean FPR95 over the outlier sets, under the constraint that ID accuracy may drop only so much. Among
the candidates within noise of the best the one that prunes least is chosen.

Masks of one sensitivity are nested, so a candidate needs no matrix product of its own. Sort weights
and neurons by sensitivity; a candidate keeps an interval of either order, and all intervals share
their middle. With the middle counted to the low side, logits are the sum of four partial products,

    f(wl, wh, nl, nh) = [wl, nl] + [wl, nh] + [wh, nl] + [wh, nh] + b,

one for each pair of a low or high cut of the weights and one of the neurons: the four corners of a
summed-area table (Crow, SIGGRAPH 1984), without its subtractions. The exponentials of sums being
products, so is Σ exp f: one small matrix product over the classes gives the energies of all neuron
cuts at once, and an exponential is taken only for each corner.
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
BLOCK = 2**21  # numbers in the table of a block of samples: more leave the processor's caches
TINY = 1e-30  # of a sum of float32 exponentials: below, rounding may have eaten into it


@dataclass(frozen=True)
class Judge:
    """What candidates are judged on.

    Attributes:
        weight: of the head, (K, L).
        bias: of the head, (K,).
        samples: ID validation features, then those of each outlier set, not clipped.
        inside: how many of them are ID.
        sizes: of each outlier set.
        labels: of the ID samples, if known.
        memory: bytes that blocks and scores may take.
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
        """Measure candidates, all of one table together; they come in the order of the tables."""
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
        """Outlier scores of all samples, (samples,), for a few candidates, in their order."""
        found = {
            candidate: row
            for group, scores, _, _ in self.scored(measured, candidates)
            for candidate, row in zip(group, scores, strict=True)
        }
        return {candidate: found[candidate] for candidate in candidates}

    def scored(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> Iterator[tuple[list[Candidate], Tensor, Tensor, Tensor]]:
        """Groups of candidates, their outlier scores (group, samples), hits and pruned shares."""
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
        """The candidates of one sensitivity and one definition of the neurons'."""
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
        """Outlier scores (weights, cells, samples), ID hits and pruned shares (weights, cells).

        A cell is a pair of cuts of the neurons, see `Cuts.kept`.
        """
        device, dtype = self.samples.device, self.samples.dtype
        k, width = self.weight.shape
        w, t = Cuts.of(weights, k * width), sensitivity.temperature
        ascending = torch.argsort(sensitivity.neurons(kind), stable=True).to(device)
        rank = torch.empty(k * width, dtype=torch.int64)
        rank[torch.argsort(sensitivity.weights.flatten(), stable=True)] = torch.arange(k * width)
        rank = rank.reshape(k, width).to(device)[:, ascending]
        head, bias = (part.to(device, dtype) / t for part in (self.weight, self.bias))
        head = head[:, ascending]
        kept = [(rank >= low) & (rank < high) for low, high in w.intervals]
        # The head as each cut of the weights leaves it, one below another: (cuts · K, L).
        heads = torch.cat([head * part for part in kept])
        # The bias counts to the low side, as the middle does.
        biases = torch.zeros(len(w.intervals), k, device=device, dtype=dtype)
        biases[: len(w.low)] = bias
        columns = torch.stack([part.sum(dim=0) for part in kept]).cumsum(dim=1)
        columns = nn.functional.pad(columns, (1, 0))  # kept weights in the first 0, 1, … L neurons
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
        # ID samples and outliers in blocks of their own: only the former have labels.
        starts = [*range(0, self.inside, block), *range(self.inside, len(self.samples), block)]
        scores = self.samples.new_empty(len(weights), len(n.kept), len(self.samples))
        hits = torch.zeros(len(weights), len(n.kept), device=device, dtype=torch.int64)
        # Of each corner the greatest partial logit, and the exponentials of all relative to it.
        tops = self.samples.new_empty(corners[0], block, corners[1])
        powers = self.samples.new_empty(corners[0], block, corners[1], k)
        votes: Iterator[Tensor]
        for start, stop in zip(starts, [*starts[1:], len(self.samples)], strict=True):
            h = self.samples[start:stop].index_select(1, ascending)
            if sensitivity.clip is not None:
                h = h.clamp(max=sensitivity.clip)
            power, top = powers[:, : len(h)], tops[:, : len(h)]
            for side, outermost in ((n.outwards[:lows], biases), (n.outwards[lows:], 0 * biases)):
                partial_logits = outermost.flatten()
                for place, (a, b) in side:
                    partial_logits = torch.addmm(partial_logits, h[:, a:b], heads[:, a:b].T)
                    corner = partial_logits.view(len(h), -1, k)
                    greatest = corner.amax(dim=2, keepdim=True)
                    top[:, :, place] = greatest.squeeze(2).T
                    power[:, :, place] = (corner - greatest).exp_().transpose(0, 1)
            for row, (low, high) in enumerate(map(w.parts, weights)):
                terms = power[low] * power[high]  # (B, neuron cuts, K)
                shift = top[low] + top[high]
                sums = terms[:, :lows] @ terms[:, lows:].transpose(1, 2)  # over the classes
                if sums.min() > TINY:
                    energy = sums.log_().add_(shift[:, :lows, None]).add_(shift[:, None, lows:])
                    pairs = product(range(lows), range(lows, corners[1]))
                    votes = (terms[:, a] * terms[:, b] for a, b in pairs)
                else:
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
    """The intervals of an ascending order that low and high cuts leave, each in two parts.

    Every low cut must end before every high cut begins, as in valid settings.

    Attributes:
        n: length of the order.
        low: where low cuts begin, ascending; their parts end where the greatest high cut begins.
        high: where high cuts end, ascending; their parts begin there.
    """

    n: int
    low: list[int]
    high: list[int]

    @classmethod
    def of(cls, percentages: Sequence[Percentages], n: int) -> "Cuts":
        return cls(
            n,
            sorted({pruned_count(n, low) for low, _ in percentages}),
            sorted({n - pruned_count(n, high) for _, high in percentages}),
        )

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """The parts of all low cuts, then those of all high cuts."""
        middle = self.high[0]
        return [(a, middle) for a in self.low] + [(middle, b) for b in self.high]

    @property
    def outwards(self) -> list[tuple[int, tuple[int, int]]]:
        """The places of the low, then of the high parts, each from the middle outwards; beside each
        what it has more than the one before."""
        middle = self.high[0]
        lows = list(zip(self.low, [*self.low[1:], middle], strict=True))
        highs = list(zip([middle, *self.high[:-1]], self.high, strict=True))
        places = list(enumerate([*lows, *highs]))
        return places[: len(lows)][::-1] + places[len(lows) :]

    @property
    def kept(self) -> list[tuple[int, int]]:
        """What each cell, a low cut with a high cut, keeps."""
        return list(product(self.low, self.high))

    def parts(self, percentages: Percentages) -> tuple[int, int]:
        """The places among the intervals of the two parts that a pair of percentages keeps."""
        low, high = (pruned_count(self.n, percentage) for percentage in percentages)
        return self.low.index(low), len(self.low) + self.high.index(self.n - high)

    def cell(self, percentages: Percentages) -> int:
        """The place among the cells of a pair of percentages."""
        low, high = self.parts(percentages)
        return low * len(self.high) + high - len(self.low)
