"""PyTorch's fused AdamW, shown weights in the order in which they lie in memory.

On a CPU it copies what is not contiguous, such as convolutions that lie channels last. Each number is updated by
itself, so their order is free.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class AdamW(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov & Hutter 2019), fused."""

    def _init_group(self, group: Any, *lists: list[Tensor]) -> Any:
        """Collect weights, gradients, moments and counters of a group; views of them do as well."""
        found = super()._init_group(group, *lists)
        weights, gradients, *moments = lists
        for index, weight in enumerate(weights):
            if not is_channels_last(weight):
                continue
            gradients[index] = gradients[index].contiguous(memory_format=torch.channels_last)
            for values in (weights, gradients, *moments):
                if index < len(values) and values[index].dim() == 4:
                    values[index] = values[index].permute(0, 2, 3, 1)
        return found


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor lies channels last and in no other order; of what is sharded by itself nothing is said."""
    if isinstance(tensor, DTensor) or tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)
