"""From the members to the next view, or to the reason why there is none. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from expertmesh.balancer.ledger import Ledger
from expertmesh.balancer.members import Member
from expertmesh.balancer.placement_file import PlacementFile
from expertmesh.balancer.placement_rules import PlacementError, arrange
from expertmesh.balancer.placement_static import place_layer, usable_slots
from expertmesh.balancer.policy import Floats, Layout
from expertmesh.balancer.replicas import ReplicaRule, Table
from expertmesh.mesh.view import HOSTS_ATTENTION, HOSTS_EXPERTS
from expertmesh.v1 import mesh_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class NoView:
    """Why no view can be formed, as a user should read it."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """What a new view needs beside its members."""

    number: int
    num_slots: int | None  # to fill in a layer; None = those that ``rule`` asks for
    store_address: str
    secret: bytes
    fingerprint: str = ""  # of the members' model
    ledger: Ledger = field(default_factory=Ledger)
    initial: PlacementFile | None = None  # for a view whose ranks hold nothing yet
    loads: Mapping[int, Floats] = field(default_factory=dict)  # layer → load_E, where it is known
    rule: ReplicaRule = field(default_factory=ReplicaRule)


def still_missing(targets: Mapping[str, int], members: Sequence[Member]) -> str | None:
    """Which of the servers that there should be, by role, are not there yet; None when all are."""
    attention_wanted = targets["attention"] + targets["both"]
    expert_wanted = targets["expert"] + targets["both"]
    attention = sum(member.has_attention for member in members)
    expert = sum(member.has_experts for member in members)
    if attention >= attention_wanted and expert >= expert_wanted:
        return None
    return (
        f"waiting for the configured servers: {attention} of {attention_wanted} attention halves "
        f"and {expert} of {expert_wanted} expert halves are there"
    )


def why_none(members: Sequence[Member]) -> NoView | None:
    """Why these members can serve nothing together; None when they can."""
    hosts = [member for member in members if member.has_experts]
    if not any(member.has_attention for member in members):
        return NoView(reason="no attention server is in the mesh: start one")
    if not hosts:
        return NoView(reason="no expert server is in the mesh: start one")
    num_experts = hosts[0].registration.model.num_experts
    usable = usable_slots(num_experts, [member.registration.num_slots for member in hosts])
    if usable >= num_experts:
        return None
    return NoView(
        reason=f"the {len(hosts)} expert servers in the mesh have room for {usable} of the model's "
        f"{num_experts} experts a layer: start another expert server or raise expert.slots_per_server"
    )


def next_view(members: Sequence[Member], plan: ViewPlan, previous: mesh_pb2.View) -> mesh_pb2.View | NoView:
    """The view of exactly these members.

    Ranks are attention and both first, then experts, each by server id. Experts stay in the slots that ``previous``
    gave to the same incarnations. A layer's version grows when a slot of a server holds another expert than before.

    Args:
        previous: the view published last, live or not; an empty message when there was none.
    """
    none = why_none(members)
    if none is not None:
        return none
    ordered = sorted(members, key=lambda member: (not member.has_attention, member.server_id))
    hosts = [member for member in ordered if member.has_experts]
    model = hosts[0].registration.model
    capacities = [member.registration.num_slots for member in hosts]
    view = mesh_pb2.View(
        number=plan.number,
        slots_per_rank=max(capacities),
        store_address=plan.store_address,
        secret=plan.secret,
        ranks=[_rank(number, member) for number, member in enumerate(ordered)],
    )
    _place(view, model, plan, capacities, previous)
    if plan.initial is not None and not _old_ranks(view, previous):
        mistake = _place_as(view, model, plan.initial, plan.fingerprint)
        if mistake is not None:
            return NoView(reason=f"balancer.placement_file: {mistake}")
    return view


def slot_servers(view: mesh_pb2.View) -> list[str]:
    """Global slot → server id."""
    return [rank.server_id for rank in view.ranks if rank.role in HOSTS_EXPERTS for _ in range(view.slots_per_rank)]


def _rank(number: int, member: Member) -> mesh_pb2.Rank:
    registration = member.registration
    return mesh_pb2.Rank(
        rank=number,
        server_id=registration.server_id,
        incarnation=registration.incarnation,
        role=registration.role,
        node=registration.node,
        grpc_address=registration.grpc_address,
        rank_address=registration.rank_address,
        num_slots=registration.num_slots if member.has_experts else 0,
    )


def _place(
    view: mesh_pb2.View,
    model: mesh_pb2.ModelShape,
    plan: ViewPlan,
    capacities: Sequence[int],
    previous: mesh_pb2.View,
) -> None:
    """Fill in ``view.placement``; layers that hold the same now are solved once."""
    old_layers = {layer.layer: layer for layer in previous.placement}
    old_hosts = {(rank.server_id, rank.incarnation): i for i, rank in enumerate(_hosts(previous))}
    came_from = [old_hosts.get((rank.server_id, rank.incarnation)) for rank in _hosts(view)]
    moved = came_from != list(range(len(old_hosts))) or view.slots_per_rank != previous.slots_per_rank
    solved: dict[tuple[bytes, bytes | None], Table] = {}
    for layer in model.moe_layers:
        old = old_layers.get(layer)
        if old is not None and not moved:  # as good as it was, and perhaps made with care
            version = plan.ledger.next_version(layer, old.version, changes=False)
            quotas = old.source_quotas if _sources(view) == _sources(previous) else ()  # level together, not alone
            view.placement.add(layer=layer, version=version, slots=old.slots, source_quotas=quotas)
            continue
        current_RS = _current(old, previous, view.slots_per_rank, came_from)
        load_E = plan.loads.get(layer)
        key = current_RS.tobytes(), None if load_E is None else load_E.tobytes()
        if key not in solved:
            num_slots = max(_wanted_slots(plan, current_RS, load_E, model.num_experts), model.num_experts)
            solved[key] = place_layer(model.num_experts, num_slots, capacities, current_RS, load_E, plan.rule)
        version = plan.ledger.next_version(layer, 0 if old is None else old.version, changes=True)
        view.placement.add(layer=layer, version=version, slots=solved[key].ravel().tolist())


def _wanted_slots(plan: ViewPlan, current_RS: Table, load_E: Floats | None, num_experts: int) -> int:
    """Slots to fill. Where the number is left open, replicas that are there are kept when they go by load or by the
    rule; those that the rule asks for beside them are loaded when the view serves, so that no token waits for it."""
    if plan.num_slots is not None:
        return plan.num_slots
    held = int((current_RS >= 0).sum())
    if plan.rule.asks_for_any:
        missing = num_experts - len(np.unique(current_RS[current_RS >= 0]))
        return held + missing if held else num_experts * plan.rule.min_replicas
    return 0 if load_E is None else held


def _place_as(view: mesh_pb2.View, model: mesh_pb2.ModelShape, file: PlacementFile, fingerprint: str) -> str | None:
    """Replace ``view.placement`` by the file's, as far as it has the layers. Returns why it cannot be."""
    mistake = file.mismatch(model, fingerprint)
    if mistake is not None:
        return mistake
    layout, wanted = Layout.of(view), {layer.layer: layer for layer in file.layers}
    try:
        for placement in view.placement:
            if placement.layer in wanted:
                version = placement.version
                placement.CopyFrom(arrange(wanted[placement.layer], file.slot_servers, layout, model.num_experts))
                placement.version = version
    except PlacementError as error:
        return f"{file.source}: {error}"
    return None


