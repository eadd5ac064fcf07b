"""expertmesh: a serving mesh for Mixture-of-Experts language models."""

import os

__version__ = "0.1.0"

# Before gRPC reads it. Its handlers run in every child that uvloop forks, and crash some 2 % of them before they become
# the program they were forked for; what they are there for, gRPC in a child that goes on as it is, nobody here does.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
