"""Tables, prices and quotas on a device, here the CPU: what follows a placement, and what does not."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.gate import Gate, route_reference
from expertmesh.mesh.device_routing import MOST_REPLICAS, DeviceRouting
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.v1 import mesh_pb2

TOPOLOGY = Topology(slots_per_rank=2, node_R=(0, 0, 1), own_node=0, server_id="a1")
SLOTS = [0, 1, 0, 2, 1, -1]


def placement(slots: list[int], version: int = 1, quota_R: list[float] | None = None) -> mesh_pb2.LayerPlacement:
    made = mesh_pb2.LayerPlacement(layer=3, version=version, slots=slots)
    if quota_R is not None:
        made.source_quotas.add(server_id="a1", rank_share=quota_R)
    return made


def device_routing(tables: RoutingTables, topology: Topology = TOPOLOGY, num_experts: int = 3) -> DeviceRouting:
    return DeviceRouting(tables, topology, (3,), num_experts=num_experts, device=torch.device("cpu"))


def test_tables_follow_a_placement_in_place() -> None:
    tables = RoutingTables([placement(SLOTS)], 3, TOPOLOGY)
    routing = device_routing(tables)
    on_device, prices = routing.tables(3), routing.prices(3)
    assert prices is not None
    assert on_device.replica_EW.tolist() == [[0, 2, -1], [1, 4, -1], [3, -1, -1]]
    assert on_device.rank_EW.tolist() == [[0, 1, -1], [0, 2, -1], [1, -1, -1]]
    assert (on_device.own_rank, on_device.own_node) == (-1, 0)
    assert prices.share_R.tolist() == pytest.approx([1 / 3] * 3)
    before = on_device.replica_EW.data_ptr()
    tables.replace(placement([0, 1, 2, -1, 2, 0], 2, [0.5, 0.25, 0.25]))
    assert on_device.replica_EW.tolist() == [[0, 5, -1], [1, -1, -1], [2, 4, -1]]
    assert routing.tables(3).replica_EW.data_ptr() == before
    assert prices.share_R.tolist() == [0.5, 0.25, 0.25]


def test_prices_carry_over_with_a_completed_step_and_through_a_placement() -> None:
    tables = RoutingTables([placement(SLOTS)], 3, TOPOLOGY)
    routing = device_routing(tables)
    prices = routing.prices(3)
    assert prices is not None
    prices.after_R.copy_(torch.tensor([0.5, 0.0, 0.25]))
    assert prices.price_R.tolist() == [0, 0, 0]
    tables.commit()
    tables.replace(placement([0, 1, 2, -1, 2, 0], 2))
    assert prices.price_R.tolist() == [0.5, 0.0, 0.25]


def test_a_second_micro_batch_finds_the_prices_behind_the_first() -> None:
    tables = RoutingTables([placement(SLOTS)], 3, TOPOLOGY)
    routing = device_routing(tables)
    first, second = routing.prices(3), routing.prices(3, goes_on=True)
    assert first is not None
    assert second is not None
    for _ in range(2):  # a step that is run again finds what it had found
        found = []
        for prices in (first, second):
            found.append(prices.price_R.tolist())
            route_reference(torch.tensor([[1.0, 0.0, 0.5]] * 4), Gate(top_k=2), routing.tables(3), prices=prices)
        assert found[0] == [0, 0, 0]
        assert found[1] != found[0]
    after = second.after_R.tolist()
    tables.commit()
    assert first.price_R.tolist() == after != found[1]


def test_without_room_for_replicas_there_is_nothing_to_choose() -> None:
    topology = Topology(slots_per_rank=3, node_R=(0,), own_rank=0, own_node=0)
    routing = device_routing(RoutingTables([placement([2, 0, 1])], 3, topology), topology)
    assert routing.prices(3) is None
    assert routing.tables(3).replica_EW.tolist() == [[1], [2], [0]]
    routing.commit()


def test_an_expert_on_many_ranks_is_chosen_on_the_first_ones_of_each_source() -> None:
    found = []
    for source in range(2):
        topology = Topology(slots_per_rank=2, node_R=(0,) * 6, source=source)
        routing = device_routing(RoutingTables([placement([0, 1] * 6)], 2, topology), topology, num_experts=2)
        found.append(routing.tables(3).replica_EW[0].tolist())
    assert found == [[0, 2, 4, 6], [2, 4, 6, 8]]
    assert len(found[0]) == MOST_REPLICAS


def test_a_source_follows_its_quota() -> None:
    tables = RoutingTables([placement([0, 1, 0, 1, 0, 1], quota_R=[0.5, 0.2, 0.3])], 2, TOPOLOGY)
    routing = device_routing(tables, num_experts=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        logits_TE = torch.randn(16, 2, generator=generator)
        route_reference(logits_TE, Gate(top_k=1), routing.tables(3), prices=routing.prices(3), totals=routing.totals(3))
        tables.commit()
    rows_R = routing.slot_load_LG[0].view(3, 2).sum(1)
    assert (rows_R / rows_R.sum()).tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
