"""Saving an average as a folder: every rank its own pieces, and rank 0 the index and the name.

    begin     all ranks tell what they would write and where; rank 0 compares, settles who writes what several hold, and
              makes the incoming folder
    write     each rank writes its pieces into a file of its own; nothing is said meanwhile, so that training may go on
    finish    all ranks tell where their pieces lie; rank 0 writes the index, adds the manifest, and names the folder

A Saving is one of these on its way; a PendingSave one whose middle part runs beside the training.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.distributed as dist

from ...averages.arguments import MANIFEST_KEY
from ...errors import CheckpointError, ConfigError
from ...files.dcp_folder import INDEX_FILE
from ...ranks import all_or_none, collective, decided, gather_objects, interruptible, part_group, rank_in, size_of
from ..manifest import Manifest
from .claims import Claim, Piece, Place, claim_of, claim_path, held_twice, settle
from .distcp import Written, index_of, sync, write_pieces
from .place import MANIFEST_FILE, AbstractPlace, place_of

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Part:
    """What one rank would save."""

    manifest: Manifest
    pieces: list[Piece]


class _Asked(NamedTuple):
    """What a rank tells before anything is written."""

    path: str
    contents: bytes  # equal where manifests are
    places: list[Place]


class _Answered(NamedTuple):
    """Where each rank saves, which pieces several of them hold, and whether their manifests differ."""

    paths: list[str]
    shared: set[Place]
    differ: bool


class Saving:
    """One save under way on this rank."""

    def __init__(self, place: AbstractPlace, manifest: Manifest, pieces: list[Piece], group: dist.ProcessGroup | None):
        self.place, self._manifest, self._pieces, self._group = place, manifest, pieces, group
        self._written: list[Written] = []
        self._failure = ""

    def detach(self) -> None:
        """Copy the values to host memory: what is saved is the state of this moment."""
        self._pieces = [replace(piece, values=piece.values.detach().to("cpu", copy=True)) for piece in self._pieces]

    def write(self) -> None:
        """Write this rank's pieces. Local. What goes wrong on the disk is told when the save is finished."""
        rank = rank_in(self._group)
        try:
            objects = {MANIFEST_KEY: self._manifest.to_json()} if rank == 0 else {}
            if self._pieces or objects:
                self._written = write_file(self.place, f"__{rank}_0.distcp", self._pieces, objects)
        except Exception as failure:
            self._failure = repr(failure)
        finally:
            self._pieces = []

    def finish(self, error: BaseException | None = None) -> None:
        """Collective: all ranks must call. Give the folder its name, unless some rank has an `error`, or failed."""

        def say() -> tuple[str, list[Written]]:
            if error is not None:
                raise error
            return self._failure, self._written

        def publish(ranks: list[tuple[str, list[Written]]]) -> None:
            causes = "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(ranks) if failure)
            if causes:
                raise CheckpointError(f"saving to {self.place.incoming!r} failed: {causes}")
            whole(self.place, [written for _, written in ranks], self._manifest)

        decided(self._group, say, publish, f"naming the finished folder {self.place.path!r}")


def write_file(place: AbstractPlace, file: str, pieces: Iterable[Piece], objects: dict[str, str]) -> list[Written]:
    """One rank's file of the incoming folder. Local."""
    with place.create(f"{place.incoming}/{file}") as stream:
        written = write_pieces(stream, file, pieces, objects)
        sync(stream)
    return written


def whole(place: AbstractPlace, ranks: list[list[Written]], manifest: Manifest) -> None:
    """Make the incoming folder whole, and give it its name. Local: rank 0 alone."""
    with place.create(f"{place.incoming}/{INDEX_FILE}") as stream:
        stream.write(index_of(ranks))
        sync(stream)
    place.write(f"{place.incoming}/{MANIFEST_FILE}", manifest.to_json())
    place.publish()


