"""Imports point one way, and only the shell knows Flower. Read from the source, nothing runs."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fedtune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own row and from the rows above it.
LEVELS = (
    {"errors"},
    {
        "assets",
        "config",
        "decisive",
        "failures",
        "files",
        "last",
        "lists",
        "lock",
        "nearest",
        "proxies",
        "signals",
    },
    {"output", "ranges", "settings", "data", "report", "doctor"},
    {"adapters"},
    {"strategies", "streaming", "transport"},
    {"checks"},
    {"relay"},
    {"client", "server"},
    {"compare"},
    {"deploy", "engines"},
)
TOP = len(LEVELS)  # launch, cli and what they are made of

MAY_IMPORT_FLOWER = (
    "strategies/shell.py",
    "strategies/stock.py",
    "strategies/updates.py",
    "strategies/scoring.py",
    "strategies/views.py",
    "strategies/stock.py",
    "transport/",
    "server/",
    "client/",
    "relay/",
    "engines/",
    "deploy/node.py",
)
PRIVATE_FLOWER = "engines/_compat/"
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
# What lists arms, curves and rows needs neither models nor Flower.
LIGHT = ("report", "data")
TOO_HEAVY = {"adapters", "strategies", "transport", "streaming", "client", "server", "engines"}


def name(path):
    return path.relative_to(PACKAGE).as_posix()


def unit(module):
    """`fedtune.adapters.params` -> `adapters`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path):
    """Absolute names of all imported modules, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield node.module
            if node.module in ("fedtune", "flwr"):  # `from flwr import app`
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(part):
    return next((i for i, row in enumerate(LEVELS) if part in row), TOP)


def owner(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


assert len(FILES) > 20, "the package moved"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    here = owner(path)
    for module in imports(path):
        if module.split(".")[0] == "fedtune" and unit(module):
            assert level(unit(module)) <= level(here), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_shell_imports_flower(path):
    flower = [module for module in imports(path) if module.split(".")[0] == "flwr"]
    if not name(path).startswith(MAY_IMPORT_FLOWER):
        assert flower == []
    if not name(path).startswith(PRIVATE_FLOWER):
        public = ("flwr", *PUBLIC_FLOWER)
        private = [module for module in flower if ".".join(module.split(".")[:2]) not in public]
        assert private == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_report_and_data_stay_light(path):
    if owner(path) in LIGHT:
        found = {unit(module) for module in imports(path) if module.startswith("fedtune.")}
        assert not found & TOO_HEAVY


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_pickle(path):
    found = {module.split(".")[0] for module in imports(path)}
    assert not found & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def test_the_rule_sees_an_import_inside_a_function(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import flwr.server\n    from fedtune import cli\n")
    assert set(imports(file)) == {"flwr.server", "fedtune", "fedtune.cli"}
