"""What a rank computes on, and models without weights."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from expertmesh.mesh.config import ModelConfig, parse_config
from expertmesh.mesh.device import LOCAL_RANK_VARIABLES, begin_behind_steps, beside_steps, resolve_device
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.model.weights import DummyCheckpoint, open_checkpoint
from support.checkpoints import write_checkpoint

ALONE = {"both_servers": 1, "attention": {"servers": 0}, "expert": {"servers": 0}}


def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device: is cuda, and .*auto or cpu"):
        resolve_device(parse_config({**ALONE, "device": "cuda"}))
    for config in ({}, ALONE, {"device": "cpu"}, {**ALONE, "dataplane": {"backend": "nccl"}}):
        assert resolve_device(parse_config(config)).type == "cpu"


def test_auto_takes_a_gpu_where_the_ranks_can_talk_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device(parse_config(ALONE)).type == "cuda"
    assert resolve_device(parse_config({"dataplane": {"backend": "nccl"}})).type == "cuda"
    assert resolve_device(parse_config({"device": "cuda"})).type == "cuda"
    assert resolve_device(parse_config({})).type == "cpu", "several ranks, and no plane between GPUs is set"
    assert resolve_device(parse_config({**ALONE, "device": "cpu"})).type == "cpu"


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    config = parse_config({"device": "cuda"})
    found = [resolve_device(config, 3), resolve_device(config)]
    for name, value in (("LOCAL_RANK", "2"), ("SLURM_LOCALID", "5")):  # 5: this process sees 4 of the machine's GPUs
        monkeypatch.setenv(name, value)
        found.append(resolve_device(config))
    assert [device.index for device in found] == [3, 0, 2, 1]
    assert current == found
    with pytest.raises(UserError, match=r"--gpu: is 4, and this process sees 4 GPUs"):
        resolve_device(config, 4)


class Stream:
    """Stands for a stream of a GPU, and notes what happens to it."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def wait_stream(self, other: object) -> None:
        self._log.append(f"waits for {other}")

    def synchronize(self) -> None:
        self._log.append("is done")


def test_copies_beside_the_steps_begin_behind_those_that_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the steps")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with beside_steps(torch.device("cuda", 1)):
        log.append("memory is made spare")
        begin_behind_steps(torch.device("cuda", 1))
        log.append("copies")
    assert log == ["memory is made spare", "waits for the steps", "copies", "is done"]
    with beside_steps(torch.device("cpu")):
        begin_behind_steps(torch.device("cpu"))
    assert len(log) == 4


def test_a_model_with_random_weights_needs_its_config_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError):
        load_spec(ModelConfig(path=path))
    config = ModelConfig(path=path, load_format="dummy")
    spec = load_spec(config)
    checkpoint = open_checkpoint(config, spec, torch.device("cpu"), lambda num_bytes: None)
    assert isinstance(checkpoint, DummyCheckpoint)
    for layer in range(spec.num_layers):
        parts = checkpoint.layer_tensors(spec, layer)
        assert all(part.isfinite().all() for part in parts.values())
        assert (parts["input_norm"] - 1).abs().max() <= 0.1
