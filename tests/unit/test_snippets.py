"""Every snippet of the README and the docs runs, as it stands there.

What is the reader's, as the pages say (`model`, `batches`, `loss_of`, ...), are the stand-ins of `reader`. A page's
blocks run in order, in one namespace and an empty folder of their own, as somebody would who reads it; where the page
takes up another model, it is a block after a heading. In a block called diff the lines run that are kept or added.
Blocks after `<!-- ranks -->` run on two ranks. Of lines for a shell, the commands are looked for.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sharded_avg
from sharded_avg import load_averaged_state_dict
from sharded_avg.commands.cli import COMMANDS, main
from tests.helpers.pool import on_ranks
from tests.unit.test_architecture import ROOT

PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
WRAPPINGS = "Every engine"  # of the README: each paragraph wraps a model of its own
FOR_LIGHTNING = "docs/lightning.md"
FOR_DEEPSPEED = (
    "docs/deepspeed.md"  # on DeepSpeed's ranks; other trainers' recipes: multigpu/weights/test_zero_trainers.py
)


class Block(NamedTuple):
    """One snippet: its code, padded so that a traceback shows the page's own lines."""

    page: str
    heading: str
    line: int
    ranks: bool
    code: str


def blocks(page: str, drop: str = "-") -> Iterator[Block]:
    """The snippets of a page; `drop` is the side of a diff that is left out."""
    text = (ROOT / page).read_text()
    for found in re.finditer(r"(<!-- ranks -->\n)?^```(python|diff)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        code = found[3]
        if found[2] == "diff":
            code = "".join("\n" if line[0] == drop else line[2:] + "\n" for line in code.splitlines())
        headings = re.findall(r"^#+ (.*)$", text[: found.start()], re.MULTILINE)
        line = text[: found.start(3)].count("\n")
        yield Block(page, headings[-1] if headings else "", line + 1, bool(found[1]), "\n" * line + code)


BLOCKS = [block for page in PAGES for block in blocks(page)]


class Net(nn.Module):
    """A model with BatchNorm and two matrices that are called like an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.lora_a, self.lora_b = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).relu()) + self.lora_b(self.lora_a(x))
        return out


def reader() -> dict[str, Any]:
    """What is the reader's."""
    torch.manual_seed(0)
    model = Net()
    names: dict[str, Any] = {name: getattr(sharded_avg, name) for name in sharded_avg.__all__}
    names |= {"torch": torch, "nn": nn, "dist": dist, "sharded_avg": sharded_avg, "rank": 0}
    names |= {"model": model, "build_model": Net, "rule": sharded_avg.EMA(decay=0.999)}
    names |= {
        "batches": [torch.randn(5, 3) for _ in range(4)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    names["loss_of"] = lambda model, batch: model(batch).square().mean()
    names["evaluate"] = names["validate"] = torch.no_grad()(lambda model: names["loss_of"](model, names["batches"][0]))
    names["train_on"] = lambda batch: None
    return names


def run(block: Block, names: dict[str, Any]) -> None:
    exec(compile(block.code, str(ROOT / block.page), "exec"), names)


def of_one_process(page: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == page and not block.ranks and block.heading != WRAPPINGS]


def _of_fabric(names: dict[str, Any]) -> None:
    """`Fabric.setup` takes a model once."""
    from lightning.fabric import Fabric

    model = Net()
    names |= {"fabric": Fabric(accelerator="cpu", devices=1), "model": model}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.own_processes
@pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled|unavailable)"
)  # said by each dcp.save in one process
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (FOR_LIGHTNING, FOR_DEEPSPEED) and of_one_process(page)]
)
def test_snippets(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = reader()
    if page == "docs/files.md":  # it begins where a run has ended
        average = sharded_avg.ShardedAverage(names["model"], names["rule"])
        average.update()
        average.save("run/average", with_buffers=True)
    heading = ""
    for block in of_one_process(page):
        if page in ("docs/recipes.md", "docs/come_from.md") and block.heading != heading:
            names, heading = reader(), block.heading  # each for itself
        if "Trainer(" in block.code:
            continue  # with those of docs/lightning.md
        if "torch.onnx" in block.code or "huggingface_hub" in block.code:
            continue  # a test each, below: they want packages that may be absent
        if "fabric" in block.code:
            _of_fabric(names)
        if "dcp.save" in block.code:
            import torch.distributed.checkpoint as dcp

            names |= {"dcp": dcp, "model_state": names["model"].state_dict()}
            names |= {"average": sharded_avg.ShardedAverage(names["model"], names["rule"])}
        if block.page == "docs/guide.md" and "average" not in names:
            names["average"] = sharded_avg.ShardedAverage(names["model"], names["rule"])
        run(block, names)


@pytest.mark.own_processes
@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)", "ignore:.*num_workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the page's line has the average only
def test_snippets_with_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that wants a GPU is stood in for by one device: tests/lightning runs each of them."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from torch.utils.data import DataLoader

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.log("val_loss", self.net(batch).square().mean(), batch_size=len(batch))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return DataLoader(torch.randn(10, 3), batch_size=5)

        val_dataloader = train_dataloader

    def trainer(strategy: Any = None, max_epochs: int = 1, **arguments: Any) -> Any:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        return Trainer(accelerator="cpu", devices=1, max_epochs=max_epochs, **quiet, **arguments)

    monkeypatch.chdir(tmp_path)
    names = reader() | {
        "module": Module(),
        "Trainer": trainer,
        "EarlyStopping": EarlyStopping,
        "ModelCheckpoint": partial(ModelCheckpoint, dirpath="."),
    }
    names["FSDPStrategy"] = names["DeepSpeedStrategy"] = lambda config=None, **_: config and (ROOT / config).read_text()
    lines = [b for b in BLOCKS if "Trainer(" in b.code and b.page != FOR_LIGHTNING and "Lightning" in b.heading]
    lines += [b for b in BLOCKS if b.page in ("README.md", FOR_DEEPSPEED) and "Trainer(strategy" in b.code]
    for block in [*lines, *(block for block in BLOCKS if block.page == FOR_LIGHTNING)]:
        if "fabric" in block.code:
            _of_fabric(names)
        if "max_epochs=20" in block.code:
            block = block._replace(code=block.code.replace("max_epochs=20", "max_epochs=2"))
        run(block, names)
        if block.page == FOR_LIGHTNING and "trainer" in names and not Path("best.ckpt").exists():
            names["trainer"].save_checkpoint("best.ckpt")
            names["trainer"].save_checkpoint("last.ckpt")


