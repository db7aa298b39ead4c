"""Attention has its closed form, and a foreign kernel is used only where it agrees, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.nn.attention import Attention, agrees, attention

CPU = torch.device("cpu")


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value


def test_attention_is_its_formula() -> None:
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    assert torch.allclose(attention(query, key, value), by_hand(query, key, value), atol=1e-5)


def test_layer_attends_to_itself_without_a_context() -> None:
    torch.manual_seed(0)
    layer, x = Attention(16, heads=2), torch.randn(1, 6, 16)
    assert torch.equal(layer(x), layer(x, x))
    permuted = torch.tensor([5, 3, 1, 0, 2, 4])
    assert torch.allclose(layer(x)[:, permuted], layer(x[:, permuted]), atol=1e-5), "order is no information"


def test_a_right_kernel_agrees() -> None:
    assert agrees(by_hand, CPU, torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert agrees(by_hand, CPU, torch.float32), "the test of a kernel does not depend on who asks"


def test_compiled_code_does_not_look_for_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("ldm.nn.attention.xformers_kernel", lambda: asked.append(True))
    with FakeTensorMode():
        states = torch.empty(1, 2, 4, 8, device="cuda", dtype=torch.float16)
        assert attention(states, states, states).shape == states.shape and asked == [True]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert attention(states, states, states).shape == states.shape and asked == [True]


def test_kernels_with_a_wrong_result_a_wrong_gradient_or_an_error_do_not() -> None:
    def unscaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)

    def detached(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return by_hand(query, key.detach(), value)

    def missing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    assert not any(agrees(kernel, CPU, torch.float32) for kernel in (unscaled, detached, missing))
