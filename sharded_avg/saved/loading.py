"""A saved average on its way into memory.

A Loading is one attempt: what fits (`result`), and room for it (`incoming`). The State takes it over at once, when
every value is there; until then nothing of it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from ..averages.state import State
from ..averages.store import Store
from ..files.dcp_folder import DcpFolder
from ..shard import Shard, patches
from .fit import LoadResult
from .folder.claims import window
from .items import Incoming
from .manifest import Manifest


class Loading:
    """What `manifest` describes, coming into the averages of `state`.

    The averages that are missing from it keep their values; so do shards that `result` leaves out, which start again
    from the live weights.
    """

    def __init__(self, state: State, manifest: Manifest, result: LoadResult, incoming: Incoming | None = None) -> None:
        self.manifest, self.result = manifest, result
        self._state = state
        self._left_out = {*result.missing_keys, *result.misfits}
        self.incoming = Incoming(state) if incoming is None else incoming
        self._kept: Collection[str] | None = None  # the snapshots that are at hand, "NAME/AGE"; `None` is all
        present = state.store
        records = manifest.averages
        self.started = [name for name in present.names if name in records and records[name].n_averaged]
        if self.started or present.arranged:
            self.incoming.arrange()
            if present.arranged:
                self.incoming.store.take_from(present, result.missing_averages)

    def read(self, folder: DcpFolder) -> None:
        """This rank's pieces, out of a folder of ours."""
        with folder.kept_open():
            for name in self.started:
                for shard in self._wanted():
                    target = self.incoming.view(name, shard.name)
                    for patch in patches(shard.region, tuple(shard.shape)):
                        window(target, patch).copy_(folder.read(f"{name}.{shard.name}", patch.box))
                        for age, column in self._snapshots(name):
                            kept = self.incoming.view(column, shard.name)
                            window(kept, patch).copy_(folder.read(f"{name}/{age}.{shard.name}", patch.box))

    def fill(self, value_of: Callable[[str, Shard], Tensor], kept: Collection[str] = ()) -> None:
        """Copy this rank's pieces: `value_of(column, shard)`, shaped like the shard.

        Columns are averages, and those snapshots of them, "NAME/AGE", that are in `kept`.
        """
        self._kept = kept
        for name in self.started:
            columns = [(name, name), *((f"{name}/{age}", column) for age, column in self._snapshots(name))]
            for shard in self._wanted():
                for theirs, column in columns:
                    self.incoming.view(column, shard.name).copy_(value_of(theirs, shard))

    def fill_from(self, store: Store) -> None:
        """Copy what lies in another store, snapshots too."""
        for name in self.started:
            columns = [(name, name)]
            if name in store.rings:
                columns += [(column, store.rings[name].column(age)) for age, column in self._snapshots(name)]
            for shard in self._wanted():
                for column, theirs in columns:
                    self.incoming.view(column, shard.name).copy_(store.view(theirs, shard.name))

    def _snapshots(self, name: str) -> list[tuple[int, str]]:
        """Age and column of the snapshots that are saved and have room here."""
        ring = self.incoming.store.rings.get(name)
        if ring is None:
            return []
        ages = range(min(ring.size, self.manifest.averages[name].snapshots))
        return [(age, ring.column(age)) for age in ages if self._kept is None or f"{name}/{age}" in self._kept]

    def _wanted(self) -> list[Shard]:
        return [shard for shard in self._state.members.averaged if shard.name not in self._left_out]

    def take_over(self) -> None:
        """Every value is there: from now on the state has these averages."""
        for name in self.started:
            if name in self.incoming.store.rings:
                self.incoming.store.begin_ring(name, len(self._snapshots(name)))
        histories = {name: record.history for name, record in self.manifest.averages.items()}
        self._state.replace(self.incoming.store, histories, self.manifest.step)
