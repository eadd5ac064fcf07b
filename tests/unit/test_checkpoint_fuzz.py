"""Broken checkpoint folders: whatever is in them, reading ends well or in a ``UserError``, soon, and stays inside."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.sizes import read_sizes
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.model.tensors import INDEX_FILE
from support.checkpoints import write_checkpoint

NUM_SHARDS = 2
SHARD = "model-00001-of-00002.safetensors"
JSON_FILES = ("config.json", "generation_config.json", INDEX_FILE)
CASES = 500
CONFIG_CASES = 1000
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "data" / "configs").glob("*.json"))
MAX_MESSAGE = 3000
MAX_MEMORY = 64 * 2**20

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 1.5, -0.0, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, float("nan"),
    float("inf"), "", "x", "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "~root", "é" * 3000, [], {}, [[]],
    [1, True], [None], {"a": None}, [0] * 40, [2**62] * 16,
)  # fmt: skip
ODD_TEXTS: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\xfd",
    b"\xef\xbb\xbf{}",
    b'{"a": 1, "a": 2}',
    b"[" * 100_000,
)
ODD_TEXTS += (b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a": ' + b"9" * 6000 + b"}")
ODD_TEXTS += (b'{"\\ud800": 1}', b'{"a": NaN}', b"{}" * 2, b"\0" * 50, "{}".encode("utf-16"))


class Folder:
    """A healthy folder whose copies get broken."""

    def __init__(self, root: Path) -> None:
        self.healthy = write_checkpoint(
            root / "healthy", shards=NUM_SHARDS, num_experts=2, num_hidden_layers=1, vocab_size=32
        )
        (self.healthy / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_p": 0.5}))
        (root / "secret").write_bytes((self.healthy / SHARD).read_bytes())
        self.path = root / "broken"

    def restore(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.healthy, self.path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("fuzz"))


def odd_json(rng: random.Random, value: Any) -> Any:
    """``value`` with one of its parts replaced, dropped or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = dict(value)
        match rng.randrange(4):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(("x", "\ud800", "é" * 2000, ""))] = changed.pop(key)
            case _:
                changed[key] = odd_json(rng, changed[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], odd_json(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 2**32))
    return rng.choice(ODD_VALUES)


def read_header(raw: bytes) -> tuple[Any, bytes]:
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def write_header(path: Path, header: bytes, data: bytes, num_bytes: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if num_bytes is None else num_bytes) + header + data)


def break_json(rng: random.Random, path: Path) -> None:
    file = path / rng.choice(JSON_FILES)
    file.write_text(json.dumps(odd_json(rng, json.loads(file.read_text()))))


def break_text(rng: random.Random, path: Path) -> None:
    (path / rng.choice(JSON_FILES)).write_bytes(rng.choice(ODD_TEXTS))


def break_bytes(rng: random.Random, path: Path) -> None:
    """Flip, cut or add bytes, most often where the header is."""
    file = path / rng.choice((*JSON_FILES, SHARD))
    raw = bytearray(file.read_bytes())
    place = rng.randrange(min(len(raw), 3000))
    match rng.randrange(4):
        case 0:
            raw[place] = rng.randrange(256)
        case 1:
            del raw[place:]
        case 2:
            raw[place:place] = rng.randbytes(rng.randrange(1, 20))
        case _:
            raw += rng.randbytes(rng.randrange(1, 20))
    file.write_bytes(raw)


def break_header(rng: random.Random, path: Path) -> None:
    header, data = read_header((path / SHARD).read_bytes())
    write_header(path / SHARD, json.dumps(odd_json(rng, header)).encode(), data)


def break_header_text(rng: random.Random, path: Path) -> None:
    _, data = read_header((path / SHARD).read_bytes())
    write_header(path / SHARD, rng.choice(ODD_TEXTS), data)


def break_header_length(rng: random.Random, path: Path) -> None:
    raw = (path / SHARD).read_bytes()
    length = rng.choice((0, 1, 7, len(raw) - 8, len(raw) - 7, 10**8, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64)))
    (path / SHARD).write_bytes(struct.pack("<Q", length) + raw[8:])


