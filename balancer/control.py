"""The parts that move experts, put together."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.balancer.actual import Actual
from expertmesh.balancer.applying import Applying
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.migrations import Migrations
from expertmesh.balancer.online import Online
from expertmesh.balancer.policy import StatisticsSource
from expertmesh.balancer.replicas import ANY_REPLICAS, ReplicaRule
from expertmesh.balancer.upkeep import Upkeep
from expertmesh.mesh.config import BalancerConfig


@dataclass(frozen=True, kw_only=True)
class PlacementControl:
    """Migrations that are under way, and those that start them."""

    migrations: Migrations
    applying: Applying
    upkeep: Upkeep
    online: Online

    @classmethod
    def create(
        cls,
        config: BalancerConfig,
        actual: Actual,
        *,
        statistics: StatisticsSource,
        effects: Effects,
        events: EventLog,
        rule: ReplicaRule = ANY_REPLICAS,
    ) -> PlacementControl:
        timeout_s = config.migration_timeout_s
        migrations = Migrations(actual, effects=effects, events=events, timeout_s=timeout_s)
        applying = Applying(actual, migrations, events)
        online = Online(config, actual, migrations, applying, statistics=statistics, effects=effects, events=events)
        upkeep = Upkeep(config, actual, migrations, applying, rule=rule, known_loads=online.known_loads, events=events)
        return cls(migrations=migrations, applying=applying, upkeep=upkeep, online=online)
