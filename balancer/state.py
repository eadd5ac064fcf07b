"""What the balancer must not forget: one JSON file and its previous generation, replaced atomically.

A file is two lines: the SHA-256 of the second, and the state. It holds a view's secret, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from expertmesh.balancer.events import Event
from expertmesh.balancer.ledger import Ledger
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
PREVIOUS_FILE = "state.previous.json"
DAMAGED_FILE = "state.damaged.json"
LOCK_FILE = "lock"
EVENTS_STORED = 200
LEAVING_KEPT = 256
_EVENT_FIELDS = tuple(field.name for field in fields(Event))

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeSwitch:
    """What an administrator switched to, in a mesh whose configuration said ``configured``."""

    mode: str
    layer_updates_per_iter: int
    configured: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleState:
    """How many servers there should be, by role, in a mesh whose configuration said ``configured``.

    Args:
        version: grows with each change.
        leaving: incarnations that were asked to drain, oldest first.
    """

    version: int
    targets: dict[str, int]
    configured: dict[str, int]
    leaving: tuple[str, ...] = ()

    def with_leaving(self, incarnation: str) -> ScaleState:
        """The same, and one more was asked to drain."""
        return replace(self, leaving=(*self.leaving, incarnation)[-LEAVING_KEPT:])


@dataclass(frozen=True, kw_only=True, slots=True)
class DurableState:
    """``view`` is the one published last, whether it still steps or not; empty when there was none."""

    mesh_id: str
    view: mesh_pb2.View
    fingerprint: str
    fenced: tuple[str, ...]  # incarnations that are over, oldest first
    events: tuple[Event, ...]
    ledger: Ledger = field(default_factory=Ledger)
    mode_switch: ModeSwitch | None = None  # None: the mode is the configuration's
    scale: ScaleState | None = None  # None: the configuration's servers


def fresh_state() -> DurableState:
    return DurableState(mesh_id=uuid.uuid4().hex, view=mesh_pb2.View(), fingerprint="", fenced=(), events=())


class StateFile:
    """The state in one folder, which is locked for as long as this object is open.

    Raises:
        UserError: the folder cannot be made or written, or another balancer holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(
                "balancer.state_dir", f"{folder} cannot be used ({error.strerror})", "name a folder that can be written"
            ) from None
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_fd)
            raise UserError(
                "balancer.state_dir",
                f"{folder} is in use by another balancer",
                "stop it, or give each mesh its own name or state_dir",
            ) from None

    def close(self) -> None:
        os.close(self._lock_fd)

    def load(self) -> DurableState | None:
        """The newest whole generation; None when nothing was ever saved.

        Raises:
            UserError: files are there and none is whole.
        """
        problems: list[str] = []
        for name in (STATE_FILE, PREVIOUS_FILE):
            path = self._folder / name
            try:
                state = decode(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problems.append(f"{path} {error}")
                continue
            if problems:
                log.error("%s; going on from the previous generation, view %d", problems[0], state.view.number)
                # Out of the way, or the next save would make it the previous generation.
                (self._folder / STATE_FILE).replace(self._folder / DAMAGED_FILE)
            return state
        if not problems:
            return None
        raise UserError(
            "balancer.state_dir",
            "; ".join(problems),
            "remove them to start without: a mesh that runs is then adopted from what its servers bring",
        )

    def save(self, state: DurableState) -> None:
        """Replace the state; the one before it becomes the previous generation. A crash leaves one of the two whole.

        Raises:
            OSError: nothing could be written (a full disk); what was saved before is untouched.
        """
        current, temporary = self._folder / STATE_FILE, self._folder / (STATE_FILE + ".tmp")
        try:
            _write_durably(temporary, encode(state))
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        with contextlib.suppress(FileNotFoundError):
            current.rename(self._folder / PREVIOUS_FILE)
        temporary.rename(current)
        _sync_folder(self._folder)


def encode(state: DurableState) -> bytes:
    body = json.dumps(
        {
            "format": FORMAT,
            "mesh_id": state.mesh_id,
            "fingerprint": state.fingerprint,
            "fenced": state.fenced,
            "view": json_format.MessageToDict(state.view, preserving_proto_field_name=True),
            "migrations": {
                "last_id": state.ledger.last_id,
                "versions": list(state.ledger.versions.items()),
                "plans": [
                    json_format.MessageToDict(plan, preserving_proto_field_name=True)
                    for plan in state.ledger.plans.values()
                ],
            },
            "mode_switch": None if state.mode_switch is None else asdict(state.mode_switch),
            "scale": None if state.scale is None else asdict(state.scale),
            "events": [_event_fields(event) for event in state.events[-EVENTS_STORED:]],
        },
        separators=(",", ":"),
    ).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"


def _event_fields(event: Event) -> dict[str, Any]:
    """As ``asdict``, which copies deeply and takes ten times as long: a migration saves the state three times."""
    return {name: getattr(event, name) for name in _EVENT_FIELDS}


def decode(data: bytes) -> DurableState:
    """
    Raises:
        ValueError: torn, altered, or of another format; the message continues a file's name.
    """
    digest, _, rest = data.partition(b"\n")
    body = rest.removesuffix(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("is torn or was altered: its checksum does not match")
    fields: dict[str, Any] = json.loads(body)
    if fields["format"] != FORMAT:
        raise ValueError(f"has format {fields['format']}, this version reads {FORMAT}")
    return DurableState(
        mesh_id=fields["mesh_id"],
        fingerprint=fields["fingerprint"],
        fenced=tuple(fields["fenced"]),
        view=_parsed(fields["view"], mesh_pb2.View()),
        events=tuple(Event(**event) for event in fields["events"]),
        ledger=_decode_ledger(fields.get("migrations")),
        mode_switch=_decode_mode_switch(fields.get("mode_switch")),
        scale=_decode_scale(fields.get("scale")),
    )


def _parsed(fields: dict[str, Any], message: M) -> M:
    """Fields that an earlier version wrote and this one does without are passed over."""
    return json_format.ParseDict(fields, message, ignore_unknown_fields=True)


def _decode_ledger(fields: dict[str, Any] | None) -> Ledger:
    """None: the state of a version without migrations."""
    if fields is None:
        return Ledger()
    plans = [_parsed(plan, mesh_pb2.MigrationPlan()) for plan in fields["plans"]]
    return Ledger(
        last_id=fields["last_id"],
        versions=dict(fields["versions"]),
        plans={plan.id: plan for plan in plans},
    )


def _decode_mode_switch(fields: dict[str, Any] | None) -> ModeSwitch | None:
    """None: no switch, or the state of a version that forgot them."""
    return None if fields is None else ModeSwitch(**fields)


def _decode_scale(fields: dict[str, Any] | None) -> ScaleState | None:
    """None: the state of a version without scaling."""
    return None if fields is None else ScaleState(**{**fields, "leaving": tuple(fields["leaving"])})


def _write_durably(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
