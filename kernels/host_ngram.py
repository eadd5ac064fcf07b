"""Prompt lookup on the CPU: a draft out of the tokens that a sequence has (A. Saxena, "Prompt Lookup Decoding", 2023).

Dimensions: T tokens of a sequence, D tokens of a draft.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]


@compiled
def host_draft(token_T: Ints, shortest: int, longest: int, draft_D: Ints) -> bool:
    """What followed the last tokens when they occurred before, into ``draft_D``; False = they did not.

    The longest suffix of ``shortest`` .. ``longest`` tokens that occurs twice decides, its latest earlier occurrence of
    several. What followed it goes on, where the sequence ends, with the draft itself: a sequence that repeats a few
    tokens over and over is drafted at full length.
    """
    num_tokens = len(token_T)
    found, found_length = -1, shortest - 1
    for end in range(num_tokens - 1, 0, -1):
        length = 0
        while length < min(longest, end) and token_T[end - 1 - length] == token_T[num_tokens - 1 - length]:
            length += 1
        if length > found_length:
            found, found_length = end, length
            if length == longest:
                break
    if found < 0:
        return False
    for index in range(len(draft_D)):
        source = found + index
        draft_D[index] = token_T[source] if source < num_tokens else draft_D[source - num_tokens]
    return True
