"""kill -9 of the balancer in every phase of a migration, under traffic: no wrong token, no lost request, one placement.

A phase is held by standing processes still: a migration cannot go on without the rank, nor with a balancer, that hangs.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from support import reference
from support.mesh import demo_prompts, generate_all, greedy_request, kept_down, logs, mesh_config, start_mesh
from support.mesh_state import metrics, rank_ids, status, stepping, until

pytestmark = pytest.mark.slow

NUM_TOKENS = 32
DEMO_EOS = 0
TIMEOUT_S = 40.0
POLL_S = 0.02
PATIENCE_S = 30.0  # of a rank with others, and of the balancer with ranks: nothing that hangs here is to be given up
STAGED = "expertmesh_rank_migration_duration_seconds_count"  # one for the staging, one for the switch
ENDED = "expertmesh_rank_migrations_total"
MOVED, FALLBACKS = "expertmesh_migrated_slots_total", "expertmesh_migration_fallbacks_total"

DESTINATIONS = ("expert-0", "expert-1")  # of ``Scene.apply``

Expected = list[tuple[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def expected() -> Expected:
    path, texts = demo_model_path(), [prompt.text for prompt in demo_prompts()][::4]
    encoded = tuple(reference.encode(path, text) for text in texts)
    return list(zip(texts, reference.greedy(path, encoded, NUM_TOKENS, DEMO_EOS), strict=True))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """Two attention and three expert servers, without spare slots; what dies is started again."""
    settings = mesh_config(
        attention__servers=2,
        expert__servers=3,
        balancer__layer_updates_per_iter=1,
        balancer__migration_timeout_s=PATIENCE_S,
        balancer__lease_s=PATIENCE_S,
        dataplane__timeout_s=PATIENCE_S,
        telemetry__metrics_port=0,
    )
    mesh = start_mesh(tmp_path_factory.mktemp("mesh"), settings, restart=True)
    try:
        yield mesh
    finally:
        mesh.stop()


@asynccontextmanager
async def traffic(router: str, expected: Expected) -> AsyncIterator[None]:
    """For as long as the block runs; every request has to end, with the reference's tokens."""
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            outputs = await generate_all(
                router, [greedy_request(text, NUM_TOKENS) for text, _ in expected], concurrency=8
            )
            for (text, tokens), output in zip(expected, outputs, strict=True):
                ids = output.token_ids
                assert tuple(ids[:-1] if ids and ids[-1] == DEMO_EOS else ids) == tokens, text

    async with asyncio.TaskGroup() as group:
        group.create_task(run(), name="traffic")
        yield
        stop.set()


