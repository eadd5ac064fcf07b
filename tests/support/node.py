"""Node scripts with packages of npm, installed in a folder of their own."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = Path(__file__).parents[1] / "browser"
INSTALL_TIMEOUT_S = 120.0
LOOK_TIMEOUT_S = 90.0


def node_script(source: Path, script: str, folder: Path) -> list[str]:
    """The command line of one of the scripts of ``source``, which holds a package.json and no folders; skips the test
    where its packages cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(f"{script} is not run: node and npm are not installed")
    for file in source.iterdir():
        shutil.copy(file, folder)
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
    try:
        result = subprocess.run(
            install, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{script} is not run: npm did not finish within {INSTALL_TIMEOUT_S:g} s")
    if result.returncode:
        pytest.skip(f"{script} is not run: npm cannot install its packages: {result.stderr.strip()[-300:]}")
    return [node, str(folder / script)]


async def look(script: str, url: str, *arguments: str, folder: Path) -> Any:
    """What a script of tests/browser sees there in Chromium, from the JSON that it prints; skips the test where there
    is no browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip(f"{script} is not run: there is no command 'chromium' (Debian: apt-get install chromium)")
    command = await asyncio.to_thread(node_script, BROWSER, script, folder)
    process = await asyncio.create_subprocess_exec(*command, chromium, url, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return json.loads(output)
