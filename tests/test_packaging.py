"""The root folders are the package, and shadow nobody else's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ringspan

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attention", "cluster", "deploy", "kernels", "kvstore")


@pytest.mark.parametrize("folder", FOLDERS)
def test_root_folder_is_the_subpackage(folder: str) -> None:
    link = Path(ringspan.__file__).parent / folder
    if not link.is_relative_to(ROOT / "src"):
        pytest.skip("installed from a wheel")
    assert link.is_symlink()
    assert not Path(os.readlink(link)).is_absolute()
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_root_folder_does_not_shadow_other_distributions(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_type_marker_is_shipped() -> None:
    assert (Path(ringspan.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("module", ["ringspan.cluster.messages", "ringspan.kvstore.keys"])
def test_modules_import_by_their_package_name(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_names_and_messages_need_neither_torch_nor_ray() -> None:
    """So that `ringspan --help` and a refusal of bad input take no seconds."""
    code = (
        "import sys, ringspan, ringspan.errors, ringspan.types, ringspan.cluster.messages\n"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
