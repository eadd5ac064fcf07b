"""Slots on a GPU that keep the experts of an FP8 checkpoint as they are stored; kernels in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.expert_server.gpu_slots import GpuSlots
from expertmesh.expert_server.gpu_weights import Fp8
from expertmesh.expert_server.server import ExpertServer
from expertmesh.mesh.config import ModelConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import SlotChange
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.telemetry import disabled_telemetry
from support.checkpoints import write_checkpoint

BLOCK, NUM_SLOTS = 128, 3
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def quantise(folder: Path) -> Path:
    """Every expert's matrices in float8, with scales that were drawn."""
    file = folder / "model.safetensors"
    stored, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(file).items():
        stored[name] = tensor
        if ".experts." in name:
            scale = [-(-size // BLOCK) for size in tensor.shape]
            stored[name] = torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = (0.5 + torch.rand(scale, generator=generator)) / 16
    save_file(stored, file, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": CONFIG}))
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 144, "moe_intermediate_size": 160, "num_hidden_layers": 1, "num_experts": 4}
    return quantise(write_checkpoint(tmp_path_factory.mktemp("model") / "fp8", **sizes))


def make_slots(path: Path, fp8: Fp8, dtype: Literal["float32", "bfloat16"] = "bfloat16") -> tuple[GpuSlots, ModelSpec]:
    spec = load_spec(ModelConfig(path=path, dtype=dtype))
    loaded = disabled_telemetry().metrics.slots_loaded
    slots = GpuSlots(spec, Checkpoint(path), NUM_SLOTS, loaded, torch.device("cpu"), spare=1, fp8=fp8)
    return slots, spec


def expected(path: Path, experts: list[int], rows_NH: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """With the floats that the loader makes of the experts, which has tests of its own."""
    spec, found = load_spec(ModelConfig(path=path)), []
    for expert, x in zip(experts, torch.split(rows_NH.float(), counts), strict=True):
        gate_up, down = Checkpoint(path).expert(spec, 0, expert) if expert >= 0 else (torch.empty(0), torch.empty(0))
        if len(x):
            gate, up = (x @ gate_up.T).chunk(2, -1)
            found.append((torch.nn.functional.silu(gate) * up) @ down.T)
    return torch.cat(found)


@pytest.mark.slow
def test_computes_with_what_is_stored_and_migrates_it(path: Path) -> None:
    slots, _ = make_slots(path, "weights")
    rows_NH = torch.randn(9, 144, generator=torch.Generator().manual_seed(1)).bfloat16()
    counts = [4, 0, 5]
    slots.load({0: [3, -1, 1]})
    assert [part.dtype for part in slots.read(0, 0)] == [torch.float8_e4m3fn] * 2 + [torch.float32] * 2
    assert all(part.float().isnan().all() for part in slots.read(0, 1))

    def check(experts: list[int]) -> None:
        assert list(slots.slots(0)) == experts
        actual, wanted = (
            slots.compute(0, rows_NH, torch.tensor(counts)).float(),
            expected(path, experts, rows_NH, counts),
        )
        assert (actual - wanted).norm() <= 2e-2 * wanted.norm()

    check([3, -1, 1])
    staged = slots.reserve(1)
    slots.fetch(0, 2, staged[0])
    slots.commit(0, [SlotChange(2, 2, staged[0])])
    slots.release(staged)
    check([3, -1, 2])


def test_the_parts_are_the_file_s_bit_for_bit(path: Path) -> None:
    slots, _ = make_slots(path, "weights")
    slots.load({0: [2, 0, -1]})
    stored = load_file(path / "model.safetensors")
    gate_up, down, gate_up_scale, down_scale = slots.read(0, 0)
    for name, weight, scale in zip(
        ("gate", "up", "down"), (*gate_up.chunk(2), down), (*gate_up_scale, down_scale), strict=True
    ):
        whole = f"model.layers.0.mlp.experts.2.{name}_proj.weight"
        assert torch.equal(weight.view(torch.uint8), stored[whole].view(torch.uint8))
        assert torch.equal(scale, stored[f"{whole}_scale_inv"])


@pytest.mark.parametrize(
    ("fp8", "dtype", "problem"),
    [("weights", "float32", "model.dtype is float32"), ("activations", "bfloat16", "no multiples of 128")],
)
def test_what_cannot_be_kept_is_refused(
    path: Path, fp8: Fp8, dtype: Literal["float32", "bfloat16"], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        make_slots(path, fp8, dtype)


def test_a_checkpoint_in_floats_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"moe_intermediate_size": 32, "num_hidden_layers": 1}
    with pytest.raises(UserError, match="does not store its experts in FP8"):
        make_slots(write_checkpoint(tmp_path / "plain", **sizes), "weights")


def test_cpu_ranks_refuse_the_key(path: Path) -> None:
    config = parse_config({"expert": {"fp8": "weights"}})
    with pytest.raises(UserError, match=r"expert\.fp8: is weights, and experts are on the CPU"):
        ExpertServer(config, load_spec(ModelConfig(path=path)), Checkpoint(path), disabled_telemetry())
