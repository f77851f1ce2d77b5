"""`python -m tests.gpu.rank FOLDER DEVICE ENGINE PART RANK`: one of two ranks that share a device, over gloo.

PART is "proof", or "control": a training of the same engine in which sharded_avg is not even imported. Ends with 0, or
leaves in FOLDER why not.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .devices import chosen
from .engines import ENGINES, STEPS, Make, done

TIMEOUT = timedelta(seconds=30)


def main(folder: str, device_name: str, engine: str, part: str, rank: str) -> int:
    """Join the other one, and do one part."""
    device = chosen(device_name)
    os.environ.update(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", 2)
    try:
        dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2, timeout=TIMEOUT)
        _PARTS[part](ENGINES[engine], device)
        done(device)
    except Exception as error:
        traceback.print_exc()
        Path(folder, f"rank{rank}.why").write_text(f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


def _prove(make: Make, device: torch.device) -> None:
    from .proof import prove

    prove(make, device)


def _control(make: Make, device: torch.device) -> None:
    """What a proof asks of an engine that it has no average of."""
    engine = make(device)
    for step in range(STEPS):
        engine.learn(step)
        engine.full()
        engine.working()
        engine.evaluate()
    engine.close()
    assert "sharded_avg" not in sys.modules, "a control must do without"


_PARTS = {"proof": _prove, "control": _control}


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
