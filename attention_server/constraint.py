"""Constraints of running sequences: which tokens each may go on with, and the mask that keeps a step's samples to them.

Dimensions: S sequences to sample, C of them constrained, V vocabulary, B bytes of a packed mask.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence as List
from pathlib import Path

import grpc
import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from expertmesh.attention_server.request import RefusedError
from expertmesh.mesh.constraint import (
    Constraint,
    ConstraintError,
    VocabularyError,
    compile_constraint,
    open_vocabulary,
)

_KEPT = 32
"""Compiled constraints that are kept for the next request with the same one."""


class Matcher:
    """Where the output of one sequence is in its constraint. Not for two threads at once.

    Args:
        end_ids: of end-of-sequence; the matcher allows them exactly where the output may end.
        goes_on: end only where the constraint leaves no other choice.
    """

    def __init__(self, matcher: LLMatcher, constraint: Constraint, end_ids: np.ndarray, *, goes_on: bool) -> None:
        self._matcher = matcher
        self._constraint = constraint
        self._end_ids = end_ids
        self._goes_on = goes_on
        self._num_tokens = 0

    @property
    def llguidance(self) -> LLMatcher:
        return self._matcher

    @property
    def must_end(self) -> bool:
        """Nothing can follow but the end."""
        return self._matcher.is_stopped()

    @property
    def problem(self) -> str:
        """Why the constraint cannot be followed any further; empty where it can."""
        if not self._matcher.is_error():
            return ""
        reason = self._matcher.get_error().strip().split("\n", 1)[0]
        return (
            f"{self._constraint.field}: cannot be followed beyond {self._num_tokens} output tokens ({reason});"
            " bound its repetitions, or make it less ambiguous"
        )

    def accept(self, token: int) -> None:
        """The sequence goes on with a token; one that is not allowed, or is too much to follow, is a ``problem``."""
        if self._matcher.consume_token(token):
            self._num_tokens += 1

    def after(self, tokens: List[int]) -> Matcher:
        """The matcher of a draft: as if the sequence had gone on with these tokens. This one stays where it is."""
        matcher = Matcher(self._matcher.deep_copy(), self._constraint, self._end_ids, goes_on=self._goes_on)
        matcher._num_tokens = self._num_tokens
        for token in tokens:
            matcher.accept(token)
        return matcher

    def narrow(self, allowed_B: np.ndarray) -> None:
        """Turn what llguidance allows into what is allowed here, in place: packed uint8, token 0 is the lowest bit."""
        if self._goes_on:
            kept_B = allowed_B.copy()
            np.bitwise_and.at(kept_B, self._end_ids // 8, ~(1 << (self._end_ids % 8)).astype(np.uint8))
            if kept_B.any():
                allowed_B[:] = kept_B


class TokenMasks:
    """Keeps samples to what constraints allow: one call of llguidance and one operation on the logits a step."""

    def __init__(self, vocab_size: int, device: torch.device | None = None) -> None:
        """``device``: of the logits; None = the CPU."""
        self._vocab_size = vocab_size
        self._device = device
        self._bit_8 = torch.arange(8, dtype=torch.uint8, device=device)
        self._mask_CW = np.empty((0, -(-vocab_size // 32)), np.int32)
        self._executor: LLExecutor | None = None

    def apply(self, logits_SV: torch.Tensor, rows: List[tuple[int, Matcher]]) -> None:
        """Set the logits of what is not allowed to −inf.

        A row whose matcher has a ``problem`` afterwards is left as it was.

        Args:
            rows: which of S, and what it has to fit. A matcher may stand there once; several rows of a sequence need
                ``Matcher.after``.
        """
        self._fill([matcher for _, matcher in rows])
        allowed_CB = self._mask_CW[: len(rows)].view(np.uint8)
        for allowed_B, (_, matcher) in zip(allowed_CB, rows, strict=True):
            if matcher.problem:
                allowed_B[:] = 0xFF
            else:
                matcher.narrow(allowed_B)
        packed_CB1 = self._there(allowed_CB).unsqueeze(-1)
        forbidden_CV = (packed_CB1 >> self._bit_8 & 1).view(len(rows), -1)[:, : self._vocab_size] == 0
        index = self._there(np.array([row for row, _ in rows]))
        logits_SV.index_copy_(0, index, logits_SV[index].masked_fill_(forbidden_CV, float("-inf")))

    def _fill(self, matchers: List[Matcher]) -> None:
        if len(self._mask_CW) < len(matchers):
            self._mask_CW = np.empty((2 * len(matchers), self._mask_CW.shape[1]), np.int32)
        if self._executor is None:
            self._executor = LLExecutor(torch.get_num_threads())
        numbered = [(matcher.llguidance, index) for index, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, numbered, self._mask_CW)

    def _there(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device is None else tensor.to(self._device)


class ConstraintCompiler:
    """Makes matchers; for one thread, which is not the step thread: the first one reads the tokenizer."""

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: List[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def matcher(self, constraint: Constraint, output: List[int], *, ignore_eos: bool) -> Matcher:
        """The matcher of a sequence that has some output already.

        Raises:
            RefusedError: FAILED_PRECONDITION where the model's tokenizer cannot be used, INVALID_ARGUMENT where the
                constraint cannot, or where the output does not fit it.
        """
        try:
            compiled = self._compile(constraint)
        except VocabularyError as error:
            message = f"{constraint.field}: the output of this model cannot be constrained: {error}"
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, message) from None
        except ConstraintError as error:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"{constraint.field}: {error}") from None
        end_ids = np.array(self._eos_token_ids, np.int64)
        matcher = Matcher(compiled, constraint, end_ids, goes_on=ignore_eos).after(output)
        if matcher.problem:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"output_token_ids do not fit: {matcher.problem}")
        return matcher

    def _compile(self, constraint: Constraint) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = open_vocabulary(self._tokenizer_json, self._vocab_size, self._eos_token_ids)
        if constraint not in self._compiled:
            self._compiled[constraint] = compile_constraint(self._vocabulary, constraint)
        self._compiled.move_to_end(constraint)
        while len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return self._compiled[constraint]


assert sys.byteorder == "little", "masks are words of 32 bits and are read as bytes"
