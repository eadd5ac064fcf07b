"""What transformers generates on the same checkpoint: the reference of every parity test."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

PAD_TOKEN_ID = 1


@functools.cache
def reference_model(path: Path) -> Any:
    """The checkpoint in float32, loaded once a test session."""
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@functools.cache
def reference_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def encode(path: Path, text: str) -> tuple[int, ...]:
    """Prompt token ids as a client that tokenises by itself would send them."""
    return tuple(reference_tokenizer(path).encode(text).ids)


def decode(path: Path, token_ids: Sequence[int]) -> str:
    return str(reference_tokenizer(path).decode(list(token_ids)))


@functools.cache
def greedy(
    path: Path, prompts: tuple[tuple[int, ...], ...], max_new_tokens: int, eos_token_id: int | None
) -> tuple[tuple[int, ...], ...]:
    """transformers' greedy continuation of each prompt, without the end-of-sequence token, in one left-padded batch."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[PAD_TOKEN_ID] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_token_id, pad_token_id=PAD_TOKEN_ID
    )
    with torch.inference_mode():
        out_BT = reference_model(path).generate(ids_BT, attention_mask=mask_BT, generation_config=config)
    return tuple(_until_end(row, eos_token_id) for row in out_BT[:, longest:].tolist())


def continuation(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """A model's greedy continuation of one prompt, past any end-of-sequence token."""
    with torch.inference_mode():
        # Without a mask, generate would leave out the tokens of the prompt that equal the padding.
        out_BT = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN_ID,
        )
    return [int(token) for token in out_BT[0, len(prompt) :]]


def _until_end(token_ids: Sequence[int], eos_token_id: int | None) -> tuple[int, ...]:
    end = token_ids.index(eos_token_id) if eos_token_id in token_ids else len(token_ids)
    return tuple(token_ids[:end])
