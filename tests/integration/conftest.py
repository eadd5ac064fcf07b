"""The mesh that the ``test_mesh_*`` modules share; it is stopped before the first test of another module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from expertmesh.mesh import rpc
from support.live_mesh import LiveMesh, LiveMeshHolder

_HOLDER = pytest.StashKey[LiveMeshHolder]()
_SHARED_BY = "test_mesh_"


@pytest_asyncio.fixture(autouse=True)
async def calls_over() -> AsyncIterator[None]:
    """Each test has an event loop of its own, beside that of a mesh which several share."""
    yield
    await rpc.calls_over()


@pytest_asyncio.fixture
async def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LiveMesh:
    stash = request.config.stash
    if _HOLDER not in stash:
        stash[_HOLDER] = LiveMeshHolder(lambda: tmp_path_factory.mktemp("live-mesh"))
    return await stash[_HOLDER].get()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    done = nextitem is None or not nextitem.path.name.startswith(_SHARED_BY)
    if done and _HOLDER in item.config.stash:
        item.config.stash[_HOLDER].stop()
