"""What a machine can do is asked of it, and its C library is told only what it takes."""

import platform

import pytest
import torch

from ldm import machine
from ldm.machine import computes_in_bf16, keep_freed_memory

TRIM, MMAP, HEAPS = -1, -3, -8


@pytest.mark.parametrize(
    ("largest_taken", "wanted"),
    [
        (2**40, [(MMAP, 2**30), (TRIM, 2**30), (HEAPS, 1)]),
        (2**25, [(MMAP, 2**30), (MMAP, 2**25), (TRIM, 2**30), (HEAPS, 1)]),
        (0, [(MMAP, 2**30), (MMAP, 2**25), (HEAPS, 1)]),
    ],
)
def test_an_older_c_library_is_told_what_it_takes(
    largest_taken: int, wanted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    def set_option(option: int, value: int) -> int:
        told.append((option, value))
        return int(option != MMAP or value <= largest_taken)

    monkeypatch.setattr(machine, "of_c_library", lambda name: set_option)
    keep_freed_memory()
    assert told == wanted
    told.clear()
    keep_freed_memory(heaps=None)  # as many as the library likes
    assert told == wanted[:-1]
    monkeypatch.setattr(machine, "of_c_library", lambda name: None)
    keep_freed_memory()


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize(
    ("processor", "target", "name"),
    [
        ("aarch64", torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
        ("x86_64", torch.cpu, "_is_avx512_bf16_supported"),
        ("x86_64", torch.cpu, "_is_amx_tile_supported"),
    ],
)
def test_half_precision_is_for_processors_with_instructions_for_it(
    processor: str, target: object, name: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: processor)
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda: False)
    monkeypatch.setattr(target, name, lambda: has)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert computes_in_bf16() is has
