"""What the sensitivity costs: beside a forward pass, against autograd, and as it grows.

Goals: features and sensitivity in one pass at most 1.03 × a plain forward pass over the same
loader; the sensitivity on cached features at K = 1000, L = 2048 at least 80 × as fast as gradients
of single samples by autograd, and within 1.3 × of the two matrix products it consists of, all in
float64. Run ``python -m benchmarks.sensitivity [--parts pass cached growth] [--device cuda]
[--model resnet50] [--bfloat16] [--compile] [--threads N] [--json]``.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import timing
from opnp.backbones import encoding
from opnp.backbones.backbone import Classifier
from opnp.pruning.energy import bias_of, energy_score, logits
from opnp.pruning.sensitivity import SensitivitySums, parameter_sensitivity

__all__ = ["cached", "growth", "main", "passes"]

MODELS = ("resnet18", "resnet50", "vit_b_16")
CHUNKS = (2, 8, 32)  # samples whose gradients autograd holds at once; the fastest counts
BY_W, BY_BOTH = "autograd of W", "autograd of W and h"


def settled(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def classifier(name: str, device: str) -> Classifier:
    """A torchvision model with random weights, as this project sees it: K = 1000."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    if name.startswith("vit"):
        head, model.heads = model.heads.head, nn.Identity()
    else:
        head, model.fc = model.fc, nn.Identity()
    return Classifier(model, head).eval().requires_grad_(False).to(device)


def passes(arguments: argparse.Namespace) -> dict[str, Any]:
    """A forward pass, and one that keeps the features and sums up the sensitivity."""
    device, count = torch.device(arguments.device), arguments.images
    model = classifier(arguments.model, arguments.device)
    weight, bias = model.head.weight, bias_of(model.head)
    compiled: Callable[[nn.Module], Any] = torch.compile if arguments.compile else lambda each: each
    whole, encoder = compiled(model), compiled(model.encoder)
    torch.manual_seed(0)
    loader = DataLoader(
        TensorDataset(torch.randn(count, 3, arguments.size, arguments.size)),
        arguments.batch_size,
        pin_memory=arguments.device != "cpu",
    )

    def batches() -> Iterator[Tensor]:
        for [batch] in loader:
            yield batch

    @torch.no_grad()
    def plain() -> None:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bfloat16):
            for batch in batches():
                whole(batch.to(device, non_blocking=True))

    def both() -> None:
        precision: Literal["float32", "bfloat16"] = "bfloat16" if arguments.bfloat16 else "float32"
        encoded = encoding.encode(encoder, batches(), device, precision)
        shards = encoded.split(arguments.shard_size)
        parts = [SensitivitySums.of(shard.to(device), weight, bias) for shard in shards]
        sum(parts[1:], start=parts[0]).mean()

    plain()  # warms up
    both()
    wait = partial(settled, arguments.device)
    seconds = timing.interleaved(
        {"forward": plain, "features + sensitivity": both}, arguments.repeats, settled=wait
    )
    rows = [
        {"pass": name, "seconds": median(of), "images_per_second": count / median(of)}
        for name, of in seconds.items()
    ]
    times = timing.ratio(seconds, "features + sensitivity", "forward")
    sentence = "features and sensitivity in one pass at most 1.03 × a forward pass"
    return {
        "model": arguments.model,
        "images": count,
        "bfloat16": arguments.bfloat16,
        "compiled": arguments.compile,
        "passes": rows,
        "goals": [timing.goal(sentence, times, times <= 1.03)],
    }


