"""Sizes of models as they are published, from their config.json alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from expertmesh.cli.inspect_tables import ranges
from expertmesh.cli.main import build_app
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.sizes import ModelSizes, read_sizes
from expertmesh.mesh.model.tensors import SINGLE_FILE
from support.checkpoints import fuse_experts, write_checkpoint

CONFIGS = Path(__file__).resolve().parents[1] / "data" / "configs"
BILLION = 10**9


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others say about a model.

    ``active`` has two or three digits wherever it is published, so that it is compared to the last of them;
    ``counts_embedding``: whether it has the embedding, of which a token reads one row.
    """

    name: str
    total: float
    active: str
    counts_embedding: bool
    stored_bytes: float | None
    kv_bytes: int
    moe_layers: tuple[int, ...]
    experts: int
    expert_parameters: int
    source: str


PUBLISHED = (
    Published(
        name="deepseek-v3",
        total=671 * BILLION,
        active="37",
        counts_embedding=False,
        stored_bytes=None,
        kv_bytes=70272,
        moe_layers=tuple(range(3, 61)),
        experts=256,
        expert_parameters=3 * 7168 * 2048,
        source="model card: 671B total, 37B activated; 70.272 KB of KV cache a token: arXiv:2505.09343, table 1",
    ),
    Published(
        name="kimi-k2",
        total=1_026_408_232_448,
        active="32",
        counts_embedding=False,
        stored_bytes=1_029_173_256_720,
        kv_bytes=70272,
        moe_layers=tuple(range(1, 61)),
        experts=384,
        expert_parameters=3 * 7168 * 2048,
        source="model card: 32B activated, 1T total; the exact total and bytes: headers of Kimi-K2-Instruct's shards; "
        "attention's cache is DeepSeek-V3's",
    ),
    Published(
        name="qwen3-235b-a22b",
        total=235 * BILLION,
        active="22",
        counts_embedding=True,
        stored_bytes=None,
        kv_bytes=94 * 2 * 4 * 128 * 2,
        moe_layers=tuple(range(94)),
        experts=128,
        expert_parameters=3 * 4096 * 1536,
        source="model card: 235B in total and 22B activated, 94 layers, 4 KV heads",
    ),
    Published(
        name="qwen3-30b-a3b",
        total=30.5 * BILLION,
        active="3.3",
        counts_embedding=True,
        stored_bytes=61_064_245_248,
        kv_bytes=48 * 2 * 4 * 128 * 2,
        moe_layers=tuple(range(48)),
        experts=128,
        expert_parameters=3 * 2048 * 768,
        source="model card: 30.5B in total and 3.3B activated, 48 layers, 4 KV heads; total_size of its index",
    ),
    Published(
        name="gpt-oss-120b",
        total=116.83 * BILLION,
        active="5.13",
        counts_embedding=False,
        stored_bytes=60.8 * 2**30,
        kv_bytes=36 * 2 * 8 * 64 * 2,
        moe_layers=tuple(range(36)),
        experts=128,
        expert_parameters=3 * 2880 * 2880 + 3 * 2880,
        source="model card, table 1: 116.83B total, 5.13B active without the embedding, 60.8 GiB",
    ),
    Published(
        name="llama-4-maverick",
        total=400 * BILLION,
        active="17",
        counts_embedding=True,
        stored_bytes=None,
        kv_bytes=48 * 2 * 8 * 128 * 2,
        moe_layers=tuple(range(1, 48, 2)),
        experts=128,
        expert_parameters=3 * 5120 * 8192,
        source="model card: 400B total, 17B activated, 128 experts",
    ),
    Published(
        name="mixtral-8x7b",
        total=46.7 * BILLION,
        active="12.9",
        counts_embedding=True,
        stored_bytes=2 * 46_702_792_704,
        kv_bytes=131072,
        moe_layers=tuple(range(32)),
        experts=8,
        expert_parameters=3 * 4096 * 14336,
        source="arXiv:2401.04088's announcement: 46.7B total, 12.9B a token; total_size of its index",
    ),
)


