"""Lightning callbacks: change one import line, keep everything, shard everything.

    from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging

The arguments, the `should_update` override and the single-file checkpoints are those of Lightning's own callbacks of
these names; FSDP, ModelParallel and DeepSpeed strategies work too, and nobody holds a full copy.

    callback.py     WeightAveraging: which hook does what
    ema.py          EMAWeightAveraging: a WeightAveraging with Lightning's schedule arguments
    trainers.py     what is relied on of Lightning, in both of its packages
    weights.py      what the model holds: raw weights, the average for an evaluation, or the average for good
    passes.py       a second evaluation, on the raw weights
    saving.py       checkpoints written: keys of a file, or a folder beside the model's
    resuming.py     checkpoints read
    stepping.py     whether an optimizer stepped
"""

from .callback import WeightAveraging
from .ema import EMAWeightAveraging

__all__ = ["EMAWeightAveraging", "WeightAveraging"]
