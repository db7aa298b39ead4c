"""Loading adds no more memory than the model needs: no second copy, no mapped pages left resident."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import compvis, write
from helpers import environment

from ldm.bundle import Bundle
from ldm.config import validate
from ldm.formats.fill import fill
from ldm.formats.read import open_model
from ldm.models.model_config import ModelConfig, build
from ldm.nn.memory import peak_of

ROOT = Path(__file__).resolve().parent.parent
# About 60 million parameters; no tensor has more than a tenth of them.
MIDDLE = {
    "autoencoder": {"kind": "kl", "channels": 64},
    "text": {"kind": "clip", "width": 128, "layers": 2, "heads": 2, "vocabulary": 8192},
    "unet": {"channels": 128, "multipliers": [1, 2, 3], "attention": [True, True, False], "context_width": 128},
    "sampling": {"width": 64, "height": 64},
}
# The peak of resident memory, file pages included, since it was last asked for; Linux forgets it on request.
MEASURE = """
import json, pathlib, sys, torch
from ldm.bundle import Bundle
from ldm.models.text import ClipTextConfig, ClipTextEncoder

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

ClipTextEncoder(ClipTextConfig(width=8, heads=1, layers=1, vocabulary=8192))  # imports open_clip
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
bundle = Bundle.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
peak = resident("VmHWM")
tensors = [t for part in ("autoencoder", "text", "unet") for t in getattr(bundle, part).state_dict().values()]
print(json.dumps([peak - before, sum(t.numel() * t.element_size() for t in tensors)]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of middle size in half precision, as our folder and as a single file."""
    folder = tmp_path_factory.mktemp("middle")
    config = validate(MIDDLE, ModelConfig, "middle")
    torch.manual_seed(0)
    bundle = Bundle("middle", config, *build(config))
    state = {name: tensor.half() for name, tensor in compvis(bundle).items()}
    return {"folder": bundle.save(folder / "ours"), "single file": write(folder / "x.safetensors", state, config)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param("folder", "float32", marks=pytest.mark.slow),
        pytest.param("single file", "float32", marks=pytest.mark.slow),
        ("single file", "bfloat16"),
    ],
)
def test_loading_adds_at_most_what_the_model_needs(saved: dict[str, Path], layout: str, dtype: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(saved[layout]), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=240, check=True)
    added, needed = json.loads(done.stdout)
    assert needed > 100e6
    assert added <= 1.15 * needed, f"{added / needed:.2f} times what the model needs"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thread_fills_with_one_part_of_a_tensor_beside_the_network(
    saved: dict[str, Path], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread, which is this one: those of others are not counted.
    monkeypatch.setattr("ldm.formats.fill.single_threads", lambda _: SimpleNamespace(map=map))
    opened = open_model(saved["single file"])
    with torch.device("meta"):
        _, _, unet = build(opened.config)
    largest = max(math.prod(tensor.shape) for tensor in opened.parts["unet"].values())
    counted_though_not_there = sum(tensor.nbytes for tensor in unet.state_dict().values())
    peak = peak_of(lambda: fill(unet, opened.parts["unet"], saved["single file"], dtype)) - counted_though_not_there
    weights = sum(tensor.nbytes for tensor in unet.state_dict().values())
    assert weights <= peak <= weights + largest * dtype.itemsize
    kernel = unet.conv_in.weight
    assert kernel.dtype == dtype and kernel.is_contiguous(memory_format=torch.channels_last)
