"""Saving and loading an average as a folder: every rank its own pieces, and rank 0 the name.

    save    all ranks write their pieces into the incoming folder, through torch.distributed.checkpoint (DCP), which
            writes its index last; then rank 0 adds the manifest and gives the folder its name
    load    rank 0's manifest goes to all ranks, which check that it fits; then each reads its own pieces

A PendingSave is a save whose bytes are still on their way; `result()` ends it.
"""

from __future__ import annotations

import io
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..errors import CheckpointError, ShardedAvgError
from ..files.dcp_folder import DcpFolder
from ..ranks import all_or_none, gather_objects, rank_in
from .manifest import Manifest
from .place import MANIFEST_FILE, AbstractPlace, Disk, place_of
from .safe import safe_storage_reader

Path = str | os.PathLike[str]


def save_folder(path: Path, state: Mapping[str, Any], manifest: Manifest, group: dist.ProcessGroup | None) -> None:
    """Collective: all ranks must call. The folder has its name when it is whole; an earlier one stays until then."""
    group = everyone(group)
    place = _prepared(path, group)
    with _clear_errors(f"saving to {place.incoming!r}"):
        dcp_save(dict(state), checkpoint_id=place.incoming, process_group=group)
    _on_rank_0(group, lambda: _publish(place, manifest), f"naming the finished folder {place.path!r}")


def _prepared(path: Path, group: dist.ProcessGroup | None) -> AbstractPlace:
    place = place_of(path)
    _on_rank_0(group, place.prepare, f"preparing {place.incoming!r}")
    return place


def _publish(place: AbstractPlace, manifest: Manifest) -> None:
    place.write(f"{place.incoming}/{MANIFEST_FILE}", manifest.to_json())
    place.publish()


class PendingSave:
    """A save under way. Training and updates may go on: what lands is the state of the moment of the call."""

    def __init__(self, place: AbstractPlace, manifest: Manifest, future: Any, group: dist.ProcessGroup | None) -> None:
        self._place, self._manifest, self._future, self._group = place, manifest, future, group
        self._ended = False

    def done(self) -> bool:
        """Whether this rank's bytes are written; the folder has its name only after `result()`. Local."""
        return bool(self._future.done())

    def result(self) -> None:
        """Collective: all ranks must call. Wait for all bytes, and give the folder its name."""
        if self._ended:
            return
        with _clear_errors(f"saving to {self._place.incoming!r}"):
            self._future.result()
        name = f"naming the finished folder {self._place.path!r}"
        _on_rank_0(self._group, lambda: _publish(self._place, self._manifest), name)
        self._ended = True


def save_folder_async(
    path: Path, state: Mapping[str, Any], manifest: Manifest, group: dist.ProcessGroup | None, carrier: Any
) -> PendingSave:
    """Collective: all ranks must call. As `save_folder`, returning when the values are copied to host memory.

    `carrier`: a gloo group of the same ranks that nothing else uses while bytes travel.
    """
    group = everyone(group)
    place = _prepared(path, group)
    with _clear_errors(f"saving to {place.incoming!r}"):
        future = dcp_async_save(dict(state), checkpoint_id=place.incoming, process_group=carrier)
    return PendingSave(place, manifest, future, group)


def read_manifest(path: Path, group: dist.ProcessGroup | None = None) -> tuple[str, Manifest]:
    """Collective: all ranks must call. The newest whole folder of that name, and its manifest, as rank 0 sees them."""
    found: tuple[str, str] | ShardedAvgError | None = None
    if rank_in(group) == 0:
        try:
            found = _find(path)
        except ShardedAvgError as error:
            found = error
        except Exception as error:  # whatever a storage backend raises; the others wait for an answer
            found = CheckpointError(f"{path!r} cannot be read: {error!r}")
    found = gather_objects(everyone(group), found)[0]
    if isinstance(found, ShardedAvgError):
        raise found
    if found is None:
        raise CheckpointError(f"rank 0 found nothing at {os.fspath(path)!r}")
    return found[0], Manifest.from_json(found[1])


def _find(path: Path) -> tuple[str, str]:
    place = place_of(path)
    try:
        whole = place.whole()
        if whole is not None:
            text = place.read(f"{whole}/{MANIFEST_FILE}")
            Manifest.from_json(text)
            if isinstance(place, Disk):
                DcpFolder(pathlib.Path(whole))  # refuses what is torn, or points elsewhere, before any rank reads
            return whole, text
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{place.path!r}: {MANIFEST_FILE} cannot be read: {error}") from error
    if place.exists(place.incoming):
        found = f"only {place.incoming!r}, the pieces of a first save that was cut short; it cannot be used"
    elif not place.exists(place.path):
        found = "there is nothing of that name"
    else:
        found = f"it has no {MANIFEST_FILE}, so it is something else, or was torn while it was copied"
    raise CheckpointError(f"{place.path!r} holds no saved average: {found}")


def load_folder(path: str, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Collective: all ranks must call. Read into the items of `state`; what the folder holds is never executed."""
    with _clear_errors(f"loading {path!r}"):
        dcp_load(state, storage_reader=safe_storage_reader(path), planner=_SafePlanner(), process_group=everyone(group))


class _SafePlanner(DefaultLoadPlanner):
    """Reads objects that are not tensors (the manifest, NOT_STARTED) without running what a pickle may hold."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded, again = torch.load(value, weights_only=True), io.BytesIO()
        torch.save(loaded, again)  # DCP's own load_bytes unpickles: what it gets is ours
        again.seek(0)
        super().load_bytes(read_item, again)


def everyone(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that saves together: replicated plain models save as one job."""
    return dist.group.WORLD if group is None and dist.is_initialized() else group


def _on_rank_0(group: dist.ProcessGroup | None, action: Callable[[], None], doing: str) -> None:
    """Collective: all ranks must call. Rank 0 acts; all ranks raise if it fails."""
    with all_or_none(group, doing):
        try:
            if rank_in(group) == 0:
                action()
        except ShardedAvgError:
            raise
        except Exception as failure:  # a disk, or whatever a storage backend raises
            raise CheckpointError(f"{doing} failed: {failure!r}") from failure


@contextmanager
def _clear_errors(doing: str) -> Iterator[None]:
    """DCP's failures as CheckpointError, and none of its remarks about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        try:
            yield
        except CheckpointException as error:  # a BaseException, which `except Exception` would not catch
            causes = "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())
            raise CheckpointError(f"{doing} failed: {causes}") from error
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{doing} failed: {error!r}") from error
