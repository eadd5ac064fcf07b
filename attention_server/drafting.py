"""Where drafts come from: tokens that a sequence may go on with, for a step to verify."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from expertmesh.attention_server.request import Sequence
from expertmesh.kernels.host_ngram import host_draft
from expertmesh.mesh.config_speculation import SpeculationConfig

Draft = tuple[int, ...]


class Drafter(Protocol):
    """A pure function of the sequence: asked again before the step has run, it answers the same."""

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        """At most ``limit`` (1 or more) tokens that may follow the sequence's last one."""


class NgramDrafter:
    """Prompt lookup; see ``kernels.host_ngram``."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._num_tokens = config.max_tokens
        self._shortest, self._longest = config.prompt_lookup_min, config.prompt_lookup_max

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        draft_D = np.empty(min(limit, self._num_tokens), np.int64)
        if host_draft(sequence.tokens[: sequence.num_tokens], self._shortest, self._longest, draft_D):
            return tuple(draft_D.tolist())
        return ()


class ProposalDrafter:
    """What the last step that sampled for a sequence has proposed."""

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        return sequence.proposal[:limit] if sequence.proposal_at == sequence.num_tokens else ()


def open_drafter(config: SpeculationConfig) -> Drafter | None:
    """None = no drafts."""
    match config.method:
        case "off":
            return None
        case "ngram":
            return NgramDrafter(config)
        case "mtp":
            return ProposalDrafter()
