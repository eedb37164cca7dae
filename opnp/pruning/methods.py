"""The methods that a search chooses for, and what each of them may prune."""

from collections.abc import Callable

from opnp.pruning.candidates import Candidate

METHODS: dict[str, Callable[[Candidate], bool]] = {
    "clip": lambda candidate: candidate.weights == (0, 0) and candidate.neurons == (0, 0),
    "opp": lambda candidate: candidate.clip is None and candidate.neurons == (0, 0),
    "onp": lambda candidate: candidate.clip is None and candidate.weights == (0, 0),
    "opnp": lambda candidate: candidate.clip is None,
    "opnp+react": lambda candidate: True,
}
"""Which candidates each method may choose.

OPP prunes weights only, ONP neurons only, and OPNP both; these are the paper's. OPNP+ReAct may clip
features as well. Clip may only clip features and choose the temperature: what OPNP+ReAct has beyond
it is due to pruning.
"""
