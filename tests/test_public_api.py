import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fedtune"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exported(path):
    """The names in `__all__`, or None for a module without one."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)
    return None


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if exported(path) is not None]
assert FILES, "no module with __all__: the package moved"


def isort_style(name):
    """Constants, then classes, then the rest: the order that ruff's RUF022 keeps."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return (kind, name)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_all_is_sorted_and_importable(path):
    names = exported(path)
    assert names == sorted(set(names), key=isort_style)
    module = importlib.import_module(module_name(path))
    missing = [name for name in names if not hasattr(module, name)]
    assert missing == []


def test_a_public_name_is_the_same_thing_every_time():
    """A lazy name must not turn into the submodule of the same name once that is imported."""
    import fedtune

    for name in fedtune.__all__:
        first, second = getattr(fedtune, name), getattr(fedtune, name)
        assert first is second
        assert not isinstance(first, type(fedtune)), f"fedtune.{name} is a module"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_public_functions_and_classes_are_documented(path):
    module = importlib.import_module(module_name(path))
    for name in exported(path):
        value = getattr(module, name)
        if callable(value) and getattr(value, "__module__", "").startswith("fedtune"):
            assert value.__doc__, f"{module_name(path)}.{name}"


def test_dir_shows_the_public_names():
    import fedtune
    import fedtune.adapters

    assert {*fedtune.__all__, "transport", "errors"} <= set(dir(fedtune))
    assert set(dir(fedtune.adapters)) == set(fedtune.adapters.__all__)
    assert all(getattr(fedtune, name) is not None for name in dir(fedtune))
