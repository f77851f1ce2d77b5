"""Exponential moving averages: w(n) = 1 - decay."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError
from .base import AbstractLerpRule, Moment
from .decays import AbstractDecay, WarmupTF
from .numbers import number

_PER = ("update", "step")


@dataclass(frozen=True, kw_only=True)
class EMA(AbstractLerpRule):
    """Exponential moving average: a <- decay * a + (1 - decay) * x (torch.optim.swa_utils).

    Args:
        decay: a number, or a value of `sharded_avg.decays` that changes in the course of training.
        warmup: decay is min(decay, (1 + n) / (10 + n)) after n updates (TensorFlow's ExponentialMovingAverage), so that
            the first weights are forgotten quickly: short for `decays.WarmupTF(decay=decay)`.
        per: what the decay is of. "update", as in torch and Lightning: with a schedule of every 10 steps it remembers
            ten times as long. "step", an optimizer step: an update that comes 10 steps after the last one takes
            decay^10, so that the horizon in steps is the same under any schedule, also an irregular one.
        batch_factor: how many units of `per` one of ours stands for: see `scaled`.

    Raises `ConfigError` for a decay outside of [0, 1], and for other settings that cannot be.
    """

    decay: float | AbstractDecay = 0.999
    warmup: bool = False
    per: Literal["update", "step"] = "update"
    batch_factor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.decay, AbstractDecay):
            number("EMA(decay", self.decay, least=0, most=1, for_example=0.999)
        if not isinstance(self.warmup, bool):
            raise ConfigError(f"EMA(warmup={self.warmup!r}): warmup must be True or False")
        if self.warmup and isinstance(self.decay, AbstractDecay):
            raise ConfigError(f"EMA(warmup=True, decay={self.decay!r}): this decay has its own beginning: give one")
        if self.per not in _PER:
            raise ConfigError(f"EMA(per={self.per!r}): must be one of {', '.join(map(repr, _PER))}")
        number("EMA(batch_factor", self.batch_factor, above=0)

    @classmethod
    def from_half_life(
        cls,
        steps: float | None = None,
        *,
        images: float | None = None,
        batch_size: float | None = None,
        warmup: bool = False,
    ) -> EMA:
        """The EMA in which a weight's share halves every `steps` optimizer steps: decay = 2^(-1 / steps) per step.

        The schedule makes no difference to it. Half-lives of diffusion models are in images that were seen: give
        `images` and `batch_size`, of all ranks together, instead of `steps`. Raises `ConfigError` unless they are
        positive numbers.
        """
        if (steps is None) == (images is None) or (images is None) != (batch_size is None):
            given = {"steps": steps, "images": images, "batch_size": batch_size}
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
            raise ConfigError(f"EMA.from_half_life({shown}): give steps, or images and batch_size")
        if images is not None and batch_size is not None:
            number("EMA.from_half_life: the half-life (images", images, above=0)
            number("EMA.from_half_life(batch_size", batch_size, above=0)
            steps = images / batch_size
        number("EMA.from_half_life: the half-life (steps", steps, above=0, for_example=2000)
        return cls(decay=2.0 ** (-1 / steps), warmup=warmup, per="step")  # type: ignore[operator]

    def scaled(self, batch_factor: float) -> EMA:
        """The EMA for batches `batch_factor` times as large, which see as much data in fewer steps: decay^batch_factor.

        The scaling rule of Busbridge et al., "How to Scale Your EMA", 2023 (arXiv 2307.13813); it goes with a learning
        rate that is scaled by the same factor. Raises `ConfigError` unless batch_factor > 0.
        """
        number("EMA.scaled(batch_factor", batch_factor, above=0)
        return replace(self, batch_factor=self.batch_factor * batch_factor)

    def weight(self, at: Moment) -> float:
        """w(n) = 1 - decay^(k * batch_factor), where k is 1, or per step the steps that the update stands for.

        The power of `batch_factor` is the scaling rule of arXiv 2307.13813. A decay that changes gives its own share
        that stays over k * batch_factor (`AbstractDecay.over`).
        """
        t, elapsed = (at.num_averaged, 1) if self.per == "update" else (at.age, at.elapsed)
        decay = WarmupTF(decay=self.decay) if self.warmup else self.decay  # type: ignore[arg-type]
        if isinstance(decay, AbstractDecay):
            return 1 - decay.over(t * self.batch_factor, elapsed * self.batch_factor)
        return float(1 - decay ** (elapsed * self.batch_factor))

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind, decay, warmup, and what is not at its default."""
        decay = self.decay.settings() if isinstance(self.decay, AbstractDecay) else self.decay
        changed = {name: value for name, value in asdict(self).items() if value != getattr(EMA, name)}
        return {"kind": "EMA", **changed, "decay": decay, "warmup": self.warmup}
