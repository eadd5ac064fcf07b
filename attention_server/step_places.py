"""How many places a step's inputs take on the device: what a padded step has of each is the same every time.

A padded step with chunks of prompts has its tokens without gaps, as others do: first the sequences with one token each,
``decodes`` at most, then the chunks. The tokens behind the last such sequence are then places of the decode attention
as well, with no context, and get their answers from that of the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.attention_server.host_step import HostStep
from expertmesh.mesh.padding import PaddedStep

MOST_CHUNKS = 64
"""In a padded step, as far as pieces go that are not full: pieces of nothing cost a little, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlaces:
    """Padding included: ``tokens`` T, the first ``decodes`` of which may be sequences with one token, ``pieces`` C of
    chunks, ``samples`` Z. ``samples_all``: the samples are the tokens. ``is_padded``: tokens may be of no sequence.
    """

    tokens: int
    decodes: int
    pieces: int
    samples: int
    samples_all: bool
    is_padded: bool

    def hold(self, step: HostStep) -> bool:
        return (
            step.num_tokens <= self.tokens
            and step.num_decodes <= self.decodes
            and len(step.pieces_C4) <= self.pieces
            and len(step.row_Z) <= self.samples
        )


CHUNK_OF_NOTHING = StepPlaces(tokens=1, decodes=1, pieces=1, samples=1, samples_all=False, is_padded=False)
"""The least step with chunks that has everything: to compile kernels with, of any number of tokens."""


def places_of(step: HostStep) -> StepPlaces:
    """As many as a step has that is not padded."""
    return StepPlaces(
        tokens=step.num_tokens,
        decodes=step.num_decodes,
        pieces=len(step.pieces_C4),
        samples=len(step.row_Z),
        samples_all=False,
        is_padded=False,
    )


def padded_places(padded: PaddedStep, max_seqs: int, queries_a_piece: int) -> StepPlaces:
    """Of a micro-batch, of ``max_seqs`` sequences at most, of a padded step."""
    size = padded.size
    if not padded.has_chunks:
        return StepPlaces(tokens=size, decodes=size, pieces=0, samples=size, samples_all=True, is_padded=True)
    seqs = min(size, max_seqs)
    return StepPlaces(
        tokens=size,
        decodes=seqs,
        pieces=size // queries_a_piece + min(seqs, MOST_CHUNKS),
        samples=seqs,
        samples_all=False,
        is_padded=True,
    )
