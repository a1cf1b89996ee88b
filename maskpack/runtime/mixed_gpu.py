"""Corrections of several adapters on a GPU: all rows of a batch in one launch. TRITON_INTERPRET=1 runs it on a CPU."""

# mypy: ignore-errors

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mixed import Correction

OUTPUTS = 32  # of a program


@triton.jit
def _add(inputs, rows, begin, columns, values, total, size, outputs, OUTPUTS: tl.constexpr):
    """Add D x for one row of the batch and a block of outputs, change by change."""
    row = tl.program_id(0).to(tl.int64)
    task = tl.load(rows + row)
    if task >= 0:
        output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = output < outputs
        first = begin + task * (outputs + 1) + output
        at = tl.load(first, mask=inside, other=0)
        end = tl.load(first + 1, mask=inside, other=0)
        sums = tl.zeros((OUTPUTS,), dtype=tl.float32)
        for k in range(tl.max(end - at)):
            there = at + k < end
            column = tl.load(columns + at + k, mask=there, other=0)
            value = tl.load(values + at + k, mask=there, other=0.0)
            sums += value * tl.load(inputs + row * size + column, mask=there, other=0.0)
        place = total + row * outputs + output
        tl.store(place, tl.load(place, mask=inside) + sums, mask=inside)


class Stacked:
    """The corrections of a layer, one behind the other."""

    def __init__(self, found: Sequence[Correction | None]):
        known = [one for one in found if one is not None]
        empty = Correction(torch.zeros_like(known[0].begin), known[0].columns[:0], known[0].values[:0])
        each, start, begins = [one or empty for one in found], 0, []
        for one in each:
            begins.append(one.begin.long() + start)
            start += len(one.columns)
        self.begin = torch.stack(begins)
        self.columns, self.values = torch.cat([one.columns for one in each]), torch.cat([one.values for one in each])

    def add(self, inputs: Tensor, rows: Tensor, total: Tensor) -> None:
        """As `mixed._add`; all are contiguous."""
        grid = len(inputs), triton.cdiv(total.shape[1], OUTPUTS)
        rows = rows.to(inputs.device)
        sizes = inputs.shape[1], total.shape[1]
        with torch.cuda.device_of(inputs):
            _add[grid](inputs.contiguous(), rows, self.begin, self.columns, self.values, total, *sizes, OUTPUTS=OUTPUTS)
