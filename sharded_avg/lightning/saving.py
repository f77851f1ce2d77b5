"""Checkpoints written. Every save of a trainer goes through its `save_checkpoint`, where a SaveHook stands.

    a file      `state_dict` is the average, `current_model_state` the raw weights, `averaging_state` the count, as
                Lightning's own callback has it; "sharded_avg" the manifest
    a folder    as the strategy writes it, with raw weights, and the average in the folder AVERAGE_FOLDER inside it;
                "sharded_avg" has a copy of that folder's manifest, so that a folder of another save is noticed

Whoever saves, and at whatever moment: the model holds raw weights while the strategy collects them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import PeerError, UnsupportedModelError
from ..integration import Manifest, all_or_none, clean, place_of, rank_in, rendezvous, writes_checkpoints
from .patches import replaced
from .trainers import collects_together, job_group, spans_rank_0, writes_folder
from .weights import Weights

AVERAGE_FOLDER = "average"
KEY = "sharded_avg"  # of a checkpoint: {"manifest": JSON text, or None before training began and with weights only}
RENDEZVOUS_GRACE_S = 30.0  # for ranks that may have failed


@dataclass(eq=False, repr=False)
class SaveHook:
    """Stands in place of one trainer's `save_checkpoint`. Collective, as that is: all ranks must call."""

    callback: Any
    trainer: Any
    original: Callable[..., Any]

    def __call__(self, filepath: Any, weights_only: bool | None = None, **options: Any) -> None:
        """Save as the trainer does, with the average."""
        trainer, holdings = self.trainer, self.callback.holdings
        module = trainer.lightning_module
        if not writes_checkpoints(trainer.strategy.model):
            raise UnsupportedModelError(
                f"cannot save {str(filepath)!r}: under ZeRO 3 an evaluation leaves DeepSpeed with an engine that "
                "writes no checkpoints, until the next fit. Save before you call validate, test or predict"
            )
        if (present := holdings.in_model(module)) is not None and present.is_moving:  # we are in a signal handler
            present.defer(lambda: self(filepath, weights_only, **options))
            return

        def write(edit: Callable[[Any], Any]) -> None:
            # Lightning's last step before writing, also where callbacks are not asked (weights_only).
            with replaced(module, "on_save_checkpoint", lambda hook: edit(getattr(hook, "unedited", hook))):
                self.original(filepath, weights_only, **options)

        if holdings.pending is not None and trainer.state.fn == "fit":
            # Between a resumed fit's loading and its first step: the average waits, and must not be lost.
            if trainer.interrupted and not rendezvous(job_group(trainer), grace_s=RENDEZVOUS_GRACE_S):
                raise self._peers_gone(filepath)
            holdings.begin(trainer, module)
        weights = holdings.reachable(trainer, module)
        if weights is None:
            write(lambda hook: _Noted(hook, None))
            return
        if trainer.interrupted:
            if not rendezvous(weights.average.process_group, grace_s=RENDEZVOUS_GRACE_S):
                self._alone(weights, filepath, write)
                return
            weights.average.republish()  # some may come after others gave up on ending an evaluation together
        with all_or_none(job_group(trainer), "taking the last step into the average that is saved"):
            self.callback.catch_up(trainer, weights)  # by the user's rule, which may fail on one rank
        if weights.average.n_averaged:
            self._together(weights, filepath, bool(weights_only), write)
        else:
            if writes_folder(trainer.strategy):
                self._remove_earlier(Path(trainer.strategy.broadcast(filepath)), weights)
            write(lambda hook: _Noted(hook, weights.average.manifest().to_json()))

    def _together(self, weights: Weights, filepath: Any, weights_only: bool, write: Callable[..., None]) -> None:
        """Collective: all ranks must call. Both copies."""
        with weights.raw() as is_raw:
            if not is_raw:
                self.callback.say(
                    f"the model was given other weights since the training: {str(filepath)!r} has them, and not the "
                    "average"
                )
                write(lambda hook: _Noted(hook, None))
            elif writes_folder(self.trainer.strategy):
                self._beside(weights, filepath, write)
            else:
                write(lambda hook: _FileKeys(hook, weights, weights_only))

    def _beside(self, weights: Weights, filepath: Any, write: Callable[..., None]) -> None:
        """The old average goes first: whenever we are killed, none is beside weights of another step."""
        path = Path(self.trainer.strategy.broadcast(filepath))
        self._remove_earlier(path, weights)
        write(lambda hook: _Noted(hook, weights.average.manifest().to_json()))
        # A model that is cut over part of the job is in the other parts once more: only the part of rank 0 writes it.
        everybody = dist.group.WORLD if dist.is_initialized() else None
        with all_or_none(everybody, f"saving the average in {str(path)!r}"):
            if spans_rank_0(weights.average.process_group):
                weights.average.save(path / AVERAGE_FOLDER, with_buffers=True)

    def _remove_earlier(self, path: Path, weights: Weights) -> None:
        group = weights.average.process_group
        with all_or_none(group, f"removing the earlier average in {str(path)!r}"):
            if rank_in(group) == 0:
                place_of(path / AVERAGE_FOLDER).forget()

    def _alone(self, weights: Weights, filepath: Any, write: Callable[..., None]) -> None:
        """After an error, and other ranks do not come: nothing that waits for them may be called."""
        strategy = self.trainer.strategy
        torn = weights.exchanged or weights.average.has_stale_replicas
        if torn or not self.trainer.is_global_zero or collects_together(strategy):
            raise self._peers_gone(filepath)
        manifest = None if weights.average.n_averaged else weights.average.manifest().to_json()
        if manifest is None:
            self.callback.say(
                f"other ranks did not come within {RENDEZVOUS_GRACE_S:.0f} s: {str(filepath)!r} has the weights, not "
                "the average, which is in parts on all ranks"
            )
        with replaced(strategy, "barrier", lambda barrier: lambda *_, **__: None):
            write(lambda hook: _Noted(hook, manifest))

    @staticmethod
    def _peers_gone(filepath: Any) -> PeerError:
        return PeerError(
            f"cannot save {str(filepath)!r}: this rank failed, the others did not come within {RENDEZVOUS_GRACE_S:.0f} "
            "s, and each holds a part of what is saved. Resume from the last checkpoint"
        )


