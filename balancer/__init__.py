"""The control plane: membership, views, placement, the admin service."""

from expertmesh.balancer.server import serve

__all__ = ["serve"]
