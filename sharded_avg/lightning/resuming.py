"""Checkpoints read. Every strategy reads one in its `load_checkpoint`, where a LoadHook stands.

    Pending     the average of a checkpoint, waiting for the model to be there
    in a file   fit gets the raw weights and an evaluation the average, by Lightning's own means where it loads a state
                dict; where the strategy has loaded `state_dict`, the average, by itself, the raw ones are written here
    in a folder the strategy loads raw weights; the folder beside them waits

The module's `on_load_checkpoint` sees each copy once, under `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import CheckpointError, PeerError, ShardedAverage
from ..integration import (
    Manifest,
    all_or_none,
    clean,
    everyone,
    find_importer,
    gather_objects,
    read_manifest,
    write_live,
)
from .saving import AVERAGE_FOLDER, KEY, containers_copied
from .trainers import job_group, loads_by_itself

_ELSEWHERE = "another rank failed"


@dataclass
class Pending:
    """Averages that were found in a checkpoint: in a folder, or as full tensors."""

    path: Path
    manifest: Manifest | None  # None if another callback saved it
    main: str  # the average that a file has as its `state_dict`
    full: dict[str, Mapping[str, Tensor]] | None = None  # by average and snapshot; names are the unwrapped model's
    n_averaged: int = 0  # of the main one, if there is no manifest
    step: int = 0
    is_in_model: bool = False  # the strategy loads it as the model's weights, and nothing else is wanted

    @property
    def started(self) -> list[str]:
        """The averages that have had an update."""
        if self.manifest is None:
            return [self.main] if self.n_averaged else []
        return [name for name, record in self.manifest.averages.items() if record.n_averaged]

    def into(self, average: ShardedAverage, *, strict: bool) -> None:
        """Collective: all ranks must call. Raises `CheckpointError` if it does not fit, or is of another save.

        If not `strict`, averages that one of both lacks are left alone.
        """
        if self.full is None and self.started:
            folder = self.path / AVERAGE_FOLDER
            _, found = read_manifest(folder, average.process_group)
            if found != self.manifest:
                raise CheckpointError(
                    f"{str(folder)!r} is the average after {_counts(found)}, and the checkpoint that it lies in was "
                    f"saved with the one after {_counts(self.manifest)}: they do not belong together"
                )
            result = average.load(folder, strict=False)
        else:
            with all_or_none(average.process_group, f"reading the average in {str(self.path)!r}"):
                result = average.load_full(self.full or {}, self._described(average), strict=False)
        # What is missing was frozen when the checkpoint was written: it joins now. Anything else is another model's.
        misfit = result.unexpected_keys or result.misfits or (self.manifest is None and result.missing_keys)
        if misfit or (strict and (result.missing_averages or result.unexpected_averages)):
            raise CheckpointError(f"the average in {str(self.path)!r} does not fit this model: {result}")

    def _described(self, average: ShardedAverage) -> Manifest:
        full, mine = (self.full or {}).get(self.main, {}), average.manifest()
        infos = full.infos if isinstance(full, FileTensors) else full
        tensors = {
            name: replace(record, shape=list(infos[name].shape), dtype=str(infos[name].dtype).removeprefix("torch."))
            for name, record in mine.tensors.items()
            if name in infos
        }
        if self.manifest is not None:
            return replace(mine, step=self.manifest.step, averages=self.manifest.averages, tensors=tensors)
        record = replace(mine.averages[self.main], n_averaged=self.n_averaged, updates=[], snapshots=0)
        return replace(mine, step=self.step, averages={self.main: record}, tensors=tensors)


@dataclass(eq=False, repr=False)
class LoadHook:
    """Stands in place of one strategy's `load_checkpoint`."""

    callback: Any
    trainer: Any
    original: Callable[..., Any]

    def __call__(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as the strategy does; the average waits in the callback."""
        checkpoint = self.original(checkpoint_path, *args, **kwargs)
        is_ours = KEY in checkpoint  # from before the first update, if it has no average: a tuner's, for one
        if is_ours and checkpoint[KEY].get("weights") == "average" and self.callback.wants_raw(self.trainer):
            self.callback.say("the checkpoint was saved with weights only: its weights are the average, none are raw")
        # What is read here is read by each rank for itself, and can fail on one.
        with all_or_none(job_group(self.trainer), f"reading the average in {str(checkpoint_path)!r}"):
            pending, raw = self._found(Path(checkpoint_path), checkpoint)
        if raw is not None:
            write_live(self.trainer.strategy.model, {clean(key): value for key, value in raw.items()})
        self.callback.found(self.trainer, pending, silently=is_ours)
        return checkpoint

    def _found(self, path: Path, checkpoint: dict[str, Any]) -> tuple[Pending | None, dict[str, Any] | None]:
        """What waits, and raw weights that belong into the live model now."""
        ours = (checkpoint.pop(KEY, None) or {}) if isinstance(checkpoint, dict) else {}
        text = ours.get("manifest")
        manifest = None if text is None else Manifest.from_json(text)
        main = ours.get("main", self.callback.main)
        if "averaging_state" in checkpoint and "current_model_state" in checkpoint:
            full: dict[str, Mapping[str, Tensor]] = dict(ours.get("averages", {}))
            pending = Pending(path, manifest, main, full)
            return pending, self._in_file(pending, full, checkpoint)
        return (None if manifest is None else Pending(path, manifest, main)), None

    def _in_file(
        self, pending: Pending, full: dict[str, Mapping[str, Tensor]], checkpoint: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Raw weights that belong into the live model now; averages go into `full`, perhaps later."""
        count = pending.n_averaged = int(checkpoint.pop("averaging_state")["n_averaged"])
        raw: dict[str, Any] = checkpoint.pop("current_model_state")
        pending.step = int(checkpoint.get("global_step", count)) // max(1, len(checkpoint.get("optimizer_states", [])))
        if pending.main == self.callback.main and not self.callback.wants_raw(self.trainer):
            pending.is_in_model = True
        elif loads_by_itself(self.trainer.strategy):
            full[pending.main] = FileTensors(pending.path)
            return raw
        else:
            averaged, checkpoint["state_dict"] = checkpoint["state_dict"], raw
            module = self.trainer.lightning_module
            module.on_load_checkpoint = _BothCopies(module, averaged, full, pending.main)
        return None


@dataclass(eq=False, repr=False)
class _BothCopies:
    """In place of the module's `on_load_checkpoint`, once: the raw weights in the checkpoint, and the average."""

    module: Any
    averaged: dict[str, Any]
    full: dict[str, Mapping[str, Tensor]]
    main: str  # under which the average goes there

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        del self.module.on_load_checkpoint
        averaged = {**containers_copied(checkpoint), "state_dict": self.averaged}
        self.module.on_load_checkpoint(checkpoint)
        self.module.on_load_checkpoint(averaged)
        state = averaged["state_dict"]
        self.full[self.main] = {clean(key): value for key, value in state.items() if isinstance(value, Tensor)}


def forget_load(module: Any) -> None:
    """A run that ended between reading a checkpoint and giving it to the module has left its stand-in there."""
    if isinstance(vars(module).get("on_load_checkpoint"), _BothCopies):
        del module.on_load_checkpoint


class FileTensors(Mapping[str, Tensor]):
    """The averaged tensors of a file, each read when it is asked for: a rank needs memory for one at a time."""

    def __init__(self, path: Path) -> None:
        found = find_importer(path, "lightning", ignore_classes=True)
        if found is None:
            raise CheckpointError(f"{str(path)!r} cannot be read a second time, for its average")
        self._source = found.open()
        self.infos = self._source.infos  # shapes and dtypes, without reading

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        return self._source.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _counts(manifest: Manifest | None) -> str:
    if manifest is None:
        return "no update"
    counts = " and ".join(f"{record.n_averaged} updates" for record in manifest.averages.values())
    return f"{counts} in {manifest.step} steps"


def load_quietly(pending: Pending, average: ShardedAverage, strict: bool) -> str:
    """Collective: all ranks must call. Load; "" or, if that is not `strict`, why it could not be done."""
    error: BaseException | None = None
    try:
        with torch.inference_mode(False):
            pending.into(average, strict=strict)
    except BaseException as failure:
        error = failure
    # What failed on one rank only is a PeerError on the others: they do as it does.
    reason: str | None = ""  # why a saved average cannot be used; `None` for an error of another kind
    if error is not None:
        reason = _ELSEWHERE if isinstance(error, PeerError) else None
        reason = str(error) if isinstance(error, CheckpointError) else reason
    reasons: list[str | None] = gather_objects(everyone(average.process_group), reason)
    if not strict and None not in reasons:
        said = sorted(filter(None, reasons), key=_ELSEWHERE.__eq__)
        return said[0] if said else ""
    if error is None and any(told != "" for told in reasons):
        raise PeerError(
            f"another rank could not take over the average in {str(pending.path)!r}; the cause is in the traceback of "
            "that rank"
        )
    if error is None:
        return ""
    if strict and isinstance(error, CheckpointError):
        raise CheckpointError(
            f"{error}. To start a new average from the weights of this checkpoint, give the callback strict=False"
        ) from error
    raise error
