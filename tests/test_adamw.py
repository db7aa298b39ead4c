"""The optimizer is PyTorch's up to rounding, whatever lies how in memory."""

import pytest
import torch
from torch import nn

from ldm.training.adamw import AdamW, is_channels_last

LAST = torch.channels_last


def test_what_lies_channels_last_is_known() -> None:
    assert is_channels_last(torch.zeros(4, 3, 3, 3).to(memory_format=LAST))
    for other in (torch.zeros(4, 3, 3, 3), torch.zeros(4, 3, 1, 1).to(memory_format=LAST), torch.zeros(4, 3).T):
        assert not is_channels_last(other)


@pytest.mark.parametrize("gradients", [LAST, torch.contiguous_format])
def test_steps_are_those_of_pytorch_on_contiguous_weights(gradients: torch.memory_format) -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 4, 3, 3), torch.randn(6), torch.randn(4, 7), torch.randn(3, 2, 1, 1)]
    ours = [nn.Parameter(t.clone().to(memory_format=LAST) if t.dim() == 4 else t.clone()) for t in start]
    theirs = [nn.Parameter(t.clone()) for t in start]
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.05, "fused": True}
    first, second = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(4):
        for own, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(other.shape, generator=torch.Generator().manual_seed(step))
            own.grad = gradient.to(memory_format=gradients) if own.dim() == 4 else gradient
            other.grad = gradient.clone()
        first.step()
        second.step()
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other, rtol=1e-6, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(first.state[own][name], second.state[other][name], rtol=1e-6, atol=1e-6)
        assert own.stride() == first.state[own]["exp_avg"].stride() and own.grad.shape == own.shape


def test_a_weight_without_gradient_stays() -> None:
    still, moved = (nn.Parameter(torch.ones(2, 2, 3, 3).to(memory_format=LAST)) for _ in range(2))
    moved.grad = torch.ones_like(moved)
    AdamW([still, moved], lr=0.1, fused=True).step()
    assert torch.equal(still, torch.ones_like(still)) and not torch.equal(moved, still)
