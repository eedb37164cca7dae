"""The four methods of the search: what each of them may prune."""

from collections.abc import Callable

from opnp.pruning.candidates import Candidate

# What OPP, ONP and OPNP, the methods of the paper, may do, and what OPNP with ReAct's clipping may.
METHODS: dict[str, Callable[[Candidate], bool]] = {
    "opp": lambda candidate: candidate.clip is None and candidate.neurons == (0, 0),
    "onp": lambda candidate: candidate.clip is None and candidate.weights == (0, 0),
    "opnp": lambda candidate: candidate.clip is None,
    "opnp+react": lambda candidate: True,
}
