"""The package's version, and the versions of others that it works with: one list, which errors and `doctor` quote.

CHANGELOG.md is checked against `__version__`; pyproject.toml, constraints.txt and the README against WORKS_WITH.
"""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from typing import NamedTuple

from .errors import EngineVersionError

__version__ = "0.1.0"


class Span(NamedTuple):
    """The oldest release that is asked for, and the newest that the tests were run with; a newer one may work."""

    oldest: str
    newest: str


WORKS_WITH = {
    "torch": Span("2.8", "2.15.0"),
    "lightning": Span("2.6", "2.6.6"),
    "deepspeed": Span("0.16.9", "0.19.8"),
}


_LIGHTNING_TOO = ("pytorch-lightning", "lightning-fabric")  # the same code under other names, with the same versions
_EXTRAS = {"lightning": "lightning", "safetensors": "safetensors", "matplotlib": "plots", "tqdm": "progress"}


def requirement(package: str) -> str:
    """What to ask an installer for, as an error quotes it: `lightning>=2.6,<=2.6.6`; the name of any other package."""
    known = _known(package)
    if known not in WORKS_WITH:
        return package
    oldest, newest = WORKS_WITH[known]
    return f"{package}>={oldest},<={newest}"


def how_to_install(package: str, *, again: bool = False) -> str:
    """The command that brings a version of `package` that this package works with: what errors and `doctor` advise.

    The extra of this package where an index gave it; where a checkout or a wheel did, an index may not have it.
    `again`: it is there, and broken, which an installer does not see.
    """
    torch_too = package == "torch"  # what others need is left alone: torch is large, and works
    options = "" if not again else "--force-reinstall " if torch_too else "--force-reinstall --no-deps "
    if package == "deepspeed":  # its build imports torch, so it takes place where torch is, and compiles no op ahead
        build = f"DS_BUILD_OPS=0 pip install --no-build-isolation {options}{shlex.quote(requirement(package))}"
        return f"pip install setuptools wheel ninja && {build}"
    if package in _EXTRAS and not again and _is_from_an_index():
        return f"pip install 'sharded-avg[{_EXTRAS[package]}]'"
    return f"pip install {options}{shlex.quote(requirement(package))}"


def _is_from_an_index() -> bool:
    """Installers record a checkout, a file or an address in direct_url.json (PEP 610), and what an index gave not."""
    try:
        own = metadata.distribution("sharded-avg")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return False
    return own.read_text("INSTALLER") is not None and own.read_text("direct_url.json") is None


def installed_version(package: str) -> str | None:
    """What an installer wrote down, without importing `package`; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def span_of(package: str) -> Span:
    """Of torch, Lightning under any of its names, or DeepSpeed."""
    return WORKS_WITH[_known(package)]


def is_too_old(package: str, version: str) -> bool:
    """Whether `version` comes before the oldest that this package works with; local parts (`+cpu`) do not count."""
    return _release(version) < _release(span_of(package).oldest)


def require(package: str, version: str) -> None:
    """Raise `EngineVersionError` if `version` is too old, before something that it lacks is missed."""
    if is_too_old(package, version):
        raise EngineVersionError(
            f"{package} {version} is older than what sharded_avg {__version__} works with; {how_to_install(package)}"
        )


def require_torch() -> None:
    """Raise `EngineVersionError` where torch is absent, broken or too old."""
    try:
        import torch  # here, so that what needs none of it can say so

        version = torch.__version__
    except Exception as error:  # a broken build raises anything
        broken = getattr(error, "name", None) != "torch"
        raise EngineVersionError(
            f"sharded_avg {__version__} needs torch, which cannot be imported here "
            f"({' '.join(str(error).split())}); {how_to_install('torch', again=broken)}"
        ) from error
    require("torch", version)


def _known(package: str) -> str:
    return "lightning" if package in _LIGHTNING_TOO else package


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
