"""The loop around the reconcile loop."""

from __future__ import annotations

import asyncio

from expertmesh.balancer.leading import Driver
from expertmesh.balancer.load_gauges import LoadGauges
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.statistics import Statistics
from expertmesh.mesh.telemetry import disabled_telemetry
from support.balancer_world import World, config


async def test_a_driver_that_is_woken_while_it_is_cancelled_ends() -> None:
    world = World(config())
    metrics = disabled_telemetry().metrics
    routing = RoutingDesk(world.actual, Statistics(1), world.effects.send, lambda: world.now)
    loads = LoadGauges(routing, metrics)
    driver = Driver(world.reconciler, world.actual, world.control.migrations, loads, metrics)
    for _ in range(3):
        running = asyncio.create_task(driver.run())
        for _ in range(5):  # turns of the event loop: it ticks, and then waits
            await asyncio.sleep(0)
        driver.wake()
        running.cancel()
        await asyncio.wait({running}, timeout=2)
        assert running.cancelled()