def recipe(needle: str) -> Block:
    (found,) = [block for block in BLOCKS if block.page == "docs/recipes.md" and needle in block.code]
    return found


@pytest.mark.own_processes
def test_the_recipe_for_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote gives what the averaged model gives, and the raw one does not."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export wants it: pip install onnx onnxscript")
    onnx_reference = pytest.importorskip("onnx.reference", reason="it runs the file: pip install onnx")
    monkeypatch.chdir(tmp_path)
    names = reader()
    run(recipe("torch.onnx"), names)
    evaluator = onnx_reference.ReferenceEvaluator("model.onnx")
    (shape,) = [kind.tensor_type.shape for kind in evaluator.input_types]
    assert [size.dim_param or size.dim_value for size in shape.dim] == ["batch", 3]  # the evaluator takes any size
    model = names["model"].eval()
    for batch in (names["batches"][1], torch.randn(7, 3)):
        (given,) = evaluator.run(None, {evaluator.input_names[0]: batch.numpy()})
        with torch.no_grad(), names["average"].swapped():
            averaged = model(batch)
        torch.testing.assert_close(torch.from_numpy(given), averaged, rtol=0, atol=1e-6)
        assert (model(batch) - averaged).abs().max() > 1e-3


class HfApi:
    """A stand-in for the hub's client, with those of its arguments that the recipe uses."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.uploaded: dict[str, dict[str, Any]] = {}

    def create_repo(self, repo_id: str, *, exist_ok: bool = False) -> None:
        self.created.append(repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str | None = None) -> None:
        assert repo_id in self.created
        assert [path.name for path in Path(folder_path).iterdir()] == ["model.safetensors"]
        self.uploaded[repo_id] = load_averaged_state_dict(folder_path)


@pytest.mark.own_processes
def test_the_recipe_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ModuleType("huggingface_hub")
    client.HfApi = HfApi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    monkeypatch.chdir(tmp_path)
    names = reader()
    run(recipe("huggingface_hub"), names)
    (uploaded,) = names["hub"].uploaded.values()
    names["build_model"]().load_state_dict(uploaded)  # strictly
    with names["average"].swapped():
        averaged = names["model"].state_dict()
        assert all(torch.equal(averaged[name], value) for name, value in uploaded.items())


@pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")
@pytest.mark.filterwarnings("ignore")  # its own, when it is imported
@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_the_stand_in_is_like_the_hubs_client(method: str) -> None:
    import huggingface_hub

    real = inspect.signature(getattr(huggingface_hub.HfApi, method)).parameters
    for name, ours in inspect.signature(getattr(HfApi, method)).parameters.items():
        assert (real[name].kind, real[name].default) == (ours.kind, ours.default)


THEIRS = [block for block in blocks("docs/come_from.md", drop="+") if "Trainer(" not in block.code]
THEIRS = [block for block in THEIRS if re.match(r"\s*from (?!sharded_avg)", block.code)]


@pytest.mark.parametrize("block", THEIRS, ids=[block.heading for block in THEIRS])
def test_what_others_write(block: Block) -> None:
    """The lines that readers come with are true ones, as far as the library that they call is installed."""
    package = re.findall(r"^from (\w+)", block.code, re.MULTILINE)[0]
    pytest.importorskip(package)
    run(block, reader())


@on_ranks(2)
def test_snippets_on_ranks(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for block in (block for block in BLOCKS if block.ranks):
            run(block, reader())


def paragraphs() -> list[str]:
    (block,) = [block for block in BLOCKS if block.heading == WRAPPINGS and "fully_shard" in block.code]
    return block.code.strip().split("\n\n")


@on_ranks(2)
def test_the_wrappings_of_the_readme(tmp_path: Path) -> None:
    """All but DeepSpeed's; FullyShardedDataParallel is told that its device is the CPU."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    for paragraph in paragraphs():
        if "deepspeed" not in paragraph:
            names = reader() | {"DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard}
            names["FullyShardedDataParallel"] = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
            exec(paragraph, names)
            names["average"].update()
            assert names["average"].n_averaged == 1


class Loss(nn.Sequential):
    """What an engine's `backward` takes."""

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = super().forward(x).float().square().mean()
        return loss


@on_ranks(2, kind="deepspeed")
def test_snippets_with_deepspeed(tmp_path: Path) -> None:
    """The first example of the page, then each row of "How do I export?" and the line that loads."""
    import deepspeed

    (first,) = [block for block in BLOCKS if block.page == FOR_DEEPSPEED and "deepspeed.initialize(" in block.code]
    text = (ROOT / FOR_DEEPSPEED).read_text()
    exports = text.partition("## How do I export?")[2].partition("\n## ")[0]
    torch.manual_seed(0)
    model = Loss(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))
    names = reader() | {"deepspeed": deepspeed, "model": model, "params": list(model.parameters())}
    names["batches"] = [torch.randn(8, 3).bfloat16() for _ in range(4)]
    names["evaluate"] = torch.no_grad()(lambda engine: engine(names["batches"][0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        if dist.get_rank() == 0:
            Path("ds_config.json").write_text((ROOT / "examples/deepspeed/stage2_bf16.json").read_text())
        dist.barrier()
        run(first, names)
        whole, export = re.findall(r"`(with average\.[^`]*)`", exports)
        exec(whole + "\n    kept = dict(full)", names)
        exec(export, names)
        if dist.get_rank() == 0:
            (command,) = re.findall(r"`sharded-avg ([^`]*)`", exports)
            assert main(command.split()) == 0
            assert all(
                torch.equal(v, names["kept"][k]) for k, v in load_averaged_state_dict("model.safetensors").items()
            )
            low = torch.load("run/pytorch_model.bin", weights_only=True)
            assert all(torch.equal(value, names["kept"][key].to(value.dtype)) for key, value in low.items())
        (again,) = re.findall(r'`(average\.load\("run/average"\))`', text)
        exec(again, names)
    names["engine"].destroy()


@pytest.mark.further
@on_ranks(2, kind="deepspeed")
def test_the_wrapping_of_the_readme_with_deepspeed() -> None:
    import deepspeed

    (paragraph,) = [paragraph for paragraph in paragraphs() if "deepspeed" in paragraph]
    config = {
        "train_micro_batch_size_per_gpu": 5,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    }
    names = reader() | {"deepspeed": deepspeed, "config": config}
    before, after = paragraph.split("...\n")
    exec(before, names)
    names["engine"].backward(names["engine"](names["batches"][0]).square().mean())
    exec(after, names)
    assert names["average"].n_averaged == 1


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_in_the_text_exist(page: str) -> None:
    """`sharded-avg x`, `make x` and `python -m x`, wherever they stand."""
    text = (ROOT / page).read_text()
    known = {module.__name__.rpartition(".")[2] for module in COMMANDS}
    assert {word for word in re.findall(r"sharded-avg ([a-z]+)\b", text) if word != "developers"} <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    |^\| `)make ([a-z-]+)\b", text, re.MULTILINE)) <= targets
    for module in set(re.findall(r"python -m ((?:sharded_avg|tests)[\w.]*)", text)):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_site_has_every_public_name_and_page() -> None:
    listed = re.findall(r"^::: (sharded_avg\.\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    absent = set(sharded_avg.__all__) - {name.rpartition(".")[2] for name in listed} - {"__version__"}
    assert not absent, f"docs/api.md lacks {absent}: add `::: sharded_avg.ITS.MODULE.NAME`"
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert {f"docs/{page}" for page in re.findall(r"(\w+\.md)$", nav, re.MULTILINE)} == set(PAGES) - {"README.md"}
