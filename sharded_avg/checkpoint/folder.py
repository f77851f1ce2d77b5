"""A saved average: a torch.distributed.checkpoint folder with `manifest.json` beside it.

save    every rank writes its pieces into `<path>.incoming`; when all are done, rank 0 writes the manifest and gives
        the folder its name, keeping the old one until then
load    every rank reads the manifest, and then its own pieces
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..collectives import agree, rank_in
from ..errors import CheckpointError
from .manifest import Manifest

MANIFEST_FILE = "manifest.json"


def save_folder(
    path: str | os.PathLike[str], state: Mapping[str, Any], manifest: Manifest, group: dist.ProcessGroup | None
) -> None:
    """Collective: all ranks must call. Write `state` and `manifest`; the folder appears under its name when whole."""
    final = Path(path)
    incoming = final.with_name(final.name + ".incoming")
    group = _everyone(group)
    with _on_rank_0(group, "preparing the checkpoint folder") as act:
        if act:
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.mkdir(parents=True)
    with _quiet(), _as_checkpoint_error(f"saving to {str(incoming)!r}"):
        dcp_save(dict(state), checkpoint_id=str(incoming), process_group=group)
    with _on_rank_0(group, "naming the finished checkpoint folder") as act:
        if act:
            (incoming / MANIFEST_FILE).write_text(manifest.to_json())
            _replace(final, incoming)


def _replace(final: Path, incoming: Path) -> None:
    outgoing = final.with_name(final.name + ".outgoing")
    shutil.rmtree(outgoing, ignore_errors=True)
    if final.exists():
        final.rename(outgoing)
    incoming.rename(final)
    shutil.rmtree(outgoing, ignore_errors=True)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a saved average; raises `CheckpointError` if there is none."""
    file = Path(path) / MANIFEST_FILE
    try:
        return Manifest.from_json(file.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} holds no saved average: {MANIFEST_FILE} cannot be read ({error.strerror}). A save that was "
            "cut short leaves its pieces under the name with .incoming added, and the folder before it untouched"
        ) from error


def load_folder(path: str | os.PathLike[str], state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Collective: all ranks must call. Read the pieces that the items of `state` ask for, in place."""
    with _quiet(), _as_checkpoint_error(f"loading {str(path)!r}"):
        dcp_load(state, checkpoint_id=str(path), process_group=_everyone(group))


def _everyone(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that saves together: replicated plain models save as one job."""
    return dist.group.WORLD if group is None and dist.is_initialized() else group


@contextmanager
def _on_rank_0(group: dist.ProcessGroup | None, doing: str) -> Iterator[bool]:
    """Collective: all ranks must call. The body acts on rank 0; all ranks raise if it fails there."""
    error: BaseException | None = None
    try:
        yield rank_in(group) == 0
    except OSError as failure:
        error = CheckpointError(f"{doing} failed: {failure}")
    agree(group, error, doing)


@contextmanager
def _as_checkpoint_error(doing: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # a BaseException, which `except Exception` would not catch
        causes = "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())
        raise CheckpointError(f"{doing} failed: {causes}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield
