"""Whether NIXL is here."""

from __future__ import annotations

import pytest

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.nixl_setup import Purpose, load_nixl


def _missing() -> str:
    try:
        load_nixl(Purpose(key="tests", what="tests", where="", remedy="do without"))
    except UserError as error:
        return str(error)
    return ""


NIXL_IS_MISSING = _missing()
"""Why; '' where it is there."""
needs_nixl = pytest.mark.skipif(bool(NIXL_IS_MISSING), reason=f"not installed: {NIXL_IS_MISSING}")
TRANSPORTS = ["tcp", pytest.param("nixl", marks=needs_nixl)]