class Scene:
    """A mesh with one migration of ``layer`` asked for; ``stopped`` are the servers that stand still."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        self.layer = 0
        self.stopped: set[str] = set()

    def stop(self, *server_ids: str) -> None:
        for server_id in server_ids:
            self._signal(server_id, signal.SIGSTOP)
            self.stopped.add(server_id)

    def go_on(self, *server_ids: str) -> None:
        for server_id in server_ids:
            self._signal(server_id, signal.SIGCONT)
            self.stopped.discard(server_id)

    def _signal(self, server_id: str, number: signal.Signals) -> None:
        pid = self.mesh.servers[server_id].pid
        assert pid is not None, f"{server_id} does not run"
        os.kill(pid, number)

    async def placement(self) -> admin_pb2.GetPlacementResponse:
        async with self._admin() as stub:
            return await stub.GetPlacement(admin_pb2.GetPlacementRequest())

    async def apply(self, *layers: int) -> None:
        """Ask for the first expert of expert-0 and of expert-1 to change places."""
        async with self._admin() as stub:
            now = await stub.GetPlacement(admin_pb2.GetPlacementRequest(layers=layers))
            width = len(now.layers[0].slots) // 3
            wish = admin_pb2.ApplyRequest(view_number=now.view_number)
            for placement in now.layers:
                slots = list(placement.slots)
                slots[0], slots[width] = slots[width], slots[0]
                wish.layers.add(layer=placement.layer, version=placement.version, slots=slots)
            await stub.Apply(wish)

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
        async with rpc.open_channel(self.mesh.balancer, TlsConfig()) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    async def reaches(self, phase: str, ranks_done: int) -> None:
        """Until the one migration that runs is so far."""
        seen = ""

        async def is_there() -> bool:
            nonlocal seen
            running = (await status(self.mesh)).migrations
            seen = str(running)
            return [(m.phase, m.ranks_done) for m in running] == [(phase, ranks_done)]

        await until(is_there, TIMEOUT_S, lambda: f"not {phase} on {ranks_done} ranks: {seen}", POLL_S)

    def counts(self, name: str) -> dict[str, float]:
        """Of every rank that does not stand still."""
        running = [server_id for server_id in rank_ids(self.mesh) if server_id not in self.stopped]
        return {server_id: metrics(self.mesh, server_id).get(name, 0.0) for server_id in running}

    async def grows(self, name: str, before: dict[str, float]) -> None:
        """Until the metric has grown on each of these ranks."""

        async def has_grown() -> bool:
            now = await asyncio.to_thread(self.counts, name)
            return all(now[server_id] > count for server_id, count in before.items())

        await until(has_grown, TIMEOUT_S, lambda: f"{name} does not grow from {before}", POLL_S)


# The phases: each leaves the scene as the balancer is to be killed in.


async def planned(scene: Scene) -> None:
    """A layer is announced to ranks that have not heard of it, another waits for its turn."""
    scene.stop(*rank_ids(scene.mesh))
    await scene.apply(scene.layer, scene.layer + 1)
    await scene.reaches("staging", 0)
    assert (await status(scene.mesh)).layers_to_apply == 1


async def staging(scene: Scene) -> None:
    """expert-0 waits for weights of expert-1; the other three have staged."""
    scene.stop("expert-1")
    await scene.apply(scene.layer)
    await scene.reaches("staging", 3)


async def staged(scene: Scene) -> None:
    """Every rank has staged, the balancer has not heard it of the last one."""
    before = {"attention-1": (await asyncio.to_thread(scene.counts, STAGED))["attention-1"]}
    scene.stop("attention-1")
    await scene.apply(scene.layer)
    await scene.reaches("staging", 4)
    scene.stop("balancer")
    scene.go_on("attention-1")
    await scene.grows(STAGED, before)


async def committing(scene: Scene) -> None:
    """The commit is on its way: all but one have heard it."""
    await staged(scene)
    scene.stop("attention-1")
    scene.go_on("balancer")
    await scene.reaches("committing", 0)


async def committed(scene: Scene) -> None:
    """Every rank has switched, the balancer has heard it of none."""
    before = await asyncio.to_thread(scene.counts, ENDED)
    await committing(scene)
    scene.stop("balancer")
    scene.go_on("attention-1")
    await scene.grows(ENDED, before)


class Registrar(mesh_pb2_grpc.MembershipServiceServicer):
    """Stands where the balancer was and only writes down what ranks register with: they try again and again."""

    def __init__(self) -> None:
        self.views: dict[str, mesh_pb2.View] = {}

    async def Join(
        self,
        request_iterator: AsyncIterator[mesh_pb2.JoinRequest],
        context: grpc.aio.ServicerContext[AsyncIterator[mesh_pb2.JoinRequest], AsyncIterator[mesh_pb2.JoinResponse]],
    ) -> AsyncIterator[mesh_pb2.JoinResponse]:
        registration = (await anext(request_iterator)).registration
        if registration.role != mesh_pb2.ROLE_ROUTER:
            self.views[registration.server_id] = registration.view
        await context.abort(grpc.StatusCode.UNAVAILABLE, "only looking")
        yield mesh_pb2.JoinResponse()


async def agreed_placement(mesh: LocalMesh) -> mesh_pb2.View:
    """While the balancer is down: the view with the placements that run, once every rank says the same."""
    registrar = Registrar()

    def register(server: grpc.aio.Server) -> Sequence[str]:
        mesh_pb2_grpc.add_MembershipServiceServicer_to_server(registrar, server)
        return (mesh_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,)

    async def is_dead() -> bool:
        return mesh.servers["balancer"].pid is None

    await until(is_dead, TIMEOUT_S, lambda: "the balancer does not end", POLL_S)
    host, _, port = mesh.balancer.rpartition(":")
    server = await rpc.start_server(
        host=host, port=int(port), tls=TlsConfig(), register=register, telemetry=disabled_telemetry()
    )

    agreed: list[mesh_pb2.View] = []

    async def agree() -> bool:
        views = list(registrar.views.values())
        if set(registrar.views) == set(rank_ids(mesh)) and all(view == views[0] for view in views):
            agreed.append(views[0])
            registrar.views.clear()  # once more: they may have been about to switch, before the next step
        return len(agreed) >= 2 and agreed[-1] == agreed[-2]

    def what_they_say() -> str:
        said = {name: [layer.version for layer in view.placement] for name, view in registrar.views.items()}
        return f"ranks do not agree on the placement: {said}"

    try:
        await until(agree, TIMEOUT_S, what_they_say, POLL_S)
    finally:
        await server.stop(0.1)
    return agreed[-1]


@pytest.mark.parametrize(
    ("hold", "switches"),
    [(staging, False), (planned, False), (staged, False), (committing, None), (committed, True)],
    ids=["staging", "planned", "staged", "committing", "committed"],
)
async def test_the_balancer_is_killed(
    mesh: LocalMesh,
    expected: Expected,
    hold: Callable[[Scene], Coroutine[Any, Any, None]],
    switches: bool | None,
) -> None:
    """``switches``: whether the new placement is the one in force then; None: either, as long as all ranks agree."""
    scene = Scene(mesh)
    try:
        before = await scene.placement()
        async with traffic(mesh.router, expected):
            await hold(scene)
            with kept_down(mesh, "balancer"):
                scene.stopped.discard("balancer")
                scene.go_on(*scene.stopped)
                view = await agreed_placement(mesh)
            has_switched = list(view.placement) != list(before.layers)
            print(f"{hold.__name__}: {'switched' if has_switched else 'as before'}")
            assert switches in (None, has_switched)
            await again(scene, view)
    except BaseException:
        for server_id in list(scene.stopped):
            scene.go_on(server_id)
        print(logs(mesh))
        raise


async def again(scene: Scene, view: mesh_pb2.View) -> None:
    """The balancer that starts again goes on from what runs, in the same view, and migrates as before: weights go from
    peer to peer, who need nothing of the balancer for that."""
    mesh = scene.mesh

    async def is_whole() -> bool:
        return await stepping(mesh) is not None

    await until(is_whole, TIMEOUT_S, lambda: "the balancer does not adopt the mesh")
    after = await scene.placement()
    assert (after.view_number, list(after.layers)) == (view.number, list(view.placement))
    versions = {layer.layer: layer.version for layer in after.layers if layer.layer in (scene.layer, scene.layer + 1)}
    moved = await asyncio.to_thread(scene.counts, MOVED)
    fallbacks = await asyncio.to_thread(scene.counts, FALLBACKS)

    async def has_migrated() -> bool:
        """A layer that a rank has staged for a plan that died with the balancer is refused once."""
        now, current = await status(mesh), await scene.placement()
        left = [layer.layer for layer in current.layers if versions.get(layer.layer, 0) == layer.version]
        if left and not now.migrations and not now.layers_to_apply:
            await scene.apply(*left)
        return not left

    await until(has_migrated, TIMEOUT_S, lambda: "the mesh does not migrate any more", POLL_S)
    await scene.grows(MOVED, {server_id: count for server_id, count in moved.items() if server_id in DESTINATIONS})
    assert await asyncio.to_thread(scene.counts, FALLBACKS) == fallbacks
