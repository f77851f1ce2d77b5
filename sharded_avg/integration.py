"""What integrations use beside the public names of the package: one list, with nothing of its own.

An integration knows one trainer (lightning/ knows Lightning) and imports from `sharded_avg` itself and from here, which
tests/unit/test_architecture.py holds it to: so it can be read what a change inside of a room may break.

    ranks     waiting for each other, and failing together, where a trainer's ranks may be anywhere
    names     keys of a wrapped model's `state_dict()` as the user's own module has them
    steps     whether optimizers of torch made a step
    zero      what DeepSpeed's engine says of itself before there is an average to ask
    settings  what a callback passes on, checked when it is built
    versions  whether a trainer is too old, and what to ask an installer for
    saved     whether a folder and a checkpoint are of one save; averages that lie in a trainer's own file
"""

from .averages.arguments import as_buffers, as_dtype, as_rules
from .averages.store import AverageDtype
from .formats.importers import find_importer
from .ranks import all_or_none, everyone, gather_objects, rank_in, rendezvous, size_of
from .rules.custom import AvgFn, MultiAvgFn
from .saved.folder.place import place_of
from .saved.manifest import Manifest
from .saved.opening import read_manifest
from .version import how_to_install, installed_version, is_too_old, requirement
from .weights.aside import RawWeights
from .weights.buffers import BufferPolicy
from .weights.layouts.zero.engine import steps_taken, writes_checkpoints
from .weights.names import clean
from .weights.steps import StepCount
from .weights.write import write_live

__all__ = [
    "AverageDtype",
    "AvgFn",
    "BufferPolicy",
    "Manifest",
    "MultiAvgFn",
    "RawWeights",
    "StepCount",
    "all_or_none",
    "as_buffers",
    "as_dtype",
    "as_rules",
    "clean",
    "everyone",
    "find_importer",
    "gather_objects",
    "how_to_install",
    "installed_version",
    "is_too_old",
    "place_of",
    "rank_in",
    "read_manifest",
    "rendezvous",
    "requirement",
    "size_of",
    "steps_taken",
    "write_live",
    "writes_checkpoints",
]
