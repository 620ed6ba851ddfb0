from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moestro.policy
from moestro.errors import MoestroError
from moestro.policy import LRU, POLICIES, make_policy


def test_every_name_makes_a_fresh_policy() -> None:
    for name in POLICIES:
        assert make_policy(name) is not make_policy(name)
    assert isinstance(make_policy("lru"), LRU)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'fifo'.*lru") as refusal:
        make_policy("fifo")
    assert isinstance(refusal.value, MoestroError)


@pytest.mark.parametrize("file", sorted(Path(moestro.policy.__file__).parent.rglob("*.py")), ids=lambda file: file.name)
def test_policies_are_pure(file: Path) -> None:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {name for name in imported if name.startswith("moestro")}
    assert own <= {"moestro.keys", "moestro.errors", "moestro.trace.collection"} | {
        name for name in own if name.startswith("moestro.policy")
    }
    pure = {"__future__", "collections", "collections.abc", "dataclasses", "inspect", "math", "numpy", "typing"}
    assert imported - own <= pure
