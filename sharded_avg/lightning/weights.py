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
from ..replaced import RawWeights


class Weights:
    """The weights of one model, and its average."""

    def __init__(self, average: ShardedAverage, model: nn.Module) -> None:
        self.average = average
        self._model = ref(model)
        self._swap: AbstractContextManager[bool] | None = None
        self._kept: RawWeights | None = None

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
        if self._swap is None and not self.finished:
            swap = self.average.swapped()
            swap.__enter__()
            self._swap = swap

    def leave(self, error: BaseException | None = None) -> None:
        """Collective: all ranks must call. Bring the raw weights back; `error` is why, if it is one."""
        swap, self._swap = self._swap, None
        if swap is None:
            return
        swap.__exit__(None if error is None else type(error), error, None if error is None else error.__traceback__)

    def finish(self) -> None:
        """Collective: all ranks must call. Make the average the model's own, if there is one."""
        if self.average.n_averaged and not self.finished:
            with torch.inference_mode(False):
                self._kept = self.average.copy_to_model(keep_raw=True)

    def unfinish(self) -> bool:
        """Collective: all ranks must call. Raw weights back for more training; False if the model has other ones."""
        kept, self._kept = self._kept, None
        return kept is None or self.average.restore_raw(kept)

    def succeed(self, earlier: Weights) -> None:
        """Collective: all ranks must call. Go on where another object was, for a model that was wrapped anew."""
        self.average.take_from(earlier.average)
        self._kept = earlier._kept

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Collective: all ranks must call. The model holds raw weights inside.

        After an error it keeps them: other ranks may be anywhere, and exchanging is collective.
        """
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
