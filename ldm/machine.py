"""The device to compute on and the number format to compute in, from the words of a user; threads and freed memory."""

import os
import platform
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import nearest
from ldm.errors import MachineError, SettingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

    import torch

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_names(device: str, dtype: str) -> None:
    """Raise SettingError for words that name no device or number format; imports nothing."""
    if device not in DEVICES[:3] + DEVICES[4:] and not re.fullmatch(r"cuda:[0-9]{1,3}", device):
        raise SettingError(
            f"device: no device {device!r}{nearest(device[:100], DEVICES)}; use one of {', '.join(DEVICES)}"
        )
    if dtype not in DTYPES:
        raise SettingError(f"dtype: no dtype {dtype!r}{nearest(dtype[:100], DTYPES)}; use one of {', '.join(DTYPES)}")


def keep_freed_memory(largest: int = 2**30, most: int = 2**30, heaps: int | None = 1) -> None:
    """Have the C library give freed memory to the next tensor instead of back to the system, where it is glibc.

    Large tensors come and go with every layer, and the system clears every page that it gives out. Of itself glibc
    keeps no block of more than 32 MB; `largest`, in bytes, is more. Of what is free at the heap's end it keeps `most`.
    And all threads share one heap, so that what one has freed is there for the others. Training wants `heaps` None,
    glibc's own number: gradients are computed in another thread than losses, and both would wait for one heap.
    """
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of malloc.h
    threshold_of_trim, threshold_of_mmap, most_heaps = -1, -3, -8
    set_option = of_c_library("mallopt")
    if set_option is None:
        return
    # Older versions refuse more than 32 MB. Where none is taken, glibc's own rule, which learns, is the better one.
    if any(set_option(threshold_of_mmap, size) for size in (largest, min(largest, 2**25))):
        set_option(threshold_of_trim, most)
    if heaps is not None:
        set_option(most_heaps, heaps)


def give_back_freed_memory() -> None:
    """Have the C library give all memory that is free back to the system, where it is glibc."""
    trim = of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def of_c_library(name: str) -> "Callable[..., int] | None":
    """A function of the C library, if it has one of that name; asked for on Linux only."""
    import ctypes

    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@cache
def single_threads(count: int) -> "ThreadPoolExecutor":
    """So many threads of Python, each of which computes with no other one of PyTorch's."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    import torch

    def start() -> None:
        ready.wait()  # all are there before one begins: none does another's start
        torch.get_num_threads()  # a thread's first question takes over the number of all; then it gets its own
        torch.set_num_threads(1)
        ready.wait()

    before, ready = torch.get_num_threads(), Barrier(count + 1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="single")
    try:
        started = [pool.submit(start) for _ in range(count)]
        ready.wait()
        ready.wait()
        for one in started:
            one.result()
    except BaseException:
        ready.abort()  # or those that wait would keep the process from its end
        raise
    torch.set_num_threads(before)  # it was also the number that threads to come start with
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=single_threads.cache_clear)  # where these threads are not
    return pool


def keep_compiled() -> None:
    """Have PyTorch keep what it compiles from now on in the user's cache folder, unless it has another one."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path("~/.cache/ldm/compiled").expanduser()))


def find_device(name: str = "auto") -> "torch.device":
    """The device of that name; `auto` is CUDA, else Apple's MPS, else the CPU. MachineError where it is not there."""
    import torch

    cuda, mps = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not mps:
        raise MachineError("device: mps is not available here; use --device cpu")
    if device.type == "cuda" and cuda <= (device.index or 0):
        found = f"only {cuda} CUDA devices are" if cuda else "CUDA is not"
        raise MachineError(f"device: {name}: {found} available here; use --device {'cuda' if cuda else 'cpu'}")
    return device


def find_dtype(name: str, device: "torch.device") -> "tuple[torch.dtype, str]":
    """The number format of that name, and a note where it is not the one asked for.

    `auto` is float16 on CUDA, bfloat16 on a CPU with instructions for it, else float32.
    float16 is very slow on CPUs: float32 instead.
    """
    import torch

    if name == "auto":
        if device.type == "cpu" and computes_in_bf16():
            return torch.bfloat16, ""
        return (torch.float16 if device.type == "cuda" else torch.float32), ""
    dtype: torch.dtype = getattr(torch, name)
    if dtype == torch.float16 and device.type == "cpu":
        return torch.float32, "dtype: float16 is not for CPUs, computing in float32"
    return dtype, ""


def computes_in_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16: AVX512-BF16, AMX, or those of ARM that oneDNN uses."""
    import torch

    if platform.machine() in ("aarch64", "arm64"):
        # Of other processors it says whether oneDNN can do without, which is slow.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
