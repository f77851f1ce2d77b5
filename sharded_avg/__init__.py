"""Averages of a model's weights, kept sharded beside its parameters.

from sharded_avg import EMA, ShardedAverage

average = ShardedAverage(model, EMA(decay=0.999))
...
average.update()                # after every optimizer step
with average.swapped():         # the model computes with averaged weights
    evaluate(model)
"""

from .version import __version__, require_torch

try:
    require_torch()  # before anything that needs it
except ImportError as error:
    from .commands.without_torch import exit_if_started  # a package that raises here has no command line of its own

    exit_if_started(error)
    raise

# isort: split
from .weights.names import collector_paused

# `import torch` leaves a full collection due, which the next import of this size would be made to wait for: longer
# than for all that it does itself.
with collector_paused():
    from .averager import ShardedAverage
    from .errors import (
        CheckpointError,
        ConfigError,
        EngineVersionError,
        LayoutChangedError,
        NotStartedError,
        PeerError,
        ReplicaError,
        ShardedAvgError,
        SwapError,
        UnsupportedModelError,
    )
    from .evaluation.batch_norm import refreshed_batch_norm
    from .evaluation.buffers import averaged_buffers
    from .formats.open import load_averaged_state_dict
    from .rules import decays
    from .rules.base import AbstractRule, Moment
    from .rules.cosine_merge import CosineMerge
    from .rules.custom import CustomRule
    from .rules.ema import EMA
    from .rules.lawa import LAWA
    from .rules.polynomial import PolynomialAverage
    from .rules.power import PowerAverage
    from .rules.schedule import Schedule
    from .rules.swa import SWA
    from .saved.snapshots import Snapshots

del collector_paused, require_torch

__all__ = [  # noqa: RUF022 plainly sorted, as a test checks
    "AbstractRule",
    "CheckpointError",
    "ConfigError",
    "CosineMerge",
    "CustomRule",
    "EMA",
    "EngineVersionError",
    "LAWA",
    "LayoutChangedError",
    "Moment",
    "NotStartedError",
    "PeerError",
    "PolynomialAverage",
    "PowerAverage",
    "ReplicaError",
    "SWA",
    "Schedule",
    "ShardedAverage",
    "ShardedAvgError",
    "Snapshots",
    "SwapError",
    "UnsupportedModelError",
    "__version__",
    "averaged_buffers",
    "decays",
    "load_averaged_state_dict",
    "refreshed_batch_norm",
]
