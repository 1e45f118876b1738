"""Who may import whom: deploy -> cluster -> kvstore -> attention -> kernels, and Ray only above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "attention", "kvstore", "cluster", "deploy")
"""Lowest first; each may import those before it."""
FOR_ALL = {"ringspan.cluster.messages"}
"""Messages carry no behaviour: every layer speaks them."""
WITHOUT_RAY = ("kernels", "attention", "kvstore")


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            module = node.module or ""
            yield module
            if module == "ringspan" or module.count(".") == 1:
                yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    words = module.split(".")
    if words[0] == "ringspan" and len(words) > 1 and words[1] in LAYERS:
        return words[1]
    return None


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_down_only(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(layer)
        for module in imports(path)
        if layer_of(module) in above
        and not any(module.startswith(name) for name in FOR_ALL)
        and module != "ringspan.cluster"
    ]
    assert wrong == []


@pytest.mark.parametrize("layer", WITHOUT_RAY)
def test_ray_stays_at_the_rim(layer: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(layer)
        for module in imports(path)
        if module.split(".")[0] == "ray"
    ]
    assert wrong == []


def test_only_the_modules_of_actors_and_of_the_cluster_know_ray() -> None:
    knowing = {
        path.name
        for path in sources("cluster")
        if any(module.split(".")[0] == "ray" for module in imports(path))
    }
    assert knowing == {
        "ray_pending.py",
        "board_actor.py",
        "directory_actor.py",
        "ray_cluster.py",
        "ray_gang.py",
    }


def test_shared_modules_import_no_layer() -> None:
    shared = [path for path in (ROOT / "src" / "ringspan").glob("*.py") if path.stem != "testing"]
    wrong = [
        f"{path.name} imports {module}"
        for path in shared
        for module in imports(path)
        if layer_of(module)
    ]
    assert wrong == []


def test_every_file_of_a_layer_is_looked_at() -> None:
    assert all(sources(layer) for layer in LAYERS)