def break_offsets(rng: random.Random, path: Path) -> None:
    """Tensors that overlap, leave a gap, go backwards, end beyond the file or are of another size."""
    header, data = read_header((path / SHARD).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    match rng.randrange(5):
        case 0:
            header[one]["data_offsets"] = header[other]["data_offsets"]
        case 1:
            header[one]["data_offsets"].reverse()
        case 2:
            header[one]["data_offsets"][rng.randrange(2)] += rng.choice((-2, 2, 2**40, -(2**40)))
        case 3:
            header[one]["shape"] = [rng.choice((0, 2**40, 2**62)) for _ in range(rng.choice((1, 2, 40)))]
        case _:
            header[one]["dtype"] = rng.choice(("F64", "I8", "F4", "BOOL", "U128", "", "f32"))
    write_header(path / SHARD, json.dumps(header).encode(), data)


def break_index(rng: random.Random, path: Path) -> None:
    """Files that are elsewhere, absent, odd or of another kind."""
    index = json.loads((path / INDEX_FILE).read_text())
    name = rng.choice(sorted(index["weight_map"]))
    outside = ("../secret", str(path.parent / "secret"), "a/../../secret", "..\\secret", "//secret", "./../secret")
    odd = ("", ".", "config.json", "x" * 300, "x" * 5000, "\ud800", "\0", "absent", "link", f"./{SHARD}", f"{SHARD}/")
    index["weight_map"][name] = rng.choice(outside + odd)
    (path / INDEX_FILE).write_text(json.dumps(index))


def break_kind(rng: random.Random, path: Path) -> None:
    """A link out of the folder or to itself, a pipe, a folder, or nothing, instead of a file."""
    file = path / rng.choice((*JSON_FILES, SHARD))
    file.unlink()
    match rng.randrange(6):
        case 0:
            file.symlink_to("../secret")
        case 1:
            file.symlink_to(file.name)
        case 2:
            os.mkfifo(file)
        case 3:
            file.mkdir()
        case 4:
            file.symlink_to("/dev/zero")
        case _:
            pass


BREAKERS: tuple[Callable[[random.Random, Path], None], ...] = (
    break_json, break_json, break_json, break_text, break_bytes, break_header, break_header, break_header_text,
    break_header_length, break_offsets, break_offsets, break_index, break_kind,
)  # fmt: skip


def read_all(path: Path) -> None:
    """Everything that a rank reads."""
    spec = load_spec(ModelConfig(path=path))
    checkpoint = Checkpoint(spec.path)
    checkpoint.log_unused(spec)
    checkpoint.model_tensors(spec)
    for layer in range(spec.num_layers):
        checkpoint.layer_tensors(spec, layer)
    for layer in spec.moe_layers:
        checkpoint.expert(spec, layer, 0)


class Opened:
    """Files that the process opens below a folder, as Python's own audit events tell."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.paths: list[str] = []
        sys.addaudithook(self._hook)  # for ever: hooks cannot be taken away

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is not None and event == "open":
            path = os.path.realpath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | Path) else ""
            if path.startswith(self.root) or path.startswith("/etc") or path.startswith("/dev"):
                self.paths.append(path)


@pytest.fixture(scope="module")
def opened(folder: Folder) -> Iterator[Opened]:
    watch = Opened()
    watch.root = str(folder.path.parent)
    yield watch
    watch.root = None


def outcome(path: Path) -> UserError | None:
    try:
        read_all(path)
    except UserError as error:
        return error
    return None


def break_folder(folder: Folder, seed: int) -> bool:
    """False if there was nothing left to break a second time."""
    rng = random.Random(seed)
    folder.restore()
    try:
        # What makes a pipe comes last: another breaker would wait for ever to read it.
        breakers = rng.choices(BREAKERS, k=rng.choice((1, 1, 1, 2)))
        for breaker in sorted(breakers, key=lambda breaker: breaker is break_kind):
            breaker(rng, folder.path)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, struct.error, RecursionError):
        return False
    return True


def resident_bytes(key: str) -> int:
    """``VmRSS``: memory of the process now; ``VmHWM``: the most since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_broken_folders_end_in_a_user_error(folder: Folder, opened: Opened) -> None:
    folder.restore()
    read_all(folder.path)
    assert opened.paths, "the watch sees what is read"
    refused = 0
    for seed in filter(lambda seed: break_folder(folder, seed), range(CASES)):
        opened.paths.clear()
        forget_peak()
        before = resident_bytes("VmRSS")
        error = outcome(folder.path)
        if error is not None:
            refused += 1
            assert len(str(error)) < MAX_MESSAGE, seed
            assert "/broken" in str(error) or error.key.startswith("model."), (seed, error)
        assert all(path.startswith(f"{folder.path}/") for path in opened.paths), (seed, opened.paths)
        assert resident_bytes("VmHWM") - before < MAX_MEMORY, seed
    assert refused > CASES // 2


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_broken_configurations_of_every_family_end_in_a_user_error(tmp_path: Path) -> None:
    assert CONFIGS
    outcomes = {True: 0, False: 0}
    forget_peak()
    before = resident_bytes("VmRSS")
    for seed in range(CONFIG_CASES):
        rng = random.Random(seed)
        config = json.loads(rng.choice(CONFIGS).read_text())
        for _ in range(rng.choice((1, 1, 2, 3))):
            config = odd_json(rng, config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            sizes = read_sizes(tmp_path)
        except UserError as error:
            outcomes[False] += 1
            message, key = str(error), error.key
        else:
            outcomes[True] += 1
            assert sizes.total_parameters >= sizes.active_parameters > 0, seed
            continue
        assert "config.json" in key, (seed, message)
        assert len(message) < MAX_MESSAGE, seed
    assert resident_bytes("VmHWM") - before < MAX_MEMORY
    assert min(outcomes.values()) > CONFIG_CASES // 10
