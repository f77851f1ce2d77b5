"""What the model holds: raw weights, the average for an evaluation, or the average for good.

    raw        training, and whatever writes a checkpoint
    swapped    an evaluation: raw and averaged values have changed places until it ends
    finished   training has ended: the model holds the average, and host memory the raw weights

`raw()` is for saving: whatever the state, the model holds raw weights inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import ref

import torch
from torch import nn

from ..averager import ShardedAverage
from ..errors import SwapError
from ..replaced import RawWeights


class Weights:
    """The weights of one model, and its average."""

    def __init__(self, average: ShardedAverage, model: nn.Module) -> None:
        self.average = average
        self._model = ref(model)
        self._swap: AbstractContextManager[bool] | None = None
        self._kept: RawWeights | None = None
        self.is_moving = False

    @property
    def finished(self) -> bool:
        """Whether the model holds the average for good."""
        return self._kept is not None

    @property
    def exchanged(self) -> bool:
        """Whether the model holds something else than its raw weights."""
        return self._swap is not None or self.finished

    def is_of(self, model: nn.Module) -> bool:
        """Whether the average was built for `model`, as it is wrapped now."""
        return self._model() is model

    def enter(self) -> None:
        """Collective: all ranks must call. Evaluate the average, if there is one, until `leave`."""
        if self._swap is not None or self.finished:
            return
        with self._moving():
            swap = self.average.swapped()
            try:
                swap.__enter__()
                self._swap = swap
            except BaseException as error:  # an interruption may come when the exchange is done
                self._swap = None
                swap.__exit__(type(error), error, error.__traceback__)
                raise

    def leave(self, error: BaseException | None = None) -> None:
        """Collective: all ranks must call. Bring the raw weights back; `error` is why, if it is one."""
        swap, self._swap = self._swap, None
        if swap is None:
            return
        with self._moving():
            swap.__exit__(None if error is None else type(error), error, None if error is None else error.__traceback__)

    def finish(self) -> None:
        """Collective: all ranks must call. Make the average the model's own, if there is one."""
        if self.average.n_averaged and not self.finished:
            with self._moving(), torch.inference_mode(False):
                self._kept = self.average.copy_to_model(keep_raw=True)

    def unfinish(self) -> bool:
        """Collective: all ranks must call. Raw weights back for more training; False if the model has other ones."""
        kept, self._kept = self._kept, None
        with self._moving():
            return kept is None or self.average.restore_raw(kept)

    def succeed(self, earlier: Weights) -> None:
        """Collective: all ranks must call. Go on where another object was, for a model that was wrapped anew."""
        self.average.take_from(earlier.average)
        self._kept = earlier._kept

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Values are on their way; a signal handler that saves in the middle must be told."""
        self.is_moving = True
        try:
            yield
        finally:
            self.is_moving = False

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Collective: all ranks must call. The model holds raw weights inside.

        After an error it keeps them: other ranks may be anywhere, and exchanging is collective.
        """
        if self.is_moving:
            raise SwapError(
                "a checkpoint was asked for while raw and averaged weights were changing places (by a signal handler, "
                "most likely): what would be saved is neither. Save once more"
            )
        was_swapped, was_finished = self._swap is not None, self.finished
        self.leave()
        is_raw = not was_finished or self.unfinish()
        try:
            yield
        except BaseException as error:
            if (was_swapped or was_finished) and hasattr(error, "add_note"):  # Python >= 3.11
                error.add_note("sharded_avg: saving failed, and the model holds its raw weights from here on")
            raise
        if was_swapped:
            self.enter()
        elif was_finished and is_raw:
            self.finish()
