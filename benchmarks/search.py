"""The search by tables of partial sums against a matrix product for each candidate.

Both judge the same candidates on the same samples in this process, and must agree. The product is
tuned: ranks are sorted once, features and logits lie as the faster of two layouts has them, and the
metrics are counted by the same code. Goals: at least 8 × as fast at K = 1000, L = 1280, and 4 × at
K = 10, L = 512. Run ``python -m benchmarks.search [--device cuda] [--threads N] [--json]``.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opnp.metrics.separation import fpr95_auroc
from opnp.pruning.candidates import Candidate, grid
from opnp.pruning.masks import pruned_count
from opnp.pruning.sensitivity import Sensitivity, measure
from opnp.pruning.settings import SearchSettings
from opnp.pruning.table import Judge

__all__ = ["main", "measured"]

CASES = (
    # K, L, ID samples, outlier sets, samples in each, goal
    (1000, 1280, 1000, 4, 500, 8.0),
    (10, 512, 3000, 12, 3000, 4.0),
)


def problem(case: tuple[int, int, int, int, int, float], device: str) -> tuple[Judge, Sensitivity]:
    """A random head with features like those after a ReLU, and its sensitivity."""
    k, width, inside, sets, outside, _ = case
    drawn = torch.Generator().manual_seed(0)
    weight = 3 * torch.randn(k, width, generator=drawn) / width**0.5
    bias = torch.randn(k, generator=drawn)
    train = torch.randn(4096, width, generator=drawn).relu()
    samples = torch.randn(inside + sets * outside, width, generator=drawn).relu()
    samples[:inside] *= 1.2
    labels = torch.nn.functional.linear(samples[:inside], weight, bias).argmax(dim=1)
    [sensitivity] = measure(train, weight, bias)
    on = [each.to(device) for each in (weight, bias, samples, labels)]
    sizes = {str(index): outside for index in range(sets)}
    return Judge(on[0], on[1], on[2], inside, sizes, on[3], 2**30), sensitivity


def by_products(
    judge: Judge, sensitivity: Sensitivity, candidates: list[Candidate], classes_first: bool
) -> Iterator[tuple[float, float, float]]:
    """Mean FPR95, mean AUROC and ID hits of each candidate."""
    device, (k, width) = judge.samples.device, judge.weight.shape

    def ranked(values: Tensor) -> Tensor:
        order = torch.argsort(values.flatten(), stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        return rank.reshape(values.shape).to(device)

    weights = ranked(sensitivity.weights)
    neurons = {kind: ranked(sensitivity.neurons(kind)) for kind in ("mean", "gradient", "taylor")}

    def kept(rank: Tensor, percentages: tuple[float, float], n: int) -> Tensor:
        low, high = (pruned_count(n, percentage) for percentage in percentages)
        return (rank >= low) & (rank < n - high)

    columns = judge.samples.T.contiguous()
    sizes = list(judge.sizes.values())
    for candidate in candidates:
        neuron = neurons[candidate.neuron_sensitivity]
        head = judge.weight * (
            kept(weights, candidate.weights, k * width) & kept(neuron, candidate.neurons, width)
        )
        if classes_first:
            logits = torch.addmm(judge.bias[:, None], head, columns)
        else:
            logits = torch.addmm(judge.bias, judge.samples, head.T)
        score = -logits.logsumexp(dim=0 if classes_first else 1)
        fpr95, auroc = fpr95_auroc(score[: judge.inside], score[judge.inside :], sizes)
        inside = logits[:, : judge.inside] if classes_first else logits[: judge.inside]
        assert judge.labels is not None
        hits = torch.eq(inside.argmax(dim=0 if classes_first else 1), judge.labels)
        yield float(fpr95.mean()), float(auroc.mean()), int(hits.sum())


def consume(work: Callable[[], Iterator[Any]]) -> list[Any]:
    return list(work())


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measured(case: tuple[int, int, int, int, int, float], device: str) -> dict[str, Any]:
    """Times of both, their ratio, and how far they differ."""
    judge, sensitivity = problem(case, device)
    candidates = grid(SearchSettings())
    few = candidates[:: len(candidates) // 8]
    list(judge.trials([sensitivity], few))  # warms up
    layouts = {}
    for layout in (False, True, False, True):  # the second time counts
        work = partial(by_products, judge, sensitivity, few, layout)
        layouts[layout] = seconds(partial(consume, work), device)[0]
    faster = layouts[True] < layouts[False]
    by_tables = partial(judge.trials, [sensitivity], candidates)
    took, trials = seconds(partial(consume, by_tables), device)
    each = partial(by_products, judge, sensitivity, candidates, faster)
    product_took, figures = seconds(partial(consume, each), device)
    by_candidate = {trial.candidate: trial for trial in trials}
    differences = [
        max(
            abs(by_candidate[candidate].mean_fpr95 - fpr95),
            abs(by_candidate[candidate].mean_auroc - auroc),
            abs(by_candidate[candidate].accuracy - 100 * hits / judge.inside),
        )
        for candidate, (fpr95, auroc, hits) in zip(candidates, figures, strict=True)
    ]
    best = min(candidates, key=lambda candidate: by_candidate[candidate].mean_fpr95)
    best_product = min(zip(figures, candidates, strict=True), key=lambda pair: pair[0][0])[1]
    return {
        "K": case[0],
        "L": case[1],
        "samples": len(judge.samples),
        "candidates": len(candidates),
        "table_seconds": took,
        "product_seconds": product_took,
        "product_layout": "classes first" if faster else "samples first",
        "ratio": product_took / took,
        "goal": case[5],
        "met": product_took / took >= case[5],
        "largest_difference": max(differences),
        "same_winner": best == best_product,
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.search", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [measured(case, arguments.device) for case in CASES]
    result = {
        "device": arguments.device,
        "threads": arguments.threads,
        "cases": cases,
        "goal": "ratio of product to table seconds at least 8 (K = 1000) and 4 (K = 10)",
        "met": all(case["met"] for case in cases),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    table = Table(title=f"search, {arguments.device}, {arguments.threads} threads")
    for column in cases[0]:
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in case.values()))
    Console().print(table)
    print(f"goal: {result['goal']}; met: {result['met']}")


if __name__ == "__main__":
    main()
