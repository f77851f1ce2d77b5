"""Which shards are averaged, and whether they are still the live ones.

    all        one Shard for every parameter and persistent buffer of the model
    averaged   those that the averages cover; it grows when a parameter is unfrozen
    waiting    names chosen since: they join at the next update

Every decision here follows from names, full shapes and `requires_grad`, so all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, LayoutChangedError, UnsupportedModelError
from ..shard import Shard
from . import names
from .layouts.detect import detect, layout_class

Include = Callable[[str, Tensor], bool]

_REBUILD = "Build a new ShardedAverage from the model as it is now (and load() the saved average into it)."


class Members:
    """The shards of one model, as chosen by `include`."""

    def __init__(
        self,
        model: nn.Module,
        include: Include | None,
        *,
        average_buffers: bool,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if include is not None and not callable(include):
            raise ConfigError(f"include={include!r}: must be a callable (name, tensor) -> bool, or None")
        self._model = model
        self._include = include
        self._average_buffers = average_buffers
        self.layout = detect(model, process_group)
        self._tree = names.Tree(model)
        self.layout.release()
        self.all = self.layout.shards()
        chosen = self._choose()
        self._refuse_nothing(chosen)
        self._names = dict.fromkeys(chosen)  # an ordered set
        self.waiting: list[str] = []
        self.layout.adopt(chosen)
        self.all = self.layout.shards()
        self._cuts = {shard.name: (shard.shape, shard.region) for shard in self.all}

    @property
    def averaged(self) -> list[Shard]:
        """The shards that the averages cover, in the layout's order."""
        return [shard for shard in self.all if shard.name in self._names]

    def _choose(self) -> list[str]:
        names_of: dict[str, list[str]] = {shard.name: [shard.name] for shard in self.all}
        for alias, name in self.layout.aliases.items():
            names_of.setdefault(name, [name]).append(alias)
        return [shard.name for shard in self.all if self._is_chosen(shard, names_of[shard.name])]

    def _is_chosen(self, shard: Shard, all_names: list[str]) -> bool:
        can_average = shard.dtype.is_floating_point or shard.dtype.is_complex
        if not shard.shape.numel():
            return False
        if shard.is_buffer:
            return self._average_buffers and can_average
        if self._include is None:
            return shard.trainable
        wanted = any(bool(self._include(name, shard.stand_in())) for name in all_names)
        if wanted and not can_average:
            raise ConfigError(
                f"include chose {shard.name!r}, whose dtype {shard.dtype} has no average; leave it out, and full "
                "states will take it from the live model"
            )
        return wanted

    def _refuse_nothing(self, chosen: list[str]) -> None:
        parameters = [shard for shard in self.all if not shard.is_buffer]
        if not parameters:
            raise UnsupportedModelError(f"{type(self._model).__name__} has no parameters: there is nothing to average")
        buffers = {shard.name for shard in self.all if shard.is_buffer}
        if all(name in buffers for name in chosen):
            which = "include matched none" if self._include is not None else "none require grad: all are frozen"
            raise ConfigError(
                f"nothing to average: of {len(parameters)} parameters ({parameters[0].name!r}, ...) {which}. Pass "
                "include=lambda name, tensor: ... that returns True for some"
            )

    def refresh(self) -> None:
        """Re-read the live tensors if they have moved. Raises `LayoutChangedError` if the model is cut differently."""
        if self.layout.is_current() and self._tree.unchanged():
            return
        try:
            now = layout_class(self._model)
        except UnsupportedModelError as error:
            raise LayoutChangedError(
                f"the model was wrapped after its average was built: {error}. {_REBUILD}"
            ) from error
        if now is not type(self.layout):
            raise LayoutChangedError(
                f"the average was built for {type(self.layout).__name__} and the model is now one for {now.__name__}: "
                f"it was wrapped afterwards. {_REBUILD}"
            )
        try:
            self.layout.release()
            shards = self.layout.shards()
        except UnsupportedModelError as error:
            raise LayoutChangedError(
                f"the model has changed since the average was built: {error}. {_REBUILD}"
            ) from error
        cuts = {shard.name: (shard.shape, shard.region) for shard in shards}
        for name in self._names:
            if cuts.get(name) != self._cuts[name]:
                then, here = self._cuts[name], cuts.get(name, "gone")
                raise LayoutChangedError(
                    f"parameter {name!r} was {then} when the average was built and is {here}: the model was wrapped, "
                    f"re-sharded or changed afterwards. {_REBUILD}"
                )
        self.all = shards
        self._tree = names.Tree(self._model)
        self.waiting = [name for name in self._choose() if name not in self._names]

    def admit(self) -> bool:
        """Let the waiting parameters join; whether there were any."""
        if not self.waiting:
            return False
        self._before = (dict(self._names), self.waiting, self.all, self._cuts)
        self._names.update(dict.fromkeys(self.waiting))
        self.layout.adopt(self.waiting)
        self.waiting = []
        self.all = self.layout.shards()
        self._cuts = {shard.name: (shard.shape, shard.region) for shard in self.all}
        return True

    def dismiss(self) -> None:
        """Undo the last `admit`: there was no room for the newcomers. They wait again."""
        self._names, self.waiting, self.all, self._cuts = self._before

    def state(self, full: dict[str, Tensor]) -> dict[str, Any]:
        """Full tensors under every key of the unwrapped model's `state_dict()`, with its extra state."""
        aliases = self.layout.aliases
        state: dict[str, Any] = {key: full[aliases.get(key, key)] for key in self.layout.state_keys()}
        return {**state, **self.layout.extra_state()}
