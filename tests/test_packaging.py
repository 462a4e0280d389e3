"""What pip is told of the package, and the sets of versions that come with it."""

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import arabic_qwen

ROOT = Path(__file__).parent.parent


def pins(name):
    """A file's constraints: package → version, `==2.11.*` as 2.11."""
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pinned = {}
    for constraint in map(Requirement, lines):
        (specifier,) = constraint.specifier
        assert specifier.operator == "==", constraint
        pinned[canonicalize_name(constraint.name)] = Version(specifier.version.removesuffix(".*"))
    return pinned


def requirements(extra=""):
    """What the package needs by itself, or with an extra too: name → range."""
    found = map(Requirement, importlib.metadata.requires("arabic-qwen"))
    return {
        canonicalize_name(needed.name): needed.specifier
        for needed in found
        if needed.marker is None or needed.marker.evaluate({"extra": extra})
    }


def test_version_is_the_installed_one():
    assert importlib.metadata.version("arabic-qwen") == arabic_qwen.__version__


def test_constraints_are_of_all_that_tests_need_and_within_its_ranges():
    pinned = pins("constraints.txt")
    needed = requirements("test")
    assert needed.keys() <= pinned.keys()
    assert {name for name, allowed in needed.items() if pinned[name] not in allowed} == set()
    assert not [name for name, version in pinned.items() if version.local or name.startswith("nvidia")]


def test_lowest_constraints_are_the_lower_ends_of_the_ranges():
    lowest = {
        name: Version(part.version)
        for name, allowed in requirements().items()
        for part in allowed
        if part.operator == ">=" and name != "torch"
    }
    assert pins("constraints-lowest.txt") == lowest
