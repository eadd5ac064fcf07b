"""When the first view is formed, and the first one after everybody was gone. Pure; time comes in as an argument."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.balancer.actual import NO_SERVERS, Actual
from expertmesh.balancer.members import Member
from expertmesh.balancer.scaling_target import ScaleTargets
from expertmesh.balancer.views import still_missing, why_none
from expertmesh.mesh.config import BalancerConfig


class Formation:
    """``had_view``: somebody who is alive was in a view, so that the formation is behind us."""

    def __init__(self, settings: BalancerConfig, actual: Actual, targets: ScaleTargets) -> None:
        self._settings = settings
        self._actual = actual
        self._targets = targets
        self._first_rank_s: float | None = None
        self.had_view = False

    def waits_for(self, candidates: Sequence[Member], unchanged_s: float, now: float) -> str | None:
        """Why the view is not formed yet; None when it may be.

        Args:
            unchanged_s: for how long these have been the candidates.
        """
        if not self._actual.members.ranks():
            self.had_view = False
            self._first_rank_s = None
            return NO_SERVERS
        if self.had_view:
            return None
        if self._first_rank_s is None:
            self._first_rank_s = now
        is_late = now - self._first_rank_s >= self._settings.formation_timeout_s
        if is_late or self._is_back(candidates, unchanged_s):
            return None
        return still_missing(self._targets.targets, candidates)

    def _is_back(self, candidates: Sequence[Member], unchanged_s: float) -> bool:
        """A mesh that served before and whose servers have all died goes on with those of its last view; or, when
        nobody else has come for the time of a lease, with any who can hold all experts: the rest joins later."""
        before = {rank.server_id for rank in self._actual.view.ranks}
        if not before or why_none(candidates) is not None:
            return False
        return before <= {member.server_id for member in candidates} or unchanged_s >= self._settings.lease_s
