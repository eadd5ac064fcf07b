"""A service's stderr, rolled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from expertmesh.cli.rolling_log import LogSize, opened

LINES = 400


def write_lines(path: Path, size: LogSize | None) -> None:
    code = f"import sys\nfor i in range({LINES}): print(f'line {{i:04}}', file=sys.stderr)"
    with opened(path, size) as stderr:
        subprocess.run([sys.executable, "-S", "-c", code], stderr=stderr, check=True, timeout=60)


def test_the_log_is_rolled_and_the_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "expert-0.log"
    write_lines(path, LogSize(max_bytes=1000, keep=2))
    files = [tmp_path / "expert-0.log.2", tmp_path / "expert-0.log.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = "".join(file.read_text(encoding="utf-8") for file in files).splitlines()
    assert kept == [f"line {number:04}" for number in range(LINES - len(kept), LINES)]
    assert len(kept) > 200


def test_without_a_size_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "expert-0.log"
    write_lines(path, None)
    write_lines(path, None)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2 * LINES
