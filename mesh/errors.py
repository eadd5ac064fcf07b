"""Errors that name what was wrong and what to change."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user wrote is wrong: a configuration key, a checkpoint, an argument.

    The command line prints it without a traceback and exits with status 2.

    Args:
        key: what was wrong: ``attention.block_size``, a file, a tensor's name.
        problem: the value and why it cannot be used.
        remedy: what to do instead.
    """

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        super().__init__(f"{key}: {problem}; {remedy}")
        self.key = key
        self.problem = problem
        self.remedy = remedy


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """What is wrong with a file, for a message that names it already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class DataPlaneError(RuntimeError):
    """The data plane or the lockstep of a view failed: the view is over, the rank is not.

    ``suspects`` holds the ranks whose links failed, as far as this rank can tell.
    """

    def __init__(self, message: str, suspects: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.suspects = suspects


EXIT_DEVICE_LOST = 75
"""Exit status of a rank whose GPU context is gone (EX_TEMPFAIL): start it again. 2 means that this would not help."""


class DeviceLostError(DataPlaneError):
    """The CUDA context of this process is gone: it can be in no view any more and has to be started again."""
