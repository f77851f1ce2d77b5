"""A saved average on its way into memory.

A Loading is one attempt: what fits (`result`), and room for it (`incoming`). The averager takes both over at once, when
every value is there; until then nothing of it has changed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..averages.store import Store
from ..shard import Shard
from ..weights.members import Members
from .dcp import ShardItem
from .fit import LoadResult
from .items import Incoming, items_of
from .manifest import Manifest


class Loading:
    """What `manifest` describes, coming into the averages that `present` holds.

    The averages that are missing from it keep their values; so do shards that `result` leaves out, which start again
    from the live weights.
    """

    def __init__(
        self,
        members: Members,
        present: Store,
        manifest: Manifest,
        result: LoadResult,
        incoming: Incoming | None = None,
    ) -> None:
        self.manifest, self.result = manifest, result
        self._members = members
        self._left_out = {*result.missing_keys, *result.misfits}
        self.incoming = Incoming(members, present) if incoming is None else incoming
        self.started = [name for name in present.names if _updates(manifest, name)]
        if self.started or present.arranged:
            self.incoming.arrange()
            if present.arranged:
                self.incoming.store.take_from(present, result.missing_averages)

    def items(self) -> dict[str, dict[str, ShardItem]]:
        """Where torch.distributed.checkpoint puts what it reads."""
        return {
            name: items_of(name, self._members, self.incoming, present=None, left_out=self._left_out)
            for name in self.started
        }

    def fill(self, value_of: Callable[[str, Shard], Tensor]) -> None:
        """Copy this rank's pieces: `value_of(average, shard)`, shaped like the shard."""
        for name in self.started:
            for shard in self._members.averaged:
                if shard.name not in self._left_out:
                    self.incoming.view(name, shard.name).copy_(value_of(name, shard))


def _updates(manifest: Manifest, name: str) -> int:
    return manifest.averages[name].n_averaged if name in manifest.averages else 0
