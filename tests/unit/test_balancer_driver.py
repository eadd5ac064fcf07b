"""The loop around the reconcile loop."""

from __future__ import annotations

import asyncio

import pytest

from expertmesh.balancer.leading import Driver
from expertmesh.balancer.load_gauges import LoadGauges
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.statistics import Statistics
from expertmesh.mesh.telemetry import disabled_telemetry
from support.balancer_parts import config
from support.balancer_world import World


def driver_of(world: World) -> Driver:
    metrics = disabled_telemetry().metrics
    routing = RoutingDesk(world.actual, Statistics(1), world.effects.send, lambda: world.now)
    return Driver(world.reconciler, world.actual, world.control.migrations, LoadGauges(routing, metrics), metrics)


async def test_what_can_wait_a_moment_is_dealt_with_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(config(heartbeat_s=20.0, lease_s=60.0))
    ticked = asyncio.Event()
    rounds = 0

    def tick(now: float) -> None:
        nonlocal rounds
        rounds += 1
        ticked.set()

    monkeypatch.setattr(world.reconciler, "tick", tick)
    monkeypatch.setattr(world.reconciler, "due_in_s", lambda now: 60.0)
    monkeypatch.setattr("expertmesh.balancer.leading.SOON_S", 0.2)  # a busy machine may take a moment between two lines
    driver = driver_of(world)
    running = asyncio.create_task(driver.run())
    await ticked.wait()
    for urgent in (False, True):  # what cannot wait takes along what can
        ticked.clear()
        rounds = 0
        for _ in range(5):
            driver.wake_soon()
            await asyncio.sleep(0)
            assert not rounds
        if urgent:
            driver.wake()
        async with asyncio.timeout(20):
            await ticked.wait()
        assert rounds == 1
    running.cancel()
    await asyncio.wait({running}, timeout=2)


async def test_a_driver_that_is_woken_while_it_is_cancelled_ends() -> None:
    driver = driver_of(World(config()))
    for _ in range(3):
        running = asyncio.create_task(driver.run())
        for _ in range(5):  # turns of the event loop: it ticks, and then waits
            await asyncio.sleep(0)
        driver.wake()
        running.cancel()
        await asyncio.wait({running}, timeout=2)
        assert running.cancelled()
