"""A process that compiles constraints for a router, because a hostile one may take all of its time or memory.

Reads one JSON object a line, ``{"kind": ..., "source": ...}``, and answers each with a line ``{"problem": ...}``, null
where there is none; the first line that it writes says whether the tokenizer can be used. It ends with its standard
input. A constraint that is too much for it kills it: the limits are the kernel's, no code here has to notice them.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

from expertmesh.mesh.constraint import Constraint, ConstraintError, VocabularyError, compile_constraint, open_vocabulary

CPU_LIMIT_S = 1.0
"""Of one constraint."""

MEMORY_LIMIT_BYTES = 512 * 2**20
"""Of address space, beside what there is once the tokenizer is read."""

_NICE = 10


def main() -> None:
    """Arguments: the tokenizer's file, the vocabulary's size, and a JSON list of end-of-sequence ids."""
    path, vocab_size, eos_token_ids = sys.argv[1:]
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        vocabulary = open_vocabulary(Path(path), int(vocab_size), json.loads(eos_token_ids))
    except VocabularyError as error:
        _say({"problem": str(error)})
        return
    _say({"problem": None})
    limit = _address_space_bytes() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        # Nothing handles this signal: it ends the process, whatever that is in.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        problem = None
        try:
            compile_constraint(vocabulary, Constraint(**json.loads(line)))
        except ConstraintError as error:
            problem = str(error)
        except MemoryError:
            os.abort()  # as llguidance's own memory does where there is no more
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _say({"problem": problem})


def _say(message: dict[str, str | None]) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - standard output is its link to the router


def _address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
