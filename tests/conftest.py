"""What every test may rely on: no settings from the outside, one set of hypothesis settings, meshes that are shared."""

from __future__ import annotations

import os

# Before anything imports Triton, which reads it then: its kernels run on the CPU. tests/gpu has settings of its own.
os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

from support.certificates import certificates
from support.etcd import etcd
from support.mesh import meshes

__all__ = ["certificates", "etcd", "meshes"]

# Other work may share the two cores of a test machine: a slow example says nothing about the code.
settings.register_profile("expertmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("expertmesh")

for name in list(os.environ):
    if name.startswith(("EXPERTMESH_", "OTEL_")):
        del os.environ[name]