@dataclass(eq=False, repr=False)
class _Noted:
    """In place of the module's `on_save_checkpoint`: adds the manifest of an average that is elsewhere."""

    unedited: Callable[..., Any]
    manifest: str | None

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.unedited(checkpoint)
        checkpoint[KEY] = {"manifest": self.manifest}


@dataclass(eq=False, repr=False)
class _FileKeys:
    """In place of the module's `on_save_checkpoint`: both copies under Lightning's keys, each edited by the module."""

    unedited: Callable[..., Any]
    weights: Weights
    weights_only: bool

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Collective: all ranks must call. Averages are on rank 0, which is the one that writes."""
        raw, average, main = checkpoint["state_dict"], self.weights.average, self.weights.main
        manifest, started, state = average.manifest(), self.weights.started, dict(raw)
        with torch.inference_mode(False):
            if main in started:
                with average.summon_full_params(main) as full:
                    state = {key: full.get(clean(key), value) for key, value in raw.items()}
            others = self._beside(started, manifest)
        averaged = {**containers_copied(checkpoint), "state_dict": state}
        self.unedited(checkpoint)
        self.unedited(averaged)  # on every rank, also where the state is empty: the hook may communicate
        raw, checkpoint["state_dict"] = checkpoint["state_dict"], averaged["state_dict"]
        n_averaged = manifest.averages[main].n_averaged
        if self.weights_only:
            checkpoint[KEY] = {"manifest": None, "weights": "average", "n_averaged": n_averaged}
        else:
            checkpoint["current_model_state"] = raw
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(n_averaged)}
            checkpoint[KEY] = {"manifest": manifest.to_json()} | ({"main": main, "averages": others} if others else {})

    def _beside(self, started: list[str], manifest: Manifest) -> dict[str, dict[str, Tensor]]:
        """Collective: all ranks must call. What is kept beside the main average; nothing with weights only."""
        main = self.weights.main
        names = [name for name in started if name != main or manifest.averages[name].snapshots]
        found = self.weights.average.gather_full(names) if names and not self.weights_only else {}
        return {column: full for column, full in found.items() if column != main}


def containers_copied(value: Any) -> Any:
    """The same tensors and objects in dicts and lists of their own, from which a hook may take things away."""
    if type(value) is dict:
        return {key: containers_copied(inner) for key, inner in value.items()}
    return [containers_copied(inner) for inner in value] if type(value) is list else value