def begin(path: Path, collect: Callable[[], Part], group: dist.ProcessGroup | None, *, connected: bool) -> Saving:
    """Collective: all ranks must call. Everything that can be compared before anything is written, and a new folder.

    `connected`: an engine, or the user, says that the ranks of `group` hold one model. Otherwise ranks that name other
    paths save for themselves, and all that name one save what they hold together.
    """
    held: list[tuple[AbstractPlace, Part]] = []
    rank, num_ranks, doing = rank_in(group), size_of(group), f"preparing a save to {path!r}"

    def ask() -> _Asked:
        place, part = place_of(path), collect()
        held.append((place, part))
        places = [piece.place for piece in part.pieces] if num_ranks > 1 else []
        return _Asked(place.path if connected else place.identity, part.manifest.digest(), places)

    def look(asked: list[_Asked]) -> _Answered:
        paths = [one.path for one in asked]
        if len(set(paths)) > 1 and connected:
            raise ConfigError(f"path: ranks that hold one model together save to different places, {paths}")
        answer = _Answered(paths, held_twice([one.places for one in asked]), len({one.contents for one in asked}) > 1)
        if len(set(paths)) == 1 and not answer.shared and not answer.differ:
            _prepare(held[0][0], group)
        return answer

    answer = decided(group, ask, look, doing)
    place, part = held[0]
    same = [other for other in range(num_ranks) if answer.paths[other] == answer.paths[rank]]
    if len(same) < num_ranks:
        return begin(path, lambda: part, part_group(same), connected=connected)
    manifest, left = part.manifest, set()
    if answer.differ:
        manifests = gather_objects(group, manifest, doing)
        with all_or_none(group, doing):
            manifest = manifests[0].joined_by(manifests[1:])
    if answer.differ or answer.shared:

        def compare(claims: list[list[Claim]]) -> list[set[Place]]:
            settled = settle(claims)
            _prepare(place, group)
            return settled

        claims = decided(group, lambda: [claim_of(p) for p in part.pieces if p.place in answer.shared], compare, doing)
        left = claims[rank]
    return Saving(place, manifest, [piece for piece in part.pieces if piece.place not in left], group)


def _prepare(place: AbstractPlace, group: dist.ProcessGroup | None) -> None:
    """Rank 0 alone."""
    if group is not None and size_of(group) < dist.get_world_size():
        claim_path(place.identity, dist.get_process_group_ranks(group))
    place.prepare()


@collective
def save_folder(path: Path, collect: Callable[[], Part], group: dist.ProcessGroup | None, *, connected: bool) -> None:
    """Collective: all ranks must call. The folder has its name when it is whole; an earlier one stays until then."""
    saving, error = begin(path, collect, group, connected=connected), None
    try:
        with interruptible():
            saving.write()
    except BaseException as failure:
        error = failure
    saving.finish(error)


class PendingSave:
    """A save under way. Training and updates may go on: what lands is the state of the moment of the call."""

    def __init__(self, saving: Saving) -> None:
        self._saving = saving
        self._thread = threading.Thread(target=saving.write, name="sharded_avg.async_save", daemon=False)
        self._ended = False
        self._thread.start()

    def wait(self) -> None:
        """Until this rank's bytes are written, or have failed to be. Local."""
        self._thread.join()

    def done(self) -> bool:
        """Whether this rank's bytes are written; the folder has its name only after `result()`. Local."""
        return not self._thread.is_alive()

    @collective
    def result(self) -> None:
        """Collective: all ranks must call. Wait for all bytes, and give the folder its name."""
        if self._ended:
            return
        error: BaseException | None = None
        try:
            with interruptible():
                self.wait()
        except BaseException as failure:  # Ctrl-C on this rank: the others wait for its word
            error = failure
        self._ended = True
        self._saving.finish(error)


@collective
def save_folder_async(
    path: Path, collect: Callable[[], Part], group: dist.ProcessGroup | None, *, connected: bool
) -> PendingSave:
    """Collective: all ranks must call. As `save_folder`, returning when the values are copied to host memory."""
    saving = begin(path, collect, group, connected=connected)
    with all_or_none(group, "copying averages to host memory"):
        saving.detach()
        pending = PendingSave(saving)
    return pending
