r"""A plain DeepSpeed script: real text, a JSON configuration, and an average that is evaluated, saved and exported.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/deepspeed_text.py
    torchrun --standalone --nproc_per_node=2 examples/deepspeed_text.py --config examples/deepspeed/stage3_hpz.json

Look for AVERAGE below. A run goes on with more ranks after DeepSpeed's own converter; the average needs none:

    python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state \
        --input_folder runs/deepspeed/checkpoint/last --output_folder runs/deepspeed/checkpoint/universal
    torchrun --standalone --nproc_per_node=3 examples/deepspeed_text.py --resume --steps 50
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from text.data import random_batches, split, validation_batches
from text.engines import import_deepspeed
from text.evaluation import validation_loss
from text.model import GPT, Shape
from text.report import Clock
from torch import Tensor

from sharded_avg import EMA, ShardedAverage
from sharded_avg.ranks import leave

CONFIGURATIONS = Path(__file__).with_name("deepspeed")
TINY = Shape(context=32, width=24, num_layers=2, num_heads=2)
UNIVERSAL = "universal"


def initialized(model: torch.nn.Module, config: dict[str, Any]) -> Any:
    """Collective. The engine of a configuration."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo")
    trained = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    return engine


def train(engine: Any, average: ShardedAverage, batches: Iterator[Tensor], num_steps: int, clock: Clock) -> None:
    """Collective. Until the average has seen so many optimizer steps, whatever that takes of micro-batches."""
    last = average.num_steps + num_steps
    while average.num_steps < last:
        with clock.time("micro-batch"):
            engine.backward(engine(next(batches)))
            engine.step()
        with clock.time("update"):
            average.update()  # AVERAGE: False inside accumulation and after an overflow, so nothing to think about


def save(engine: Any, average: ShardedAverage, out: Path) -> None:
    """Collective. Checkpoint and average side by side; then the average as files for everybody else."""
    engine.save_checkpoint(str(out / "checkpoint"), tag="last")
    average.save(out / "average")  # AVERAGE: any engine at any world size loads it

    with average.summon_full_params() as full:  # AVERAGE: fp32, under the plain model's own keys
        if dist.get_rank() == 0:
            torch.save(full, out / "averaged.pt")
    with average.swapped():  # AVERAGE: the dtype of training, by DeepSpeed's own means
        engine.save_16bit_model(str(out), "averaged_16bit.bin")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGURATIONS / "accumulation.json", help="DeepSpeed's JSON")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of this run")
    parser.add_argument("--decay", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/deepspeed"))
    parser.add_argument("--resume", action="store_true", help=f"from OUT/checkpoint/{UNIVERSAL} and OUT/average")
    parser.add_argument("--tiny", action="store_true", help="a toy model and little validation text, for tests")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with a launcher, deepspeed or torchrun: the lines are at the top of this file")
    return args


def main() -> None:
    """Run as one rank."""
    args = parse()
    config = json.loads(args.config.read_text())
    if args.resume:
        config["checkpoint"] = {"load_universal": True}
    shape = TINY if args.tiny else Shape()
    torch.manual_seed(args.seed)  # the same first weights on every rank
    engine = initialized(GPT(shape), config)
    average = ShardedAverage(engine, EMA(decay=args.decay, warmup=True))  # AVERAGE: the engine, not the module
    if args.resume:
        engine.load_checkpoint(str(args.out / "checkpoint"), tag=UNIVERSAL)
        average.load(args.out / "average")

    text, held_out = split()
    part = dist.get_rank() // engine.mp_world_size  # tensor-parallel ranks see the same text
    batches = random_batches(
        text, shape.context, engine.train_micro_batch_size_per_gpu(), seed=args.seed + average.num_steps, rank=part
    )
    clock = Clock()
    train(engine, average, batches, args.steps, clock)

    validation = validation_batches(held_out, shape.context, 32, 4 if args.tiny else None)
    raw = validation_loss(engine, validation)
    with clock.time_ends("swap", average.swapped()):  # AVERAGE: the engine computes with it in here
        averaged = validation_loss(engine, validation)
    save(engine, average, args.out)
    if dist.get_rank() == 0:
        print(f"{args.config.stem}, {dist.get_world_size()} ranks, step {average.num_steps}")
        print(f"validation loss: raw {raw:.4f}, averaged {averaged:.4f} nats per byte")
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
        print(f"{average.nbytes / trained:.2f} bytes of average on rank 0 for each of {trained:,} parameters")
        micro, update, swap = (clock.median_s(part) for part in ("micro-batch", "update", "swap"))
        print(f"micro-batch {1000 * micro:.0f} ms; update {update / micro:.2%} of that, swap {swap / micro:.0%}")
    leave()


if __name__ == "__main__":
    main()