def sizes_of(name: str, folder: Path) -> ModelSizes:
    folder.mkdir()
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return read_sizes(folder)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_published_models_have_their_published_sizes(published: Published, tmp_path: Path) -> None:
    sizes = sizes_of(published.name, tmp_path / "model")
    assert not sizes.has_weights
    assert sizes.not_served is None
    assert sizes.total_parameters == pytest.approx(published.total, rel=0.01)
    active = sizes.active_parameters - (0 if published.counts_embedding else sizes.embedding_parameters)
    last_digit = 10.0 ** -len(published.active.partition(".")[2])
    assert active / BILLION == pytest.approx(float(published.active), abs=last_digit)
    assert 2 * sizes.kv_values_per_token == published.kv_bytes
    if published.stored_bytes is not None:
        assert sizes.stored_bytes == pytest.approx(published.stored_bytes, rel=0.01)
    assert (sizes.arch.moe_layers, sizes.arch.num_experts) == (published.moe_layers, published.experts)
    assert sizes.expert_parameters == published.expert_parameters


def test_every_configuration_is_compared() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == sorted(published.name for published in PUBLISHED)


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [("deepseek-v3", 1 + 4 / 128**2), ("mixtral-8x7b", 2), ("gpt-oss-120b", (4 + 8 / 32) / 8)],
)
def test_an_expert_takes_what_its_format_says(name: str, bytes_per_parameter: float, tmp_path: Path) -> None:
    sizes = sizes_of(name, tmp_path / "model")
    biases = 3 * 2880 if name == "gpt-oss-120b" else 0  # in bfloat16
    expected = (sizes.expert_parameters - biases) * bytes_per_parameter + 2 * biases
    assert sizes.stored_expert_bytes == pytest.approx(expected)


