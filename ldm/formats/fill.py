"""Networks get their weights from files: built without memory, then filled a few rows of a tensor at a time.

Beside the network itself, each of a few threads has one such part in memory, read and converted: up to 8 MB.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.formats.tensors import FLOATS, StoredTensor
from ldm.machine import single_threads

# Threads that fill a network, at most. More of them wait for one another, and each has a part in memory.
READERS = 4


def fill(
    network: nn.Module,
    stored: Mapping[str, StoredTensor],
    where: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Give every tensor of a network on the meta device its stored value, in `dtype` on `device`.

    Names and shapes of `stored` are the network's. Raises ModelError for numbers that are not finite or not floats.
    """

    def read(name: str, like: Tensor) -> Tensor:
        # Convolutions lie as CPUs and tensor cores read them fastest.
        layout = torch.channels_last if like.dim() == 4 else torch.contiguous_format
        tensor = torch.empty(like.shape, dtype=dtype, device=device, memory_format=layout)
        copy(stored[name], tensor, f"{where}: {name}")
        return tensor

    empty = network.state_dict()
    # One thread reads for as long as all of them convert: so each reads tensors of its own, and converts them. GPUs are
    # filled by one: the current device is a thread's own in CUDA, and Apple's is not made for several.
    on_cpu = torch.device(device).type == "cpu"
    each = single_threads(min(READERS, torch.get_num_threads())).map if on_cpu else map
    tensors = each(read, empty, empty.values())
    network.load_state_dict(dict(zip(empty, tensors, strict=True)), assign=True)
    assert not any(buffer.is_meta for buffer in network.buffers()), "a constant that no file has"


def copy(stored: StoredTensor, destination: Tensor, where: str) -> None:
    """Read a stored tensor into `destination`. Raises ModelError for numbers that are not finite or not floats."""
    if stored.dtype not in FLOATS:
        raise ModelError(f"{where} is {stored.dtype}, expected fp32, fp16 or bf16; convert the file")
    row = damaged = 0
    for chunk in stored.chunks():
        damaged += not_finite(chunk)
        part = destination[row : row + len(chunk)] if destination.dim() else destination
        if (chunk.dtype, part.dtype) == (torch.float16, torch.bfloat16):
            chunk = chunk.float().bfloat16()  # there are vector instructions for each step, and none for both at once
        part.copy_(chunk)
        row += part.shape[0] if part.dim() else 0
    if damaged:
        raise ModelError(f"{where} holds {damaged} values that are not finite; the file is damaged, copy it again")


def not_finite(chunk: Tensor) -> int:
    """How many numbers are infinite or not a number; the extremes show at once that there are none."""
    if not chunk.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(chunk)):
        return 0
    return int((~torch.isfinite(chunk)).sum())


def whole(stored: StoredTensor, where: str) -> Tensor:
    """A stored tensor in memory, in the number format of its file. Raises ModelError as `copy` does."""
    if stored.dtype not in FLOATS:
        raise ModelError(f"{where} is {stored.dtype}, expected fp32, fp16 or bf16; convert the file")
    destination = torch.empty(stored.shape, dtype=getattr(torch, FLOATS[stored.dtype]))
    copy(stored, destination, where)
    return destination
