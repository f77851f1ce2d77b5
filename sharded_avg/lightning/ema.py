"""EMAWeightAveraging: a WeightAveraging with the schedule arguments of Lightning's."""

from __future__ import annotations

from typing import Any

import torch

from .. import EMA, ConfigError
from .callback import WeightAveraging
from .settings import count


class EMAWeightAveraging(WeightAveraging):
    """Lightning's `EMAWeightAveraging`: an exponential moving average, `decay * average + (1 - decay) * weights`.

    Updates after the optimizer steps 0, n, 2n, ... (n is `update_every_n_steps`) that come at or after both
    `update_starting_at_step` and `update_starting_at_epoch`, each counted from 0 and `None` for no limit. With n = 0,
    updates after every epoch from `update_starting_at_epoch` on.

    In Lightning's callback `update_starting_at_epoch` does not hold steps back, and adds an update after every epoch.

    Args:
        device: see `WeightAveraging`.
        use_buffers: see `WeightAveraging`.
        decay: share of the average that stays at an update, whatever the stride, as in Lightning; for a half-life in
            steps, use `WeightAveraging(rule=EMA.from_half_life(steps))`.
        update_every_n_steps: optimizer steps from one update to the next; 0 is once an epoch.
        update_starting_at_step: first optimizer step that may update.
        update_starting_at_epoch: first epoch that may update.
        settings: keyword arguments of `WeightAveraging`, but for functions and rules.

    Raises `ConfigError` for arguments that cannot be.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **settings: Any,
    ) -> None:
        # jsonargparse gives all that it finds in the signatures: what is None was not asked for.
        not_of_ema = [name for name in ("rule", "avg_fn", "multi_avg_fn") if settings.get(name) is not None]
        if not_of_ema:
            raise ConfigError(f"EMAWeightAveraging averages by decay={decay}; for {not_of_ema}, use WeightAveraging")
        super().__init__(device=device, use_buffers=use_buffers, rule=EMA(decay=decay), **settings)
        self.update_every_n_steps = count("update_every_n_steps", update_every_n_steps) or 0
        self.update_starting_at_step = count("update_starting_at_step", update_starting_at_step)
        self.update_starting_at_epoch = count("update_starting_at_epoch", update_starting_at_epoch)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after this optimizer step, or after this epoch."""
        every = self.update_every_n_steps
        if step_idx is None:
            return not every and epoch_idx is not None and epoch_idx >= (self.update_starting_at_epoch or 0)
        if not every or step_idx < (self.update_starting_at_step or 0):
            return False
        return step_idx % every == 0 and self.current_epoch >= (self.update_starting_at_epoch or 0)
