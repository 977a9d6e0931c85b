"""`__all__` of the client's modules is what others take from them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def trees(folder):
    return {path: ast.parse(path.read_text()) for path in (ROOT / folder).rglob("*.py")}


def name_of(path):
    return ".".join(path.relative_to(ROOT / "client").with_suffix("").parts).removesuffix(".__init__")


def imported(of, trees):
    """Module and name of what is imported from modules of the client."""
    return {(node.module, name.name) for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module in of for name in node.names
            if f"{node.module}.{name.name}" not in of}


def all_of(tree):
    return next((ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), None)


PRODUCT = trees("client/batch_client")
MODULES = {name_of(path): names for path, tree in PRODUCT.items() if (names := all_of(tree)) is not None}
TAKEN = imported(MODULES, PRODUCT.values())
TAKEN_BY_ANYONE = TAKEN | imported(MODULES, [*trees("tests").values(), *trees("benchmarks").values()])


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_other_modules_take_and_no_constant_that_nobody_takes(name):
    names = MODULES[name]
    assert {taken for module, taken in TAKEN if module == name} <= {*names}
    assert {one for one in names if one.isupper()} <= {taken for module, taken in TAKEN_BY_ANYONE if module == name}
    assert names == sorted(names, key=lambda key: (not key.isupper(), key[0].islower(), key))
