"""WeightAveraging: which hook of Lightning does what.

setup                 stand where the trainer saves and loads
on_train_start        build the average, from what the strategy has sharded; take over what waits for it
on_train_batch_end    update, if an optimizer stepped
on_*_start, on_*_end  the average in and out, for validation, test and predict
on_train_end          the average into the model for good; the raw weights stay in host memory
on_exception          the raw weights back, before anybody saves
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import AbstractRule, ConfigError, ReplicaError, ShardedAverage, Snapshots
from ..integration import AvgFn, BufferPolicy, MultiAvgFn, all_or_none, as_buffers
from .holdings import Holdings
from .passes import Passes
from .patches import replaced, stand_in
from .resuming import LoadHook, Pending, forget_load
from .saving import SaveHook
from .settings import Included, count, dtype_of, evaluation, main_of, rules_of, snapshots_of
from .stepping import StepWatch
from .trainers import callback_class, check, evaluation_loops, is_named, job_group, spans_rank_0, tell_left_out
from .weights import Weights

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = callback_class()


class WeightAveraging(Callback):
    """Lightning's `WeightAveraging`, with the average kept sharded beside the model, under every strategy.

    `device`, `use_buffers`, `avg_fn` and `multi_avg_fn` are the arguments of Lightning's callback, and overriding
    `should_update` decides when to update. The other arguments are this package's own.

    Args:
        device: where averages live; `None` is beside the weights, "cpu" host memory (pinned beside a GPU).
        use_buffers: average floating-point persistent buffers too; if not, the live buffers are used. State of torch's
            own modules whose mean means nothing is the live one in any case, as docs/guide.md lists.
        avg_fn: elementwise `avg_fn(averaged, current, num_averaged) -> averaged`; by default, the equal-weight mean.
        multi_avg_fn: the same on lists, in place.
        rule: one of this package's rules, instead of a function; or several by name, such as
            `{"short": EMA(decay=0.99), "long": PowerAverage.from_sigma_rel(0.1)}`. Then the one that `end_with` names,
            or else the first, is meant wherever there can be one only: at the end, in a prediction, in `state_dict` of
            a file.
        dtype: storage of the average, a torch.dtype or its name: see `ShardedAverage`. By default fp32, and float64
            for float64 weights; `None` is each parameter's own.
        buffers: which buffers are averaged, instead of all or none by `use_buffers`: what `ShardedAverage` takes, for
            example `{"*.running_*": "average"}`, or a predicate.
        include: `include(name, tensor) -> bool` chooses parameters; by default those that require grad.
        evaluate_with: "average", "raw", or "both": then each validation and test first runs on the raw weights, with
            `raw_prefix` before the names of its metrics, and then on the average. With "all" it runs on each of several
            averages in between, with "NAME/" before the names of metrics; those of the average of `end_with`, which is
            the last, are logged under their plain names as well. Checkpoints and early stopping act once, at the last.
        raw_prefix: of the metrics of raw weights, with evaluate_with="both" and "all".
        end_with: "average" leaves the average in the model at the end of training, "raw" the raw weights; of several
            averages, the name of the one to end with, and "average" is the first.
        strict: whether an average in a checkpoint that is torn or does not fit is an error; if not, a new average
            starts from the checkpoint's weights, with a warning.
        skip_nonfinite: look at the weights before each update, and leave it out if some are NaN or infinite, on any
            rank: a pass over the weights, a host sync and a small reduction each time.
        log_every_n_updates: log the decay in force and the distance between live and averaged weights that often, as
            "average/decay" and "average/distance" (or "NAME/..."), and what the update took on rank 0, as
            "average/update_seconds" and "average/update_bytes": one small reduction each time. 0 does not.
        check_replicas_every_n_updates: compare what ranks should hold alike that often (`check_replicas`), and raise
            `ReplicaError` where it differs: a pass over that, and a small exchange. 0 does not.
        snapshots: save the averages on a schedule of their own, while training goes on, for a choice among horizons
            after it (`load_posthoc`): the arguments of `Snapshots`, such as `{"folder": "run/snapshots",
            "every_steps": 1000, "keep_last": 5}`.

    `average` is the `ShardedAverage` once training has begun, and `None` before.

    Raises `ConfigError` for arguments that cannot be.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        *,
        rule: AbstractRule | Mapping[str, AbstractRule] | None = None,
        dtype: torch.dtype | str | None = "auto",
        buffers: str | Mapping[str, str] | BufferPolicy | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
        evaluate_with: Literal["average", "raw", "both", "all"] = "average",
        raw_prefix: str = "raw/",
        end_with: str = "average",
        strict: bool = True,
        skip_nonfinite: bool = False,
        log_every_n_updates: int = 0,
        check_replicas_every_n_updates: int = 0,
        snapshots: Mapping[str, Any] | None = None,
    ) -> None:
        tell_left_out()
        self.rules = rules_of(rule, avg_fn, multi_avg_fn)
        self.rule = self.rules if len(self.rules) > 1 else next(iter(self.rules.values()))
        self.end_with, self.main = end_with, main_of(end_with, self.rules)
        self.device, self.use_buffers, self.include = device, use_buffers, include
        self.dtype, self.buffers = dtype_of(dtype), buffers
        if buffers is not None:
            as_buffers(buffers)
        self.evaluate_with = evaluation(evaluate_with)
        self.raw_prefix, self.strict, self.skip_nonfinite = raw_prefix, strict, skip_nonfinite
        self.log_every_n_updates = count("log_every_n_updates", log_every_n_updates) or 0
        every = count("check_replicas_every_n_updates", check_replicas_every_n_updates)
        self.check_replicas_every_n_updates = every or 0
        self.snapshots = snapshots_of(snapshots)
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._latest_asked_epoch = -1
        self.current_epoch = 0
        self._forget()

    def _forget(self) -> None:
        """Nothing of a run: what a new, copied or unpickled callback has."""
        self.holdings = Holdings(self)
        self._watch: StepWatch | None = None
        self._during_run = ExitStack()
        self._looks_at: str | None = None  # "raw" or an average, in a pass of its own
        self._has_caught_up = False
        self._job: dist.ProcessGroup | None = None  # all ranks of the trainer

    def __getstate__(self) -> dict[str, Any]:
        fresh = type(self).__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        fresh._forget()
        state = dict(fresh.__dict__)
        del state["_during_run"]  # an ExitStack cannot be pickled
        del state["holdings"]
        state.pop("log", None)  # bound to the module by Lightning, which binds it again
        state.pop("log_dict", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def average(self) -> ShardedAverage | None:
        """The average, or all of several, of the weights that are being trained, or were; `None` before training."""
        return None if self.holdings.training is None else self.holdings.training.average

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after an optimizer step, or after an epoch; override it. All ranks must decide alike.

        One argument is given, and counts from 0: `step_idx` is how many batches with an optimizer step came before
        (whatever `accumulate_grad_batches` and the number of optimizers; skipped steps do not count), `epoch_idx` the
        epoch. By default, after every step.
        """
        return step_idx is not None

    # -- a run begins ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stand where the trainer saves and loads, from here on: it may save long after the run."""
        others = [c for c in trainer.callbacks if is_named(c, "WeightAveraging") and c is not self]  # or Lightning's
        if others:
            raise ConfigError(
                f"the trainer has two averaging callbacks, {type(self).__name__} and {type(others[0]).__name__}, and a "
                "checkpoint has room for one average under Lightning's keys: keep one of them"
            )
        check(trainer)
        self._job = job_group(trainer)
        stand_in(self, trainer, trainer, "save_checkpoint", SaveHook)
        stand_in(self, trainer, trainer.strategy, "load_checkpoint", LoadHook)
        forget_load(pl_module)
        self.holdings.new_run()
        if stage == "fit":  # perhaps of another trainer, which counts from 0 again; or a checkpoint says how far it was
            self._latest_update_step = min(self._latest_update_step, trainer.global_step)
            self._latest_update_epoch = min(self._latest_update_epoch, trainer.current_epoch - 1)
            self._latest_asked_epoch = -1
        if self.evaluate_with in ("both", "all"):
            for loop in evaluation_loops(trainer):
                passes = replaced(loop, "run", lambda run: Passes(self, trainer, run))
                self._during_run.enter_context(passes)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Collective: all ranks must call. Build the average; lazy layers put it off until the first step."""
        self._watch, self._has_caught_up = StepWatch(trainer, trainer.strategy.optimizers), False
        if not any(is_lazy(parameter) for parameter in pl_module.parameters()):
            self.holdings.begin(trainer, pl_module)

    def built(self, model: Any, pending: Pending | None = None) -> ShardedAverage:
        """Collective: all ranks must call. A new average of `model`, with room for what is pending."""
        saved = frozenset() if pending is None or pending.manifest is None else frozenset(pending.manifest.tensors)
        # `include` is the user's, and may fail on one rank; the others may be making groups by then.
        with torch.inference_mode(False), all_or_none(self._job, "building the average of the weights"):
            return ShardedAverage(
                model,
                self.rules,
                dtype=self.dtype,
                device=self.device,  # type: ignore[arg-type]
                buffers=self.buffers if self.buffers is not None else "average" if self.use_buffers else "copy",
                include=Included(self.include, saved) if self.include is not None or saved else None,
                schedule=self._is_due,
            )

    # -- updating --------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update, once for each batch with a real optimizer step; at the end of an epoch, before its validation."""
        if self._watch is not None and self._watch.stepped() and not self._has_caught_up:
            weights = self.holdings.of(pl_module) if self.holdings.pending is None else None
            self._update(self.holdings.begin(trainer, pl_module) if weights is None else weights, trainer)
        self._has_caught_up = False
        if self.snapshots is not None and (weights := self.holdings.of(pl_module)) is not None:
            self._save_snapshot(weights)
        if trainer.is_last_batch:
            self._epoch_ended(trainer, pl_module)

    def catch_up(self, trainer: Any, weights: Weights, *, alone: bool = False) -> None:
        """Who saves after a step and before our hook saves an average that has taken the step in, too.

        Collective, unless `alone`.
        """
        if self._watch is not None and self._watch.stepped() and not self._has_caught_up:
            self._update(weights, trainer, alone=alone)
            self._has_caught_up = True  # what else steps in this batch is of the same step

    def _is_due(self, step: int) -> bool:
        return bool(self.should_update(step_idx=step - 1))

    def _update(self, weights: Weights, trainer: Any, *, alone: bool = False) -> None:
        self.current_epoch, average = trainer.current_epoch, weights.average
        if self._refuses_nonfinite(weights) or not average.update():
            return
        self._latest_update_step = trainer.global_step
        if alone:
            return
        if self.log_every_n_updates and average.n_averaged % self.log_every_n_updates == 0:
            self._log(weights, trainer)
        every = self.check_replicas_every_n_updates
        if every and average.n_averaged % every == 0 and (differing := average.check_replicas()):
            raise ReplicaError(
                f"after {average.num_steps} steps, ranks that should hold the same do not: "
                + "; ".join(f"{what} of {name!r} on ranks {ranks}" for what, name, ranks in differing)
            )

    def _log(self, weights: Weights, trainer: Any) -> None:
        """Collective: all ranks must call."""
        average, values = weights.average, {}
        for name in weights.started:
            values[f"{name}/distance"] = average.distance(name)
            with suppress(ConfigError):  # a function of the user's does not know
                values[f"{name}/decay"] = average.decay(name)
        if (took := average.last_update) is not None:
            values |= {"average/update_seconds": took.seconds, "average/update_bytes": float(took.nbytes)}
        # To the loggers themselves: what a module logs in one batch, Lightning repeats in the batches after it.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def _save_snapshot(self, weights: Weights) -> None:
        """Collective: all ranks must call. If it is time."""
        average = weights.average
        if weights.snapshots is None and spans_rank_0(average.process_group):  # others have the same once more
            weights.snapshots = Snapshots(average, **self.snapshots or {})
        if weights.snapshots is not None:
            weights.snapshots.update()

    def _refuses_nonfinite(self, weights: Weights) -> bool:
        if not self.skip_nonfinite or weights.average.live_is_finite():
            return False
        self.say("the weights have a NaN or an infinity: this update of the average is left out")
        return True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Update after the epoch, if the last batch did not see that it was one."""
        self._epoch_ended(trainer, pl_module)

    def _epoch_ended(self, trainer: Any, pl_module: Any) -> None:
        epoch, weights = trainer.current_epoch, self.holdings.of(pl_module)
        if epoch <= max(self._latest_update_epoch, self._latest_asked_epoch) or weights is None:
            return
        self._latest_asked_epoch = epoch
        if self.should_update(epoch_idx=epoch) and not self._refuses_nonfinite(weights):
            weights.average.update(unscheduled=True)
            self._latest_update_epoch = epoch

    # -- evaluating ------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Collective: all ranks must call. The average in, for a test and a prediction as well."""
        if trainer.sanity_checking:
            return
        weights = self.holdings.to_evaluate(trainer, pl_module)
        what = self._looks_at or ("raw" if self.evaluate_with == "raw" else self.main)
        if weights is not None and what != "raw":
            weights.enter(what)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Collective: all ranks must call. The raw weights back."""
        self.holdings.leave()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @property
    def earlier_passes(self) -> list[tuple[str, str]]:
        """What is evaluated before the average, "raw" or the name of another one, and the prefix of its metrics."""
        others = [name for name in self.rules if name != self.main] if self.evaluate_with == "all" else []
        return [("raw", self.raw_prefix), *((name, f"{name}/") for name in others)]

    @property
    def other_prefixes(self) -> list[str]:
        """Of the metrics of the average, beside their plain names."""
        return [f"{self.main}/"] if self.evaluate_with == "all" and len(self.rules) > 1 else []

    @contextmanager
    def looking_at(self, trainer: Any, what: str) -> Iterator[None]:
        """Collective: all ranks must call. Inside, evaluations are of the raw weights, or of this average."""
        in_memory = trainer.state.fn != "fit" and self.holdings.pending is None
        weights = self.holdings.reachable(trainer, trainer.lightning_module) if in_memory else None
        with weights.raw() if weights is not None else nullcontext():
            self._looks_at = what
            try:
                yield
            finally:
                self._looks_at = None

    # -- a run ends ------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Collective: all ranks must call. The average into the model for good."""
        weights = self.holdings.of(pl_module)
        if weights is not None and weights.snapshots is not None:
            weights.snapshots.close()
        if weights is not None and self.end_with != "raw":
            weights.finish()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Collective: all ranks must call. A resumed run that had nothing left to do has its average all the same."""
        if self.holdings.pending is not None:
            self.holdings.begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The raw weights back. Waits for other ranks only as long as they may still come."""
        self.holdings.leave(exception)
        weights = self.holdings.of(pl_module)
        if weights is not None and not self.skip_nonfinite:  # which would wait for other ranks
            self.catch_up(trainer, weights, alone=True)
        forget_load(pl_module)
        self._end_run()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing stays in place but the hooks for saving and loading."""
        self.holdings.leave()
        self._end_run()

    def _end_run(self) -> None:
        self._during_run.close()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What Lightning's callback keeps; the counts of the average are with the average."""
        return {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read what `state_dict` wrote, here or in Lightning's callback."""
        self._latest_update_step = state_dict.get("latest_update_step", 0)
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    def wants_raw(self, trainer: Any) -> bool:
        """Whether the raw weights of a checkpoint that is being read belong into the model."""
        return bool(trainer.state.fn == "fit") or self.evaluate_with != "average"

    def found(self, trainer: Any, pending: Pending | None, *, silently: bool) -> None:
        """A checkpoint was read, with this average in it or without one."""
        is_fit, module = trainer.state.fn == "fit", trainer.lightning_module
        if pending is None and not silently:
            then = "a new average starts from them" if is_fit else "they are evaluated as they are"
            self.say(f"the checkpoint has no average in it: its weights are used, and {then}")
        present = self.holdings.of(module) if is_fit and self._watch is not None else None
        if present is not None and pending is not None and pending.manifest == present.average.manifest():
            return  # in the middle of a run, tuners read again what they have just saved
        self.holdings.found(module, pending, is_fit=is_fit)

    @staticmethod
    def say(message: str) -> None:
        """A warning, on rank 0."""
        rank_zero_warn(f"sharded_avg: {message}", stacklevel=3)
