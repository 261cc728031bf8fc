"""Imports point one way, and few rooms know Flower. Read from the source, nothing runs."""

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fedtune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own row and from the rows above it.
LEVELS = (
    {"errors"},
    {
        "aligned",
        "assets",
        "config",
        "decisive",
        "extensions",
        "failures",
        "files",
        "lists",
        "lock",
        "nearest",
        "processes",
        "proxies",
    },
    {"_flower", "output_dir", "ranges", "results", "settings", "data", "report", "doctor"},
    {"adapters"},
    {"strategies", "transport"},
    {"checks"},
    {"relay"},
    {"client", "server"},
    {"compare"},
    {"deploy"},
    {"engines"},
)
TOP = len(LEVELS)  # run, cli and the public names

MAY_IMPORT_FLOWER = (
    "strategies/stock.py",
    "transport/",
    "server/",
    "client/",
    "relay/",
    "engines/",
    "_flower/",
)
PRIVATE_FLOWER = "_flower/"
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
# What lists arms, curves and rows needs neither models nor Flower.
LIGHT = ("report", "data")
TOO_HEAVY = {"_flower", "adapters", "strategies", "transport", "client", "server", "engines"}


def name(path):
    return path.relative_to(PACKAGE).as_posix()


def unit(module):
    """`fedtune.adapters.params` -> `adapters`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@cache
def imports(path):
    """Absolute names of all imported modules, those inside functions too."""
    return list(_imports(path))


def _imports(path):
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


def room_of(module):
    """The folder or file right under the package; `fedtune` itself is the one of public names."""
    return unit(module) if unit(module) in ROOMS else "__init__"


def circle(edges):
    """The rooms that import one another, or None."""
    graph = defaultdict(set)
    for importing, imported in edges:
        if importing != imported:
            graph[importing].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def owner(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


assert len(FILES) > 20, "the package moved"
ROOMS = {owner(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    here = owner(path)
    for module in imports(path):
        if module.split(".")[0] == "fedtune" and unit(module):
            assert level(unit(module)) <= level(here), f"{name(path)} imports {module}"


def test_no_circle_between_rooms():
    edges = [
        (owner(path), room_of(module))
        for path in FILES
        for module in imports(path)
        if module.startswith("fedtune.")
    ]
    assert len(edges) > len(FILES)
    assert circle(edges) is None


def test_a_circle_is_found():
    edges = [("deploy", "errors"), ("engines", "deploy"), ("deploy", "relay"), ("relay", "engines")]
    assert set(circle(edges)) == {"deploy", "engines", "relay"}
    assert circle(edges[:-1]) is None


def test_every_room_has_its_level():
    named = set().union(*LEVELS)
    assert named <= ROOMS


@pytest.mark.parametrize("path", FILES, ids=name)
def test_few_rooms_import_flower(path):
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
