from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from expertmesh.mesh.config import ModelConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.hub import fetch_repo, is_repo
from expertmesh.mesh.model.spec import checkpoint_folder, load_spec
from support.checkpoints import write_checkpoint
from support.hub import COMMIT, FakeHub, serve_hub

REPO = "org/tiny-1.5"
WANTED = {
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}
UNWANTED = ("modeling_evil.py", "pytorch_model.bin", "model.pt", "README.md", "original/consolidated.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = write_checkpoint(tmp_path / "repo", shards=2, auto_map={"AutoModel": "modeling_evil.Evil"})
    for name in ("tokenizer.json", "chat_template.jinja", *UNWANTED):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    with serve_hub(FakeHub(REPO, folder)) as served:
        # What HF_ENDPOINT and HF_HOME would set in a new process; `test_from_the_command_line` starts one.
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield served


def test_only_what_is_read_is_fetched(hub: FakeHub) -> None:
    folder = fetch_repo(REPO)
    assert set(hub.asked) == WANTED
    assert {path.name for path in folder.iterdir()} == WANTED
    hub.asked.clear()
    assert fetch_repo(REPO) == folder
    assert hub.asked == []


def test_a_repository_is_a_model(hub: FakeHub) -> None:
    spec = load_spec(ModelConfig(repo=REPO))
    assert (spec.name, spec.path.name, spec.num_experts) == (REPO, COMMIT, 8)
    assert load_spec(ModelConfig(repo=REPO, name="mine")).name == "mine"
    assert load_spec(ModelConfig(path=hub.folder)).fingerprint == spec.fingerprint


def test_config_alone(hub: FakeHub) -> None:
    checkpoint_folder(ModelConfig(repo=REPO), weights=False)
    assert hub.asked == ["config.json"]


def test_revisions(hub: FakeHub) -> None:
    assert fetch_repo(REPO, COMMIT) == fetch_repo(REPO, "main") == fetch_repo(REPO)
    with pytest.raises(UserError, match=rf"model\.revision: {REPO} at v9 does not exist; give a branch"):
        fetch_repo(REPO, "v9")


def test_repository_that_does_not_exist(hub: FakeHub) -> None:
    with pytest.raises(UserError, match=r"model\.repo: org/other does not exist or is private; check its spelling"):
        fetch_repo("org/other")


def test_repository_that_needs_permission(hub: FakeHub) -> None:
    hub.gated = True
    with pytest.raises(UserError, match=rf"model\.repo: {REPO} needs permission; ask for it .* set HF_TOKEN"):
        fetch_repo(REPO)


def test_without_network_the_cache_will_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=rf"model\.repo: {REPO} cannot be fetched and is not whole in the cache"):
            fetch_repo(REPO)
    part = fetch_repo(REPO, weights=False)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch_repo(REPO, weights=False) == part
        with pytest.raises(UserError, match=r"is not whole in the cache"):
            fetch_repo(REPO)


@pytest.mark.slow
def test_from_the_command_line(hub: FakeHub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "expertmesh.cli.main", "inspect", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    told = run(REPO, "--revision", COMMIT, "--json")
    assert (told.returncode, told.stderr) == (0, "")
    assert json.loads(told.stdout)["num_experts"] == 8
    wrong = run("org/other", "--json")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: model.repo: org/other does not exist or is private")


def test_what_is_taken_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    assert is_repo("Qwen/Qwen3-30B-A3B")
    for folder in ("here/tiny", "./a/b", "/a/b", "a/b/c", "~/b", "../b", "model", "a/", "a/b\n"):
        assert not is_repo(folder)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"path": "/models/a", "repo": "a/b"}, "path and repo are both set: leave one out"),
        ({"revision": "main"}, "revision is set and repo is not"),
        ({"repo": "https://host/a/b"}, r"model\.repo: String should match pattern"),
        ({"repo": "../b"}, r"model\.repo: String should match pattern"),
    ],
)
def test_configuration(model: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_config({"model": model})