def _old_ranks(view: mesh_pb2.View, previous: mesh_pb2.View) -> set[tuple[str, str]]:
    """Ranks that were in the view before and hold experts."""
    before = {(rank.server_id, rank.incarnation) for rank in _hosts(previous)}
    return before & {(rank.server_id, rank.incarnation) for rank in _hosts(view)}


def _sources(view: mesh_pb2.View) -> set[str]:
    return {rank.server_id for rank in view.ranks if rank.role in HOSTS_ATTENTION}


def _hosts(view: mesh_pb2.View) -> list[mesh_pb2.Rank]:
    return [rank for rank in view.ranks if rank.role in HOSTS_EXPERTS]


def _current(
    old: mesh_pb2.LayerPlacement | None, previous: mesh_pb2.View, width: int, came_from: Sequence[int | None]
) -> Table:
    """int32 [R, width]: what the new view's expert ranks hold of a layer now."""
    current_RS = np.full((len(came_from), width), -1, dtype=np.int32)
    if old is None:
        return current_RS
    old_RS = np.array(old.slots, dtype=np.int32).reshape(-1, previous.slots_per_rank)
    for rank, old_rank in enumerate(came_from):
        if old_rank is not None:
            kept = old_RS[old_rank, :width]
            current_RS[rank, : len(kept)] = kept
    return current_RS
