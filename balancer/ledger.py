"""What must outlive a balancer for migrations: nothing that was ever given out is given out again."""

from __future__ import annotations

from dataclasses import dataclass, field

from expertmesh.v1 import mesh_pb2


@dataclass(kw_only=True)
class Ledger:
    """
    Args:
        last_id: of a migration.
        versions: layer → the highest placement version that any plan carried, whatever became of it.
        plans: by id, the plans of the current view that may still take effect: those that run, and aborted ones, since
            an abort may cross the commit.
    """

    last_id: int = 0
    versions: dict[int, int] = field(default_factory=dict)
    plans: dict[int, mesh_pb2.MigrationPlan] = field(default_factory=dict)

    def issue(self, plan: mesh_pb2.MigrationPlan, current_version: int) -> None:
        """Give the plan its id and version, both new, and remember it."""
        layer = plan.placement.layer
        self.last_id += 1
        plan.id = self.last_id
        plan.placement.version = max(current_version, self.versions.get(layer, 0)) + 1
        self.versions[layer] = plan.placement.version
        self.plans[plan.id] = plan

    def next_version(self, layer: int, current_version: int, *, changes: bool) -> int:
        """The version of a layer in a new view. A plan without a known outcome may have been the truth on some rank of
        the old one: then the number is left behind even if nothing changes."""
        issued = self.versions.get(layer, 0)
        if changes or issued > current_version:
            return max(current_version, issued) + 1
        return current_version