def problem(n: int, k: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features like those after a ReLU, float32 as they are cached, and a random head."""
    drawn = torch.Generator().manual_seed(0)
    h = torch.randn(n, width, generator=drawn).relu()
    weight = 3 * torch.randn(k, width, generator=drawn) / width**0.5
    bias = torch.randn(k, generator=drawn)
    return h.to(device), weight.to(device), bias.to(device)


def energy(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    return -energy_score(logits(h, weight, bias))


def by_autograd(h: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Tensor:
    """Σ |∂E/∂W| (K, L) from the gradients of single samples."""
    total = torch.zeros_like(weight)
    gradients = vmap(grad(energy), in_dims=(None, None, 0))
    for part in h.split(chunk):
        total += gradients(weight, bias, part).abs_().sum(dim=0)
    return total


def all_by_autograd(h: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """The same with all neuron sensitivities: mean, gradient and taylor."""
    total, by_gradient = torch.zeros_like(weight), torch.zeros_like(weight[0])
    by_taylor = torch.zeros_like(by_gradient)
    gradients = vmap(grad(energy, argnums=(0, 2)), in_dims=(None, None, 0))
    for part in h.split(chunk):
        dw, dh = gradients(weight, bias, part)
        total += dw.abs_().sum(dim=0)
        by_gradient += dh.abs().sum(dim=0)
        by_taylor += (part * dh).abs_().sum(dim=0)
    return total, total.mean(dim=0), by_gradient, by_taylor


def cached(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sensitivity on cached features against autograd and against its own products."""
    n, k, width, few = arguments.samples, arguments.classes, arguments.width, arguments.autograd
    h, weight, bias = problem(n, k, width, arguments.device)
    single = (h[:few], weight, bias)
    double = (h[:few].double(), weight.double(), bias.double())

    sums = SensitivitySums.of(h[:few], weight, bias)
    ours = (sums.weights, sums.neurons_mean, sums.neurons_gradient, sums.neurons_taylor)
    for mine, theirs in zip(ours, all_by_autograd(*double, CHUNKS[0]), strict=True):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=1e-9, atol=1e-12)
    alone = few * parameter_sensitivity(h[:few], weight, bias)
    torch.testing.assert_close(alone, sums.weights, rtol=1e-9, atol=1e-12)

    h64, weight64 = h.double(), double[1]
    absolute, f = h64.abs(), torch.empty(n, k, dtype=torch.float64, device=h.device)
    p, m = torch.softmax(h64 @ weight64.T, dim=1), torch.empty_like(weight64)
    dh = torch.empty_like(h64)

    def two() -> None:
        torch.mm(h64, weight64.T, out=f)
        torch.mm(p.T, absolute, out=m)

    def three() -> None:
        two()
        torch.mm(p, weight64, out=dh)

    works: dict[str, Callable[[], Any]] = {
        "parameter_sensitivity": lambda: parameter_sensitivity(h, weight, bias),
        "two products": two,
        "SensitivitySums.of": lambda: SensitivitySums.of(h, weight, bias),
        "three products": three,
    }
    for chunk in CHUNKS:
        works[f"{BY_W}, {chunk}"] = partial(by_autograd, *double, chunk)
        works[f"{BY_W}, float32, {chunk}"] = partial(by_autograd, *single, chunk)
        works[f"{BY_BOTH}, {chunk}"] = partial(all_by_autograd, *double, chunk)
    for work in works.values():  # warms up
        work()
    wait = partial(settled, arguments.device)
    seconds = timing.interleaved(works, arguments.repeats, settled=wait)
    per_sample = {
        name: [each / (few if name.startswith("autograd") else n) for each in of]
        for name, of in seconds.items()
    }

    def ratio(autograd: str, ours: str) -> float:
        """To autograd with the chunk that suits it best."""
        best = min(
            (f"{autograd}, {chunk}" for chunk in CHUNKS), key=lambda n: median(per_sample[n])
        )
        return timing.ratio(per_sample, best, ours)

    by_two = ratio(BY_W, "parameter_sensitivity")
    of_two = timing.ratio(per_sample, "parameter_sensitivity", "two products")
    return {
        "K": k,
        "L": width,
        "samples": n,
        "autograd_samples": few,
        "times": [
            {"work": name, "microseconds_per_sample": 1e6 * median(of)}
            for name, of in per_sample.items()
        ],
        "autograd_float32_ratio": ratio(f"{BY_W}, float32", "parameter_sensitivity"),
        "autograd_both_ratio": ratio(BY_BOTH, "SensitivitySums.of"),
        "two_products_to_autograd_ratio": ratio(BY_W, "two products"),
        "three_products_ratio": timing.ratio(per_sample, "SensitivitySums.of", "three products"),
        "goals": [
            timing.goal(
                "parameter sensitivity at least 80 × as fast as autograd", by_two, by_two >= 80
            ),
            timing.goal("at most 1.3 × its two products", of_two, of_two <= 1.3),
        ],
    }


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a sample costs as the number of samples, of classes and of features grows."""
    base = {"N": 4096, "K": 100, "L": 512}
    grown = [
        base | {name: value}
        for name, values in (("N", (1024, 16384)), ("K", (10, 1000)), ("L", (128, 2048)))
        for value in values
    ]
    rows = []
    for sizes in (base, *grown):
        h, weight, bias = problem(sizes["N"], sizes["K"], sizes["L"], arguments.device)
        work = partial(SensitivitySums.of, h, weight, bias)
        work()  # warms up
        wait = partial(settled, arguments.device)
        seconds = timing.interleaved({"of": work}, arguments.repeats, settled=wait)["of"]
        rows.append(sizes | {"microseconds_per_sample": 1e6 * median(seconds) / sizes["N"]})
    return {"growth": rows, "goals": []}


PARTS = {"pass": passes, "cached": cached, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sensitivity", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, default="resnet18", help="of the pass")
    parser.add_argument("--images", type=int, default=64, help="of the pass")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard-size", type=int, default=8192, help="of the pass")
    parser.add_argument("--bfloat16", action="store_true", help="of the backbone, by autocast")
    parser.add_argument("--compile", action="store_true", help="the backbone by torch.compile")
    parser.add_argument("--samples", type=int, default=4096, help="of the cached features")
    parser.add_argument("--autograd", type=int, default=32, help="samples of autograd")
    parser.add_argument("--classes", type=int, default=1000, help="K of the cached features")
    parser.add_argument("--width", type=int, default=2048, help="L of the cached features")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "device": arguments.device,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
    }
    goals = []
    for part in arguments.parts:
        measured = PARTS[part](arguments)
        goals += measured.pop("goals")
        result |= measured
    title = f"sensitivity, {arguments.device}, {arguments.threads} thread(s)"
    timing.show(result | {"goals": goals}, arguments.json, title)


if __name__ == "__main__":
    main()
