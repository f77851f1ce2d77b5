"""ZeroLayout: the surface of a layout over a DeepSpeedEngine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from ....errors import LayoutChangedError, SwapError, UnsupportedModelError
from ....shard import Box, Interval, Shard
from ... import names
from ..base import AbstractLayout, trainable
from .engine import STAGE_3, STAGE_3_EVALUATION, is_a, kind, moved_away, need, never_steps, refuse
from .partitioned import Partitioned
from .piece import AbstractWeights, Piece
from .replicated import Replicated
from .steps import steps_of
from .tensor_parallel import Cut, cuts_of, refuse_uneven, replica_set_of


class ZeroLayout(AbstractLayout):
    """A DeepSpeedEngine, ZeRO stages 0 to 3. Pass the engine that `deepspeed.initialize` returned.

    Raises:
        UnsupportedModelError: the engine does something that is not covered; the message says what to do.
        EngineVersionError: this DeepSpeed lacks an attribute that the module's Note names.
    """

    knows_steps = True

    def __init__(self, engine: Any) -> None:
        refuse(engine)
        self._engine, self.model = engine, need(engine, "module")
        in_parts = self.waits_in_forward(engine)
        self._weights: AbstractWeights = Partitioned(engine) if in_parts else Replicated(engine)
        self.replica_set = replica_set_of(engine)
        self.group = self._weights.group if self.replica_set[1] == 1 else dist.group.WORLD
        self.publishes = in_parts or dist.get_world_size(self._weights.group) > 1
        if not in_parts and dist.get_world_size(self._weights.group) > 1:
            refuse_uneven(engine, cuts_of(engine))
        if reason := self._out_of_reach():
            raise UnsupportedModelError(reason)
        self.shards()  # a missing attribute is noticed now, not at the first update
        self._steps = steps_of(engine)

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        """Whether `model` is a DeepSpeedEngine."""
        return is_a(model, "DeepSpeedEngine")

    @classmethod
    def waits_in_forward(cls, model: Any) -> bool:
        """Whether parameters are in parts that forward gathers, as in stage 3."""
        return kind(model.optimizer) == STAGE_3 or is_a(model.optimizer, STAGE_3_EVALUATION)

    def shards(self) -> list[Shard]:
        """Masters in memory order, then what has none.

        Raises `LayoutChangedError` after `engine.destroy()` or `engine.offload_states()`.
        """
        if reason := self._out_of_reach():
            raise LayoutChangedError(reason)
        entries = names.entries(self.model)
        unique, self.aliases = names.split_ties(entries)
        pieces, cuts = {id(piece.param): piece for piece in self._weights.pieces()}, cuts_of(self._engine)
        order = {key: index for index, key in enumerate(pieces)}
        unique.sort(key=lambda entry: order.get(id(entry.tensor), len(order)))
        shards = [_shard(entry, pieces.get(id(entry.tensor)), cuts.get(id(entry.tensor))) for entry in unique]
        self._entries = [(entry, entry.tensor) for entry in entries]
        self._homes = [getattr(tensor, "ds_tensor", tensor) for _, tensor in self._entries]
        self._seen = self._now()
        return shards

    def _out_of_reach(self) -> str | None:
        """Why the weights cannot be read at this time."""
        if moved := moved_away(self._engine):
            return f"engine.offload_states() has moved {moved} away: call engine.reload_states() first"
        if not self._weights.alive():
            return (
                "the DeepSpeed engine was destroyed (engine.destroy(), or the trainer's teardown), so nothing steps "
                "these weights any more: save or export the average before that, or use it on a new engine"
            )
        return None

    def _now(self) -> tuple[list[int], list[bool]]:
        """Where masters and weights lie, and which are trained."""
        places = [tensor.data_ptr() for tensor in (*self._weights.buffers(), *self._homes)]
        return places, trainable(tensor for _, tensor in self._entries)

    def is_current(self) -> bool:
        """Whether names, masters and weights are still where the last `shards()` found them."""
        # dict.get: under stage 3 the slots gather what they return while a forward runs
        same = all(dict.get(entry.slot, entry.key) is tensor for entry, tensor in self._entries)
        return same and self._seen == self._now() and self._weights.alive()

    def release(self) -> None:
        """Stage 3: free the gathered copies that a forward without backward left behind."""
        self._weights.release()

    def publish(self) -> None:
        """Collective: all ranks must call. Low-precision weights of every owner to every rank."""
        self._weights.publish()

    def replicas(self) -> list[tuple[str, Tensor]]:
        names_of = {id(tensor): entry.name for entry, tensor in reversed(self._entries)}
        return [(names_of.get(id(param), "?"), tensor) for param, tensor in self._weights.replicas()]

    def publish_masters(self) -> None:
        """Collective: all ranks must call. Stage 0 keeps whole masters on every rank, which averages them in parts."""
        self._weights.publish_masters()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, `engine.save_checkpoint` raises `SwapError`: masters are raw there, and weights are averages."""
        attributes = vars(self._engine)
        before = {name: attributes[name] for name in ("save_checkpoint",) if name in attributes}
        attributes["save_checkpoint"] = _refuse_to_save
        try:
            yield
        finally:
            del attributes["save_checkpoint"]
            attributes.update(before)

    def step_was_skipped(self) -> bool:
        """Whether no step changed weights since `count_step`: gradient accumulation, an fp16 overflow, or no step.

        Raises `UnsupportedModelError` for an engine without an optimizer: it is good for evaluation only.
        """
        if never_steps(self._engine):
            raise UnsupportedModelError(
                "this DeepSpeed engine has no optimizer, so no step ever changes its weights and update() would "
                "average nothing: pass the engine that trains (give deepspeed.initialize an optimizer)"
            )
        return not self._steps.is_new

    def count_step(self) -> None:
        self._steps.count()


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise SwapError(
        "engine.save_checkpoint() cannot be called while an average is swapped in: it would write raw fp32 masters "
        "beside averaged weights, so that zero_to_fp32 gives raw weights, and a run resumed from it starts on averaged "
        "ones. Leave the `with average.swapped():` block first, and save the average beside it by average.save(). To "
        "export averaged weights as they are in the model now, call engine.save_16bit_model(folder)"
    )


def _shard(entry: names.Entry, piece: Piece | None, cut: Cut | None) -> Shard:
    tensor = entry.tensor
    if piece is None:
        piece = Piece(cast(nn.Parameter, tensor), tensor.shape, Box.whole(tensor.shape), tensor.detach(), None)
    trainable = tensor.requires_grad and not entry.is_buffer
    if cut is None:
        shape, values, working = piece.shape, piece.tensor, piece.working
        return Shard(entry.name, shape, piece.region, values, working, trainable, entry.is_buffer)
    part, values = piece.region, piece.tensor.view(-1)
    part = Interval(0, values.numel()) if isinstance(part, Box) else part
    working = None if piece.working is None else piece.working.view(-1)
    return Shard(entry.name, cut.shape, cut.region(part), values, working, trainable, entry.is_buffer)
