"""Which rule helps, and when: one small GPT, every rule at once, constant and decayed learning rates, several seeds.

    python examples/which_rule.py             # 5 seeds, 1200 steps: minutes on one core
    python examples/which_rule.py --jobs 8    # eight runs at a time

Averages cost a training run nothing but memory, so each run keeps all of them and evaluates each at its end. The table
has the validation loss of the raw weights, and by how much each average is below it (mean over the seeds, and range).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from math import cos, pi
from statistics import mean

import torch
from text.data import random_batches, split, validation_batches
from text.evaluation import validation_loss
from text.model import GPT, Shape

from sharded_avg import EMA, LAWA, SWA, CosineMerge, PolynomialAverage, PowerAverage, Schedule, ShardedAverage

BATCH_SIZE, LEARNING_RATE = 16, 3e-3
LAST = 0.75  # of the training: where averages of the last part begin
RATES: dict[str, Callable[[float], float]] = {  # factor of the learning rate, by the share of training that is done
    "constant": lambda done: 1.0,
    "cosine to 0": lambda done: 0.5 * (1 + cos(pi * done)),
    "constant, then 1 - sqrt over the last quarter": lambda done: 1 - max(0.0, (done - LAST) / (1 - LAST)) ** 0.5,
}
SMALL = Shape(context=32, width=32, num_layers=2, num_heads=2)
TINY = Shape(context=16, width=16, num_layers=1, num_heads=2)


def whole_run(steps: int) -> dict[str, object]:
    """Rules that begin with the training."""
    return {
        "EMA(decay=0@98, warmup=True)": EMA(decay=0.98, warmup=True),
        f"EMA@from_half_life({steps // 20})": EMA.from_half_life(steps / 20, warmup=True),
        "PowerAverage@from_sigma_rel(0@05)": PowerAverage.from_sigma_rel(0.05),
        "PowerAverage@from_sigma_rel(0@10)": PowerAverage.from_sigma_rel(0.10),
        "PowerAverage@from_sigma_rel(0@20)": PowerAverage.from_sigma_rel(0.20),
        f"LAWA(last=5, every={max(1, steps // 20)})": LAWA(last=5, every=max(1, steps // 20)),
        "SWA() of the whole run": SWA(),
    }


def last_part(steps: int) -> dict[str, object]:
    """Rules that begin when three quarters are done."""
    return {
        "SWA(), last quarter": SWA(),
        "PolynomialAverage(1), last quarter": PolynomialAverage(1),
        "PowerAverage@merge_1_sqrt(), last quarter": PowerAverage.merge_1_sqrt(),
        "CosineMerge, last quarter": CosineMerge(steps * (1 - LAST) + 1),
    }


def run(rate: str, seed: int, steps: int, tiny: bool) -> dict[str, float]:
    """Train once; the validation loss of the raw weights, and of each average."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    shape = TINY if tiny else SMALL
    model, (text, held_out) = GPT(shape), split()
    batches = random_batches(text, shape.context, BATCH_SIZE, seed=seed, rank=0)
    validation = validation_batches(held_out, shape.context, 64, 4 if tiny else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: RATES[rate](step / steps))
    averages = [
        ShardedAverage(model, whole_run(steps)),
        ShardedAverage(model, last_part(steps), schedule=Schedule.from_share(LAST, total_steps=steps)),
    ]
    for _ in range(steps):
        model(next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for average in averages:
            average.update()
    losses = {"raw": validation_loss(model, validation)}
    for average in averages:
        for name in average.names:
            with average.swapped(name):
                losses[name.replace("@", ".")] = validation_loss(model, validation)
    return losses


def table(rate: str, runs: list[dict[str, float]]) -> str:
    """One learning rate: the loss of the raw weights, and what each average takes off it."""
    raw = [losses["raw"] for losses in runs]
    lines = [f"learning rate: {rate}", f"    raw weights: {mean(raw):.4f} ({min(raw):.4f} to {max(raw):.4f})"]
    for name in runs[0]:
        if name != "raw":
            off = [losses[name] - losses["raw"] for losses in runs]
            lines.append(f"    {name:45} {mean(off):+.4f} ({min(off):+.4f} to {max(off):+.4f})")
    return "\n".join(lines)


def main() -> None:
    """All runs, some at a time; then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--tiny", action="store_true", help="a toy model and little validation text, for tests")
    args = parser.parse_args()
    todo = list(product(RATES, range(args.seeds)))
    with ProcessPoolExecutor(args.jobs) as pool:
        found = list(pool.map(run, *zip(*todo, strict=True), [args.steps] * len(todo), [args.tiny] * len(todo)))
    print(
        f"{args.steps} steps, {args.seeds} seeds; validation loss in nats per byte, and differences to the raw weights'"
    )
    for rate in RATES:
        print("\n" + table(rate, [losses for (of, _), losses in zip(todo, found, strict=True) if of == rate]))


if __name__ == "__main__":
    main()
