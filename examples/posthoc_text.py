"""Train once, and choose the horizon of the average afterwards: validation loss over sigma_rel, without a second run.

    torchrun --standalone --nproc_per_node=2 examples/posthoc_text.py

Two processes on CPUs take about a minute. While a small GPT learns English under FSDP2, two power averages are kept and
saved now and then (POSTHOC, below). Afterwards each other width is mixed out of these saves, on the shards: each rank
reads its own pieces only (Karras et al., "EDM2", 2023, arXiv 2312.02696, algorithm 3). The best one is written to one
file. A third average is kept as well, which is not saved: what is mixed for its width must have its loss.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from text.data import random_batches, split, validation_batches
from text.engines import with_adamw
from text.evaluation import validation_loss
from text.model import GPT, Shape
from text.report import progress
from torch.distributed.fsdp import fully_shard

from sharded_avg import PowerAverage, ShardedAverage, Snapshots
from sharded_avg.ranks import leave
from sharded_avg.version import how_to_install

SHAPE = Shape(context=32, width=32, num_layers=2, num_heads=2)
LEARNING_RATE, BATCH_SIZE = 3e-3, 8  # windows on each rank
SAVED, CHECKED = {"narrow": 0.02, "wide": 0.10}, 0.05  # sigma_rel
NUM_SAVES = 16
SWEEP = (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15)


@dataclass(frozen=True)
class Point:
    """One width: the validation loss of its average, and how far its profile is from the one that was wanted."""

    sigma_rel: float
    loss: float
    error: float


def train(args: argparse.Namespace) -> None:
    """Collective. Train, search, export."""
    rank = dist.get_rank()
    text, held_out = split()
    batches = random_batches(text, SHAPE.context, BATCH_SIZE, seed=args.seed, rank=rank)
    validation = validation_batches(held_out, SHAPE.context, 64, 4 if args.tiny else None)
    torch.manual_seed(args.seed)
    model = GPT(SHAPE)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    training = with_adamw(model, LEARNING_RATE)

    averages = ShardedAverage(model, {name: PowerAverage.from_sigma_rel(width) for name, width in SAVED.items()})
    checked = ShardedAverage(model, PowerAverage.from_sigma_rel(CHECKED))
    with Snapshots(averages, args.out / "snapshots", max(1, args.steps // NUM_SAVES)) as snapshots:  # POSTHOC: saved
        for _ in progress(args.steps, show=rank == 0):
            training.learn(model(next(batches)))
            averages.update()
            checked.update()
            snapshots.update()

    raw = validation_loss(model, validation)
    with checked.swapped():
        kept = validation_loss(model, validation)
    points = []
    for sigma_rel in SWEEP:
        mixed = averages.load_posthoc(args.out / "snapshots", sigma_rel=sigma_rel, name="wide")  # POSTHOC: mixed
        with averages.swapped("wide"):
            points.append(Point(sigma_rel, validation_loss(model, validation), mixed.error))
    best = min(points, key=lambda point: point.loss)
    averages.load_posthoc(args.out / "snapshots", sigma_rel=best.sigma_rel, name="wide")
    with averages.summon_full_params("wide") as full:
        if rank == 0:
            torch.save(full, args.out / "best.pt")
            show(args, points, best, raw, kept)


def show(args: argparse.Namespace, points: list[Point], best: Point, raw: float, kept: float) -> None:
    """The table and the picture."""
    print(f"\nvalidation loss after {args.steps} steps, nats per byte; raw weights {raw:.4f}")
    print(f"{'sigma_rel':>12}{'loss':>10}{'profile off by':>18}")
    for point in points:
        print(f"{point.sigma_rel:12.3f}{point.loss:10.4f}{100 * point.error:16.2f} %{'  best' * (point is best)}")
    mixed = next(point.loss for point in points if point.sigma_rel == CHECKED)
    print(f"the average that was kept at {CHECKED}: {kept:.4f}; mixed out of the saves: {mixed:.4f}")
    print(f"written: {args.out / 'best.pt'}, sigma_rel {best.sigma_rel}")
    print(plot(args, points, best, raw, kept))


def plot(args: argparse.Namespace, points: list[Point], best: Point, raw: float, kept: float) -> str:
    """Loss over width, where matplotlib is installed; what was done, in words."""
    try:
        import matplotlib
    except ImportError:
        return f"no picture: {how_to_install('matplotlib')}"
    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(raw, color="grey", linestyle="--", label="raw weights")
    axes.plot([p.sigma_rel for p in points], [p.loss for p in points], marker="o", label="mixed after training")
    axes.plot([CHECKED], [kept], marker="x", markersize=12, linestyle="", color="black", label="kept in training")
    axes.plot([best.sigma_rel], [best.loss], marker="*", markersize=14, linestyle="", label="best")
    for width in SAVED.values():
        axes.axvline(width, color="lightgrey", zorder=0)
    saved = " and ".join(f"{width:.2f}" for width in SAVED.values())
    title = f"{args.steps} steps, trained once; saved {NUM_SAVES} times: sigma_rel {saved}"
    axes.set(title=title, xlabel="sigma_rel", ylabel="validation loss (nats per byte)")
    axes.legend()
    path = args.out / "sigma_rel.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return f"picture: {path}"


def main() -> None:
    """Run as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/posthoc"), help="folder for what the run writes")
    parser.add_argument("--tiny", action="store_true", help="little validation text, for tests")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with: torchrun --standalone --nproc_per_node=2 examples/posthoc_text.py")
    dist.init_process_group("gloo")
    train(args)
    leave()


if __name__ == "__main__":
    main()
