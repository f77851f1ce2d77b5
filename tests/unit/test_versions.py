"""One list of versions: what the package checks, what its metadata ask for, what the README says was run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from sharded_avg import EMA, EngineVersionError, ShardedAverage
from sharded_avg.version import WORKS_WITH, how_to_install, is_too_old, require, requirement

ROOT = Path(__file__).resolve().parents[2]


def toml_list(name: str) -> list[str]:
    """The strings of one list in pyproject.toml (Python 3.10 has no tomllib)."""
    found = re.search(rf"^{name} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return re.findall(r'"([^"]*)"', found[1])


@pytest.mark.parametrize(
    ("package", "where"), [("torch", "dependencies"), ("lightning", "lightning"), ("deepspeed", "deepspeed")]
)
def test_the_metadata_ask_for_the_oldest(package: str, where: str) -> None:
    assert toml_list(where) == [f"{package}>={WORKS_WITH[package].oldest}"]


@pytest.mark.parametrize("package", WORKS_WITH)
def test_the_pinned_version_is_within(package: str) -> None:
    pinned = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    oldest, newest = (tuple(map(int, version.split("."))) for version in WORKS_WITH[package])
    assert oldest <= tuple(map(int, pinned[1].split("."))) <= newest


@pytest.mark.parametrize("where", ["dev", "docs", "plots", "progress", "safetensors", "lightning", "deepspeed"])
def test_what_make_installs_is_pinned(where: str) -> None:
    """Else a release of a tool could turn `make lint` or `make docs` red, where nothing of ours has changed."""
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = {re.split(r"[\[><=]", text)[0] for text in toml_list(where)} - {"sharded-avg"}
    assert asked <= pinned
    assert {"build", "nox", "setuptools", "wheel"} <= pinned  # the Makefile's own


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("2.6.0", True),
        ("2.6.0+cu124", True),
        ("1.13.1", True),
        ("2.7.1", True),
        ("2.8.0a0+git1234", False),
        ("2.8.0", False),
        ("2.8", False),
        ("2.13.0+cpu", False),
        ("2.16.0.dev20261101+cu130", False),
        ("10.0", False),
    ],
)
def test_local_parts_and_nightlies(version: str, old: bool) -> None:
    assert is_too_old("torch", version) == old


def test_an_old_version_is_named_with_what_to_install() -> None:
    with pytest.raises(
        EngineVersionError, match=r"deepspeed 0\.15\.4 is older .*no-build-isolation 'deepspeed>=0\.16\.9,<=0"
    ):
        require("deepspeed", "0.15.4")
    assert requirement("lightning") == "lightning>=2.6,<=2.6.6"


AN_OLD_TORCH = """
import torch
torch.__version__ = "2.7.1+cu126"
torch.distributed.tensor = None                       # nothing that an old one may lack is needed for the message
import sys; sys.modules["torch.distributed.tensor"] = sys.modules["torch.distributed.checkpoint"] = None
import sharded_avg
"""


def test_import_says_which_torch_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", AN_OLD_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "sharded_avg.errors.EngineVersionError: torch 2.7.1+cu126 is older than what sharded_avg 0.1.0 works with; "
        f"pip install 'torch>=2.8,<={WORKS_WITH['torch'].newest}'"
    )


NO_TORCH = {  # kind -> (what is done before, what is said of it, an option of pip)
    "absent": ("sys.modules['torch'] = None", "import of torch halted; None in sys.modules", ""),
    "broken": ("sys.path.insert(0, {folder!r})", "libcudart.so.12: not found", "--force-reinstall "),
}


@pytest.mark.parametrize("kind", NO_TORCH)
def test_import_says_that_there_is_no_torch(kind: str, tmp_path: Path) -> None:
    before, reason, option = NO_TORCH[kind]
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: not found')")
    code = f"import sys\n{before.format(folder=str(tmp_path))}\nimport sharded_avg"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"sharded_avg.errors.EngineVersionError: sharded_avg 0.1.0 needs torch, which cannot be imported here "
        f"({reason}); pip install {option}'torch>=2.8,<={WORKS_WITH['torch'].newest}'"
    )
    assert "The above exception was the direct cause" in done.stderr


class Installed:
    """What an installer wrote of this package."""

    def __init__(self, **files: str) -> None:
        self.files = files

    def read_text(self, name: str) -> str | None:
        return self.files.get(name.partition(".")[0])


@pytest.mark.parametrize(
    ("own", "advice"),
    [
        (Installed(INSTALLER="pip"), "pip install 'sharded-avg[{extra}]'"),  # from an index
        (Installed(INSTALLER="uv", direct_url="{}"), "pip install {own}"),  # a checkout or a wheel
        (Installed(), "pip install {own}"),  # what a build leaves in a checkout
    ],
)
def test_an_extra_is_advised_where_an_index_has_it(
    own: Installed, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharded_avg.version.metadata.distribution", lambda name: own)
    for package, extra in {"matplotlib": "plots", "tqdm": "progress", "safetensors": "safetensors"}.items():
        assert how_to_install(package) == advice.format(extra=extra, own=package)
    assert how_to_install("lightning") == advice.format(extra="lightning", own=f"'{requirement('lightning')}'")
    assert how_to_install("pytorch-lightning") == f"pip install 'pytorch-{requirement('lightning')}'"
    deepspeed = f"DS_BUILD_OPS=0 pip install --no-build-isolation '{requirement('deepspeed')}'"
    assert how_to_install("deepspeed") == f"pip install setuptools wheel ninja && {deepspeed}"


def test_an_example_without_deepspeed_says_how_to_build_it() -> None:
    code = "import sys; sys.modules['deepspeed'] = None; from text.engines import import_deepspeed; import_deepspeed()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("this needs DeepSpeed (")
    assert line.endswith(how_to_install("deepspeed"))


@pytest.mark.parametrize(
    ("package", "name"), [("lightning.fabric", "lightning"), ("lightning_fabric", "lightning-fabric")]
)
def test_an_old_fabric_is_told_at_construction(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric is not imported for that: whoever wrapped a model with it has done so."""
    fabric = ModuleType(package)
    monkeypatch.setitem(sys.modules, package, fabric)
    wrapped: Any = type("_FabricModule", (nn.Module,), {"__module__": f"{package}.wrappers"})()
    wrapped._forward_module = wrapped._original_module = nn.Linear(3, 5)
    ShardedAverage(wrapped, EMA(decay=0.9))  # of no version that is known
    vars(fabric)["__version__"] = "2.6.6"
    ShardedAverage(wrapped, EMA(decay=0.9))
    vars(fabric)["__version__"] = "2.2.0"
    with pytest.raises(EngineVersionError, match=rf"^{name} 2\.2\.0 is older .*pip install '"):
        ShardedAverage(wrapped, EMA(decay=0.9))
