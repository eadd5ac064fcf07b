"""The expert MLP on the CPU for few rows a slot, where reading the weights is what takes the time.

A torch operator costs some 10 µs before it does anything, a matrix product some 5 µs more for each group; with three
slots' rows in a batch that is most of the time. This kernel is one call for a whole layer and reads a weight once for
four rows. Beside torch's ``grouped_mm``: ``python benchmarks/host_kernels.py``, benchmarks/results/host_kernels.json.

Dimensions as in ``grouped_mlp``: S slots, N rows, H hidden size, I width of an expert, F = 2I.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.kernels.compiled import compiled

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

_ZERO, _ONE = np.float32(0), np.float32(1)
_ROWS = 4


@compiled
def host_expert_mlp(rows_NH: Floats, counts_S: Counts, gate_up_SFH: Floats, down_SHI: Floats, out_NH: Floats) -> None:
    """``down(silu(gate(x)) * up(x))`` of rows grouped by slot into ``out_NH``; see ``grouped_expert_mlp``."""
    width = down_SHI.shape[2]
    hidden_RF = np.empty((_ROWS, 2 * width), np.float32)
    gated_RI = np.empty((_ROWS, width), np.float32)
    row = 0
    for slot in range(counts_S.shape[0]):
        end = row + counts_S[slot]
        while row < end:
            count = min(_ROWS, end - row)
            _multiply(rows_NH[row : row + count], gate_up_SFH[slot], hidden_RF)
            for i in range(count):
                for k in range(width):
                    gate = hidden_RF[i, k]
                    gated_RI[i, k] = gate / (_ONE + np.exp(-gate)) * hidden_RF[i, width + k]
            _multiply(gated_RI[:count], down_SHI[slot], out_NH[row : row + count])
            row += count


@compiled
def _multiply(x_RH: Floats, weight_OH: Floats, out_RO: Floats) -> None:
    """``x @ weight.T`` for up to four rows; spelled out, because only sums in separate names stay in registers."""
    features = x_RH.shape[1]
    rows = x_RH.shape[0]
    if rows == _ROWS:
        x0, x1, x2, x3 = x_RH[0], x_RH[1], x_RH[2], x_RH[3]
        for o in range(weight_OH.shape[0]):
            weight = weight_OH[o]
            sum0 = sum1 = sum2 = sum3 = _ZERO
            for k in range(features):
                w = weight[k]
                sum0 += x0[k] * w
                sum1 += x1[k] * w
                sum2 += x2[k] * w
                sum3 += x3[k] * w
            out_RO[0, o], out_RO[1, o], out_RO[2, o], out_RO[3, o] = sum0, sum1, sum2, sum3
        return
    first = 0
    if rows >= 2:
        x0, x1 = x_RH[0], x_RH[1]
        for o in range(weight_OH.shape[0]):
            weight = weight_OH[o]
            sum0 = sum1 = _ZERO
            for k in range(features):
                w = weight[k]
                sum0 += x0[k] * w
                sum1 += x1[k] * w
            out_RO[0, o], out_RO[1, o] = sum0, sum1
        first = 2
    for i in range(first, rows):
        x0 = x_RH[i]
        for o in range(weight_OH.shape[0]):
            weight = weight_OH[o]
            sum0 = _ZERO
            for k in range(features):
                sum0 += x0[k] * weight[k]
            out_RO[i, o] = sum0
