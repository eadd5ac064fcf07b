"""Rotary embedding, the gate and what a token sees, each against a formula written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.attention_server.gate import choose_experts
from expertmesh.attention_server.paged import PagedKvCache, Rule
from expertmesh.attention_server.rope import Rotations, pair_features, rotate
from expertmesh.attention_server.step_index import build_step_index
from expertmesh.mesh.model.architecture import Architecture, GateVariant, Rope, Span
from expertmesh.mesh.model.families import family_by_name
from expertmesh.mesh.model.fields import Fields
from support.families import FAMILIES, SIZES


def arch(**changes: Any) -> Architecture:
    data = {**SIZES, **FAMILIES["qwen3_moe"], "rope_theta": 1e4}
    return dataclasses.replace(family_by_name("qwen3_moe").read(Fields(file="config.json", data=data)), **changes)


@pytest.mark.parametrize("rope", [Rope(), Rope(dim=6), Rope(interleaved=True), Rope(dim=4, interleaved=True)])
def test_features_turn_with_their_partners(rope: Rope) -> None:
    model = arch(rope=rope)
    dim, position = rope.dim or model.head_dim, 37
    weight_FH = torch.randn(2 * model.head_dim, 5, generator=torch.Generator().manual_seed(0))
    x_H = torch.randn(5, generator=torch.Generator().manual_seed(1))
    paired_CD = (pair_features(weight_FH, model.head_dim, rope) @ x_H).view(1, 2, -1)
    found_CD = rotate(paired_CD.clone(), Rotations(model)(torch.tensor([position])).unsqueeze(1))[0]
    plain_CD = (weight_FH @ x_H).view(2, -1).double()
    for head, plain_D in enumerate(plain_CD):
        for pair in range(dim // 2):
            one, other = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + dim // 2)
            angle = position * 1e4 ** (-2 * pair / dim)
            turned = (plain_D[one] + 1j * plain_D[other]) * np.exp(1j * angle)
            assert found_CD[head, 2 * pair].item() == pytest.approx(turned.real.item(), abs=1e-4)
            assert found_CD[head, 2 * pair + 1].item() == pytest.approx(turned.imag.item(), abs=1e-4)
        torch.testing.assert_close(found_CD[head, dim:].double(), plain_D[dim:], rtol=1e-5, atol=1e-5)


def test_a_long_context_has_the_angles_of_a_short_one() -> None:
    positions = torch.tensor([0, 3, 255])
    short, long = Rotations(arch(max_model_len=256)), Rotations(arch(max_model_len=2**20))
    assert torch.equal(short(positions), long(positions))
    assert torch.isfinite(torch.view_as_real(long(torch.tensor([2**20 - 1])))).all()


def test_a_correction_chooses_but_does_not_weigh() -> None:
    gate = GateVariant(scoring="sigmoid", correction=True, scale=2.0)
    model = arch(gate=gate, norm_topk_prob=False, num_experts=4, top_k=2)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    routes = choose_experts(logits, model, torch.tensor([0.9, 0.0, 0.0, 0.9]))
    assert routes.expert_TK.tolist() == [[0, 3]]
    torch.testing.assert_close(routes.weight_TK, 2.0 * logits[:, [0, 3]].sigmoid())


@pytest.mark.parametrize(("score", "experts"), [("max", {0, 1}), ("top2", {4, 5})])
def test_only_the_best_groups_are_chosen_from(score: Any, experts: set[int]) -> None:
    gate = GateVariant(num_groups=3, top_groups=1, group_score=score)
    model = arch(gate=gate, num_experts=6, top_k=2)
    routes = choose_experts(torch.tensor([[3.0, -9.0, 2.0, 1.0, 2.8, 2.7]]), model, None)
    assert set(routes.expert_TK[0].tolist()) == experts
    assert routes.weight_TK.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("span", [None, Span("window", 1), Span("window", 5), Span("chunk", 4)])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_a_token_sees(span: Span | None, sinks: bool) -> None:
    """Three sequences at once, in blocks that lie anywhere, against one query after the other."""
    generator = torch.Generator().manual_seed(2)
    heads, kv_heads, dim, block_size = 4, 2, 8, 3
    starts, counts = np.array([11, 0, 7]), np.array([1, 6, 6])
    blocks_SB = torch.randperm(18, generator=generator).view(3, 6).numpy()
    cache = PagedKvCache(
        num_layers=1, num_blocks=18, block_size=block_size, num_kv_heads=kv_heads, head_dim=dim, dtype=torch.float32
    )
    history = [
        torch.randn(int(start + count), 2 * kv_heads, dim, generator=generator)
        for start, count in zip(starts, counts, strict=True)
    ]
    for rows, blocks in zip(history, blocks_SB, strict=True):
        for position, row in enumerate(rows):
            cache.layer(0)[blocks[position // block_size] * block_size + position % block_size] = row
    q_THD = torch.randn(int(counts.sum()), heads, dim, generator=generator)
    new = torch.cat([rows[start:] for rows, start in zip(history, starts, strict=True)])
    sink_H = torch.randn(heads, generator=generator) if sinks else None
    index = build_step_index(
        starts, counts, blocks_SB, block_size=block_size, dtype=torch.float32, spans=[span] if span else []
    )
    found_TC = cache.attend(0, torch.cat([q_THD, new], 1), index, Rule(0.3, span, sink_H))
    token = 0
    for rows, start, count in zip(history, starts, counts, strict=True):
        for position in range(start, start + count):
            low = 0
            if span is not None:
                low = max(0, position - span.size + 1) if span.kind == "window" else position - position % span.size
            for head in range(heads):
                key, value = rows[low : position + 1, head // 2], rows[low : position + 1, kv_heads + head // 2]
                score = key @ q_THD[token, head] * 0.3
                extra = score.new_tensor([sink_H[head]]) if sink_H is not None else score[:0]
                weight = torch.cat([score, extra]).softmax(0)[: len(score)]
                torch.testing.assert_close(found_TC[token].view(heads, dim)[head], weight @ value, rtol=1e-4, atol=1e-5)
            token += 1
