"""Our text tower is open_clip's: from one seed the same weights under the same names, and the same states."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.errors import MachineError
from ldm.models.text import ClipTextConfig, ClipTextEncoder, open_clip_module, tokenizer_module
from ldm.models.text_tower import TextTower

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("quick", [True, False])
def test_tower_is_that_of_open_clip(quick: bool) -> None:
    open_clip_module()
    from open_clip.transformer import QuickGELU, TextTransformer

    torch.manual_seed(0)
    ours = TextTower(context_length=9, vocabulary=600, width=32, heads=4, layers=2, quick=quick)
    torch.manual_seed(0)
    act = QuickGELU if quick else nn.GELU
    theirs = TextTransformer(
        context_length=9, vocab_size=600, width=32, heads=4, layers=2, output_dim=None, act_layer=act
    )
    known, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(known)
    assert all(torch.equal(tensor, known[name]) for name, tensor in found.items())
    x = torch.randn(2, 9, 32)
    for block, other in zip(ours.transformer.resblocks, theirs.transformer.resblocks, strict=True):
        nn.init.normal_(block.ln_1.bias, std=0.3)
        other.load_state_dict(block.state_dict())
        assert torch.allclose(block(x, causal=True), other(x, attn_mask=theirs.attn_mask), atol=1e-5)


def test_tower_that_reads_both_ways_is_that_of_open_clip_without_its_mask() -> None:
    open_clip_module()
    from open_clip.transformer import TextTransformer

    config = ClipTextConfig(
        width=32, layers=2, heads=4, context_length=9, vocabulary=600, activation="gelu", causal=False
    )
    ours = ClipTextEncoder(config)
    theirs = TextTransformer(
        context_length=9, vocab_size=600, width=32, heads=4, layers=2, output_dim=None, no_causal_mask=True,
        output_tokens=True, pool_type="none",
    )  # fmt: skip
    theirs.load_state_dict(ours.tower.state_dict())
    ids = ours.tokenize(["a red circle"])
    pooled, tokens = theirs(ids)
    states, _ = ours(ids)
    assert torch.allclose(states, tokens, atol=1e-5) and torch.equal(pooled, tokens)


@pytest.mark.parametrize(("causal", "told"), [(True, False), (False, True)])
def test_a_word_is_told_of_the_words_behind_it_where_the_tower_reads_both_ways(causal: bool, told: bool) -> None:
    torch.manual_seed(0)
    values = {"width": 32, "layers": 2, "heads": 4, "context_length": 12, "vocabulary": 600, "causal": causal}
    encoder = ClipTextEncoder(ClipTextConfig.model_validate(values))
    left, right = (encoder(encoder.tokenize([f"a b {side}"]))[0][0, 1] for side in ("c", "d"))
    assert torch.equal(left, right) is not told


def test_a_machine_without_open_clip_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="open_clip: not installed"):
        tokenizer_module.__wrapped__()


def test_a_model_is_loaded_without_slow_imports() -> None:
    code = "import sys\nfrom ldm.bundle import Bundle\nBundle.load().text.encode(['a red circle'])\n"
    code += (
        "print([name for name in ('open_clip', 'torchvision', 'transformers', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
