"""Checkpoints written. Every save of a trainer goes through its `save_checkpoint`, where a SaveHook stands.

    a file      `state_dict` is the average, `current_model_state` the raw weights, `averaging_state` the count, as
                Lightning's own callback has it; "sharded_avg" the manifest
    a folder    as the strategy writes it, with raw weights, and the average in the folder AVERAGE_FOLDER inside it;
                "sharded_avg" has a copy of that folder's manifest, so that a folder of another save is noticed

Whoever saves, and at whatever moment: the model holds raw weights while the strategy collects them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PeerError, UnsupportedModelError
from ..ranks import all_or_none, rank_in, rendezvous
from ..saved.place import INCOMING, OUTGOING
from ..weights import names
from ..weights.layouts.zero.engine import writes_checkpoints
from .patches import replaced
from .trainers import collects_together, job_group, writes_folder
from .weights import Weights

AVERAGE_FOLDER = "average"
KEY = "sharded_avg"  # of a checkpoint: {"manifest": JSON text, or None before training began and with weights only}
RENDEZVOUS_GRACE_S = 30.0  # for ranks that may have failed


class SaveHook:
    """Stands in place of one trainer's `save_checkpoint`. Collective, as that is: all ranks must call."""

    def __init__(self, callback: Any, trainer: Any, original: Callable[..., Any]) -> None:
        self.callback, self._trainer, self._original = callback, trainer, original

    def __call__(self, filepath: Any, weights_only: bool | None = None, **options: Any) -> None:
        """Save as the trainer does, with the average."""
        trainer, holdings = self._trainer, self.callback.holdings
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
                self._original(filepath, weights_only, **options)

        self._take_pending(filepath, module)
        weights = holdings.reachable(trainer, module)
        all_came = not trainer.interrupted or weights is None or self._all_came(weights)
        if weights is not None and all_came:
            self.callback.catch_up(trainer, weights)
        if weights is None or not weights.average.n_averaged:
            self._before_the_first_update(weights, filepath, write)
        elif not all_came:
            self._alone(weights, filepath, write)
        else:
            with weights.raw() as is_raw:
                self._write(weights, is_raw, filepath, bool(weights_only), write)

    @staticmethod
    def _all_came(weights: Weights) -> bool:
        """Wait for ranks that may have failed; some may come after others gave up on ending an evaluation together."""
        if not rendezvous(weights.average.process_group, grace_s=RENDEZVOUS_GRACE_S):
            return False
        weights.average.republish()
        return True

    def _take_pending(self, filepath: Any, module: Any) -> None:
        """Saved between a resumed fit's loading and its first step: the average waits, and must not be lost."""
        trainer = self._trainer
        if self.callback.holdings.pending is None or trainer.state.fn != "fit":
            return
        if trainer.interrupted and not rendezvous(job_group(trainer), grace_s=RENDEZVOUS_GRACE_S):
            raise self._peers_gone(filepath)
        self.callback.holdings.begin(trainer, module)

    def _write(
        self, weights: Weights, is_raw: bool, filepath: Any, weights_only: bool, write: Callable[..., None]
    ) -> None:
        if not is_raw:
            self.callback.say(
                f"the model was given other weights since the training: {str(filepath)!r} has them, and not the average"
            )
            write(lambda original: _Noted(original, None))
        elif writes_folder(self._trainer.strategy):
            self._beside(weights, filepath, write)
        else:
            write(lambda original: _FileKeys(original, weights, weights_only=weights_only))

    def _before_the_first_update(self, weights: Weights | None, filepath: Any, write: Callable[..., None]) -> None:
        if weights is not None and writes_folder(self._trainer.strategy):
            self._remove_earlier(Path(self._trainer.strategy.broadcast(filepath)), weights)
        write(lambda original: _Noted(original, None if weights is None else weights.average.manifest().to_json()))

    def _beside(self, weights: Weights, filepath: Any, write: Callable[..., None]) -> None:
        """The old average goes first: whenever we are killed, none is beside weights of another step."""
        path = Path(self._trainer.strategy.broadcast(filepath))
        self._remove_earlier(path, weights)
        write(lambda original: _Noted(original, weights.average.manifest().to_json()))
        # A model that is cut over part of the job is in the other parts once more: only the part of rank 0 writes it.
        group, everybody = weights.average.process_group, dist.group.WORLD if dist.is_initialized() else None
        with all_or_none(everybody, f"saving the average in {str(path)!r}"):
            if group is None or 0 in dist.get_process_group_ranks(group):
                weights.average.save(path / AVERAGE_FOLDER, with_buffers=True)

    def _remove_earlier(self, path: Path, weights: Weights) -> None:
        group = weights.average.process_group
        with all_or_none(group, f"removing the earlier average in {str(path)!r}"):
            if rank_in(group) == 0:
                for suffix in ("", INCOMING, OUTGOING):
                    shutil.rmtree(path / (AVERAGE_FOLDER + suffix), ignore_errors=True)

    def _alone(self, weights: Weights, filepath: Any, write: Callable[..., None]) -> None:
        """After an error, and other ranks do not come: nothing that waits for them may be called."""
        strategy = self._trainer.strategy
        torn = weights.exchanged or weights.average.has_stale_replicas
        if torn or not self._trainer.is_global_zero or collects_together(strategy):
            raise self._peers_gone(filepath)
        self.callback.say(
            f"other ranks did not come within {RENDEZVOUS_GRACE_S:.0f} s: {str(filepath)!r} has the weights, not the "
            "average, which is in parts on all ranks"
        )
        with replaced(strategy, "barrier", lambda barrier: lambda *_, **__: None):
            write(lambda original: _Noted(original, None))

    @staticmethod
    def _peers_gone(filepath: Any) -> PeerError:
        return PeerError(
            f"cannot save {str(filepath)!r}: this rank failed, the others did not come within {RENDEZVOUS_GRACE_S:.0f} "
            "s, and each holds a part of what is saved. Resume from the last checkpoint"
        )


