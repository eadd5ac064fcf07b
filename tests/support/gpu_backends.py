"""Which data planes can run between two GPUs of this machine."""

from __future__ import annotations

import pytest
import torch

from expertmesh.mesh.dataplane.deepep_checks import check_machine
from expertmesh.mesh.errors import UserError


def _why_not_deepep() -> str:
    try:
        check_machine(torch.device("cuda", 0), 2)
    except UserError as error:
        return str(error)
    return ""


_MISSING = _why_not_deepep() if torch.cuda.device_count() >= 2 else ""
DEEPEP = pytest.param("deepep", marks=pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "deepep can run"))
