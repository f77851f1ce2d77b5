"""Where ranks wait for each other: every line of it can hang, so it is written once, here.

    bounds      how long one rank waits for another
    groups      who is in it: ranks, devices, the end of a job
    interrupts  Ctrl-C while ranks talk to each other
    meeting     all ranks come to one point, in the job's store, and one answer is for all of them
    traffic     values on their way from rank to rank
    together    what else a collective method is made of: local parts that all ranks go through or none, and decisions

A collective method is one shape. Each local part, and what it asks for, is inside of `all_or_none`; values travel
inside of `traffic`; rank 0's decisions are made by `decided`. docs/design.md tells what follows from that.
"""

from .groups import (
    accelerator,
    comm_device,
    everyone,
    leave,
    part_group,
    rank_in,
    size_of,
)
from .interrupts import collective, interruptible, uninterrupted
from .meeting import Asked, agree, claim_once
from .together import all_or_none, attempted, decided, gather_objects, rendezvous
from .traffic import Traffic, traffic

__all__ = [
    "Asked",
    "Traffic",
    "accelerator",
    "agree",
    "all_or_none",
    "attempted",
    "claim_once",
    "collective",
    "comm_device",
    "decided",
    "everyone",
    "gather_objects",
    "interruptible",
    "leave",
    "part_group",
    "rank_in",
    "rendezvous",
    "size_of",
    "traffic",
    "uninterrupted",
]