def inspect(*arguments: str) -> Any:
    """The command's JSON."""
    result = CliRunner().invoke(build_app(["inspect"]), ["inspect", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(build_app(["inspect"]), ["inspect", *arguments], catch_exceptions=False)
    return str(caught.value)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("deepseek")
    shutil.copy(CONFIGS / "deepseek-v3.json", folder / "config.json")
    return str(folder)


def test_what_fits_a_gpu(deepseek: str) -> None:
    told = inspect(deepseek, "--gpu-memory", "80", "--kv-cache", "10")
    slot = told["bytes_per_expert"] * len(told["moe_layers"])
    gpu = told["gpu"]
    assert gpu["usable_bytes"] == 72 * 2**30
    assert gpu["expert_slots"] * slot <= gpu["usable_bytes"] < (gpu["expert_slots"] + 1) * slot
    assert gpu["expert_servers"] * gpu["expert_slots"] >= 256 > (gpu["expert_servers"] - 1) * gpu["expert_slots"]
    left = gpu["usable_bytes"] - told["dense_bytes"]
    assert gpu["kv_tokens"] == left // told["kv_bytes_per_token"]
    assert gpu["both_slots"] * slot <= left - 10 * 2**30 < (gpu["both_slots"] + 1) * slot
    little = inspect(deepseek, "--gpu-memory", "8")["gpu"]
    assert (little["kv_tokens"], little["both_slots"], little["expert_slots"]) == (0, 0, 1)
    none = inspect(deepseek, "--gpu-memory", "5")["gpu"]
    assert (none["expert_slots"], none["expert_servers"]) == (0, None)


def test_the_dtype_doubles_what_is_computed_with(deepseek: str) -> None:
    bfloat16, float32 = inspect(deepseek), inspect(deepseek, "--dtype", "float32")
    for key in ("bytes_per_expert", "dense_bytes", "total_bytes", "kv_bytes_per_token"):
        assert float32[key] == 2 * bfloat16[key]
    assert float32["stored_bytes_per_expert"] == bfloat16["stored_bytes_per_expert"]


@pytest.mark.parametrize(
    ("servers", "slots", "replicas", "with_most", "lost", "balancedness"),
    [
        (32, 8, (1, 1), 256, 8, 1.0),
        (32, 9, (1, 2), 32, 9, 8 / 9),
        (4, 256, (4, 4), 256, 0, 1.0),
        (2, 1000, (2, 2), 256, 0, 1.0),
    ],
)
def test_a_dry_placement(
    deepseek: str, servers: int, slots: int, replicas: tuple[int, int], with_most: int, lost: int, balancedness: float
) -> None:
    placed = inspect(deepseek, "--servers", str(servers), "--slots-per-server", str(slots))["placement"]
    assert placed["slots"] == min(slots, 256) * servers
    assert (placed["replicas_min"], placed["replicas_max"], placed["experts_with_most"]) == (*replicas, with_most)
    assert placed["experts_lost_with_a_server"] == lost
    assert placed["balancedness"] == pytest.approx(balancedness)
    assert placed["bytes_per_server"] == slots * 58 * 3 * 7168 * 2048 * 2


def test_weights_say_what_is_stored(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", dtype=torch.float32, shards=3)
    told = inspect(str(path))
    assert told["has_weights"]
    assert told["stored_bytes"] == told["parameters"]["total"] * 4
    assert told["stored_bytes_per_expert"] == told["parameters"]["expert"] * 4
    fused = write_checkpoint(tmp_path / "fused")
    fuse_experts(fused / SINGLE_FILE, 3, 8)
    assert inspect(str(fused))["stored_bytes_per_expert"] == told["parameters"]["expert"] * 2


def test_without_weights_it_says_so(deepseek: str) -> None:
    result = CliRunner().invoke(build_app(["inspect"]), ["inspect", deepseek, "--gpu-memory", "80"])
    assert "not here; 626.92 GiB by config.json, quantised: fp8" in result.output
    assert "61, with experts: 3-60 (58)" in result.output
    assert "slots a layer beside the dense weights and 4.00 GiB of KV" in result.output


def test_formats_that_are_not_served_have_sizes(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    told = inspect(str(tmp_path))
    assert told["parameters"]["total"] == 30_532_122_624
    assert (told["stored_bytes"], told["quantization"]) == (None, "awq")
    assert "quant_method: is 'awq', which is not supported" in told["not_served"]
    assert not told["has_weights"]
    (tmp_path / SINGLE_FILE).write_bytes(b"what is not served is not looked into")
    assert inspect(str(tmp_path))["has_weights"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt-oss-120b", "layer_types", [{}] * 36),
        ("mixtral-8x7b", "rms_norm_eps", 10**400),
        ("qwen3-30b-a3b", "num_experts", 2**31 - 1),
        ("deepseek-v3", "quantization_config", {"quant_method": ["fp8"]}),
    ],
)
def test_values_that_no_code_foresees(tmp_path: Path, name: str, key: str, value: Any) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    try:
        not_served = read_sizes(tmp_path).not_served
    except UserError as error:
        not_served = str(error)
    assert not_served is not None
    assert "config.json" in not_served


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--dtype", "int3"), "--dtype: is 'int3'"),
        (("--gpu-memory", "-1"), "--gpu-memory: is -1"),
        (("--gpu-memory", "nan"), "--gpu-memory: is nan"),
        (("--gpu-memory", "80", "--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization: is 1.5"),
        (("--gpu-memory", "80", "--kv-cache", "81"), "--kv-cache: is 81"),
        (("--servers", "4"), "are 4 and None; give both"),
        (("--servers", "4", "--slots-per-server", "63"), "252 usable slots a layer for 256 experts; give 64 or more"),
        (("--revision", "main"), "--revision: is set and"),
    ],
)
def test_wrong_options(deepseek: str, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in refused(deepseek, *arguments)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "is not a folder" in refused(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((3,), "3 (1)"), ((0, 1, 2), "0-2 (3)"), ((1, 3, 5, 7), "1, 3 ... 7 (4)"), ((0, 1, 4, 6, 7), "0-1, 4, 6-7 (5)")],
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text
