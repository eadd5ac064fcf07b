"""The data plane: token dispatch and combine between the ranks of a view."""

from expertmesh.mesh.dataplane.base import DataPlane, Dispatched, Exchange, Pending
from expertmesh.mesh.dataplane.factory import check_secure, open_dataplane, uses_links

__all__ = ["DataPlane", "Dispatched", "Exchange", "Pending", "check_secure", "open_dataplane", "uses_links"]
