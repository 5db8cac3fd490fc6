"""For GPUs, where every kernel costs microseconds, and a value that is read back costs a wait for the device.

Not timed yet. Kernels of a mixture of 64 experts, for one token and for 32 rosters that chose 29 experts, counted as
operations that are no views: `StackedExperts` 14 and 14, nothing read back; `cpu.SortedExperts` 27 and 75, reading back
the experts; the plain loop 108 and 381, reading back for each. Without its kernel F.grouped_mm is no better than these.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Experts


def groups_on(weight: Tensor) -> bool:
    """Whether PyTorch has a kernel for grouped products: bfloat16 on compute capability 9.0 and 10.0."""
    aligned = weight.dtype == torch.bfloat16 and not any(size % 8 for size in weight.shape)
    return weight.is_cuda and aligned and torch.cuda.get_device_capability(weight.device) in ((9, 0), (10, 0))


class StackedExperts(nn.Module):
    """`Experts`: two grouped products for all of them."""

    def __init__(self, experts: Experts):
        super().__init__()
        gate_up = torch.stack([torch.cat((e.gate_proj.weight, e.up_proj.weight)) for e in experts])
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(torch.stack([e.down_proj.weight for e in experts]), requires_grad=False)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        expert, order = indices.flatten().sort(stable=True)
        ends = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(expert, ends, right=True, out_int32=True)  # where the rows of each expert end
        rows = x.flatten(0, 1).index_select(0, order // indices.shape[-1])
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends).index_select(0, order.argsort())
        return (weights.unsqueeze(2) @ y.view(*indices.shape, -1)).squeeze(2)
