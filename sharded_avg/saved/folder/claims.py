"""What ranks say that they hold of one checkpoint, compared before any of it is written.

    Piece     one Box of one tensor that this rank holds, and its values
    Claim     what a rank says about a piece that another may hold, too: sizes and a checksum of the values
    held_twice  the places that several ranks hold; only these are summed up
    settle    equal claims -> one rank writes the piece; claims that differ -> refused: half of the values would be lost

Where the ranks of an engine divide a tensor among them, no two hold one piece, and no values are read. A user's own
`dcp.save` gives us no word between planning and writing: there, a ClaimIndex (`dcp.py`) refuses to be equal to another
rank's claim on the same piece, and so stops DCP's planner.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files.stored import bytes_of
from ...ranks import claim_once
from ...shard import Box, Patch

_MOST_NAMES = 5  # in an error


Place = tuple[str, tuple[int, ...]]  # a tensor, and where a Box of it begins


@dataclass(frozen=True, slots=True)
class Piece:
    """One Box of the tensor `key`, of `shape` in full. `values` may be strided, and on any device."""

    key: str
    shape: tuple[int, ...]
    box: Box
    values: Tensor

    @property
    def place(self) -> Place:
        """What tells it from other pieces: two with one place are the same piece, or their tensors are not one."""
        return self.key, self.box.offsets


class Claim(NamedTuple):
    """One rank's word about one piece."""

    key: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: str
    checksum: int
    nbytes: int


def window(local: Tensor, patch: Patch) -> Tensor:
    """The part of a rank's local tensor that fills a Box, shaped like it."""
    if local.ndim == len(patch.box.lengths) and local.numel() == patch.box.numel:
        return local.view(patch.box.lengths) if local.is_contiguous() else local
    return local.view(-1)[patch.start : patch.stop].view(patch.box.lengths)


def may_be_held_twice(box: Box, shape: tuple[int, ...], num_ranks: int) -> bool:
    """Whether a piece is so large that, if all ranks hold as much, some hold the same: what a rank can know alone."""
    return box.numel * num_ranks > torch.Size(shape).numel()


def claim_of(piece: Piece) -> Claim:
    """A pass over the values, in host memory: equal bits give equal checksums, a NaN equals itself."""
    values = piece.values.detach().to("cpu").contiguous()
    data = bytes_of(values)
    checksum = zlib.crc32(data) << 32 | zlib.adler32(data)
    return Claim(piece.key, piece.box.offsets, piece.box.lengths, str(values.dtype), checksum, data.nbytes)


def held_twice(ranks: Sequence[Sequence[Place]]) -> set[Place]:
    """The places that more than one rank holds."""
    seen: set[Place] = set()
    twice: set[Place] = set()
    for places in ranks:
        mine = set(places)
        twice |= seen & mine
        seen |= mine
    return twice


def settle(claims: Sequence[Sequence[Claim]]) -> list[set[Place]]:
    """For each rank, the places that another rank writes. Raises `CheckpointError` if claims differ."""
    holders: dict[Place, list[tuple[int, Claim]]] = {}
    for rank, mine in enumerate(claims):
        for claim in mine:
            holders.setdefault((claim.key, claim.offsets), []).append((rank, claim))
    left: list[set[Place]] = [set() for _ in claims]
    nbytes = [0] * len(claims)
    apart = []
    for place, held in holders.items():
        if any(claim != held[0][1] for _, claim in held):
            apart.append((place[0], [rank for rank, _ in held]))
        writer = min((rank for rank, _ in held), key=nbytes.__getitem__)
        nbytes[writer] += held[0][1].nbytes
        for rank, _ in held:
            if rank != writer:
                left[rank].add(place)
    if apart:
        names = list(dict.fromkeys(name for name, _ in apart))
        raise CheckpointError(apart_error(names, apart[0][1]))
    return left


def apart_error(names: list[str], ranks: list[int]) -> str:
    """What to say of pieces that differ, and what to do."""
    shown = ", ".join(map(repr, names[:_MOST_NAMES])) + (", ..." if len(names) > _MOST_NAMES else "")
    return (
        f"ranks {ranks} each hold the same piece of {shown}, with other values or sizes: saved together, all but one "
        "rank's would be lost. Nothing was written. If each rank has a model of its own, give each a path of its own. "
        "If these are parts of one model that differ by rank (experts, stages), give them names of their own, shard "
        "them as a DTensor, or leave them out with include=. If they should be equal, find out why they are not, "
        "broadcast them from one rank, and tell with process_group= which ranks hold the model together"
    )


def claim_path(identity: str, ranks: list[int]) -> None:
    """Refuse a path that other ranks of this job have saved to: they hold another model, or another part of it.

    The store remembers who was first, for as long as the job runs. Local.
    """
    mine = ",".join(map(str, ranks))
    owner = claim_once(f"saved/{identity}", mine)
    if owner != mine:
        raise CheckpointError(
            f"ranks [{owner}] of this job have saved to {identity!r}, and these are ranks [{mine}], which hold another "
            "model, or another part of it: saving there would replace theirs. Give each group of ranks a path of its "
            "own; one checkpoint of all of them is torch.distributed.checkpoint.save({'average': average}, ...)"
        )
