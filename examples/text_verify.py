"""Reads what text_fsdp2.py exported, as a stranger would: one process, plain PyTorch, nothing sharded.

    python examples/text_verify.py runs/demo

Builds the plain model, loads `averaged.pt` strictly, and computes the validation loss that the training ranks measured
while their average was swapped in. Exits with 1 if it is another. Where the folder that `average.save` wrote is still
beside that file, it must hold the same bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from text.data import split, validation_batches
from text.evaluation import validation_loss
from text.model import GPT, Shape

# Equal weights give equal bits on one machine; another may add up matrix products in another order. Wrong weights are
# off by far more: the raw ones by 0.08.
TOLERANCE = 1e-6  # nats per byte


def main() -> None:
    """Compare; say how it went."""
    folder = Path(sys.argv[1])
    result = json.loads((folder / "result.json").read_text())
    torch.set_num_threads(result["num_threads"])

    shape = Shape(**result["shape"])
    model = GPT(shape)
    weights = torch.load(folder / "averaged.pt", weights_only=True)
    model.load_state_dict(weights, strict=True)
    _, text = split()
    batches = validation_batches(text, shape.context, result["batch_size"], result["num_batches"])
    found, expected = validation_loss(model, batches), result["averaged"]

    alone = "no process group" if not dist.is_initialized() else "INSIDE A PROCESS GROUP"
    print(f"fresh process, {alone}: averaged validation loss {found!r}, training measured {expected!r}")
    if dist.is_initialized() or not abs(found - expected) <= TOLERANCE:
        sys.exit(f"NOT REPRODUCED: off by {found - expected:.3g}, allowed are {TOLERANCE:g} nats per byte")
    print("reproduced, " + ("to the bit" if found == expected else f"off by {abs(found - expected):.1g}"))
    if (folder / "average").exists():
        compare(folder / "average", weights)


def compare(saved: Path, weights: dict[str, torch.Tensor]) -> None:
    """Exit unless the saved shards hold the same bits as the exported file."""
    from sharded_avg import load_averaged_state_dict  # only here: a stranger needs nothing but torch

    averaged = load_averaged_state_dict(saved)
    other = [name for name in weights if name not in averaged or not torch.equal(averaged[name], weights[name])]
    if other:
        sys.exit(f"NOT REPRODUCED: {saved} and averaged.pt differ in {', '.join(other)}")
    print(f"{saved} holds the same bits")


if __name__ == "__main__":
    main()
