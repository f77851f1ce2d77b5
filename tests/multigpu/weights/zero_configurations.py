"""DeepSpeed configurations, trained for real, and what came of each: the tables of docs/deepspeed.md.

    python -m tests.multigpu.weights.zero_configurations      trains all of them and writes both tables anew

The reference uses nothing of this package: full masters as DeepSpeed hands them out (tensor-parallel parts joined by
hand), averaged as full tensors after each step that DeepSpeed says it made.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict
from sharded_avg.errors import UnsupportedModelError
from tests.helpers.pool import ROOT, close_all, run_on_ranks
from tests.helpers.zero_engines import assert_same, engine_of, evaluate, groups_kept, loss_of
from tests.helpers.zero_files import offloading_to_files

FOLDER, PAGE = ROOT / "examples" / "deepspeed", ROOT / "docs" / "deepspeed.md"
EQUAL, NOT_HERE = "bit-equal", "DeepSpeed cannot run it on these CPUs"
_BF16 = {"bf16": {"enabled": True}}
_ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}


def _zero(stage: int, dtype: dict[str, Any] = _BF16, **more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 2, **_ADAMW, **dtype, "zero_optimization": {"stage": stage, **more}}


def _files() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


_FORCED = {"zero_force_ds_cpu_optimizer": False}
NVME_PATH = "/local_nvme"  # a test's own folder in its place
_NVME = {"device": "nvme", "nvme_path": NVME_PATH}
_SMALL = {"aio": {"block_size": 80}}  # sub-groups of less stay in memory
# What is in files, and variations of it: name -> configuration.
CONFIGURATIONS: dict[str, dict[str, Any]] = _files() | {
    "stage 0, fp32": _zero(0, {}),
    "stage 0, bf16": _zero(0),
    "stage 1, fp32": _zero(1, {}),
    "stage 1, bf16": _zero(1),
    "stage 2, fp32": _zero(2, {}),
    "stage 2, `overlap_comm`, small buckets": _zero(2, overlap_comm=True, reduce_bucket_size=50),
    "stage 1, `round_robin_gradients`": _zero(1, round_robin_gradients=True),
    "stage 2, `round_robin_gradients`": _zero(2, round_robin_gradients=True),
    "stage 2, optimizer offloaded to the CPU": _zero(2, offload_optimizer={"device": "cpu"}) | _FORCED,
    "stage 3, fp32": _zero(3, {}),
    "stage 3, bf16": _zero(3),
    "stage 3, nothing persistent": _zero(3, stage3_param_persistence_threshold=0),
    "stage 3, sub-groups of 20 elements": _zero(3, sub_group_size=20),
    "stage 3, fp16": _zero(3, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    "stage 0, AutoTP": _zero(0) | {"tensor_parallel": _files()["autotp.json"]["tensor_parallel"]},
    "stage 3, AutoTP": _zero(3) | {"tensor_parallel": _files()["autotp.json"]["tensor_parallel"]},
    "stage 2, a warm-up schedule": _zero(2)
    | {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_num_steps": 3}}},
    "stage 3, optimizer offloaded to NVMe": _zero(3, offload_optimizer=_NVME) | _FORCED | _SMALL,
    "stage 3, the same, sub-groups of 20 elements, pipelined": _zero(
        3,
        sub_group_size=20,
        offload_optimizer=_NVME | {"pipeline_read": True, "pipeline_write": True, "buffer_count": 8},
    )
    | _FORCED
    | _SMALL,
    "stage 3, parameters offloaded to NVMe, which `max_in_cpu` has room for": _zero(
        3, offload_optimizer=_NVME, offload_param=_NVME | {"buffer_size": 1000}
    )
    | _FORCED
    | _SMALL,
    "stage 3, parameters offloaded to NVMe": _zero(3, offload_param=_NVME | {"buffer_size": 1000, "max_in_cpu": 0})
    | _FORCED
    | _SMALL,
}


class Low(nn.Module):
    """A frozen layer and its adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(width, 3, bias=False), nn.Linear(3, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


class Block(nn.Module):
    """What AutoTP cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Odd sizes, tied weights, one element."""

    def __init__(self, lora: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.block = Block()
        self.low = Low(5) if lora else nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor([0.75]))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight
        if lora:
            for name, param in self.named_parameters():
                param.requires_grad_("lora" in name)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.low(self.table(tokens))
        return self.head(x + self.block(x) * self.scale)


@contextmanager
def _engine(name: str, config: dict[str, Any]) -> Iterator[Any]:
    import deepspeed

    torch.manual_seed(5)
    with ExitStack() as stack:
        if "fp16" in config:  # DeepSpeed says that CPUs have no fp16; torch's do
            accelerator = type(deepspeed.get_accelerator())
            stack.enter_context(mock.patch.object(accelerator, "is_fp16_supported", return_value=True))
        stack.enter_context(groups_kept())
        stack.enter_context(offloading_to_files())
        yield stack.enter_context(engine_of(copy.deepcopy(config), Net(lora="lora" in name)))


def _masters(engine: Any) -> dict[str, Tensor]:
    """Collective. Full fp32 masters of what is trained."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            whole = param.detach() if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(param)
            found[name] = whole.clone()
    if engine.zero_optimization_stage() == 0 and hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        master_of = {id(low): high for group in pairs for low, high in zip(*group, strict=True)}
        params = engine.module.named_parameters()
        found = {name: master_of[id(p)].detach().clone() for name, p in params if p.requires_grad}
    if getattr(engine.optimizer, "round_robin_gradients", False):  # what DeepSpeed hands out is wrong there
        found = _reordered(engine)
    if engine.mp_world_size > 1:
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
        for name, dim in (("block.up.weight", 0), ("block.up.bias", 0), ("block.down.weight", 1)):
            found[name] = torch.cat([part[name] for part in ranks[:2]], dim)
    return found


def _reordered(engine: Any) -> dict[str, Tensor]:
    """Collective. Full masters, out of all ranks' partitions, in the order in which DeepSpeed laid parameters down."""
    name_of, found = {id(param): name for name, param in engine.module.named_parameters()}, {}
    optimizer = engine.optimizer
    for params, part in zip(optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach())
        values = torch.cat(parts)
        for param in params:
            found[name_of[id(param)]], values = values[: param.numel()].view(param.shape), values[param.numel() :]
    return found


def _loss(engine: Any, micro: int) -> Tensor:
    part = dist.get_rank() // engine.mp_world_size
    tokens = torch.randint(0, 7, (2, 3), generator=torch.Generator().manual_seed(10 * micro + part))
    loss = loss_of(engine(tokens))
    return loss * 1e30 if micro == 2 and engine.fp16_enabled() else loss  # an overflow, so that a step is skipped


def outcome(name: str, config: dict[str, Any], folder: Path) -> str:
    """Collective. "bit-equal", or why not; raises AssertionError for numbers that are not."""
    try:
        placed = json.loads(json.dumps(config).replace(NVME_PATH, str(folder)))
        with _engine(name, placed) as engine:
            try:
                average = ShardedAverage(engine, EMA(decay=0.5))
            except UnsupportedModelError as error:
                return f"refused: {str(error).partition('engine: ')[2].partition(';')[0]}"
            _check(engine, average, name, folder / "average")
            return EQUAL
    except (ImportError, AssertionError, RuntimeError, ValueError) as error:
        if error.__traceback__ is None or not _is_deepspeeds(error):
            raise
        return f"{NOT_HERE}: {type(error).__name__}: {(str(error).strip() or 'without a word').splitlines()[0][:80]}"


def _is_deepspeeds(error: BaseException) -> bool:
    trace, last = error.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return f"{ROOT}/tests" not in last and f"{ROOT}/sharded_avg" not in last


def _check(engine: Any, average: ShardedAverage, name: str, folder: Path) -> None:
    slow: dict[str, Tensor] = {}
    before, num_steps = _masters(engine), 0
    accumulates = engine.gradient_accumulation_steps()
    for micro in range(2 * accumulates if accumulates > 1 else 4):
        engine.train()
        engine.backward(_loss(engine, micro))
        engine.step()
        live = _masters(engine)
        moved = any(not torch.equal(live[key], before[key]) for key in live)
        skips = micro == 2 and engine.fp16_enabled()
        assert average.update() == moved == (micro % accumulates == accumulates - 1 and not skips), micro
        assert not average.update()
        if moved:
            num_steps += 1
            slow = {key: torch.lerp(slow.get(key, value), value, 0.5) for key, value in live.items()}
        before = live
    assert average.num_steps == num_steps > 1
    assert engine.skipped_steps == int(engine.fp16_enabled())
    raw = evaluate(engine)
    with average.swapped():
        assert not torch.equal(evaluate(engine), raw)
    assert torch.equal(evaluate(engine), raw)
    now = _masters(engine)
    assert_same(now, before)
    with average.summon_full_params(rank0_only=False) as full:
        assert list(full) == list(Net(lora="lora" in name).state_dict())
        assert all(torch.equal(full[key], value) for key, value in slow.items())
    average.save(folder)
    saved = load_averaged_state_dict(folder)
    assert all(torch.equal(saved[key], value) for key, value in slow.items())
    if "lora" in name:  # adapters only
        assert sorted(saved) == ["low.lora_a.weight", "low.lora_b.weight"]


def run_here(names: list[str], tmp_path: Path) -> dict[str, str]:
    """On a rank: what came of each."""
    return {name: outcome(name, CONFIGURATIONS[name], tmp_path / str(number)) for number, name in enumerate(names)}


# --- the tables ----------------------------------------------------------------------------------------------------


def table_of_outcomes(outcomes: dict[str, str]) -> str:
    """Markdown."""
    rows = []
    for name, what in outcomes.items():
        shown = f"`examples/deepspeed/{name}`" if name.endswith(".json") else name
        rows.append(f"| {shown} | {what} |")
    return "\n".join(["| configuration | outcome |", "|---|---|", *rows])


def table_of_refusals() -> str:
    """Markdown, of what `refuse` asks an engine for."""
    from sharded_avg.weights.layouts.zero.engine import _REFUSALS

    rows = [f"| {refusal.reason} | {refusal.remedy} | {refusal.read_in} |" for refusal in _REFUSALS]
    return "\n".join(["| refused, because | instead | read in DeepSpeed |", "|---|---|---|", *rows])


def between(marker: str, text: str | None = None) -> str:
    """What the page has between a pair of markers; with `text`, put in its place."""
    begin, end = f"<!-- {marker} -->\n", f"\n<!-- end of {marker} -->"
    page = PAGE.read_text()
    start = page.index(begin) + len(begin)
    stop = page.index(end)
    if text is not None:
        PAGE.write_text(page[:start] + text + page[stop:])
    return page[start:stop]


def outcomes_on_the_page() -> dict[str, str]:
    """By configuration, what the page says."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", between("outcomes"), re.MULTILINE)[1:]
    return {re.sub(r"^`examples/deepspeed/(.+)`$", r"\1", name): what for name, what in rows}


def main() -> None:
    """Train all, and write the tables."""
    import tempfile

    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGURATIONS:
            (path := Path(folder) / str(len(outcomes))).mkdir()
            outcomes |= run_on_ranks(2, run_here, kind="deepspeed", names=[name], tmp_path=path)[0]
            print(f"{name}: {outcomes[name]}", file=sys.stderr, flush=True)
    close_all()
    between("outcomes", table_of_outcomes(outcomes))
    between("refusals", table_of_refusals())


if __name__ == "__main__":
    from tests.multigpu.weights import zero_configurations  # by the name under which ranks know it

    zero_configurations.main()
