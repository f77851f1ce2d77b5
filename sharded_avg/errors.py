"""What can go wrong, and whose turn it is.

ShardedAvgError
  ConfigError            an argument that cannot be                      -> change the argument
  UnsupportedModelError  a model or engine that no layout can cut        -> pass what the message says
  LayoutChangedError     the model was wrapped or re-cut after the fact  -> build the average after the last wrapping
  EngineVersionError     an engine without the internals we rely on      -> install a version named in the message
  NotStartedError        no update has happened, so there is no average  -> train first, or look at the live weights
  SwapError              something that cannot be done while swapped     -> leave `with average.swapped():` first
  PeerError              another rank failed in the same collective call -> read that rank's traceback
  ReplicaError           copies that ranks hold together are not equal   -> make them equal, or leave them out
  CheckpointError        a saved average that does not fit, or is torn   -> the message lists what is missing
"""

import warnings


class ShardedAvgError(Exception):
    """Base of everything that this package raises on purpose."""


class ConfigError(ShardedAvgError, ValueError):
    """An argument has a value or type that cannot be."""


class UnsupportedModelError(ShardedAvgError, TypeError):
    """No layout can average this model as it stands; nothing was averaged."""


class LayoutChangedError(ShardedAvgError, RuntimeError):
    """The model is no longer cut the way it was when the average was made."""


class EngineVersionError(ShardedAvgError, ImportError):
    """An installed engine lacks the internals that its layout relies on."""


class NotStartedError(ShardedAvgError, RuntimeError):
    """An average was asked for before its first update."""


class SwapError(ShardedAvgError, RuntimeError):
    """The call is not possible while live and averaged weights are exchanged."""


class PeerError(ShardedAvgError, RuntimeError):
    """Another rank failed in a collective call; this rank undid its own part."""


class ReplicaError(ShardedAvgError, RuntimeError):
    """Values that several ranks should hold alike differ, so that what one has would be lost; nothing was changed."""


class CheckpointError(ShardedAvgError, RuntimeError):
    """A saved average is missing, torn, or does not fit the model."""


def add_note(error: BaseException, note: str) -> None:
    """Say more with an error that is on its way. Before Python 3.11, as a warning."""
    if hasattr(error, "add_note"):
        error.add_note(f"sharded_avg: {note}")
    else:
        warnings.warn(note, stacklevel=3)
