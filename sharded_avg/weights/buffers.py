"""Which buffers may be averaged, and which are left live whoever asks.

The mean of some state is no state: two unit vectors have a shorter mean, two masks one of halves, and an observer that
has seen nothing yet holds infinities. torch's own modules say here which of their buffers are of that kind; what a
module of the user's keeps is the user's to say, by `buffers=`. docs/guide.md has the table for readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss
from torch.nn.modules.pooling import FractionalMaxPool2d, FractionalMaxPool3d
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from . import names

BufferPolicy = Callable[[str, Tensor], bool]  # (name, meta tensor of the full shape) -> whether it is averaged

# Those of BatchNorm and its kin (running_mean, running_var) are statistics: their mean is one, too.
LEFT_LIVE: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (parametrizations._SpectralNorm, ("_u", "_v")),  # unit vectors of a power iteration, which goes on from them
    (parametrizations._Orthogonal, ("base",)),  # an orthogonal matrix; the weight is a step away from it
    (_WeightedLoss, ("weight",)),  # settings, not state
    (nn.BCEWithLogitsLoss, ("weight", "pos_weight")),
    (FractionalMaxPool2d, ("_random_samples",)),
    (FractionalMaxPool3d, ("_random_samples",)),
)
# Forward hooks that keep buffers in the user's module: their names, by the name of the weight.
LEFT_LIVE_OF_HOOKS: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (SpectralNorm, "name", ("{}_u", "{}_v")),
    (BasePruningMethod, "_tensor_name", ("{}_mask",)),  # zeros and ones
)
# Scales, zero points, ranges seen so far (infinite at first), histograms, masks: none of them has a mean.
LEFT_LIVE_PACKAGE = "torch.ao."


def left_live(model: nn.Module) -> set[str]:
    """Names of the buffers that stay the live ones."""
    return {prefix + key for prefix, module in names.walk(model) for key in _left_live_in(module)}


def _left_live_in(module: nn.Module) -> Iterator[str]:
    if not module._buffers:
        return
    if any(cls.__module__.startswith(LEFT_LIVE_PACKAGE) for cls in type(module).__mro__):
        yield from module._buffers
    for cls, keys in LEFT_LIVE:
        if isinstance(module, cls):
            yield from keys
    for hook in module._forward_pre_hooks.values():
        for kind, attribute, patterns in LEFT_LIVE_OF_HOOKS:
            if isinstance(hook, kind):
                yield from (pattern.format(getattr(hook, attribute)) for pattern in patterns)
