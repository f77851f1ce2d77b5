"""DeepSpeed's offloading to NVMe without its async_io op, which wants libaio: the op's handle over plain files.

DeepSpeed's own code decides what is read and written, when, and where to. Its smallest request is 1 MiB, so that small
sub-groups stay in memory; here what a test sets as `aio.block_size` decides that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class Handle:
    """What DeepSpeed asks of `async_io.aio_handle`."""

    _locked: set[int] = set()  # noqa: RUF012 one for the process, as DeepSpeed's is

    def __init__(self, *_: Any, **__: Any) -> None:
        self._num_done = 0

    def new_cpu_locked_tensor(self, numel: int, like: Tensor) -> Tensor:
        tensor = torch.empty(numel, dtype=like.dtype)
        self._locked.add(tensor.untyped_storage().data_ptr())
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        self._locked.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        with open(path, "rb") as file:
            file.seek(offset)
            assert file.readinto(_bytes_of(buffer)) == buffer.nbytes
        self._num_done += 1
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)  # like DeepSpeed's: what is there stays the same file
        with os.fdopen(number, "wb") as file:
            file.seek(offset)
            file.write(_bytes_of(buffer))
        self._num_done += 1
        return 0

    def wait(self) -> int:
        done, self._num_done = self._num_done, 0
        return done


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().view(torch.uint8).numpy())


@contextmanager
def offloading_to_files() -> Iterator[None]:
    """Inside, engines are built whose optimizer states, and parameters, are in files."""
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_optimizer_swapper, partitioned_param_swapper
    from deepspeed.runtime.swap_tensor import pipelined_optimizer_swapper as pipelined

    builder = SimpleNamespace(load=lambda verbose=False: SimpleNamespace(aio_handle=Handle))
    with ExitStack() as stack:
        for module in (partitioned_optimizer_swapper, partitioned_param_swapper, pipelined):
            stack.enter_context(mock.patch.object(module, "AsyncIOBuilder", return_value=builder))
        for module in (optimizer_utils, partitioned_param_swapper):
            stack.enter_context(mock.patch.object(module, "MIN_AIO_BYTES", 1))
        yield
