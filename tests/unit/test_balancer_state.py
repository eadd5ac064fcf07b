from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.balancer.events import Event, EventLog
from expertmesh.balancer.saver import FileState, StateSaver
from expertmesh.balancer.state import (
    EVENTS_STORED,
    PREVIOUS_FILE,
    STATE_FILE,
    DurableState,
    ModeSwitch,
    StateFile,
    decode,
    encode,
    fresh_state,
)
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import mesh_pb2


def state(number: int = 3) -> DurableState:
    view = mesh_pb2.View(number=number, slots_per_rank=2, store_address="h:1", secret=b"\x00\xff")
    view.ranks.add(rank=0, server_id="a1", incarnation="x", role=mesh_pb2.ROLE_ATTENTION)
    placement = view.placement.add(layer=4, version=7, slots=[0, -1, 1, 2])
    placement.source_quotas.add(server_id="a1", rank_share=[0.75, 0.25])
    event = Event(number=5, unix_s=1.5, kind="view_published", subject="view 3", message="é")
    switch = ModeSwitch(mode="online", layer_updates_per_iter=3, configured="static")
    return DurableState(
        mesh_id="m", view=view, fingerprint="f", fenced=("i1", "i2"), events=(event,), mode_switch=switch
    )


def test_a_state_survives_the_file(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "deep" / "folder")
    assert file.load() is None
    file.save(state())
    assert file.load() == state()
    assert (tmp_path / "deep" / "folder" / STATE_FILE).stat().st_mode & 0o077 == 0, "it holds a secret"
    file.close()


def test_only_the_newest_events_are_stored() -> None:
    many = tuple(replace(state().events[0], number=number) for number in range(2 * EVENTS_STORED))
    assert decode(encode(replace(state(), events=many))).events[0].number == EVENTS_STORED


def test_the_state_of_a_version_that_forgot_mode_switches_loads() -> None:
    fields = json.loads(encode(state()).split(b"\n")[1])
    del fields["mode_switch"]
    body = json.dumps(fields).encode()
    old = decode(hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n")
    assert old == replace(state(), mode_switch=None)


def test_the_state_of_a_version_with_shares_of_slots_loads() -> None:
    fields = json.loads(encode(state()).split(b"\n")[1])
    fields["view"]["placement"][0]["quotas"] = [0.25, 0.0, 1.0, 1.0]
    body = json.dumps(fields).encode()
    assert decode(hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n") == state()


@given(st.integers(0, len(encode(state())) - 1), st.binary(max_size=3))
def test_no_torn_or_altered_file_is_taken_for_whole(cut: int, tail: bytes) -> None:
    data = encode(state())
    damaged = data[:cut] + tail
    if damaged.rstrip(b"\n") != data.rstrip(b"\n"):
        with pytest.raises(ValueError, match="torn"):
            decode(damaged)


def test_a_torn_file_gives_way_to_the_previous_generation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = StateFile(tmp_path)
    file.save(state(3))
    file.save(state(4))
    (tmp_path / STATE_FILE).write_bytes(encode(state(4))[:50])
    with caplog.at_level(logging.ERROR):
        assert file.load() == state(3)
    assert "torn" in caplog.text
    file.save(state(5))
    assert decode((tmp_path / STATE_FILE).read_bytes()) == state(5)
    assert not (tmp_path / PREVIOUS_FILE).exists() or decode((tmp_path / PREVIOUS_FILE).read_bytes()) == state(3)
    file.close()


def test_a_crash_between_the_two_renames_leaves_the_previous_generation(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.save(state(3))
    (tmp_path / STATE_FILE).rename(tmp_path / PREVIOUS_FILE)
    assert file.load() == state(3)
    file.close()


def test_two_torn_files_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.save(state(3))
    file.save(state(4))
    for name in (STATE_FILE, PREVIOUS_FILE):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"balancer.state_dir: .*torn.*remove them"):
        file.load()
    file.close()


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    body = b'{"format": 99}'
    with pytest.raises(ValueError, match="format 99"):
        decode(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def test_a_folder_serves_one_balancer_at_a_time(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    with pytest.raises(UserError, match="in use by another balancer"):
        StateFile(tmp_path)
    file.close()
    StateFile(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"balancer.state_dir"):
        StateFile(tmp_path / "file" / "sub")


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(tmp_path)
    file.save(state(3))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.save(state(4))
    assert file.load() == state(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", STATE_FILE]
    file.close()


def test_a_disk_that_fills_up_in_the_middle_of_a_write_keeps_what_was_saved(tmp_path: Path) -> None:
    """The kernel itself breaks the write off: a part of the new state is on the disk when it fails."""
    file = StateFile(tmp_path)
    file.save(state(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(encode(state(4))) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.save(state(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.load() == state(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", STATE_FILE]
    file.save(state(5))
    assert file.load() == state(5)
    file.close()


class FullDisk(StateFile):
    def __init__(self) -> None:
        self.full = True
        self.saved: list[DurableState] = []

    def save(self, state: DurableState) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.saved.append(state)


async def test_a_full_disk_is_one_event_and_the_newest_state_is_saved_later() -> None:
    events, disk = EventLog(lambda: 0.0), FullDisk()
    saver = StateSaver(FileState(disk), events)
    for number in (3, 4):
        saver.ask(state(number))
        assert not await saver.flush()
    disk.full = False
    assert await saver.flush()
    assert disk.saved == [state(4)]
    assert [event.kind for event in events.after(0)] == ["state_not_saved", "state_saved"]


def test_events_go_on_counting_from_an_earlier_process() -> None:
    events = EventLog(lambda: 2.0, state().events)
    events.add("paused", "mesh", "why")
    assert [event.number for event in events.after(0)] == [5, 6]
    assert [event.number for event in events.after(5)] == [6]
    assert [event.number for event in events.after(0, limit=1)] == [6]


async def test_waiting_for_an_event_ends_with_it() -> None:
    events = EventLog(lambda: 0.0)
    waiting = asyncio.create_task(events.wait_beyond(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    events.add("paused", "mesh", "why")
    await asyncio.wait_for(waiting, 20)
    assert fresh_state().mesh_id != fresh_state().mesh_id


def test_events_that_a_dead_process_had_not_saved_keep_their_numbers() -> None:
    events = EventLog(lambda: 2.0, state().events, unsaved=10)
    for kind in ("balancer_started", "paused"):
        events.add(kind, "mesh", "why")
    assert [event.number for event in events.after(0)] == [5, 16, 17]
