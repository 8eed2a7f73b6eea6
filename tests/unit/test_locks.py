"""The locked versions are versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from worker.config import REPOSITORY


def locked(*names: str) -> dict[str, str]:
    lines = [
        line for name in names for line in (REPOSITORY / name).read_text().splitlines() if line
    ]
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    everything = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [Requirement(one) for one in everything]


def test_every_dependency_is_locked_at_a_version_that_is_allowed():
    versions = locked("requirements.txt", "requirements-dev.txt")
    # torch is installed before the others, by its own line.
    line = re.search(r"torch==([\d.]+)", (REPOSITORY / "scripts" / "setup").read_text())
    assert line is not None
    versions["torch"] = line[1]

    wrong = [
        f"{one} against {versions.get(canonicalize_name(one.name))}"
        for one in declared()
        if versions.get(canonicalize_name(one.name)) not in one.specifier
    ]

    assert wrong == []


def test_the_image_for_a_card_installs_the_same_torch():
    setup = (REPOSITORY / "scripts" / "setup").read_text()
    dockerfile = (REPOSITORY / "Dockerfile.cuda").read_text()

    assert re.findall(r"torch==[\d.]+", setup) == re.findall(r"torch==[\d.]+", dockerfile)
