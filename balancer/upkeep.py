"""Keeps up the replicas that the configuration asks for: what a lost server took, or new ones of experts that became
hot, are loaded by migrations while the view serves.

A layer at a time, within ``max_slots_per_update``. A layer whose migration failed waits, longer each time. Pure but for
what it starts; time comes in as an argument.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.applying import Applying
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.migrations import Migrations
from expertmesh.balancer.policy import Floats, Layout
from expertmesh.balancer.replicas import ReplicaRule, hold, restore
from expertmesh.mesh.config import BalancerConfig
from expertmesh.v1 import mesh_pb2

CHECK_S = 5.0
"""How often hot experts are looked for while placements stay."""
MAX_BACK_OFF_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    """A migration that was started to replace this version of a layer."""

    version: tuple[int, int]  # view number, placement version
    failures: int
    retry_s: float


class Upkeep:
    """
    Args:
        known_loads: layer → load_E [E], of the layers whose load is known.
    """

    def __init__(
        self,
        config: BalancerConfig,
        actual: Actual,
        migrations: Migrations,
        applying: Applying,
        *,
        rule: ReplicaRule,
        known_loads: Callable[[], Mapping[int, Floats]],
        events: EventLog,
    ) -> None:
        self._config = config
        self._actual = actual
        self._migrations = migrations
        self._applying = applying
        self._rule = rule
        self._known_loads = known_loads
        self._events = events
        self._checked: tuple[tuple[int, int], ...] = ()  # versions under which nothing was to do
        self._check_s = 0.0
        self._attempts: dict[int, _Attempt] = {}
        self._told = ""

    def tick(self, now: float) -> str | None:
        """Start the next migration that is due; None when none is."""
        actual = self._actual
        if not self._rule.asks_for_any or actual.phase is not Phase.SERVING:
            return None
        if self._applying.is_busy or len(self._migrations):
            return None
        versions = tuple(self._version(placement) for placement in actual.view.placement)
        if versions == self._checked and now < self._check_s:
            return None
        self._tell_shortage()
        loads, layout = self._known_loads(), Layout.of(actual.view)
        for placement in actual.view.placement:
            if self._may_try(placement, now):
                started = self._restore(placement, loads.get(placement.layer), layout, now)
                if started is not None:
                    return started
        self._checked, self._check_s = versions, now + CHECK_S
        return None

    def _version(self, placement: mesh_pb2.LayerPlacement) -> tuple[int, int]:
        return self._actual.view.number, placement.version

    def _may_try(self, placement: mesh_pb2.LayerPlacement, now: float) -> bool:
        attempt = self._attempts.get(placement.layer)
        return attempt is None or attempt.version != self._version(placement) or now >= attempt.retry_s

    def _restore(
        self, placement: mesh_pb2.LayerPlacement, load_E: Floats | None, layout: Layout, now: float
    ) -> str | None:
        num_experts = self._actual.model.num_experts
        table_RS = np.array(placement.slots, np.int32).reshape(-1, layout.width)
        held_E = hold(table_RS, len(table_RS), num_experts).sum(axis=0)
        usable = int(np.minimum(layout.room_R, num_experts).sum())
        floor_E = self._rule.floors(held_E, load_E, usable, len(table_RS))
        short = int(np.maximum(floor_E - held_E, 0).sum())
        if not short:
            return None
        wanted_RS = restore(table_RS, layout.room_R, floor_E, self._config.max_slots_per_update)
        self._remember(placement, now)
        why = f"experts have {short} replicas fewer than they should"
        self._migrations.start(placement.layer, wanted_RS.ravel().tolist(), {}, why, now)
        return f"planned layer {placement.layer} for its replicas"

    def _remember(self, placement: mesh_pb2.LayerPlacement, now: float) -> None:
        before, version = self._attempts.get(placement.layer), self._version(placement)
        failures = before.failures + 1 if before is not None and before.version == version else 0
        wait_s = min(self._config.migration_timeout_s * 2.0**failures, MAX_BACK_OFF_S)
        self._attempts[placement.layer] = _Attempt(version=version, failures=failures, retry_s=now + wait_s)

    def _tell_shortage(self) -> None:
        """Once, when the servers have too little room for what is asked for, and once when they have enough again."""
        view, num_experts = self._actual.view, self._actual.model.num_experts
        room_R = np.minimum(Layout.of(view).room_R, num_experts)
        wanted, usable = num_experts * self._rule.min_replicas, int(room_R.sum())
        problem = ""
        if len(room_R) < self._rule.min_replicas:
            problem = f"{len(room_R)} expert servers cannot hold {self._rule.min_replicas} replicas of an expert"
        elif usable < wanted:
            problem = (
                f"{self._rule.min_replicas} replicas of each expert take {wanted} slots a layer, there are {usable}"
            )
        if problem and problem != self._told:
            text = f"{problem}: some experts have fewer until another expert server joins"
            self._events.add("replicas_short", f"view {view.number}", text, logging.WARNING)
        elif self._told and not problem:
            self._events.add("replicas_possible", f"view {view.number}", f"there is room for {usable} slots a layer")
        self._told = problem
