"""Compile the solver's kernels ahead of need: ``python -m expertmesh.balancer.solver.warm_up``.

The first solve on a machine compiles for about 25 s of CPU time, most of it under Python's lock; from then on the
kernels come from numba's cache in half a second. A service runs this in a child process before it solves: it gives way
to everything else that wants to run.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np

from expertmesh.balancer.solver.compiled import caches
from expertmesh.balancer.solver.linear import linear
from expertmesh.balancer.solver.solve import Budget, SolverOptions, solve_layer
from expertmesh.balancer.solver.topology import Topology

STOP_WITH_STDIN = "--stop-with-stdin"


def warm_up() -> None:
    """Run every kernel once, on a layer of four experts."""
    topology = Topology.even(num_slots=6, num_ranks=3, num_nodes=2)
    load_E, pair_EE = np.array([4.0, 3.0, 2.0, 1.0]), np.ones((4, 4))
    current = linear(4, topology)
    options = SolverOptions(proposals=10)
    for pairs in (None, pair_EE):
        solve_layer(load_E, pairs, topology, options, current=current)
        solve_layer(load_E, pairs, topology, options, current=current, budget=Budget(slots=2))


def main() -> None:
    if not caches():
        sys.exit("numba has no folder to keep compiled kernels in: let NUMBA_CACHE_DIR name one that can be written to")
    if sys.argv[1:] == [STOP_WITH_STDIN]:
        threading.Thread(target=_end_when_stdin_ends, name="stdin", daemon=True).start()
    os.nice(10)
    warm_up()


def _end_when_stdin_ends() -> None:
    """Whoever started this holds the other end: when it dies, however it dies, nobody needs the kernels."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
