"""The loop around the reconcile loop."""

from __future__ import annotations

import asyncio

from expertmesh.balancer.server import Driver
from expertmesh.mesh.telemetry import disabled_telemetry
from support.balancer_world import World, config


async def test_a_driver_that_is_woken_while_it_is_cancelled_ends() -> None:
    world = World(config())
    driver = Driver(world.reconciler, world.actual, world.control.migrations, disabled_telemetry().metrics)
    for _ in range(3):
        running = asyncio.create_task(driver.run())
        for _ in range(5):  # turns of the event loop: it ticks, and then waits
            await asyncio.sleep(0)
        driver.wake()
        running.cancel()
        await asyncio.wait({running}, timeout=2)
        assert running.cancelled()
