"""What a choice of replicas costs, on the CPU (``host_replicas``) and on a device (``gate_rule``).

A module of its own: machines that run kernels on a device need not have numba.
"""

from __future__ import annotations

RANK_COST = 0.5
"""Of a visit to a rank."""
NODE_COST = 0.25
"""Of a visit to a node beside that of its rank."""
ROW_PRICE = 1 / 64
"""By how much a row raises its rank's price: some 50 rows more than others have outweigh a rank and a node. On
gpt-oss-20b's tokens half of it was less even over hundreds of tokens, and twice of it cost 0.01 visits more."""
MEAN_PRICE_LIMIT = 1.0
"""Where a layer's ranks cannot get their shares, prices would rise for ever: the most that they are on average."""
