"""Which warnings of third parties are no errors in tests: each for the versions that give it, and with its reason.

pyproject.toml makes every warning an error. tests/conftest.py adds the lines of what is installed. Ranks of pools, and
processes that strategies spawn, have no conftest: they ask `settings_of_a_child`. Nothing here imports torch.

tests/unit/test_third_party.py holds every entry to the installed sources: within its span the message is in the file
where it says, outside of it is not.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import NamedTuple

import pytest

_DISTRIBUTIONS = {"lightning": ("lightning", "pytorch-lightning")}  # one code under two names


class Excepted(NamedTuple):
    """One warning; `first` and `last` are the releases of `package`, both included, that give it."""

    package: str
    first: str  # the oldest supported one stands for all before, too
    last: str | None  # None: the newest still does
    filter: str  # as pytest's filterwarnings has it
    said_in: str  # the file whose string it is
    reason: str
    sign: str = ""  # what to look for in that file, if the message is not in it


_FSDP = "torch/distributed/fsdp/"
EXCEPTED = (
    Excepted(
        "torch",
        "2.10",
        None,
        r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
        "torch/jit/_script.py",
        "torch's inductor modules script functions; DeepSpeed imports them",
    ),
    Excepted(
        "torch",
        "2.13",
        "2.14",
        r"ignore:`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated:FutureWarning",
        "torch/distributed/distributed_c10d.py",
        "DeepSpeed and FSDP1 call the collectives by these names; torch 2.15 took the deprecation back",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        "ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning",
        f"{_FSDP}_init_utils.py",
        "deprecated, and still supported by us",
    ),
    Excepted(
        "torch",
        "2.10",
        None,
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
        "torch/utils/_pytree.py",
        "Lightning's loaders ask so",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        "ignore:.* has both parameters with requires_grad=True and False:UserWarning",
        f"{_FSDP}_wrap_utils.py",
        "FSDP1 advises against such units, and shards them",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        "ignore:Both mixed precision and an auto_wrap_policy were specified:UserWarning",
        f"{_FSDP}_wrap_utils.py",
        "FSDP1 gives BatchNorm a unit of its own and says so",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        r"ignore:FSDP\.state_dict_type\(\) and .* are being deprecated:FutureWarning",
        f"{_FSDP}fully_sharded_data_parallel.py",
        "Lightning's FSDPStrategy saves by them",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        "ignore:Please use DTensor instead and we are deprecating ShardedTensor:FutureWarning",
        "torch/distributed/_shard/_utils.py",
        "what FSDP1 saves for Lightning's FSDPStrategy",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        "ignore:`_get_pg_default_device` will be deprecated:UserWarning",
        "torch/distributed/distributed_c10d.py",
        "FSDP1 calls it where it saves and loads ShardedTensors",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        "ignore:Multiple backends are registered with this ProcessGroup:UserWarning",
        "torch/distributed/distributed_c10d.py",
        "the same call, of one backend's two devices",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        r"ignore:`load_state_dict` is deprecated and will be removed:FutureWarning:torch\.distributed",
        "torch/distributed/checkpoint/state_dict_loader.py",
        "DCP's own loader of FSDP1's optimizers calls it",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        r"ignore:Detected an existing checkpoint in:UserWarning:torch\.distributed",
        "torch/distributed/checkpoint/filesystem.py",
        "ModelCheckpoint writes last.ckpt anew in every epoch",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        r"ignore:.* should not be instantiated\. Methods on autograd functions:DeprecationWarning",
        "torch/autograd/function.py",
        "dynamo does so in what it traces",
    ),
    Excepted(
        "torch",
        "2.8",
        "2.10",
        r"ignore:TypedStorage is deprecated:UserWarning:torch\.distributed\.checkpoint",
        "torch/distributed/checkpoint/filesystem.py",
        "the writer of DCP folders asks for the size of one",
        sign="tensor.storage().size()",
    ),
    Excepted(
        "torch",
        "2.8",
        "2.9",
        "ignore:Deallocating Tensor that still has live PyObject references:UserWarning",
        "torch/lib/libtorch_python.so",
        "said of weak references, where FSDP1's units are copied",
        sign="Deallocating Tensor that still has live PyObject references",
    ),
    Excepted(
        "torch",
        "2.8",
        None,
        r"ignore:Guards may run slower on Python 3\.13\.0:RuntimeWarning",
        "torch/_dynamo/guards.py",
        "dynamo advises a newer Python, on 3.13.0 only",
    ),
    Excepted(
        "torch",
        "2.13",
        None,
        "ignore:'_UnionGenericAlias' is deprecated:DeprecationWarning",
        "torch/_dynamo/variables/builder.py",
        "dynamo asks whether something is one, which Python 3.14 deprecates",
        sign="_UnionGenericAlias",
    ),
    Excepted(
        "lightning",
        "2.6",
        None,
        "ignore:.*does not have many workers:UserWarning",
        "lightning/pytorch/trainer/connectors/data_connector.py",
        "Lightning advises more, on machines with more than two cores",
    ),
    Excepted(
        "lightning",
        "2.6",
        None,
        "ignore:GPU available but not used:UserWarning",
        "lightning/pytorch/trainer/setup.py",
        "these tests run on CPUs, also where there is a GPU",
    ),
    Excepted(
        "lightning",
        "2.6",
        None,
        r"ignore:When saving the DeepSpeed Stage 3 checkpoint:UserWarning:(pytorch_)?lightning\.",
        "lightning/pytorch/strategies/deepspeed.py",
        "Lightning says how to consolidate the folder",
    ),
    Excepted(
        "deepspeed",
        "0.16.9",
        "0.17.0",
        "ignore:Accessing the 'model_fields' attribute on the instance:DeprecationWarning",
        "deepspeed/runtime/config_utils.py",
        "pydantic says so since 2.11, of every part of every configuration",
        sign="self.model_fields\n",
    ),
)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) of 2.13.0+cpu, and of a nightly of it."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def is_within(version: str, first: str, last: str | None) -> bool:
    """Both included: 2.14.1 is within a span that ends with 2.14."""
    found = release(version)
    return release(first) <= found and (last is None or found[: len(release(last))] <= release(last))


def installed(package: str) -> str | None:
    """Its version, by metadata; None if it is not there."""
    for name in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def filters() -> list[str]:
    """The lines for what is installed."""
    versions = {package: installed(package) for package in {excepted.package for excepted in EXCEPTED}}
    found = []
    for excepted in EXCEPTED:
        version = versions[excepted.package]
        if version is not None and is_within(version, excepted.first, excepted.last):
            found.append(excepted.filter)
    return found


def add_to(config: pytest.Config) -> None:
    """Put the lines at the end of filterwarnings, unless they are there."""
    there = config.getini("filterwarnings")
    for line in filters():
        if line not in there:
            config.addinivalue_line("filterwarnings", line)


def settings_of_a_child() -> pytest.Config:
    """pytest's settings, in a process that pytest has not started: no conftest is read, these lines are there."""
    from _pytest.config import _prepareconfig

    config = _prepareconfig(["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"])
    add_to(config)
    return config
