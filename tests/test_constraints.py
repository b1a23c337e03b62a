"""constraints.txt names a tested version of everything that the tests install."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")


def pinned(python):
    """Versions by package for one version of Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    there = [one for one in found if not one.marker or one.marker.evaluate(version_of(python))]
    assert len({one.name for one in there}) == len(there)
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in there}


def version_of(python):
    return {"python_version": python, "python_full_version": f"{python}.0"}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_a_version_in_its_range(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned(python)
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["test"], *extras["docs"]]:
        wanted = Requirement(text)
        version = versions[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{text}, constraints.txt: {version}"


def test_names_and_versions_alone():
    for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]:
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (==|>=) "3\.\d+")?', line), line


def test_versions_that_differ_get_a_marker(tmp_path):
    script = runpy.run_path(str(ROOT / ".ci" / "constraints.py"))
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("Same_name==1.0\njax==0.10.2\ntorch==2.0+cpu\nonly==3\n")
    new.write_text("same-name==1.0\njax==0.12.0\ntorch==2.0\nnvidia-cublas==13.1\ntriton==3\n")
    read = {"3.11": script["read"](str(old)), "3.12": script["read"](str(new))}
    assert script["merged"](read) == [
        'jax==0.10.2; python_version == "3.11"',
        'jax==0.12.0; python_version >= "3.12"',
        "only==3",
        "same-name==1.0",
        "torch==2.0",
    ]
