"""A process that compiles constraints for a router, because a hostile one may take all of its time or memory.

Set up with ``{"tokenizer": its file, "vocab_size": ..., "eos_token_ids": [...]}`` it answers each
``{"kind": ..., "source": ...}`` with ``{"problem": ...}``, null where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertmesh.mesh.constraint import Constraint, ConstraintError, VocabularyError, compile_constraint, open_vocabulary
from expertmesh.mesh.killable_worker import UnusableError, WorkerLimits, serve

LIMITS = WorkerLimits(cpu_s=1.0, memory_bytes=512 * 2**20, nice=10)


def main() -> None:
    serve(_open, LIMITS)


def _open(setup: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    try:
        vocabulary = open_vocabulary(Path(setup["tokenizer"]), setup["vocab_size"], setup["eos_token_ids"])
    except VocabularyError as error:
        raise UnusableError(str(error)) from None

    def check(question: dict[str, Any]) -> dict[str, Any]:
        try:
            compile_constraint(vocabulary, Constraint(**question))
        except ConstraintError as error:
            return {"problem": str(error)}
        return {"problem": None}

    return check


if __name__ == "__main__":
    main()
