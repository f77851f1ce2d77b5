"""A loop of one's own with Lightning Fabric, and beside it an average of the weights, divided among the ranks.

    python examples/fabric_loop.py
    python examples/fabric_loop.py --devices 2 --strategy ddp

It takes seconds. All that makes the average is what `ShardedAverage` is given, the module that `Fabric.setup` returned,
and one `update()` after each step of the optimizer. Fabric's other strategies change nothing of that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits.network import images_of
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict
from sharded_avg.ranks import leave


def network() -> nn.Module:
    """A plain model, which knows of no wrapper."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """On the validation images."""
    images, digits = images_of("validation").tensors
    return nn.functional.cross_entropy(model(images), digits).item()


def main(devices: int, strategy: str, out: Path) -> None:
    """Train, validate on both copies, save both, and deploy the average."""
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0)
    plain = network()
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3))
    batches = fabric.setup_dataloaders(DataLoader(images_of("train"), batch_size=32, shuffle=True))
    average = ShardedAverage(model, EMA(decay=0.98))

    for epoch in range(4):
        for images, digits in batches:
            fabric.backward(nn.functional.cross_entropy(model(images), digits))
            optimizer.step()
            optimizer.zero_grad()
            average.update()
        raw = loss_of(model)
        with average.swapped():  # the model computes with averaged weights in here
            averaged = loss_of(model)
        fabric.print(f"epoch {epoch}: raw loss {raw:.4f}, averaged loss {averaged:.4f}")
    print(f"rank {fabric.global_rank}: {average.nbytes} bytes kept", flush=True)

    fabric.save(out / "raw.ckpt", {"model": model, "optimizer": optimizer})
    average.save(out / "average")  # beside it, and on every rank: each writes the pieces that it has

    resumed = ShardedAverage(model, EMA(decay=0.98))
    resumed.load(out / "average")
    fabric.print(f"resumed after {resumed.num_steps} steps")
    if fabric.is_global_zero:
        deployed = network()
        deployed.load_state_dict(load_averaged_state_dict(out / "average"))
        print(f"deployed, without Fabric: loss {loss_of(deployed):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto", help="auto or ddp; others need GPUs")
    parser.add_argument("--out", type=Path, default=Path("runs/fabric_loop"))
    arguments = parser.parse_args()
    main(arguments.devices, arguments.strategy, arguments.out)
    leave()
