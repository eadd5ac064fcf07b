"""``mesh.yaml``: what a slip in it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.mesh.config import MeshConfig, load_config
from expertmesh.mesh.errors import UserError


def load(tmp_path: Path, text: str) -> MeshConfig:
    file = tmp_path / "mesh.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attenton: {servers: 1}", "attenton: unknown key (did you mean attention?)"),
        ("balancer: {etcd: {endpoint: x}}", "(did you mean balancer.etcd.endpoints?)"),
        ("zzz: 1", "zzz: unknown key; see"),
        ("router: {http: true}", "router.http: is true or false and should be a mapping of keys (got True)"),
        ("attention: {servers: two}", "attention.servers: Input should be a valid integer"),
        ("attention: {servers: 0}", "mesh.yaml: attention.servers is 0 and both_servers is 0"),
        ("expert: {servers: 3, servers: 4}", "servers stands in line 1 and again in line 1; keep one of them"),
        ("model: {name: a}\nrouter:\nmodel: {name: b}", "model stands in line 1 and again in line 3"),
        ("attention: [", "is not valid YAML (line 1, column 13: "),
        ("? [a]\n: 1", "is not valid YAML (line 1, column 3: "),
        ("- attention", "holds a list; write a mapping"),
        ("attention", "holds text; write a mapping"),
    ],
)
def test_slip_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "expert:\n  # servers: 4\nrouter: {http: }\n"])
def test_section_without_keys_has_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == MeshConfig()


def test_anchors_are_yaml(tmp_path: Path) -> None:
    text = "attention: {servers: &n 4}\nexpert: {servers: *n}\n"
    assert load(tmp_path, text).expert.servers == 4
