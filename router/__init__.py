"""The front door: the Generate API, tokenising, admission, choice of attention server, replay on failure."""

from expertmesh.router.server import serve

__all__ = ["serve"]
