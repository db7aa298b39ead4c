"""Tensors on their way to the disk: whole or absent, number for number, and pickles read without running them."""

import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import LdmError, MachineError, ModelError, SettingError
from ldm.formats import ckpt, tensors
from ldm.formats.tensors import MemoryTensor, read_header
from ldm.formats.write import Reshaped, Rows, whole_or_absent, write_tensors

NUMBERS = {
    "wide": torch.arange(40.0).reshape(8, 5),
    "half": torch.linspace(-3, 3, 7, dtype=torch.float16),
    "brain": torch.linspace(-3, 3, 6, dtype=torch.bfloat16).reshape(2, 3),
    "one": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
}


def in_memory(numbers: dict[str, torch.Tensor]) -> dict[str, tensors.StoredTensor]:
    return {name: MemoryTensor(tensor) for name, tensor in numbers.items()}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", in_memory(NUMBERS), {"note": "ā"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == NUMBERS.keys()
    assert all(found[name].dtype == NUMBERS[name].dtype and torch.equal(found[name], NUMBERS[name]) for name in found)
    assert read_header(tmp_path / "x.safetensors").metadata == {"format": "pt", "note": "ā"}


def test_another_number_format_is_that_of_every_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", in_memory(NUMBERS), {}, dtype="BF16")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], NUMBERS[name].bfloat16()) for name in NUMBERS)


def test_a_number_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = in_memory({"weight": torch.tensor([1.0, 70_000.0])})
    with pytest.raises(ModelError, match="weight: holds numbers that are too large for float16"):
        write_tensors(tmp_path / "x.safetensors", large, {}, dtype="F16")
    with pytest.raises(ModelError, match="weight: holds numbers that are not finite"):
        write_tensors(tmp_path / "x.safetensors", in_memory({"weight": torch.tensor([float("nan")])}), {})


def test_rows_are_cut_across_the_parts_a_file_is_read_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(60.0).reshape(12, 5)
    write_tensors(tmp_path / "x.safetensors", in_memory({"whole": whole}), {})
    monkeypatch.setattr(tensors, "CHUNK", 5 * 5 * 4)  # five rows at a time, of twelve
    stored = read_header(tmp_path / "x.safetensors").tensors["whole"]
    for begin in (0, 4, 8):
        rows = Rows(stored, begin, 4)
        assert rows.shape == (4, 5)
        assert torch.equal(torch.cat([chunk.clone() for chunk in rows.chunks()]), whole[begin : begin + 4])
    convolution = Reshaped(stored, (12, 5, 1, 1))
    assert torch.equal(torch.cat([chunk.clone() for chunk in convolution.chunks()]), whole[:, :, None, None])


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with whole_or_absent(tmp_path / "model", 1) as folder:
            folder.mkdir()
            (folder / "half").write_bytes(b"x")
            raise error

    with pytest.raises(MachineError, match=r"model: cannot be written \(No space left on device\); "):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="bytes do not fit on the disk"), whole_or_absent(tmp_path / "x", 2**60):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(SettingError, match="exists and is never overwritten"), whole_or_absent(tmp_path / "model", 1):
        raise AssertionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


class Payload:
    """What an attacker puts into a pickle: unpickling it runs a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.flag}",)


HOSTILE: dict[str, Callable[[Path, Payload], object]] = {
    "zip": lambda path, payload: torch.save({"state_dict": {"a": torch.zeros(2)}, "x": payload}, path),
    "legacy": lambda path, payload: torch.save(
        {"a": torch.zeros(2), "x": payload}, path, _use_new_zipfile_serialization=False
    ),
    "raw": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    "oldest": lambda path, payload: path.write_bytes(pickle.dumps(payload, protocol=0)),
}


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_run(
    tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    flag, path = tmp_path / "flag", tmp_path / f"model.{suffix}"
    HOSTILE[kind](path, Payload(flag))
    tries = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **named: tries.append(named) or load(*given, **named))
    with pytest.raises(ModelError, match=r"unsafe: it asks for posix\.system|not a PyTorch file of tensors") as caught:
        ckpt.load(path)
    assert "weights_only" not in str(caught.value)  # PyTorch's own advice
    assert [named["weights_only"] for named in tries] == [True]
    assert not flag.exists() and not recwarn.list
    pickle.loads(pickle.dumps(Payload(flag)))
    assert flag.exists()  # the payload would have worked


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_out_of_the_wrapping_of_compvis(tmp_path: Path, zipped: bool) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    modules = {part: types.ModuleType(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name)}
    callback = type("ModelCheckpoint", (), {"__module__": name})
    modules[name].ModelCheckpoint = callback  # type: ignore[attr-defined]  # a module made here
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    wrapped = {"epoch": 3, "state_dict": weights, "callbacks": {callback: {"best_model_score": np.float64(0.25)}}}
    path = tmp_path / "model.ckpt"
    sys.modules.update(modules)
    try:
        torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
    finally:
        for part in modules:
            del sys.modules[part]
    assert ckpt.is_pickle(path)
    found = ckpt.load(path)
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    for size in (9, 100, path.stat().st_size // 2, path.stat().st_size - 1):
        torn = tmp_path / "torn.ckpt"
        torn.write_bytes(path.read_bytes()[:size])
        with pytest.raises(LdmError, match="not a whole PyTorch file; copy or download it again"):
            ckpt.load(torn)
