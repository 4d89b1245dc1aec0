"""Are the packages there, in versions that work? Versions and requirements are read, nothing is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from switchrun.doctor.check import Check, failed, passed, warned

if TYPE_CHECKING:
    from packaging.requirements import Requirement

NAME = "packages"

#: Named in the finding; the others only in the details.
_MAIN = ("torch", "transformers", "accelerate", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Versions of a package that are known to do something wrong.

    Attributes:
        package: Its name.
        versions: Which, as a PEP 440 specifier.
        effect: What they do wrong.
        source: Where that was read or measured.
    """

    package: str
    versions: str
    effect: str
    source: str


_TRANSFORMERS = "read in transformers' modeling_switch_transformers.py at each version"

#: All lie outside of what pyproject.toml allows; the table says why, to whoever has one of them installed.
KNOWN_BAD = (
    KnownBad("transformers", "<4.37", "gives a model whose layers are all sparse no sparse layer", _TRANSFORMERS),
    KnownBad("transformers", "<4.42", "runs every expert for every token", _TRANSFORMERS),
    KnownBad("transformers", ">=4.42,<4.46", "routes tokens to wrong experts", _TRANSFORMERS),
    KnownBad("transformers", "<4.52", "does not zero dropped tokens", _TRANSFORMERS),
    KnownBad("transformers", ">=5.0.dev0,<5.21", "ignores the expert capacity", _TRANSFORMERS),
)


def check_packages() -> Check:
    """Compare what is installed with what switchrun needs, and with what those packages need of one another."""
    try:
        import packaging.requirements  # noqa: F401
    except ImportError:
        return failed(NAME, "packaging is not installed", "pip install packaging")
    needed = list(_requirements(needed_requirements()))
    installed = {each.name: _version(each.name) for each in needed}
    versions = {"python": platform.python_version(), **installed}
    wrong = [each for each in needed if not _satisfied(each, installed[each.name])]
    if wrong:
        finding = "; ".join(_describe(each, installed[each.name]) for each in wrong)
        return failed(NAME, finding, _install(wrong), versions=versions, conflicts=[])
    conflicts = list(_conflicts(needed))
    if conflicts:
        mend = _install(requirement for _, requirement in conflicts)
        told = [f"{owner} {_describe(requirement, _version(requirement.name))}" for owner, requirement in conflicts]
        return warned(NAME, "; ".join(told), mend, versions=versions, conflicts=told)
    main = ", ".join(f"{name} {installed[name]}" for name in _MAIN if installed.get(name))
    return passed(NAME, f"{main}, and {len(needed)} packages in all, as needed", versions=versions, conflicts=[])


def needed_requirements() -> list[str]:
    """Give what switchrun needs, in a clone by its own pyproject.toml: an editable installation may remember less."""
    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "switchrun":
            return list(project["dependencies"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        return importlib.metadata.requires("switchrun") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def known_bad(package: str, version: str) -> list[KnownBad]:
    """Give what is known to be wrong with a version of a package."""
    from packaging.specifiers import SpecifierSet

    return [
        bad
        for bad in KNOWN_BAD
        if bad.package == package and SpecifierSet(bad.versions).contains(version, prereleases=True)
    ]


def _requirements(lines: Iterable[str]) -> Iterator[Requirement]:
    """Yield the requirements that hold here, without those of extras."""
    from packaging.requirements import Requirement

    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfied(requirement: Requirement, version: str | None) -> bool:
    # A pre-release was installed on purpose; what matters is its number.
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _describe(requirement: Requirement, version: str | None) -> str:
    name = requirement.name
    needs = f"needed is {name}{requirement.specifier}"
    if version is None:
        return f"{name} is not installed; {needs}"
    effects = "".join(f", which {bad.effect}" for bad in known_bad(name, version)[:1])
    return f"{name} {version} is installed{effects}; {needs}"


def _conflicts(needed: Iterable[Requirement]) -> Iterator[tuple[str, Requirement]]:
    """Yield what our packages need themselves and do not find, as `pip check` does: (whose need, the need)."""
    for owner in needed:
        for requirement in _requirements(importlib.metadata.requires(owner.name) or []):
            if not _satisfied(requirement, _version(requirement.name)):
                yield f"{owner.name} {_version(owner.name)}:", requirement


def _install(requirements: Iterable[Requirement]) -> str:
    words: Mapping[str, None] = dict.fromkeys(f"'{each.name}{each.specifier}'" for each in requirements)
    return f"pip install {' '.join(words)}"
