"""What speaks against the choice of a mask search, in sentences for whoever must rely on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opnp.pruning.candidates import Trial
from opnp.pruning.settings import SearchSettings

if TYPE_CHECKING:
    from opnp.pruning.search import Choice

__all__ = ["doubts"]

SHARE = 2 / 3  # of the gain: what one set of outliers may bring of it


def doubts(trials: Sequence[Trial], choice: "Choice", settings: SearchSettings) -> list[str]:
    """Sentences that warn of a choice at the edge of the grid, of a gain that comes from a single
    set of outliers, and of a limit on accuracy that refused something better.

    Args:
        trials: all of them; the first is the unpruned head.
        choice: the choice among all.
        settings: what was tried, percentages as numbers.

    >>> from opnp.pruning.candidates import Candidate
    >>> from opnp.pruning.search import Choice
    >>> plain = Trial(Candidate(), {"a": 60.0, "b": 50.0}, {"a": 80.0, "b": 80.0}, 90.0, 0.0)
    >>> few = Candidate(weights=(0, 2))
    >>> pruned = Trial(few, {"a": 20.0, "b": 48.0}, {"a": 90.0, "b": 80.0}, 85.0, 0.02)
    >>> choice = Choice(pruned, pruned, (30.0, 38.0), 1, 0.0)
    >>> for doubt in doubts([plain, pruned], choice, SearchSettings(weights_high=(0, 2))):
    ...     print(doubt.split(":")[0])
    The mask prunes 2 % of the highest weights, the most that was tried
    95 % of the gain on outliers comes from a alone
    """
    found = [*edges(trials, choice.trial, settings)]
    gains = {name: before - choice.trial.fpr95[name] for name, before in trials[0].fpr95.items()}
    gained = {name: gain for name, gain in gains.items() if gain > 0}
    if len(gains) > 1 and gained:
        name = max(gained, key=lambda name: gained[name])
        share = gained[name] / sum(gained.values())
        if share > SHARE:
            found.append(
                f"{100 * share:.0f} % of the gain on outliers comes from {name} alone: on real "
                "outliers it may be smaller."
            )
    if settings.max_accuracy_drop is not None:
        best = min(trials, key=lambda trial: trial.rank)
        if best.rank < choice.lowest.rank:
            found.append(
                f"The accuracy of the pruned head was limited to a loss of "
                f"{settings.max_accuracy_drop:g} points: without the limit, mean FPR95 on the "
                f"outliers would be {best.mean_fpr95:.1f} % instead of "
                f"{choice.lowest.mean_fpr95:.1f} %."
            )
    return found


def edges(trials: Sequence[Trial], chosen: Trial, settings: SearchSettings) -> list[str]:
    """A sentence for each axis of the grid on whose edge the choice lies."""
    candidate = chosen.candidate
    found = []
    for what, value, tried in (
        ("lowest weights", candidate.weights[0], settings.weights_low),
        ("highest weights", candidate.weights[1], settings.weights_high or ()),
        ("lowest neurons", candidate.neurons[0], settings.neurons_low),
        ("highest neurons", candidate.neurons[1], settings.neurons_high),
    ):
        if len(tried) > 1 and 0 < value == max(tried):
            found.append(
                f"The mask prunes {value:g} % of the {what}, the most that was tried: a larger "
                "percentage may be better."
            )
    clips = {each.candidate.clip for each in trials if each.candidate.clip is not None}
    if len(clips) > 1 and candidate.clip == min(clips):
        found.append(
            f"Features are clipped at {candidate.clip:.4g}, the lowest value that was tried: a "
            "lower percentile may be better."
        )
    return found
