"""Finding a saved folder, and what it says about itself, before any value is read."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from ..averages.arguments import MANIFEST_KEY
from ..errors import CheckpointError
from ..files.dcp_folder import DcpFolder
from ..ranks import collective, decided, everyone
from .folder.place import MANIFEST_FILE, place_of
from .manifest import Manifest

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Found:
    """The newest whole folder of a name, and its manifest as it stands there."""

    path: str
    text: str

    def opened(self) -> DcpFolder:
        """The tensors. Local. Raises `CheckpointError` if the folder is torn."""
        folder = place_of(self.path).opened(self.path)
        if MANIFEST_KEY not in folder.objects:
            raise CheckpointError(f"{self.path!r} is torn: there is no manifest among its tensors")
        inside = folder.load_object(MANIFEST_KEY)
        if inside != self.text and Manifest.from_json(inside) != Manifest.from_json(self.text):
            raise CheckpointError(f"{self.path!r} is torn: its manifest is of another save. Nothing was changed")
        return folder


def find(path: Path) -> Found:
    """Local. Raises `CheckpointError` if there is no whole folder."""
    place = place_of(path)
    try:
        whole = place.whole()
        if whole is not None:
            return Found(whole, place.read(f"{whole}/{MANIFEST_FILE}"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{place.path!r}: {MANIFEST_FILE} cannot be read: {error}") from error
    if place.exists(place.incoming):
        found = f"only {place.incoming!r}, the pieces of a first save that was cut short; it cannot be used"
    elif not place.exists(place.path):
        found = "there is nothing of that name"
    else:
        found = f"it has no {MANIFEST_FILE}, so it is something else, or was torn while it was copied"
    raise CheckpointError(f"{place.path!r} holds no saved average: {found}")


@collective
def read_manifest(path: Path, group: dist.ProcessGroup | None = None) -> tuple[str, Manifest]:
    """Collective: all ranks must call. The newest whole folder of that name, and its manifest, as rank 0 sees them."""
    group, doing = everyone(group), f"looking for a saved average in {path!r}"
    found = decided(group, lambda: place_of(path), lambda _: find(path), doing)
    return found.path, Manifest.from_json(found.text)
