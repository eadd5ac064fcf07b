"""What the number of servers should be, from what servers report; and when a wish becomes a change. Pure; time comes in
as an argument.

A policy is a function of a snapshot. What keeps any policy from flapping, and within its bounds, is not its business
but the governor's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from expertmesh.mesh.config_scaling import ScalingConfig
from expertmesh.mesh.errors import UserError

ENTRY_POINTS = "expertmesh.scale_policies"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleSnapshot:
    """
    Args:
        target: servers that there should be.
        servers: that are there and stay.
        leaving: that were asked to go and are there still.
    """

    target: int
    servers: int
    leaving: int = 0

    @property
    def is_settled(self) -> bool:
        """What was asked for is there."""
        return self.servers >= self.target and not self.leaving


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSnapshot:
    """The mesh at one moment.

    Args:
        roles: by ``attention``, ``expert``, ``both``.
        requests_running: sequences in the batches of the attention halves.
        requests_waiting: that wait for a place in a batch, or on a router for an attention server.
        max_requests: that can run at a time.
        kv_cache_usage: the mean over attention halves, 0 .. 1.
        tpot_s: between two tokens of a request, the mean over attention halves; None while no tokens are made.
        slots_needed: in a layer, for the experts and the replicas that the configuration asks for.
        slots_there: that expert halves have in a layer for different experts.
        slots_without_one: when the one with most of them has gone.
    """

    roles: Mapping[str, RoleSnapshot]
    requests_running: int
    requests_waiting: int
    max_requests: int
    kv_cache_usage: float
    tpot_s: float | None
    slots_needed: int
    slots_there: int
    slots_without_one: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """So many servers of a role there should be, and why."""

    servers: int
    why: str = ""


ScalePolicy = Callable[[ScaleSnapshot, ScalingConfig], Mapping[str, Wish | int]]
"""Servers by role; roles that it does not name stay as they are."""


def default_policy(snapshot: ScaleSnapshot, settings: ScalingConfig) -> dict[str, Wish]:
    """Attention servers follow the queue, expert servers the time between two tokens and the room for experts; a mesh
    of colocated servers follows all three. A server goes only when what is left stays far from adding one again."""
    if not snapshot.roles["both"].target:
        steps = {"attention": attention_step(snapshot, settings), "expert": expert_step(snapshot, settings)}
    else:
        halves = attention_step(snapshot, settings), expert_step(snapshot, settings)
        steps = {"both": max(halves, key=lambda step: step[0])}  # both have to agree that one may go
    return {role: Wish(servers=snapshot.roles[role].target + step, why=why) for role, (step, why) in steps.items()}


def attention_step(snapshot: ScaleSnapshot, settings: ScalingConfig) -> tuple[int, str]:
    """One server more, one less or none, and why."""
    servers = snapshot.roles["attention"].servers + snapshot.roles["both"].servers
    waiting, running = snapshot.requests_waiting, snapshot.requests_running
    if waiting > settings.max_waiting * servers:
        return 1, f"{waiting} requests wait, more than {settings.max_waiting:g} a server"
    if servers < 2 or waiting:
        return 0, ""
    rest = (servers - 1) / servers
    is_low = running <= settings.low_share * snapshot.max_requests * rest
    if is_low and snapshot.kv_cache_usage <= settings.low_share * rest:
        return -1, f"{running} of {snapshot.max_requests} requests run, none waits"
    return 0, ""


def expert_step(snapshot: ScaleSnapshot, settings: ScalingConfig) -> tuple[int, str]:
    """One server more, one less or none, and why."""
    needed, there = snapshot.slots_needed, snapshot.slots_there
    if there < needed:
        return 1, f"experts and their replicas take {needed} slots a layer, there are {there}"
    if settings.target_tpot_ms is None:
        return 0, ""
    tpot_ms = 1e3 * (snapshot.tpot_s or 0.0)
    if tpot_ms > settings.target_tpot_ms:
        return 1, f"{tpot_ms:.1f} ms between two tokens, more than {settings.target_tpot_ms:g}"
    servers = snapshot.roles["expert"].servers + snapshot.roles["both"].servers
    is_low = tpot_ms <= settings.low_share * settings.target_tpot_ms * (servers - 1) / max(servers, 1)
    if servers > 1 and is_low and snapshot.slots_without_one >= needed:
        return -1, f"{tpot_ms:.1f} ms between two tokens, far below {settings.target_tpot_ms:g}"
    return 0, ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One server of a role more, or one less."""

    role: str
    before: int
    after: int
    why: str


