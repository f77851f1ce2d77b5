"""Where averaged shards live.

    Arena   one flat tensor per (average, device, dtype) that holds the averaged shards one after the other, in the
            layout's order, so that live shards that lie together in memory have averages that lie together
    view    one shard's part of an arena, shaped and strided like the live shard
    column  an average, or one of the snapshots that a rule keeps beside it (ring.py): each has arenas and views
    Batch   lists of pieces that one call of a rule works on, with the scratch that mixed dtypes or devices need

Nothing is allocated before `arrange`, which the first update calls. `update` allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ..rules.base import AbstractRule, Moment
from ..shard import Shard
from ..tensors import Row, chunk_numel, coalesce, is_dense, pack
from ..weights.names import collector_paused
from .ring import Ring, place_dtype, room_dtype, turn

Key = tuple[torch.device, torch.dtype]
AverageDtype = torch.dtype | Literal["auto"] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of each rule."""

    live: list[Tensor]
    current: list[Tensor]  # what rules read: `live`, or scratch of the average's dtype and device that it is copied to
    averaged: list[list[Tensor]]  # one list for each average, in the order of the store's names


class Store:
    """The averaged shards of one or several averages on this rank.

    `dtype`: of the averages; "auto" is float32, or a shard's own where that is wider, and `None` each shard's own.
    `device`: `None` is where the shard lives. `rings`: of the averages that keep snapshots, which lie in host memory.
    """

    def __init__(
        self, names: Sequence[str], dtype: AverageDtype, device: torch.device | None, rings: Iterable[Ring] = ()
    ) -> None:
        self.names = tuple(names)
        self.rings = {ring.name: ring for ring in rings}
        self._columns = [*self.names, *(column for ring in self.rings.values() for column in ring.columns)]
        self._ring_of = {column: ring.name for ring in self.rings.values() for column in ring.columns}
        self._in_flight: set[torch.device] = set()  # where snapshots may be on their way to the host
        self._rooms: dict[tuple[str, Key], Tensor] = {}  # scratch for snapshots
        self._dtype = dtype
        self._device = device
        self._shards: dict[str, Shard] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # of the averages that are held, by shard
        self._arenas: dict[str, dict[Key, Tensor]] = {column: {} for column in self._columns}
        self._views: dict[str, dict[str, Tensor]] = {column: {} for column in self._columns}
        self._scratch: dict[Key, Tensor] = {}
        self._batches: list[Batch] = []
        self.arranged = False  # whether it holds anything yet, or knows that this rank has nothing to hold

    def like(self) -> Store:
        """An empty store with the same settings."""
        rings = [Ring(ring.name, ring.size, ring.dtype) for ring in self.rings.values()]
        other = Store(self.names, self._dtype, self._device, rings)
        other._dtypes = dict(self._dtypes)
        return other

    def take_from(self, other: Store, names: Iterable[str]) -> None:
        """Copy the averages `names` of the shards that both hold, and their snapshots."""
        other.settle()
        for name in names:
            ring = other.rings.get(name)
            for column in (name, *(ring.columns if ring is not None else ())):
                for shard_name, view in self._views[column].items():
                    if shard_name in other:
                        view.copy_(other.view(column, shard_name))
            if ring is not None:
                self.rings[name] = ring

    def rename(self, old: str, new: str) -> None:
        """A shard has another name from now on."""
        if old in self._shards:
            self._shards[new] = self._shards.pop(old)
            self._dtypes[new] = self._dtypes.pop(old)
            for views in self._views.values():
                views[new] = views.pop(old)

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas on this rank, without scratch."""
        return sum(arena.nbytes for arenas in self._arenas.values() for arena in arenas.values())

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that `update` uses beside the arenas."""
        return sum(scratch.nbytes for scratch in (*self._scratch.values(), *self._rooms.values()))

    def traffic(self, names: Iterable[str]) -> int:
        """Bytes that an update of these averages reads and writes, without scratch."""
        live, total = sum(shard.tensor.nbytes for shard in self._shards.values()), 0
        for name in names:
            own = sum(arena.nbytes for arena in self._arenas[name].values())
            ring = self.rings.get(name)
            kept = 0 if ring is None else sum(a.nbytes for a in self._arenas[ring.column(0)].values())
            total += own * 2 + kept * (0 if ring is None else ring.filled + 1)
        return live + total

    def __contains__(self, shard_name: str) -> bool:
        return shard_name in self._shards

    def view(self, column: str, shard_name: str) -> Tensor:
        """One column of one shard, an average most likely, shaped like its live tensor."""
        return self._views[column][shard_name]

    def snapshots(self, name: str) -> list[str]:
        """The columns of the snapshots that are kept of an average, newest first, to be read on the host."""
        ring = self.rings.get(name)
        if ring is None:
            return []
        self.settle()
        return [ring.column(age) for age in range(ring.filled)]

    def settle(self) -> None:
        """Before snapshots are read on the host: wait for those that are on their way to it."""
        for device in self._in_flight:
            torch.accelerator.synchronize(device)
        self._in_flight.clear()

    def dtype_of(self, shard: Shard) -> torch.dtype:
        """The dtype in which a shard is averaged; complex parameters stay complex.

        An average that is held becomes no narrower when its parameter does (`model.half()`).
        """
        own = shard.dtype
        if self._dtype == "auto":
            # torch promotes no 8-bit floats.
            dtype = torch.promote_types(own, torch.float32) if own.itemsize > 1 else torch.float32
        else:
            dtype = self._dtype or own
            if own.is_complex and not dtype.is_complex:
                # torch >= 2.15 has a bcomplex32, in which it cannot average; before, complex64 was bfloat16's complex
                dtype = torch.complex64 if dtype == torch.bfloat16 else dtype.to_complex()
        held = self._dtypes.get(shard.name, dtype)
        return held if held.itemsize > dtype.itemsize else dtype

    def dtype_in(self, column: str, shard: Shard) -> torch.dtype:
        """The dtype in which a column has a shard."""
        return self._kept_as(column, self._key(shard))[1]

    def _key(self, shard: Shard) -> Key:
        return self._device or shard.tensor.device, self.dtype_of(shard)

    @collector_paused()
    def arrange(self, shards: Iterable[Shard]) -> list[Shard]:
        """Hold these shards: allocate where the set has changed, keep the values held, and return the new ones.

        New shards start as copies of the live values.
        """
        # Shards of one live dtype and device side by side, so that neighbours in memory are neighbours in the arena.
        ordered = sorted(shards, key=lambda s: (str(s.tensor.device), str(s.tensor.dtype)))
        new = [shard for shard in ordered if shard.name not in self._shards]
        if new or [_footprint(s) for s in ordered] != [_footprint(s) for s in self._shards.values()]:
            self._allocate(ordered)
            for shard in new:
                for column in self._columns:
                    self._views[column][shard.name].copy_(shard.tensor)
        self._shards = {shard.name: shard for shard in ordered}
        self._batches = self._make_batches(ordered)
        self.arranged = True
        return new

    def _allocate(self, shards: list[Shard]) -> None:
        """New arenas for these shards, with the values held of those that stay."""
        keys = [self._key(shard) for shard in shards]
        sizes: dict[Key, int] = {}
        for key, shard in zip(keys, shards, strict=True):
            sizes[key] = sizes.get(key, 0) + shard.tensor.numel()
        arenas: dict[str, dict[Key, Tensor]] = {}
        views: dict[str, dict[str, Tensor]] = {}
        self.settle()
        for name in self._columns:
            arenas[name] = {key: _empty(numel, self._kept_as(name, key), shards) for key, numel in sizes.items()}
            views[name] = {}
            offsets = dict.fromkeys(sizes, 0)
            for key, shard in zip(keys, shards, strict=True):
                live, start = shard.tensor, offsets[key]
                offsets[key] += live.numel()
                flat = arenas[name][key][start : offsets[key]]
                # The strides of a dense live tensor (channels_last, say): both can then be walked in memory order.
                view = flat.as_strided(live.shape, live.stride()) if is_dense(live) else flat.view(live.shape)
                views[name][shard.name] = view
                if shard.name in self._views[name]:
                    view.copy_(self._views[name][shard.name])
        self._arenas, self._views, self._rooms = arenas, views, {}
        for column, name in self._ring_of.items():
            for key, arena in arenas[name].items():
                dtype, numel = room_dtype(arena, arenas[column][key]), min(arena.numel(), chunk_numel(key[0]))
                if dtype is not None and (name, key) not in self._rooms:
                    self._rooms[name, key] = _empty(numel, (key[0], dtype), shards)
        self._dtypes = {shard.name: dtype for (_, dtype), shard in zip(keys, shards, strict=True)}

    def _kept_as(self, column: str, key: Key) -> Key:
        """Where and in which dtype a column of averages with this key lies."""
        if column not in self._ring_of:
            return key
        return torch.device("cpu"), place_dtype(key[1], self.rings[self._ring_of[column]].dtype)

    def _make_batches(self, shards: list[Shard]) -> list[Batch]:
        """Group the shards into calls of the rules; scratch is allocated here, once for all batches of a key."""
        groups: dict[tuple[Key, Key], list[Shard]] = {}
        for shard in shards:
            groups.setdefault(((shard.tensor.device, shard.tensor.dtype), self._key(shard)), []).append(shard)
        views = [self._views[name] for name in self.names]
        packed: list[tuple[Key | None, list[Row]]] = []
        needed: dict[Key, int] = {}
        for (live_key, key), members in groups.items():
            rows = coalesce([(s.tensor, *(view[s.name] for view in views)) for s in members])
            # In pieces, so that several averages find the live piece in cache, and scratch is small.
            in_pieces = live_key != key or len(self.names) > 1
            for piece in pack(rows, chunk_numel(key[0])) if in_pieces else [rows] if rows else []:
                packed.append((None if live_key == key else key, piece))
                if live_key != key:
                    needed[key] = max(needed.get(key, 0), sum(row[0].numel() for row in piece))
        self._scratch = {key: _empty(numel, key, shards) for key, numel in needed.items()}
        batches = []
        for scratch_key, rows in packed:
            current = live = [row[0] for row in rows]
            if scratch_key is not None:
                ends = accumulate(tensor.numel() for tensor in live)
                flat = self._scratch[scratch_key]
                current = [flat[end - t.numel() : end].view(t.shape) for end, t in zip(ends, live, strict=True)]
            batches.append(Batch(live, current, [[row[1 + i] for row in rows] for i in range(len(self.names))]))
        return batches

    def update(self, rules: Mapping[str, AbstractRule], moments: Mapping[str, Moment]) -> None:
        """One read of the live weights updates the averages in `moments`; one that begins copies them. Local."""
        for batch in self._batches:
            if batch.current is not batch.live:
                torch._foreach_copy_(batch.current, batch.live)
            for name, averaged in zip(self.names, batch.averaged, strict=True):
                if name not in moments:
                    continue
                if moments[name].num_averaged:
                    rules[name].update_(averaged, batch.current, moments[name])
                else:
                    torch._foreach_copy_(averaged, batch.current)
        for name, ring in self.rings.items():
            if name in moments:
                self._turn(name, ring.advanced())

    def _turn(self, name: str, ring: Ring) -> None:
        """The average `name` holds the newest snapshot: keep it, and make the mean of those that are kept."""
        for key, arena in self._arenas[name].items():
            places = [self._arenas[ring.column(age)][key] for age in range(ring.filled)]
            turn(arena, places, self._rooms.get((name, key)))
            if key[0].type != "cpu":
                self._in_flight.add(key[0])
        self.rings[name] = ring

    def begin_ring(self, name: str, filled: int) -> None:
        """After a load, which has put the newest snapshot into the first place: so many are there.

        If none are, the average stands for all of them.
        """
        ring = self.rings[name]
        self.rings[name] = Ring(name, ring.size, ring.dtype, 0, filled or ring.size)
        for column in ring.columns if not filled else ():
            for shard_name, view in self._views[column].items():
                view.copy_(self._views[name][shard_name])


def _footprint(shard: Shard) -> tuple[object, ...]:
    tensor = shard.tensor
    return shard.name, shard.region, tensor.shape, tensor.stride(), tensor.device, tensor.dtype, shard.dtype


@torch.inference_mode(False)  # an average that is first loaded for an evaluation may be updated after it
def _empty(numel: int, key: Key, shards: list[Shard]) -> Tensor:
    device, dtype = key
    pinned = device.type == "cpu" and any(shard.tensor.is_cuda for shard in shards)
    return torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)
