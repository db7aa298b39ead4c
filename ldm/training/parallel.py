"""A module spread over processes: copied to each (DDP), or split between them (FSDP2), and compiled where asked for."""

import contextlib
import copy
import shutil
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ldm.cli import warn
from ldm.nn.layers import ResBlock, SpatialTransformer
from ldm.training.optimization import OptimizationConfig
from ldm.training.workers import Workers

BLOCKS = (ResBlock, SpatialTransformer)
"""What is recomputed, and what is gathered at a time: blocks that hold much and whose inputs are few."""
VERSIONS = 64  # of a compiled network, one for each bucket


def placed(module: nn.Module, config: OptimizationConfig, me: Workers) -> nn.Module:
    """The module that learns: `module` itself on this process's device, or under fsdp a copy that is split."""
    if config.strategy == "fsdp" and me.world > 1:
        module = split(copy.deepcopy(module), me)
    module.to(me.device).train()
    if config.gradient_checkpointing:
        recompute_activations(module)
    return module


def split(module: nn.Module, me: Workers) -> nn.Module:
    """Divide all parameters over the processes, block by block (Zhao et al. 2023; PyTorch's `fully_shard`)."""
    mesh = init_device_mesh(me.device.type, (me.world,))
    module.to(me.device)
    for parameter in module.parameters():
        # It divides contiguous tensors only; convolutions still run in the layout of what they read.
        parameter.data = parameter.data.contiguous()
    for block in [m for m in module.modules() if isinstance(m, BLOCKS)]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def recompute_activations(module: nn.Module) -> None:
    """Let blocks forget their activations and compute them again on the way back (Chen et al. 2016)."""
    for block in (m for m in module.modules() if isinstance(m, BLOCKS)):
        block.forward = MethodType(_forgetful, block)  # type: ignore[method-assign]  # a method: copies get their own


def _forgetful(block: nn.Module, *arguments: Any, **named: Any) -> Any:
    return checkpoint(type(block).forward, block, *arguments, use_reentrant=False, **named)


def keep_activations(module: nn.Module) -> None:
    """Undo `recompute_activations`."""
    for block in module.modules():
        vars(block).pop("forward", None)


def runnable(module: nn.Module, config: OptimizationConfig, me: Workers) -> nn.Module:
    """What a loss calls: `module` behind DDP where there are several processes, compiled where asked for.

    DDP follows calls of the module itself only: a loss must call it, and none of its methods.
    """
    if me.world > 1 and not isinstance(module, FSDPModule):
        devices = [me.device] if me.device.type == "cuda" else None
        module = DistributedDataParallel(
            module, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    return compiled(module) if config.compile else module


def compiled(module: nn.Module) -> nn.Module:
    """`module` behind torch.compile, or itself, with a warning, on a machine without a compiler."""
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        warn("compile: no C++ compiler (g++) found; training runs uncompiled, which takes longer")
        return module
    # One version for each size of picture; beyond this number, eight unless said, it would run uncompiled.
    torch._dynamo.config.recompile_limit = VERSIONS
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]  # a module stays one


def without_exchange(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """While gradients accumulate, processes exchange them after the last micro-batch only."""
    inner = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(last)
    if isinstance(inner, DistributedDataParallel) and not last:
        return inner.no_sync()
    return contextlib.nullcontext()
