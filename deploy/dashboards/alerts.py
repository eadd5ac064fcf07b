"""The rules for Prometheus: what is recorded and what is an alert; ``generate.py`` makes alerts.yaml of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OBJECTIVE = "expertmesh_slo_requests_total"


@dataclass(frozen=True, kw_only=True, slots=True)
class Burn:
    """An alert on the rate at which the budget of an objective goes, times what it has for 30 days: over a long window
    it is worth somebody's attention, and a short one ends the alert soon after the cause has gone. In seconds."""

    long_s: int
    short_s: int
    factor: float
    for_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much of a thing, and for how many seconds, is an alert. ``budget``: the share of requests that may miss."""

    budget: float = 0.01
    fast: Burn = Burn(long_s=3600, short_s=300, factor=14.4, for_s=120)
    slow: Burn = Burn(long_s=21600, short_s=1800, factor=6, for_s=900)
    down_for_s: int = 60
    missing_for_s: int = 300
    joins: int = 3
    joins_within_s: int = 900
    kv_cache_usage: float = 0.95
    kv_cache_for_s: int = 300
    balancedness: float = 0.7
    traffic_within_s: int = 300
    imbalance_for_s: int = 600
    migration_age_s: int = 180
    aborts: int = 5
    aborts_within_s: int = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    name: str
    expr: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """``severity``: page (somebody gets up) or ticket."""

    name: str
    expr: str
    severity: str
    summary: str
    remedy: str
    for_s: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    name: str
    rules: Sequence[Record | Alert]


def groups(limits: Limits) -> list[Group]:
    return [
        Group(name="expertmesh-objectives", rules=[*_error_ratios(limits), *_burns(limits)]),
        Group(name="expertmesh-mesh", rules=_mesh(limits)),
        Group(name="expertmesh-balancer", rules=_balancer(limits)),
    ]


def duration(seconds: int) -> str:
    """As PromQL and people write it: 5400 → 90m."""
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _ratio(window_s: int) -> str:
    return f"expertmesh:slo_errors:ratio_rate{duration(window_s)}"


def _error_ratios(limits: Limits) -> list[Record]:
    windows = sorted({window for burn in (limits.fast, limits.slow) for window in (burn.short_s, burn.long_s)})

    def rate(labels: str, window_s: int) -> str:
        return f"sum(rate({OBJECTIVE}{{{labels}}}[{duration(window_s)}]))"

    missed, all_requests = 'objective="all",met="false"', 'objective="all"'
    return [
        Record(name=_ratio(window), expr=f"{rate(missed, window)} / {rate(all_requests, window)}") for window in windows
    ]


def _burns(limits: Limits) -> list[Alert]:
    def expr(burn: Burn) -> str:
        limit = f"{burn.factor:g} * {limits.budget:g}"
        return f"{_ratio(burn.long_s)} > {limit} and {_ratio(burn.short_s)} > {limit}"

    return [
        Alert(
            name="ExpertmeshObjectiveBurnsFast",
            expr=expr(limits.fast),
            for_s=limits.fast.for_s,
            severity="page",
            summary="{{ $value | humanizePercentage }} of requests miss their objectives",
            remedy="Look at the requests dashboard for which one: ttft (queue, KV cache), tpot (steps, balancedness) or"
            " served (views, failures).",
        ),
        Alert(
            name="ExpertmeshObjectiveBurnsSlowly",
            expr=expr(limits.slow),
            for_s=limits.slow.for_s,
            severity="ticket",
            summary="{{ $value | humanizePercentage }} of requests have missed their objectives for hours",
            remedy="Add attention servers (queue, KV cache) or expert servers (step time), or lower what routers"
            " admit.",
        ),
    ]


def _mesh(limits: Limits) -> list[Alert]:
    leads = "on (server_id) expertmesh_balancer_leader == 1"
    return [
        Alert(
            name="ExpertmeshNotServing",
            expr='max(expertmesh_view_number{role="balancer"}) == 0',
            for_s=limits.down_for_s,
            severity="page",
            summary="no view serves",
            remedy="`expertmesh balancer status` says why; most often there are too few slots for all experts.",
        ),
        Alert(
            name="ExpertmeshWithoutLeader",
            expr="sum(expertmesh_balancer_leader) < 1",
            for_s=limits.down_for_s,
            severity="page",
            summary="no balancer leads: serving goes on, and nothing that fails is put right",
            remedy="Start a balancer; with balancer.state etcd look whether etcd answers.",
        ),
        Alert(
            name="ExpertmeshServersMissing",
            expr=f"max by (server_role) (expertmesh_balancer_servers_missing and {leads}) > 0",
            for_s=limits.missing_for_s,
            severity="ticket",
            summary="{{ $value | humanize }} {{ $labels.server_role }} servers are not there that should be",
            remedy="`expertmesh balancer status` says which are; start the others, or `expertmesh balancer scale` if so"
            " many are not wanted any more.",
        ),
        Alert(
            name="ExpertmeshFlappingServer",
            expr='sum by (member) (increase(expertmesh_balancer_member_events_total{event="joined"}'
            f"[{duration(limits.joins_within_s)}])) > {limits.joins}",
            severity="ticket",
            summary="{{ $labels.member }} joined {{ $value | humanize }} times in " + _words(limits.joins_within_s),
            remedy="Its log says why it ends. Each of its joins changes the view: drain it until it is repaired.",
        ),
        Alert(
            name="ExpertmeshKvCacheFull",
            expr=f"vllm:kv_cache_usage_perc > {limits.kv_cache_usage:g}",
            for_s=limits.kv_cache_for_s,
            severity="ticket",
            summary="{{ $labels.server_id }} preempts sequences for KV blocks",
            remedy="Raise attention.kv_cache_bytes or num_kv_blocks, lower attention.max_num_seqs, or add attention"
            " servers.",
        ),
    ]


def _balancer(limits: Limits) -> list[Alert]:
    traffic = f"sum(rate(expertmesh_expert_rank_tokens_total[{duration(limits.traffic_within_s)}])) > 0"
    aborted = 'expertmesh_balancer_migrations_total{outcome="aborted"}'
    return [
        Alert(
            name="ExpertmeshImbalance",
            expr=f'expertmesh_balancer_balancedness{{over="mean"}} < {limits.balancedness:g} and on() {traffic}',
            for_s=limits.imbalance_for_s,
            severity="ticket",
            summary="the busiest expert rank has {{ $value | humanizePercentage }} of what a level one would let"
            " through",
            remedy="balancer.mode online, more slots (expert.num_slots), or `expertmesh balancer plan` to see what a"
            " migration would gain.",
        ),
        Alert(
            name="ExpertmeshMigrationStuck",
            expr=f"max(expertmesh_balancer_migration_oldest_seconds) > {limits.migration_age_s}",
            severity="ticket",
            summary="a migration has been under way for {{ $value | humanizeDuration }}",
            remedy="Each stage ends by balancer.migration_timeout_s: `expertmesh balancer events` says which rank is"
            " silent.",
        ),
        Alert(
            name="ExpertmeshMigrationsFail",
            expr=f"sum(increase({aborted}[{duration(limits.aborts_within_s)}])) > {limits.aborts}",
            severity="ticket",
            summary="{{ $value | humanize }} migrations were given up in " + _words(limits.aborts_within_s),
            remedy="`expertmesh balancer events` says why; a slow disk wants a longer balancer.migration_timeout_s.",
        ),
    ]


def _words(seconds: int) -> str:
    return f"{seconds // 60} minutes" if seconds % 60 == 0 else f"{seconds} seconds"
