"""The command line as a person meets it: exit status, one line on stderr, no traceback, nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import expertmesh

pytestmark = pytest.mark.slow

TIMEOUT_S = 60


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder, check=False)


def test_help_lists_the_commands(tmp_path: Path) -> None:
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("up", "generate", "balancer", "serve", "bench"))


def test_version(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"expertmesh {expertmesh.__version__}\n"


@pytest.mark.parametrize("command", ["--help", "up", "generate", "balancer", "serve"])
def test_commands_do_not_import_torch(tmp_path: Path, command: str) -> None:
    program = f"""
import sys
from expertmesh.cli.main import build_app
build_app([{command!r}])
print("torch" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize(
    ("yaml", "arguments", "message"),
    [
        (
            "attention: {block_sizes: 16}",
            ["up"],
            "attention.block_sizes: unknown key (did you mean attention.block_size?)",
        ),
        ("attention: [2, 3]", ["up"], "attention: is a list and should be a mapping of keys"),
        ("expert: {servers: 3}\nexpert: {servers: 4}", ["up"], "expert stands in line 1 and again in line 2"),
        ("attention:\n\tservers: 2", ["up"], "is not valid YAML (line 2, column 1: "),
        ("attention: {block_size: 0}", ["up"], "attention.block_size"),
        ("attention: [", ["up"], "not valid YAML"),
        ("{}", ["up", "--attention", "0"], "at least one attention half"),
        ("{}", ["up", "--dtype", "int3"], "model.dtype"),
        ("telemetry: {metrics_port: 9100}", ["up"], "telemetry.metrics_port"),
        ("{}", ["serve", "attention"], "balancer.address"),
        ("{}", ["serve", "attention", "--balancer", "a:1,b:2", "--port", "5"], "--port"),
        ("{}", ["serve", "expert", "--balancer", "a:1", "--share-port"], "--share-port: is given for the role expert"),
        ("{}", ["serve", "router", "--balancer", "a:1", "--share-port"], "router.port: is 0"),
        ("{router: {port: 7}}", ["serve", "router", "--balancer", "a:1", "--share-port"], "router.http.port: is 0"),
        ("{}", ["serve", "attention", "--balancer", "nowhere"], "--balancer: 'nowhere' is not an address"),
    ],
)
def test_wrong_configuration_is_one_line_and_status_2(
    tmp_path: Path, yaml: str, arguments: list[str], message: str
) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml)
    result = run(tmp_path, arguments[0], *arguments[1:], "--config", str(config))
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_generate_without_a_mesh_names_the_remedy(tmp_path: Path) -> None:
    result = run(tmp_path, "generate", "hello")
    assert result.returncode == 2
    assert "expertmesh up" in result.stderr


def test_missing_configuration_file(tmp_path: Path) -> None:
    result = run(tmp_path, "up", "--config", "nowhere.yaml")
    assert result.returncode == 2
    assert "nowhere.yaml: cannot be read" in result.stderr
