"""A number that changes when values do: what tells that somebody wrote to averages while they lay in the model.

The bytes are read as words, multiplied by odd random factors and added up modulo 2^64. So that this costs little more
than a sum, a long tensor's words are added up in rows first. A word has 64 bits, but of a float64 only 32: the sign
would be its last bit, and of that a sum knows only whether it was set an even number of times.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tensors import flatten

_ROW = 512  # words
_NUM_FACTORS = 1 << 14  # rows of 64 MiB; as many words are not worth a row
_EDGE = 16  # the last factors are for single bytes
_factors: dict[torch.device, Tensor] = {}


class Fingerprint:
    """Of one tensor, whose memory is read anew each time. Integers add up to the same on any number of threads."""

    def __init__(self, values: Tensor) -> None:
        """What is laid out with gaps cannot be read as words, and is not watched."""
        (flat,) = flatten((values.detach(),))
        self._parts = list(_parts(flat)) if flat.is_contiguous() else []

    def take(self) -> Tensor:
        """A scalar, int64, where the values are; no host sync."""
        total: Tensor | None = None
        for part, factors in self._parts:
            words = part.sum(1) if part.ndim == 2 else part
            one = (words * factors).sum()
            total = one if total is None else total + one
        return total if total is not None else torch.zeros((), dtype=torch.int64)


def _parts(values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of all bytes, as words in rows, words, or single bytes, each with a factor for every row, word or byte."""
    device = values.device
    if device not in _factors:
        drawn = torch.randint(-(1 << 62), 1 << 62, (_NUM_FACTORS + _EDGE,), generator=torch.Generator().manual_seed(0))
        _factors[device] = (2 * drawn + 1).to(device)
    factors = _factors[device]
    real = torch.view_as_real(values) if values.is_complex() else values
    word = torch.int32 if real.element_size() == 8 else torch.int64
    data = real.view(-1).view(torch.uint8)
    start = min(data.numel(), -data.storage_offset() % word.itemsize)  # where a word may begin
    stop = start + (data.numel() - start) // word.itemsize * word.itemsize
    for words in torch.split(data[start:stop].view(word), _NUM_FACTORS * _ROW):
        num_rows = words.numel() // _ROW if words.numel() > _NUM_FACTORS // 4 else 0
        if num_rows:
            yield words[: num_rows * _ROW].view(num_rows, _ROW), factors[:num_rows]
        if rest := words.numel() - num_rows * _ROW:
            yield words[num_rows * _ROW :], factors[num_rows : num_rows + rest]
    if start:
        yield data[:start], factors[-_EDGE : start - _EDGE]
    if stop < data.numel():
        yield data[stop:], factors[stop - data.numel() :]
