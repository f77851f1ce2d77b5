"""Every collective method, and how a test calls it.

Subject  an engine with its model, and an average of it that has taken in three steps
Call     one way to call one method: what it needs first, and the call itself
Request  what one call is given; a rank that is to fail is given something else
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import sharded_avg
from sharded_avg import EMA, PowerAverage, ShardedAverage, averaged_buffers, refreshed_batch_norm
from tests.helpers.engines import ENGINES, Engine
from tests.helpers.models import batch

State = dict[str, Tensor]


def collective_methods() -> set[str]:
    """Names of what a user calls on all ranks: methods of `ShardedAverage`, and functions beside it."""
    public = {name: value for name, value in vars(ShardedAverage).items() if not name.startswith("_")}
    public |= {name: getattr(sharded_avg, name) for name in sharded_avg.__all__}
    return {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and (inspect.getdoc(value) or "").split(" ")[0].rstrip(":.") == "Collective"
    }


class Subject:
    """An engine with its model, and an average of it that has taken in three steps; saved ones lie in `folder`."""

    def __init__(self, row: str, folder: Path, **arguments: Any) -> None:
        self.engine: Engine = ENGINES[row].start()
        self.model, self.folder = self.engine.model, folder
        self.average = self.another(**arguments)
        for step in range(3):
            self.engine.learn_steps(step, step + 1)
            self.average.update()

    def another(self, **arguments: Any) -> ShardedAverage:
        """Another average of the model, without an update."""
        return ShardedAverage(self.model, EMA(decay=0.5), **arguments)

    def ahead(self) -> ShardedAverage:
        """Another one, with two."""
        average = self.another()
        average.update()
        average.update()
        return average

    def live(self) -> State:
        """What this rank holds of raw weights and averages: the tensors themselves."""
        state, found = self.average._state, {}
        state.layout.release()  # what a forward has gathered
        for shard in state.members.all:
            found[f"shard {shard.name}"] = shard.tensor
            if shard.working is not None:
                found[f"working {shard.name}"] = shard.working
        for name, tensor in (*state.layout.model.named_parameters(), *state.layout.model.named_buffers()):
            local = tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
            found[f"model {name}"] = local.detach()
        for name in state.rules:
            for shard in state.members.averaged:
                if shard.name in state.store:
                    found[f"{name} of {shard.name}"] = state.average_of(name, shard)
        return found

    def counts(self) -> dict[str, Any]:
        state = self.average._state
        return {
            "histories": dict(state.histories),
            "step": state.step,
            "swapped": state.swapped,
            "stale": state.layout.has_stale_replicas,
        }

    def kept(self) -> tuple[State, dict[str, Any]]:
        """A copy of all that a failure must leave as it was."""
        return {name: tensor.clone() for name, tensor in self.live().items()}, self.counts()

    def changed_since(self, kept: tuple[State, dict[str, Any]]) -> list[str]:
        """Names of what is not as it was, bit for bit."""
        before, now = kept[0], self.live()
        changed = [name for name in before.keys() | now.keys() if not _same(before.get(name), now.get(name))]
        counts = self.counts()
        return sorted(changed) + [f"{name} {counts[name]}" for name, was in kept[1].items() if counts[name] != was]

    @torch.no_grad()
    def put_back(self, kept: tuple[State, dict[str, Any]]) -> None:
        """Make it as it was, whatever happened."""
        state, live = self.average._state, self.live()
        for name, tensor in kept[0].items():
            live[name].copy_(tensor)
        state.histories, state.step = dict(kept[1]["histories"]), kept[1]["step"]
        state.layout.has_stale_replicas = kept[1]["stale"]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.numel() == 0 or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@dataclass
class Request:
    """What one call is given."""

    subject: Subject
    average: ShardedAverage
    model: Any
    name: Any = None
    path: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    given: Any = None  # the object that a method takes: raw weights, another average
    edit: Callable[[dict[str, Any]], None] = lambda full: (
        [full[name].mul_(2) for name in full if "mix" in name] and None
    )
    inside: Callable[[], None] = lambda: None  # the body of a `with` block
    batches: Any = None
    is_reached: bool = True  # what is to fail was asked for


def _nothing(request: Request) -> None:
    pass


@dataclass(frozen=True)
class Call:
    """`method`: which one it is. `prepare`: collective, before what must stay as it was is looked at."""

    method: str
    run: Callable[[Request], Any]
    prepare: Callable[[Request], None] = _nothing

    def request(self, subject: Subject) -> Request:
        """Collective. What it is given when nothing is to go wrong."""
        request = Request(subject, subject.average, subject.model)
        self.prepare(request)
        return request


_saves = 0


def _fresh_path(request: Request) -> None:
    global _saves
    _saves += 1  # on all ranks alike
    request.path = request.subject.folder / f"save{_saves}"


def _saved(request: Request) -> None:
    request.path = request.subject.folder / "there"
    dist.barrier()
    if not request.path.exists():
        request.subject.ahead().save(request.path)
    dist.barrier()


def _saved_by_dcp(request: Request) -> None:
    request.path = request.subject.folder / "there_dcp"
    dist.barrier()
    if not request.path.exists():
        dcp.save({"average": request.subject.ahead()}, checkpoint_id=request.path)
    dist.barrier()


def _series(request: Request) -> None:
    request.path = request.subject.folder / "series"
    dist.barrier()
    if not request.path.exists():
        rules = {"wide": PowerAverage.from_sigma_rel(0.2), "narrow": PowerAverage.from_sigma_rel(0.1)}
        average = ShardedAverage(request.model, rules)
        for _step in range(3):
            average.update(unscheduled=True)
        average.save(request.path / "one")
    dist.barrier()


def _other(request: Request) -> None:
    request.given = request.subject.ahead()


def _raw(request: Request) -> None:
    request.given = request.average.raw_weights()


def _handed_over(request: Request) -> None:
    request.given = request.average.raw_weights()
    request.average.copy_to_model(undo=request.given)


def _stale(request: Request) -> None:
    request.average._state.layout.has_stale_replicas = request.average._state.layout.publishes


def _batches(request: Request) -> None:
    request.batches = [batch(seed).to(request.subject.engine.own or torch.float32) for seed in (7, 8)]


def _options(**options: Any) -> Callable[[Request], None]:
    return lambda request: request.options.update(options)


def _swapped(request: Request) -> Any:
    with request.average.swapped(request.name) as is_there:
        request.inside()
    return is_there


def _summon(request: Request) -> Any:
    with request.average.summon_full_params(request.name, **request.options) as full:
        request.inside()
        return sorted(full)


def _writeback(request: Request) -> None:
    with request.average.summon_full_params(request.name, writeback=True, **request.options) as full:
        request.edit(full)


def _batch_norm(request: Request) -> None:
    with refreshed_batch_norm(request.model, request.batches):
        request.inside()


def _buffers(request: Request) -> None:
    with averaged_buffers(request.model):
        request.inside()


def _load(request: Request) -> None:
    request.average.load(request.path, **request.options)


def _load_posthoc(request: Request) -> None:
    request.average.load_posthoc(request.path, name=request.name, **{"sigma_rel": 0.14, **request.options})


CALLS = {
    "swapped": Call("swapped", _swapped),
    "republish": Call("republish", lambda r: r.average.republish(), _stale),
    "distance": Call("distance", lambda r: r.average.distance(r.name)),
    "distances": Call("distances", lambda r: r.average.distances(r.name)),
    "check_replicas": Call("check_replicas", lambda r: r.average.check_replicas()),
    "live_is_finite": Call("live_is_finite", lambda r: r.average.live_is_finite()),
    "raw_weights": Call("raw_weights", lambda r: r.average.raw_weights(r.name) and None),
    "copy_to_model": Call("copy_to_model", lambda r: r.average.copy_to_model(r.name, undo=r.given), _raw),
    "restore_raw": Call("restore_raw", lambda r: r.average.restore_raw(r.given), _handed_over),
    "summon": Call("summon_full_params", _summon),
    "summon on all": Call("summon_full_params", _summon, _options(rank0_only=False)),
    "writeback": Call("summon_full_params", _writeback),
    "writeback from all": Call("summon_full_params", _writeback, _options(rank0_only=False)),
    "gather_full": Call("gather_full", lambda r: sorted(r.average.gather_full())),
    "save": Call("save", lambda r: r.average.save(r.path, **r.options), _fresh_path),
    "save with buffers": Call("save", lambda r: r.average.save(r.path, with_buffers=True), _fresh_path),
    "async_save": Call("async_save", lambda r: r.average.async_save(r.path).result(), _fresh_path),
    "load": Call("load", _load, _saved),
    "load what fits": Call("load", lambda r: r.average.load(r.path, strict=False) and None, _saved),
    "load_posthoc": Call("load_posthoc", _load_posthoc, _series),
    "take_from": Call("take_from", lambda r: r.average.take_from(r.given), _other),
    "refreshed_batch_norm": Call("refreshed_batch_norm", _batch_norm, _batches),
    "averaged_buffers": Call("averaged_buffers", _buffers),
    "dcp.save": Call("state_dict", lambda r: dcp.save({"average": r.average}, checkpoint_id=r.path), _fresh_path),
    "dcp.load": Call(
        "load_state_dict", lambda r: dcp.load({"average": r.average}, checkpoint_id=r.path), _saved_by_dcp
    ),
}