class Governor:
    """Lets a wish through when it has lasted ``hold_s`` and the mesh has been as it is for ``cooldown_s``; one server
    at a time, within the bounds of its role, and while everything that was asked for is there."""

    def __init__(self, settings: ScalingConfig) -> None:
        self._settings = settings
        self._bounds = {"attention": settings.attention, "expert": settings.expert, "both": settings.both}
        self._wishes: dict[str, tuple[int, float]] = {}  # role → direction, since when
        self._seen: Mapping[str, RoleSnapshot] | None = None
        self._changed_s: float | None = None

    def decide(self, wishes: Mapping[str, Wish], roles: Mapping[str, RoleSnapshot], now: float) -> Change | None:
        """The change to make now; None when there is none."""
        if self._seen is not None and self._seen != roles:
            self._changed_s = now
        self._seen = dict(roles)
        due = [self._due(role, wish, roles[role], now) for role, wish in sorted(wishes.items())]
        for role in self._wishes.keys() - wishes.keys():
            del self._wishes[role]
        changes = [change for change in due if change is not None]
        is_quiet = self._changed_s is None or now - self._changed_s >= self._settings.cooldown_s
        if not changes or not is_quiet or not all(role.is_settled for role in roles.values()):
            return None
        return max(changes, key=lambda change: change.after - change.before)  # more comes before less

    def _due(self, role: str, wish: Wish, actual: RoleSnapshot, now: float) -> Change | None:
        bounds = self._bounds[role]
        wanted = min(max(wish.servers, bounds.min_servers), bounds.max_servers)
        direction = (wanted > actual.target) - (wanted < actual.target)
        if direction == 0:
            self._wishes.pop(role, None)
            return None
        before = self._wishes.get(role)
        if before is None or before[0] != direction:
            before = self._wishes[role] = (direction, now)
        if now - before[1] < self._settings.hold_s:
            return None
        why = wish.why or f"{wanted} are wished for, of {bounds.min_servers} to {bounds.max_servers}"
        return Change(role=role, before=actual.target, after=actual.target + direction, why=why)


def checked_wishes(wishes: Mapping[str, Wish | int], roles: Mapping[str, RoleSnapshot]) -> dict[str, Wish]:
    """What a policy answered, when it is an answer.

    Raises:
        TypeError, ValueError: it is none; the message says why.
    """
    if not isinstance(wishes, Mapping):
        raise TypeError(f"it answered {type(wishes).__name__}, not servers by role")
    checked = {}
    for role, wish in wishes.items():
        if role not in roles:
            raise ValueError(f"it named the role {role!r}; there are {', '.join(roles)}")
        made = wish if isinstance(wish, Wish) else Wish(servers=wish)
        if not isinstance(made.servers, int) or isinstance(made.servers, bool):
            raise TypeError(f"it wants {made.servers!r} {role} servers, which is no integer")
        checked[role] = made
    return checked


def load_policy(hook: str | None) -> ScalePolicy:
    """The policy that ``scaling.hook`` names.

    Raises:
        UserError: there is none of that name.
    """
    if hook is None:
        return default_policy
    module, _, function = hook.partition(":")
    try:
        if function:
            policy = getattr(importlib.import_module(module), function)
        else:
            (entry,) = importlib.metadata.entry_points(group=ENTRY_POINTS, name=hook)
            policy = entry.load()
    except (ImportError, AttributeError, ValueError) as error:
        remedy = f"give module:function, or the name of one entry point in the group {ENTRY_POINTS}"
        raise UserError("scaling.hook", f"{hook} cannot be loaded ({error})", remedy) from None
    if not callable(policy):
        raise UserError("scaling.hook", f"{hook} is a {type(policy).__name__}", "name a function of a snapshot")
    loaded: ScalePolicy = policy
    return loaded
