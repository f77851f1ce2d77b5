"""Every process holds every parameter whole: one process, and DistributedDataParallel.

One process averages whole tensors. Under DDP the averages are divided: the averaged parameters of one dtype and
device are laid end to end, and each rank owns an Interval of that line, so it stores and updates 1/N of the average.

    Line    parameters of one (device, dtype) that were adopted together, end to end
    Cut     one rank's part of one parameter in a Line

A parameter that does not lie row-major in memory (channels_last) has no Interval that is a view; it goes whole to the
rank on which it begins. One that DistributedDataParallel does not keep equal, because it was told to ignore it or has
never seen it, is each rank's own: averaged whole, and never published. This file is the template for a new layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import UnsupportedModelError
from ...ranks import Traffic, all_or_none, comm_device, rank_in, size_of, traffic
from ...shard import Box, Interval, Region, Shard
from .. import names
from .base import STALE, AbstractLayout, addresses, trainable

_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's part of one parameter."""

    name: str
    region: Region


def piece(tensor: Tensor, region: Region) -> Tensor:
    """The live view of a region; an Interval needs a row-major tensor."""
    return tensor if isinstance(region, Box) else tensor.detach().view(-1)[region.start : region.stop]


def cut_line(params: list[tuple[str, Tensor]], num_ranks: int) -> list[list[Cut]]:
    """Divide parameters laid end to end into equal stretches, one list of Cuts for each rank."""
    total = sum(tensor.numel() for _, tensor in params)
    per_rank = -(-total // num_ranks) or 1
    cuts: list[list[Cut]] = [[] for _ in range(num_ranks)]
    begin = 0
    for name, tensor in params:
        if not tensor.is_contiguous():
            cuts[begin // per_rank].append(Cut(name, Box.whole(tensor.shape)))
        else:
            first, last = begin // per_rank, (begin + tensor.numel() - 1) // per_rank
            for rank in range(first, last + 1):
                start = max(begin, rank * per_rank) - begin
                stop = min(begin + tensor.numel(), (rank + 1) * per_rank) - begin
                cuts[rank].append(Cut(name, Interval(start, stop)))
        begin += tensor.numel()
    return cuts


class ReplicatedLayout(AbstractLayout):
    """Whole parameters on every rank; with a `group` of several ranks, the averages are divided among them."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        """`group`: the ranks with equal parameters, where there is no DistributedDataParallel that knows them."""
        self.model = names.unwrap(model)
        ddp = next((m for m in names.wrappers(model) if isinstance(m, DistributedDataParallel)), None)
        self.group = group if ddp is None else ddp.process_group
        self.publishes = size_of(self.group) > 1
        self._entries: list[names.Entry] = []
        self.aliases: dict[str, str] = {}
        kept_equal = () if ddp is None else (*ddp._module_parameters, *ddp._delay_all_reduce_params)
        self._kept_equal = None if ddp is None else {id(parameter): parameter for parameter in kept_equal}
        self._lines: list[list[list[Cut]]] = []
        self._cut_shapes: dict[str, torch.Size] = {}
        self._seen: list[Tensor] = []

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        return True

    @classmethod
    def waits_in_forward(cls, model: nn.Module) -> bool:
        return False

    def adopt(self, averaged: Iterable[str]) -> None:
        if not self.publishes:
            return
        wanted = set(averaged)
        lines: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for entry in self._entries:
            if entry.name in wanted and not entry.is_buffer and entry.tensor.numel() and self._is_equal(entry.tensor):
                key = (entry.tensor.device, entry.tensor.dtype)
                lines.setdefault(key, []).append((entry.name, entry.tensor))
                self._cut_shapes[entry.name] = entry.tensor.shape
        self._lines += [cut_line(params, size_of(self.group)) for params in lines.values()]

    def _is_equal(self, parameter: Tensor) -> bool:
        """Whether the wrapper keeps it equal; what it was told to ignore, or came later, is each rank's own."""
        return self._kept_equal is None or id(parameter) in self._kept_equal

    def replicas(self) -> list[tuple[str, Tensor]]:
        cut = self._cut_shapes
        return [(e.name, e.tensor.detach()) for e in self._entries if cut.get(e.name) == e.tensor.shape]

    def shards(self) -> list[Shard]:
        self._entries, self.aliases = names.split_ties(names.entries(self.model))
        mine, cut = self._regions(), self._cut_shapes
        # A parameter that has another shape now is another parameter: whole, until it is adopted.
        regions = {e.name: mine[e.name] for e in self._entries if cut.get(e.name) == e.tensor.shape} if cut else {}
        shards = [_shard(entry, regions) for entry in self._entries]
        self._slots = [entry.slot for entry in self._entries]
        self._keys = [entry.key for entry in self._entries]
        self._seen = [entry.tensor for entry in self._entries]
        self._pointers, self._flags = addresses(self._seen), trainable(self._seen)
        return shards

    def _regions(self) -> dict[str, Region]:
        """My region of each divided parameter; an empty one where other ranks have it all."""
        mine: dict[str, Region] = {}
        for line in self._lines:
            for rank, cuts in enumerate(line):
                for cut in cuts:
                    if rank == rank_in(self.group):
                        mine[cut.name] = cut.region
                    else:
                        mine.setdefault(cut.name, Interval(0, 0))
        return mine

    def is_current(self) -> bool:
        # Loops that run in C: with thousands of small parameters this is a good part of an update.
        return (
            all(map(is_, map(dict.get, self._slots, self._keys), self._seen))
            and addresses(self._seen) == self._pointers
            and trainable(self._seen) == self._flags
        )

    def publish(self) -> None:
        """Collective: all ranks must call. Every rank's cuts, written into the parameters of all."""
        if not self.publishes:
            return
        doing = "spreading weights over the replicas"
        with all_or_none(self.group, doing, left=STALE):
            live: dict[str, Tensor] = {e.name: e.tensor.detach() for e in self._entries}
            rounds = [round_ for line in self._lines for round_ in _rounds(line, live)]
            room = _Room(self.group, rounds, live)
        with traffic(self.group, doing, STALE) as messages:
            for round_ in rounds:
                _all_gather(messages, round_, live, room)


class _Room:
    """Memory for the messages of all rounds, by dtype."""

    def __init__(
        self, group: dist.ProcessGroup | None, rounds: list[list[list[Cut]]], live: Mapping[str, Tensor]
    ) -> None:
        sizes: dict[torch.dtype, int] = {}
        for round_ in rounds:
            dtype = _dtype(round_, live)
            sizes[dtype] = max(sizes.get(dtype, 0), _size(round_))
        device = comm_device(group, next(iter(live.values())).device) if live else torch.device("cpu")
        self._rooms_sent = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        n = size_of(group)
        self._rooms_received = {
            dtype: torch.empty(n * size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }

    def sent(self, round_: list[list[Cut]], live: Mapping[str, Tensor]) -> Tensor:
        """What this rank sends."""
        return self._rooms_sent[_dtype(round_, live)][: _size(round_)]

    def received(self, round_: list[list[Cut]], live: Mapping[str, Tensor]) -> Tensor:
        """What it receives, its own included."""
        return self._rooms_received[_dtype(round_, live)][: _size(round_) * len(round_)]


def _dtype(round_: list[list[Cut]], live: Mapping[str, Tensor]) -> torch.dtype:
    return next(live[cut.name].dtype for cuts in round_ for cut in cuts)


def _size(round_: list[list[Cut]]) -> int:
    """Elements that a rank sends: all send as many."""
    return max(sum(cut.region.numel for cut in cuts) for cuts in round_)


def _shard(entry: names.Entry, regions: dict[str, Region]) -> Shard:
    tensor = entry.tensor
    region = regions.get(entry.name, Box.whole(tensor.shape))
    if isinstance(region, Interval) and not region.numel:
        live = tensor.new_empty(0)
    elif isinstance(region, Interval) and not tensor.is_contiguous():
        raise UnsupportedModelError(
            f"parameter {entry.name!r} was row-major when its average was cut over the ranks and is no longer "
            f"(strides {tensor.stride()}); change the memory format before building the average"
        )
    else:
        live = piece(tensor.detach(), region)
    return Shard(entry.name, tensor.shape, region, live, trainable=tensor.requires_grad, is_buffer=entry.is_buffer)


def _rounds(line: list[list[Cut]], live: Mapping[str, Tensor]) -> Iterator[list[list[Cut]]]:
    """Divide each rank's cuts into rounds, so that what all ranks send in one round is about a bucket."""
    itemsize = max((live[cut.name].element_size() for cuts in line for cut in cuts), default=1)
    limit = max(1, _BUCKET_BYTES // itemsize // len(line))
    per_rank = [list(_in_groups(cuts, limit)) for cuts in line]
    for index in range(max(map(len, per_rank), default=0)):
        yield [groups[index] if index < len(groups) else [] for groups in per_rank]


def _in_groups(cuts: list[Cut], limit: int) -> Iterator[list[Cut]]:
    """Cuts of at most `limit` elements together; a long Interval is divided, what is not row-major stays whole."""
    group: list[Cut] = []
    size = 0
    for cut in cuts:
        step = cut.region.numel if isinstance(cut.region, Box) else limit
        for start in range(0, cut.region.numel, step):
            part = cut
            if isinstance(cut.region, Interval):
                begin = cut.region.start + start
                part = Cut(cut.name, Interval(begin, min(begin + limit, cut.region.stop)))
            if group and size + part.region.numel > limit:
                yield group
                group, size = [], 0
            group.append(part)
            size += part.region.numel
    if group:
        yield group


def _all_gather(messages: Traffic, round_: list[list[Cut]], live: Mapping[str, Tensor], room: _Room) -> None:
    """Collective: all ranks must call. One round."""
    me = rank_in(messages.group)
    with messages.attempt():
        mine = room.sent(round_, live)
        for cut, window in _windows(round_[me], mine, live):
            window.copy_(piece(live[cut.name], cut.region))
    messages.all_gather(partial(room.sent, round_, live), partial(room.received, round_, live))
    with messages.attempt():
        gathered, size = room.received(round_, live), _size(round_)
        for rank, cuts in enumerate(round_):
            if rank != me:
                for cut, window in _windows(cuts, gathered[rank * size : (rank + 1) * size], live):
                    piece(live[cut.name], cut.region).copy_(window)


def _windows(cuts: list[Cut], message: Tensor, live: Mapping[str, Tensor]) -> Iterator[tuple[Cut, Tensor]]:
    start = 0
    for cut in cuts:
        shape = live[cut.name].shape if isinstance(cut.region, Box) else (cut.region.numel,)
        yield cut, message[start : start + cut.region.numel].view(shape)
        start += cut.region.numel
