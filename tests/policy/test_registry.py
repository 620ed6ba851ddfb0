from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moestro.policy
from moestro.errors import RequestError
from moestro.policy.choice import check_names, policy_names


@pytest.mark.parametrize(("policy", "predictor", "named"), [("fifo", "auto", "lru"), ("lru", "auto+x", "learned")])
def test_an_unknown_name_lists_the_known(policy: str, predictor: str, named: str) -> None:
    with pytest.raises(RequestError, match=f"choose.* {named}"):
        check_names(policy, predictor, more=("auto",))


def test_known_names_pass() -> None:
    for policy in ("auto", *policy_names()):
        for predictor in ("auto", "learned", "ensemble", "recency+gate"):
            check_names(policy, predictor, more=("auto",))


@pytest.mark.parametrize("file", sorted(Path(moestro.policy.__file__).parent.rglob("*.py")), ids=lambda file: file.name)
def test_policies_are_pure(file: Path) -> None:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {name for name in imported if name.startswith("moestro")}
    assert own <= {"moestro.keys", "moestro.errors", "moestro.trace.collection", "moestro._native"} | {
        name for name in own if name.startswith("moestro.policy")
    }
    pure = {
        "__future__",
        "abc",
        "collections",
        "collections.abc",
        "dataclasses",
        "heapq",
        "inspect",
        "itertools",
        "math",
        "numpy",
        "typing",
    }
    assert imported - own <= pure
