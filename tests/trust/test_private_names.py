"""What other packages call private is read in two modules alone."""

import ast
from pathlib import Path

import hf_adacomp

PACKAGE = Path(hf_adacomp.__file__).parent
COMPAT = ("torch_compat.py", "transformers_compat.py")


def private_names(tree: ast.AST) -> set[str]:
    """Attributes with one leading underscore that a module reads or sets on anything."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def own_names(tree: ast.AST) -> set[str]:
    """What a module defines: functions, classes, attributes of `self`, variables."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_no_other_module_reads_what_is_private_elsewhere():
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    own = {"_asdict", "_replace"}.union(*map(own_names, trees.values()))  # named tuples document those
    found = {path.name: private_names(tree) - own for path, tree in trees.items() if path.name not in COMPAT}
    assert {name: names for name, names in found.items() if names} == {}
    assert all(private_names(trees[PACKAGE / name]) - own for name in COMPAT)
