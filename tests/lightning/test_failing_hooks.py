"""A hook of the user's that fails on one rank: what of ours the other rank comes to next raises, and waits for nobody.

What it comes to before is Lightning's, or the engine's: there it waits with this callback as it does without. That is
printed by `python -m tests.lightning.test_failing_hooks` for a metric that is reduced over the ranks, and asserted.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch

from sharded_avg import PeerError
from sharded_avg.lightning import WeightAveraging
from tests.helpers.launch import run_agents

from .modules import NUM_BATCHES, Tiny
from .runs import module, run, trainer
from .test_failing_alone import LIMIT_S, STRATEGIES, OneRankError, failed, is_last

# Each where the other rank's next wait is one of ours: after the last forward of an evaluation, say.
HOOKS = (
    "validation_step",
    "on_validation_epoch_end",
)


class FailsOnOneRank(Tiny):
    """Raises on the last rank in one hook, when that has done its work."""

    def __init__(self, hook: str, **options: Any) -> None:
        super().__init__(**options)
        self.hook = hook

    def reach(self, hook: str, *, now: bool = True) -> None:
        if hook == self.hook and now and not self.trainer.sanity_checking and is_last():
            raise OneRankError(hook)

    def log(self, *_: Any, **__: Any) -> None:
        """Nothing: the other rank would be in Lightning's reduction of it, see below."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.reach("validation_step", now=batch_idx == self.trainer.num_val_batches[0] - 1)

    def on_validation_epoch_end(self) -> None:
        self.reach("on_validation_epoch_end")


def fits(tmp_path: Path, name: str, hook: str) -> dict[str, Any]:
    """One fit that fails, and one that does not, in the same processes."""
    first = WeightAveraging()
    fitted = trainer(tmp_path, name, [first], max_epochs=1, num_sanity_val_steps=0)
    found = failed(fitted, module(name, FailsOnOneRank, hook=hook))
    again = WeightAveraging()
    trainer(tmp_path, name, [again], max_epochs=1).fit(module(name))
    return found | {"again": again.average.n_averaged, "swapped": first.average._state.swapped}


@pytest.mark.each_value
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("hook", HOOKS)
def test_the_other_rank_is_told(hook: str, name: str, tmp_path: Path) -> None:
    """Its own error on the rank that failed, `PeerError` elsewhere, within seconds; the next fit goes well."""
    first, last = run(name, fits, tmp_path, name=name, hook=hook)
    assert (first["raised"], last["raised"]) == (PeerError, OneRankError)
    for found in (first, last):
        assert found["took_s"] < LIMIT_S
        assert (found["again"], found["swapped"]) == (NUM_BATCHES, None)


# --- what Lightning waits for ---------------------------------------------------------------------------------------

GROUP_S = 15.0  # more than ranks are apart on a busy machine


class Reduced(lightning.LightningModule):
    """Logs a metric that Lightning reduces over the ranks; the validation of rank 1 fails."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 5)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.global_rank == 1:
            raise OneRankError("validation")
        self.log("loss", self.layer(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def wait_in_lightning(with_ours: bool) -> None:
    """On each rank of torchrun. Prints what it raised, after how long, and who waited for the other."""
    from datetime import timedelta

    from lightning.pytorch.strategies import DDPStrategy

    loader = torch.utils.data.DataLoader(torch.ones(4, 3), batch_size=2)
    fitted = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=GROUP_S)),
        callbacks=[WeightAveraging()] if with_ours else [],
        max_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began, error = time.monotonic(), None
    try:
        fitted.fit(Reduced(), loader, loader)
    except BaseException as failure:
        error = failure
    found, at = [], error.__traceback__ if error is not None else None
    while at is not None:
        found.append(at.tb_frame.f_code.co_filename)
        at = at.tb_next
    is_reducing = any(name.endswith("logger_connector/result.py") for name in found)
    ours = any("/sharded_avg/" in name for name in found)
    print(
        f"rank {fitted.global_rank} with_ours={with_ours}: {type(error).__name__}, reducing a metric: {is_reducing}, "
        f"in ours: {ours}, {time.monotonic() - began:.1f} s; {str(error)[:200]!r}\n",
        end="",
        flush=True,
    )
    time.sleep(2 * GROUP_S if fitted.global_rank == 1 else 0.0)  # torchrun would end the other one


@pytest.mark.further
@pytest.mark.own_processes
def test_what_lightning_waits_for_is_waited_for_without_us_too(tmp_path: Path) -> None:
    """Rank 0 is in the reduction of a metric until the group's timeout, with this callback and without it."""
    waits = {}
    for with_ours in (False, True):
        job = ["--standalone", "--nproc_per_node=2", "-m", __name__, str(with_ours)]
        (finished,) = run_agents([job], tmp_path, timeout_s=200.0)
        pattern = r"rank 0 with_ours=\w+: RuntimeError, reducing a metric: True, in ours: False, ([\d.]+) s"
        [waits[with_ours]] = re.findall(pattern, finished.output)
    assert all(GROUP_S <= float(took_s) < GROUP_S + LIMIT_S for took_s in waits.values()), waits


if __name__ == "__main__":
    if len(sys.argv) > 1:
        wait_in_lightning(sys.argv[1] == "True")
    else:
        for each in (False, True):
            [ended] = run_agents(
                [["--standalone", "--nproc_per_node=2", "-m", "tests.lightning.test_failing_hooks", str(each)]],
                Path(__import__("tempfile").mkdtemp()),
                timeout_s=200.0,
            )
            print("\n".join(line for line in ended.output.splitlines() if line.startswith("rank ")))
