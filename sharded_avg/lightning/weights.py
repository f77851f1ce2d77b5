"""What the model holds: raw weights, the average for an evaluation, or the average for good.

    raw        training, and whatever writes a checkpoint
    swapped    an evaluation: raw and averaged values have changed places until it ends
    finished   training has ended: the model holds the average, and host memory the raw weights

`raw()` is for saving: whatever the state, the model holds raw weights inside. An interruption can come between any two
lines here: a state is left only when what ends it is done, and ending it twice does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakSet, ref

import torch
from torch import nn

from .. import ShardedAverage, Snapshots
from ..integration import RawWeights, size_of


class _Block:
    """A `with` block that has not ended. It dies with the frame that holds it, unless what was raised is kept."""

    is_raw = False  # what `raw()` yields


@contextmanager
def _leaving(blocks: WeakSet[_Block], block: _Block) -> Iterator[None]:
    """After it `block` is none of them, also where Ctrl-C comes at the very line that takes it out."""
    try:
        try:
            yield
        finally:
            blocks.discard(block)
    finally:
        blocks.discard(block)


class Weights:
    """The weights of one model, and its averages; `main` is the one that training ends with.

    `snapshots`: where they are saved in the course of training, if they are.
    """

    def __init__(self, average: ShardedAverage, main: str, model: nn.Module) -> None:
        self.average, self.main = average, main
        self.snapshots: Snapshots | None = None
        self._model = ref(model)
        self._swap: AbstractContextManager[bool] | None = None
        self._in_swap = main  # which average that swap is of
        self._kept: RawWeights | None = None
        self._raws: WeakSet[_Block] = WeakSet()  # the block of `raw()`, if we are in one
        self._moves: WeakSet[_Block] = WeakSet()  # those in which values are on their way, one inside the other
        self._deferred: list[Callable[[], None]] = []

    @property
    def exchanged(self) -> bool:
        """Whether the model holds something else than its raw weights."""
        return self._swap is not None or self._kept is not None

    @property
    def started(self) -> list[str]:
        """The averages that have had an update."""
        if not self.average.n_averaged:
            return []
        return [name for name, record in self.average.manifest().averages.items() if record.n_averaged]

    @property
    def is_moving(self) -> bool:
        """Whether values are on their way: a signal handler that saves must wait."""
        return len(self._moves) > 0

    def is_of(self, model: nn.Module) -> bool:
        """Whether the average was built for `model`, as it is wrapped now."""
        return self._model() is model

    def enter(self, name: str) -> None:
        """Collective: all ranks must call. Evaluate this average, if there is one, until `leave`."""
        if self._swap is not None or (self._kept is not None and not self._raws):  # finished, and it is in the model
            return
        with self._moving():
            swap = self.average.swapped(name)
            try:
                swap.__enter__()
                self._swap, self._in_swap = swap, name
            except BaseException as error:  # an interruption may come when the exchange is done
                self._swap = None
                swap.__exit__(type(error), error, error.__traceback__)
                raise

    def leave(self, error: BaseException | None = None) -> None:
        """Collective: all ranks must call. Bring the raw weights back; `error` is why, if it is one."""
        if error is not None:
            self._moves.clear()  # whatever was begun has ended by it
            self._raws.clear()
        swap = self._swap
        if swap is not None:
            with self._moving():
                swap.__exit__(
                    None if error is None else type(error), error, None if error is None else error.__traceback__
                )
                self._swap = None

    def finish(self) -> None:
        """Collective: all ranks must call. Make the average the model's own, if there is one."""
        if self._kept is not None or self.main not in self.started:
            return
        with self._moving(), torch.inference_mode(False):
            self._kept = self.average.raw_weights(self.main)
            self._put_in(self._kept)

    def _put_in(self, kept: RawWeights) -> None:
        try:
            self.average.copy_to_model(self.main, undo=kept)
        except BaseException:
            # Undone; unless Ctrl-C came when all was done: then the average is in the model, and these are needed.
            if not kept.are_replaced:
                self._kept = None
            raise

    def unfinish(self) -> bool:
        """Collective: all ranks must call. Raw weights back for more training; False if the model has other ones."""
        with self._moving():
            restored = self._restored()
            if restored:
                self._kept = None
        return restored

    def _restored(self) -> bool:
        if self._kept is None:
            return True
        with self._moving(), torch.inference_mode(False):
            return self.average.restore_raw(self._kept)

    def succeed(self, earlier: Weights) -> None:
        """Collective: all ranks must call. Go on where another object was, for a model that was wrapped anew."""
        self.average.take_from(earlier.average)
        self._kept = earlier._kept

    def defer(self, action: Callable[[], None]) -> None:
        """Do something as soon as no values are on their way."""
        self._deferred.append(action)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        block = _Block()
        with _leaving(self._moves, block):
            self._moves.add(block)
            yield
        while self._deferred and not self.is_moving:
            self._deferred.pop(0)()

    @contextmanager
    def raw(self) -> Iterator[bool]:
        """Collective: all ranks must call. The model holds raw weights inside; False if they are not the training's.

        After an error they stay if there are other ranks: those may be anywhere, and exchanging is collective.
        """
        was_swapped, outer = self._swap is not None, next(iter(self._raws), None)
        if outer is not None and not was_swapped:  # a signal handler saves while something is saved
            yield outer.is_raw
            return
        block = _Block()
        with _leaving(self._raws, block):
            with self._moving():
                self.leave()
                block.is_raw = self._restored() if outer is None else outer.is_raw
                self._raws.add(block)
            try:
                yield block.is_raw
            except Exception as error:
                if size_of(self.average.process_group) > 1:
                    if hasattr(error, "add_note"):  # Python >= 3.11
                        error.add_note("sharded_avg: saving failed, and the model holds its raw weights from here on")
                    raise
                self._go_back(was_swapped, block.is_raw)
                raise
        self._go_back(was_swapped, block.is_raw)

    def _go_back(self, was_swapped: bool, is_raw: bool) -> None:
        if was_swapped:
            self.enter(self._in_swap)
        elif self._kept is not None and is_raw:
            with self._moving(), torch.inference_mode(False):
                self._put_in(self._kept)
