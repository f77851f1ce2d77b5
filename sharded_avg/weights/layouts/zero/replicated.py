"""Stages 0, 1, 2: every rank has whole low-precision weights; Pieces come from Runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....errors import LayoutChangedError
from ....ranks import all_or_none
from ....shard import Box
from ..base import STALE
from .engine import FLAT_ATTRIBUTES, UNFUSED, kind, need, never_steps
from .piece import AbstractWeights, Piece
from .run import SPREADING, Run, Span, view


class Replicated(AbstractWeights):
    """Stages 0, 1, 2: parameters whole on every rank."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.group = engine, need(engine, "seq_data_parallel_group")  # data parallel x sequence parallel
        self._rank, self._world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def pieces(self) -> list[Piece]:
        pieces = [piece for run in self._runs() for piece in run.pieces(self._rank)]
        for _, param, master in self._loose():
            if not _is_row_major(param, master):  # no Interval of it is a view: each rank keeps all of it
                whole, alone = Box.whole(param.shape), master is param
                pieces.append(Piece(param, param.shape, whole, master.detach(), None if alone else param.detach()))
        return pieces

    def buffers(self) -> list[Tensor]:
        if (known := kind(self._engine.optimizer)) in FLAT_ATTRIBUTES:
            return [flat for name in FLAT_ATTRIBUTES[known][1:] for flat in need(self._engine.optimizer, name)]
        return [master for _, param, master in self._loose() if master is not param]

    def alive(self) -> bool:
        optimizer = self._engine.optimizer
        if kind(optimizer) not in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            return True
        groups = getattr(optimizer, FLAT_ATTRIBUTES[kind(optimizer)][0])
        if any(getattr(param, "_hp_mapping", None) is not None for group in groups for param in group):
            return True
        return not any(piece.region.numel for piece in self.pieces())

    def publish(self) -> None:
        self._spread(list)

    def replicas(self) -> list[tuple[nn.Parameter, Tensor]]:
        found = []
        for run in self._runs():
            spans = [run.live, run.masters] if run.has_whole_masters else [run.live]
            for param, begin in run.params:
                found += [(param, view(span, begin, begin + param.numel())) for span in spans]
        return found

    def publish_masters(self) -> None:
        self._spread(lambda runs: [run.of_masters() for run in runs if run.has_whole_masters])

    def _spread(self, chosen: Callable[[list[Run]], list[Run]]) -> None:
        """Collective: all ranks must call. What is chosen of the Runs, one after the other."""
        if self._world_size > 1:
            with torch.no_grad():
                with all_or_none(self.group, SPREADING, left=STALE):
                    runs = chosen(self._runs())
                for run in runs:
                    run.spread(self.group)

    def _runs(self) -> list[Run]:
        optimizer = self._engine.optimizer
        if (known := kind(optimizer)) in FLAT_ATTRIBUTES:
            runs = []
            for params, flat, master in zip(*(need(optimizer, name) for name in FLAT_ATTRIBUTES[known]), strict=True):
                stretch = -(-flat.numel() // self._world_size)
                begin = 0 if master.numel() == flat.numel() else self._rank * stretch
                full = [param for param in params if param.numel()]  # an empty view has no place
                places = sorted(((param, _place(param, flat)) for param in full), key=lambda pair: pair[1])
                runs.append(Run(places, [Span(0, flat.detach())], [Span(begin, master.detach().view(-1))], stretch))
            return runs
        return list(self._loose_runs())

    def _loose_runs(self) -> Iterator[Run]:
        """Stage 0 without flat weights: one Run for each parameter group, dtype and device.

        A group that joins the optimizer later (unfrozen parameters) then leaves the cuts of the others as they are.
        """
        kinds: dict[tuple[object, ...], list[tuple[nn.Parameter, Tensor]]] = {}
        for index, param, master in self._loose():
            if _is_row_major(param, master):
                kinds.setdefault((index, param.dtype, param.device), []).append((param, master))
        for pairs in kinds.values():
            begins = list(accumulate((param.numel() for param, _ in pairs), initial=0))
            total = begins.pop()
            live = [Span(begin, p.detach().view(-1)) for begin, (p, _) in zip(begins, pairs, strict=True)]
            masters = [Span(begin, m.detach().view(-1)) for begin, (_, m) in zip(begins, pairs, strict=True)]
            alone = all(master is param for param, master in pairs)
            places = [(param, begin) for begin, (param, _) in zip(begins, pairs, strict=True)]
            yield Run(places, live, live if alone else masters, -(-total // self._world_size))

    def _loose(self) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
        """Group, parameter and master of every trained parameter that lies by itself; in fp32 it is its own master."""
        optimizer = self._engine.optimizer
        if (known := kind(optimizer)) in FLAT_ATTRIBUTES or never_steps(self._engine):
            return
        groups = [group["params"] for group in optimizer.param_groups]
        params = need(optimizer, "fp16_groups") if known == UNFUSED else groups
        masters = need(optimizer, "fp32_groups") if known == UNFUSED else groups
        for index, pairs in enumerate(zip(params, masters, strict=True)):
            yield from ((index, p, m) for p, m in zip(*pairs, strict=True) if p.numel())


def _place(param: nn.Parameter, flat: Tensor) -> int:
    """The element of `flat` where a parameter that is a view of it begins."""
    place, remainder = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
    inside = not remainder and 0 <= place <= flat.numel() - param.numel()
    if not inside or param.dtype != flat.dtype or not param.is_contiguous():
        raise LayoutChangedError(
            f"a parameter of shape {tuple(param.shape)} and dtype {param.dtype} no longer lies in DeepSpeed's flat "
            f"{flat.dtype} weights: its data was replaced after deepspeed.initialize (module.to(), .half(), or an "
            "assignment to .data), so the optimizer steps another copy; call deepspeed.initialize on the final model"
        )
    return place


def _is_row_major(param: Tensor, master: Tensor) -> bool:
    return param.is_contiguous() and master.is_contiguous()
