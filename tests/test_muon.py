"""Muon moves matrices as PyTorch's does, whatever lies how in memory, and leaves the rest to AdamW."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ldm.models.unet import UNet, UNetConfig
from ldm.training.muon import Muon, as_matrix, like, matrices, orthogonal, parted
from ldm.training.optimization import OptimizationConfig

LAST = torch.channels_last
SETTINGS: Any = {"lr": 0.02, "weight_decay": 0.05}


class Net(nn.Module):
    """One layer of each kind: an embedding, a first convolution, matrices of three shapes, a norm and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.conv_in = nn.Conv2d(4, 32, 3)
        self.conv = nn.Conv2d(32, 16, 3)
        self.wide, self.tall, self.same = nn.Linear(64, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.norm = nn.LayerNorm(64)
        self.out = nn.Linear(16, 3)


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 20, 70), (2, 70, 20), (1, 32, 32)])
def test_what_is_orthogonal_has_the_directions_of_what_it_was(shape: tuple[int, int, int]) -> None:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 1e-3
    u, _, v = torch.linalg.svd(found, full_matrices=False)
    made = orthogonal(found)
    stretch = u.mT @ made @ v.mT
    values = stretch.diagonal(dim1=1, dim2=2)
    assert made.dtype == found.dtype and float(values.min()) > 0.3 and float(values.max()) < 1.3
    assert float((stretch - torch.diag_embed(values)).abs().max()) < 0.05


def test_no_gradient_moves_nothing_and_none_is_not_a_number() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_matrices_are_those_between_the_first_and_the_last_layer() -> None:
    net = Net()
    net.same.requires_grad_(False)
    assert {id(w) for w in matrices(net)} == {id(net.conv.weight), id(net.wide.weight), id(net.tall.weight)}
    rest, of_muon = parted(net)
    together = [*rest["params"], *of_muon["params"]]
    assert {id(p) for p in together} == {id(p) for p in net.parameters() if p.requires_grad}
    assert len(together) == len({id(p) for p in together})


def test_of_the_unet_almost_all_is_matrices() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    found = {id(w) for w in matrices(unet)}
    share = sum(p.numel() for p in unet.parameters() if id(p) in found) / sum(p.numel() for p in unet.parameters())
    assert share > 0.99
    assert not found & {id(unet.conv_in.weight), id(unet.conv_out.weight)}


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_a_kernel_is_a_matrix_of_what_an_output_reads(layout: torch.memory_format) -> None:
    weight = torch.randn(6, 5, 3, 2).to(memory_format=layout)
    assert torch.equal(as_matrix(weight)[4], weight[4].permute(1, 2, 0).flatten())
    assert torch.equal(like(as_matrix(weight), weight), weight)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_steps_are_those_of_pytorch(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    ours.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks this form
    of_muon = matrices(theirs)
    flat = {id(w): nn.Parameter(as_matrix(w.detach()).clone()) for w in of_muon}
    rest = [p for p in theirs.parameters() if id(p) not in flat]
    first = Muon(parted(ours), betas=(0.8, 0.9), fused=True, **SETTINGS)
    second = torch.optim.Muon(flat.values(), adjust_lr_fn="match_rms_adamw", **SETTINGS)
    third = torch.optim.AdamW(rest, betas=(0.8, 0.9), **SETTINGS)
    for step in range(4):
        for net in (ours, theirs):
            give_gradients(net, step)
        for weight in of_muon:
            assert weight.grad is not None
            flat[id(weight)].grad = as_matrix(weight.grad)
        for optimizer in (first, second, third):
            optimizer.step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if id(other) in flat:
            moved = flat[id(other)] - as_matrix(other)  # which nobody stepped with
            assert float(((as_matrix(own) - flat[id(other)]).norm() / moved.norm()).detach()) < 0.02
        else:
            assert torch.allclose(own, other, rtol=1e-5, atol=1e-6)


def test_numbers_of_a_matrix_move_by_a_fifth_of_the_rate() -> None:
    torch.manual_seed(0)
    net = Net()
    before = [weight.detach().clone() for weight in matrices(net)]
    give_gradients(net, 0)
    Muon(parted(net), lr=0.01, weight_decay=0.0, fused=True).step()
    for weight, old in zip(matrices(net), before, strict=True):
        assert 0.0015 < float((weight.detach() - old).square().mean().sqrt()) < 0.0025


def test_a_matrix_without_gradient_stays() -> None:
    net = Net()
    give_gradients(net, 0)
    net.tall.weight.grad = None
    tall, wide = net.tall.weight.detach().clone(), net.wide.weight.detach().clone()
    Muon(parted(net), fused=True, **SETTINGS).step()
    assert torch.equal(net.tall.weight, tall) and not torch.equal(net.wide.weight, wide)


def test_split_matrices_are_refused() -> None:
    config = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "optimizer": "muon"}
    assert OptimizationConfig.model_validate(config).optimizer == "muon"
    with pytest.raises(ValidationError, match="muon needs whole matrices, and fsdp splits them"):
        OptimizationConfig.model_validate({**config, "strategy": "fsdp"})
