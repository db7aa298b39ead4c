"""How much memory work would need, found without doing it: on the meta device tensors have sizes and nothing else."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Alive(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made and not yet gone, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        known, size = self._known.get(id(storage)), storage.nbytes()
        if known is not None and known() is storage:
            return

        def gone(_: object) -> None:
            self.now -= size

        self._known[id(storage)] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of all tensors that `work` on the meta device has alive at once, at the worst moment; not of its inputs."""
    with torch.inference_mode(), _Alive() as alive:
        work()
    return alive.most
