"""What is averaged, and how far.

A State is everything that a ShardedAverage knows: the members of a model, the rules and the schedule, the store with
the averaged shards, and which steps each average has taken in. Updating is its own; swapping, handing out, saving and
loading are functions elsewhere that take a State as an argument. `replace` is the one way in which averages that come
from elsewhere take the place of those that are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, NotStartedError, SwapError
from ..ranks import Asked
from ..rules.base import AbstractRule
from ..rules.schedule import WhenFn
from ..shard import Shard
from ..weights.layouts.base import AbstractLayout
from ..weights.members import Members
from ..weights.steps import StepCount, stepping
from .history import History
from .store import Store

swapped_models: WeakSet[nn.Module] = WeakSet()  # of any State: a model may have several


class Cost(NamedTuple):
    """What one update took on this rank. On a GPU, `seconds` is the time to enqueue it."""

    seconds: float
    nbytes: int  # read and written


class State:
    """The averages of some members, and how far they have come."""

    def __init__(self, members: Members, rules: Mapping[str, AbstractRule], schedule: WhenFn, store: Store) -> None:
        self.members, self.rules, self.schedule, self.store = members, dict(rules), schedule, store
        self.histories = dict.fromkeys(rules, History())
        self.step = 0  # optimizer steps seen
        self.written_back: dict[str, int] = {}  # the step after which an average was last written into the model
        self._latest: tuple[float, list[str]] | None = None  # of the latest update: seconds, and of which averages
        self._attached: StepCount | None = None  # where the user's optimizers tell whether there was a step
        self.swapped: str | None = None  # the average that is in the model now
        self.lent: dict[str, Tensor] = {}  # while swapped: where averages lie that are not in the store
        self._arranged_for: list[Shard] | None = None  # what the members were when the store was arranged

    @property
    def layout(self) -> AbstractLayout:
        return self.members.layout

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the model together; `None` where each process holds all of it."""
        return self.members.layout.group

    @torch.no_grad()
    def update(self, *, unscheduled: bool = False) -> bool:
        """See `ShardedAverage.update`. Local."""
        self.refuse_while_swapped("update()")
        if unscheduled:
            self._take_in(max(1, self.step), list(self.rules))
            return True
        attached = self._attached
        if self.layout.step_was_skipped() or (attached is not None and not attached.is_new):
            return False
        step, due = self.step + 1, []
        if self.schedule(step):
            due = [name for name, rule in self.rules.items() if rule.takes(step, self.histories[name].latest)]
        if due:
            self._take_in(step, due)
        self.step += 1
        self.layout.count_step()
        if attached is not None:
            attached.count()
        return bool(due)

    @property
    def last_update(self) -> Cost | None:
        """What the latest update took on this rank; `None` before the first one of this process."""
        return None if self._latest is None else Cost(self._latest[0], self.store.traffic(self._latest[1]))

    def attach(self, optimizers: Iterable[Any]) -> None:
        """See `ShardedAverage.attach`. Local."""
        found = list(map(stepping, optimizers))
        if not found:
            raise ConfigError("attach() got no optimizer: pass those whose steps change the averaged weights")
        if self.layout.knows_steps:
            return
        if self._attached is None:
            self._attached = StepCount()
        for optimizer in found:
            self._attached.watch(optimizer)

    def _take_in(self, step: int, names: list[str]) -> None:
        self.arrange(admit=True)
        begun = perf_counter()
        self.store.update(self.rules, {name: self.histories[name].moment(step) for name in names})
        self._latest = perf_counter() - begun, names
        self.histories = self.histories | {name: self.histories[name].after(step) for name in names}

    def look(self, *, live: bool = False) -> None:
        """For saving and handing out: as `arrange`, but what the model no longer has is left out.

        With `live`, raises `LayoutChangedError` if the live tensors cannot be read any more.
        """
        self.members.look(live=live)
        self._follow()
        if self.store.arranged and not self.members.lost and not self.members.stale:
            self.arrange()

    def arrange(self, *, admit: bool = False) -> None:
        """Point the store at the live shards, wherever they are now; with `admit`, newcomers join.

        Raises `LayoutChangedError` if what is averaged is no longer in the model, or cut in another way.
        """
        self.members.refresh()
        self._follow()
        joined = admit and self.members.admit()
        if self._arranged_for is self.members.all or self.swapped is not None:  # the store holds raw weights then
            return
        try:
            self.store.arrange(self.members.averaged)
        except BaseException:  # out of memory, most likely; without the newcomers there was enough
            if joined:
                self.members.dismiss()
            raise
        self._arranged_for = self.members.all

    def _follow(self) -> None:
        for old, new in self.members.moved.items():
            self.store.rename(old, new)
            if old in self.lent:
                self.lent[new] = self.lent.pop(old)
        self.members.moved.clear()

    def replace(self, store: Store, histories: Mapping[str, History], step: int) -> None:
        """Go on with the values in `store`, which is of these members; averages without a history keep theirs."""
        self.store = store
        self._arranged_for = self.members.all if store.arranged else None
        self.histories |= {name: history for name, history in histories.items() if name in self.rules}
        self.step = step

    def average_of(self, name: str, shard: Shard) -> Tensor:
        """Where the average of a shard lies now: while swapped, perhaps where the live tensor was at its beginning."""
        if self.swapped == name and shard.name in self.lent:
            return self.lent[shard.name]
        return self.store.view(name, shard.name)

    def asks(self, call: str) -> Asked:
        """A call that all ranks make together, and how far this rank has come: what they compare before it."""
        if self.group is None:
            return Asked(call)
        counts = ", ".join(f"{history.n_averaged} of {name!r}" for name, history in self.histories.items())
        return Asked(f"{call} after {self.step} steps and {counts}", *self.members.digests)

    # -- guards ----------------------------------------------------------------------------------------------------

    def resolve(self, name: str | None) -> str:
        """The name of an average; it may be left out where there is one only."""
        if name is None and len(self.rules) == 1:
            return next(iter(self.rules))
        if not isinstance(name, str) or name not in self.rules:
            raise ConfigError(f"name={name!r}: this object keeps the averages {list(self.rules)}; name one of them")
        return name

    def about(self, name: str | None) -> tuple[AbstractRule, History, str]:
        """The rule, history and name of an average."""
        name = self.resolve(name)
        return self.rules[name], self.histories[name], name

    def started(self, name: str | None) -> str:
        """As `resolve`, of an average that has had an update. Raises `NotStartedError`."""
        name = self.resolve(name)
        if not self.histories[name].n_averaged:
            raise NotStartedError(
                f"the average {name!r} has had no update yet ({self.step} steps seen), so there are no averaged "
                "weights to hand out. Call update() after optimizer steps, and check the schedule's start_step"
            )
        return name

    def refuse_while_swapped(self, what: str) -> None:
        """Raise `SwapError` if any average is in the model."""
        if self.swapped is not None or self.layout.model in swapped_models:
            which = "of another ShardedAverage" if self.swapped is None else repr(self.swapped)
            raise SwapError(
                f"{what} cannot be called while the average {which} is swapped in: live and averaged values have "
                "changed places. Leave the `with average.swapped():` block first"
            )