class _Noted:
    """In place of the module's `on_save_checkpoint`: adds the manifest of an average that is elsewhere."""

    def __init__(self, original: Callable[..., Any], manifest: str | None) -> None:
        self.unedited, self._manifest = original, manifest

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.unedited(checkpoint)
        checkpoint[KEY] = {"manifest": self._manifest}


class _FileKeys:
    """In place of the module's `on_save_checkpoint`: both copies under Lightning's keys, each edited by the module."""

    def __init__(self, original: Callable[..., Any], weights: Weights, *, weights_only: bool) -> None:
        self.unedited, self._average, self._weights_only = original, weights.average, weights_only

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        averaged = {**containers_copied(checkpoint), "state_dict": self._averaged(checkpoint["state_dict"])}
        self.unedited(checkpoint)
        self.unedited(averaged)  # on every rank, also where the state is empty: the hook may communicate
        raw, checkpoint["state_dict"] = checkpoint["state_dict"], averaged["state_dict"]
        if self._weights_only:
            checkpoint[KEY] = {"manifest": None, "weights": "average", "n_averaged": self._average.n_averaged}
        else:
            checkpoint["current_model_state"] = raw
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._average.n_averaged)}
            checkpoint[KEY] = {"manifest": self._average.manifest().to_json()}

    def _averaged(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Collective. The keys of `raw`, with averages on rank 0, which is the one that writes."""
        with torch.inference_mode(False), self._average.summon_full_params() as full:
            return {key: full.get(names.clean(key), value) for key, value in raw.items()}


def containers_copied(value: Any) -> Any:
    """The same tensors and objects in dicts and lists of their own, from which a hook may take things away."""
    if type(value) is dict:
        return {key: containers_copied(inner) for key, inner in value.items()}
    return [containers_copied(inner) for inner in value] if type(value) is list else value
