"""The versions that are promised: `make matrix` runs these, each in an environment of its own (hours; some GB each).

    oldest   Python 3.10, and the oldest torch, Lightning and DeepSpeed of sharded_avg/version.py
    pinned   constraints.txt, as `make test` has it, with Python 3.11 and 3.12
    newest   the newest of everything that an installer finds, with Python 3.13 and 3.14
    nightly  torch's nightly (its index in TORCH_NIGHTLY), else as newest
    wheel    the wheel alone with torch only (no NumPy): what a fresh machine has; and the same with NumPy
    extras   `[all]` in an empty environment, in one command
    docs     the site, strictly

`nox -s newest` runs both of its interpreters, `nox -s newest-3.13` one; an interpreter that is not there is skipped.
Each of the first four leaves in runs/matrix/NAME what it found: doctor.json, and unit.xml, ranks.xml, lightning.xml of
pytest. `python -m tests.matrix` makes the README's table of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

nox.options.sessions = ["oldest", "pinned", "newest", "wheel", "extras", "docs"]
nox.options.reuse_existing_virtualenvs = True
ROOT = Path(__file__).parent
FOLDERS = {"unit": "tests/unit", "ranks": "tests/multigpu", "lightning": "tests/lightning"}
TOOLS = ("ema-pytorch", "jsonargparse[signatures]>=4.39", "matplotlib", "ninja", "numpy", "pytest>=8.4")
TOOLS += ("onnx", "onnxscript", "pytest-timeout", "pytest-xdist", "safetensors", "scikit-learn", "setuptools>=77")
TOOLS += ("tqdm", "wheel")


def oldest(package: str) -> str:
    """The oldest that sharded_avg/version.py asks for, which is read and not imported: torch is not there yet."""
    text = (ROOT / "sharded_avg" / "version.py").read_text()
    found = re.search(rf'"{package}": Span\("([\d.]+)"', text)
    assert found is not None, package
    return f"{package}=={found[1]}.0" if found[1].count(".") == 1 else f"{package}=={found[1]}"


def install(session: nox.Session, torch: str, lightning: str, deepspeed: str, *options: str) -> None:
    """In the order that DeepSpeed's build wants: it imports torch."""
    session.install(torch, *TOOLS, *options)
    session.install(lightning, lightning.replace("lightning", "pytorch-lightning", 1), *options)
    session.install("--no-build-isolation", deepspeed, *options, env={"DS_BUILD_OPS": "0"})
    session.install("--no-build-isolation", "--no-deps", "--editable", ".")
    session.run("python", "-m", "pip", "check")


def check(session: nox.Session) -> None:
    """Every kind of test, each with a report; all are run, whatever the first says. Arguments go to pytest."""
    out = ROOT / "runs" / "matrix" / session.name
    out.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(Path(session.virtualenv.location, "extensions"))}
    command = ["python", "-m", "sharded_avg", "doctor", "--json", "--wait", "1800"]
    with (out / "doctor.json").open("w") as report:  # compiles DeepSpeed's op: no test's time is over meanwhile
        session.run(*command, env=environment, stdout=report, stderr=None)  # it tells what it does there
    session.run("python", "-m", "tests.unit.test_third_party")
    for name, folder in FOLDERS.items():
        command = ["python", "-m", "pytest", folder, f"--junitxml={out / name}.xml", "-n", "2", *session.posargs]
        session.run(*command, env=environment, success_codes=range(256))
    session.run("python", "-m", "tests.matrix", "--check", str(out))


@nox.session(name="oldest", python="3.10")
def oldest_of_all(session: nox.Session) -> None:
    """What pyproject.toml promises at the least."""
    install(session, oldest("torch"), oldest("lightning"), oldest("deepspeed"))
    check(session)


@nox.session(python=["3.11", "3.12"])
def pinned(session: nox.Session) -> None:
    """What `make` installs."""
    install(session, "torch", "lightning", "deepspeed", "--constraint", "constraints.txt")
    check(session)


@nox.session(python=["3.13", "3.14"], name="newest")
def newest_of_all(session: nox.Session) -> None:
    """What `pip install sharded-avg` brings today."""
    install(session, "torch", "lightning", "deepspeed", "--upgrade")
    check(session)


@nox.session
def nightly(session: nox.Session) -> None:
    """What will be released next, to be told before users are."""
    index = os.environ.get("TORCH_NIGHTLY", "")
    if not index:
        session.error("name an index of torch's nightly builds in TORCH_NIGHTLY")
    session.install("--pre", "torch", "--index-url", index)
    install(session, "torch", "lightning", "deepspeed")
    check(session)


@nox.session
@nox.parametrize("numpy", [False, True], ids=["torch_only", "numpy"])
def wheel(session: nox.Session, numpy: bool) -> None:
    """The wheel alone: its metadata, an import, the README's first snippet, and the command line."""
    session.install("build", "setuptools>=77")
    folder = Path(session.create_tmp()).resolve()  # the session changes its folder below
    out = folder / "dist"
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(out), silent=True)
    fresh = folder / "fresh"
    session.run("python", "-m", "venv", "--clear", str(fresh))
    python = str(fresh / "bin" / "python")
    built = max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.run(python, "-m", "pip", "install", "--quiet", str(built), *(["numpy"] if numpy else []), external=True)
    session.run(python, "-m", "pip", "check", external=True)
    with session.chdir(fresh):  # not the checkout, whose folder would be imported
        session.run(python, str(ROOT / "tests" / "fresh.py"), *(["--numpy"] if numpy else []), external=True)


@nox.session
def extras(session: nox.Session) -> None:
    """Whatever the extras bring, installed at once, where no torch is for DeepSpeed's build to import."""
    session.install(".[all]", "--constraint", "constraints.txt")
    session.run("python", "-m", "pip", "check")
    with session.chdir(session.create_tmp()):  # not the checkout, whose folder would be imported
        session.run("sharded-avg", "doctor", "--quick")


@nox.session
def docs(session: nox.Session) -> None:
    """A broken link fails, and so does a name without a docstring, which mkdocstrings leaves out in silence."""
    session.install("mkdocs-material", "mkdocstrings[python]", "--constraint", "constraints.txt")
    session.run("python", "-m", "tests.unit.test_docstrings")
    session.run("mkdocs", "build", "--strict")
