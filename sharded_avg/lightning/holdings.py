"""Which averages a callback has, and whose they are.

    training    of the module that is being trained, or was: kept from fit to fit
    pending     of a checkpoint that was read, until the model is there to take it
    evaluated   of a checkpoint that is evaluated together with its raw weights

A trainer can train one module and evaluate another, and a callback can serve several trainers, so every question is
about a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch

from .. import LayoutChangedError
from .resuming import Pending, load_quietly
from .weights import Weights


def _nothing() -> None:
    """A reference to no module."""


class Holdings:
    """What one callback holds. `callback` is a `WeightAveraging`: it builds averages and says things."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self.training: Weights | None = None
        self.pending: Pending | None = None
        self.evaluated: Weights | None = None
        self._trained: Callable[[], Any] = _nothing  # the module that `training` is of
        self._loaded_into: Callable[[], Any] = _nothing  # a module that an evaluation loaded other weights into
        self._fit_has_loaded = False  # this fit began with a checkpoint

    def new_run(self) -> None:
        """What a checkpoint of an earlier run left."""
        self.pending, self.evaluated, self._fit_has_loaded = None, None, False

    def of(self, module: Any) -> Weights | None:
        """The weights of the training, if it is this module's."""
        return self.training if self._trained() is module else None

    def in_model(self, module: Any) -> Weights | None:
        """The same, unless an evaluation has loaded other weights into the module."""
        return None if self._loaded_into() is module else self.of(module)

    def found(self, module: Any, pending: Pending | None, *, is_fit: bool) -> None:
        """A checkpoint was read into the module, perhaps with an average for it."""
        self.pending = None if pending is not None and pending.is_in_model else pending
        self._fit_has_loaded = is_fit
        if not is_fit:
            self._loaded_into = ref(module)

    def reachable(self, trainer: Any, module: Any) -> Weights | None:
        """Collective: all ranks must call. `in_model`, for the engine that holds the module now.

        To evaluate, DeepSpeed makes an engine without optimizer, and under stage 3 the one that trained lets go.
        """
        weights = self.in_model(module)
        if weights is None or weights.is_of(trainer.strategy.model):
            return weights
        try:
            weights.average.state_dict()
        except LayoutChangedError:
            self.training = self._heir(weights, trainer.strategy.model)
        return self.training

    def begin(self, trainer: Any, module: Any) -> Weights:
        """Collective: all ranks must call. The weights of a fit: where an earlier one or a checkpoint left them."""
        model, before = trainer.strategy.model, self.in_model(module)
        goes_on = before is not None and self.pending is None and not self._fit_has_loaded
        if before is not None and goes_on:
            weights = before if before.is_of(model) else self._heir(before, model)
            if not weights.unfinish():
                self._callback.say("the weights were changed since the last fit: a new average starts from them")
                weights = self._new(model)
        else:
            weights = self._new(model, self.pending)
            problem = "" if self.pending is None else load_quietly(self.pending, weights.average, self._callback.strict)
            if problem:
                self._callback.say(f"a new average starts from the weights of the checkpoint: {problem}")
                weights = self._new(model)
        self.training, self._trained, self.pending = weights, ref(module), None
        self._loaded_into, self._fit_has_loaded = _nothing, False
        return weights

    def _new(self, model: Any, pending: Pending | None = None) -> Weights:
        return Weights(self._callback.built(model, pending), self._callback.main, model)

    def _heir(self, before: Weights, model: Any) -> Weights:
        heir = self._new(model)
        heir.succeed(before)
        return heir

    def bring_in(self, model: Any) -> None:
        """Collective: all ranks must call. The average of an evaluated checkpoint, into the model or beside it."""
        pending, self.pending = self.pending, None
        choice = self._callback.evaluate_with
        main = self._callback.main
        if pending is None or not (pending.started if choice == "all" else main in pending.started) or choice == "raw":
            return
        weights = self._new(model, pending)
        if problem := load_quietly(pending, weights.average, self._callback.strict):
            self._callback.say(f"the raw weights of the checkpoint are evaluated: {problem}")
        elif choice != "average":
            self.evaluated = weights
        else:
            with torch.inference_mode(False):
                weights.average.copy_to_model(main)

    def to_evaluate(self, trainer: Any, module: Any) -> Weights | None:
        """Collective: all ranks must call. Whose average is looked at; `None` if the model holds what is to be."""
        if trainer.state.fn == "fit":
            return self.of(module)
        if self.pending is not None:
            self.bring_in(trainer.strategy.model)
        return self.evaluated if self._loaded_into() is module else self.reachable(trainer, module)

    def leave(self, error: BaseException | None = None) -> None:
        """Collective: all ranks must call. Raw weights back, wherever they were exchanged."""
        for weights in (self.training, self.evaluated):
            if weights is not None:
                weights.leave(error)
