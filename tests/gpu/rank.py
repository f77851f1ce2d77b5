"""`python -m tests.gpu.rank FOLDER DEVICE RANK`: one of two ranks that share a device, over gloo.

For each engine it writes a line into FOLDER: the engine's name, a tab, and why it failed, or nothing.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .checks.engines import ENGINES, PAIRED, is_missing
from .devices import chosen
from .engines import done, prove

TIMEOUT = timedelta(seconds=30)


def main(folder: str, device_name: str, rank: str) -> int:
    """Stops at the first failure of one rank alone: the other one is somewhere else then."""
    device = chosen(device_name)
    os.environ.update(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2, timeout=TIMEOUT)
    with Path(folder, f"rank{rank}.said").open("w") as said:
        for name in PAIRED:
            why = _why_not(name, device)
            said.write(f"{name}\t{why}\n")
            said.flush()
            if why and not is_missing(why):
                return 1
            done(device)
    return 0


def _why_not(name: str, device: torch.device) -> str:
    try:
        prove(ENGINES[name], device)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0].replace("\t", " ")
    return ""


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
