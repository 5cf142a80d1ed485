"""One floor per import: a file imports from floors below its own, and from its own package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lomo_ds"

FLOORS = [
    [
        "errors",
        "layers",
        "numerics",
        "memory",
        "host_memory",
        "precision",
        "random_states",
        "signals",
        "training_engine",
        "buckets",
        "triton_launch",
        "warmup",
    ],
    [
        "config",
        "batches",
        "client_arguments",
        "loss",
        "distributed",
        "clipping",
        "arguments",
        "data.text",
        "manifest",
        "int8",
        "host_budget",
        "prefetch",
    ],
    ["zero3", "rules", "ds_fields", "items"],
    [
        "step_batch",
        "parameter_access",
        "gathering",
        "reduction",
        "ds_config",
        "data.tokens",
        "data.packing",
        "ds_parse",
        "stores",
        "lifeline",
        "monitor",
    ],
    ["schedules", "data", "models", "checkpoint"],
    ["backward", "demo", "cli", "progress", "planner"],
    ["optimizer", "outlook", "places", "resume"],
    ["assembly", "engine_state"],
    ["engine", "baseline"],
    ["evaluate", "keeper"],
    ["trainer", "export_checkpoint"],
    ["job"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room a module stands in: itself, or the package it is in."""
    return module if module in FLOOR_OF else module.partition(".")[0]


def modules() -> list[str]:
    found = (path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py")))
    return [".".join(path.parts).removesuffix(".__init__") for path in found if path.parts != ("__init__",)]


def imports_of(module: str) -> set[str]:
    path = ROOT / (module.replace(".", "/") + ".py")
    source = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lomo_ds":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lomo_ds."):
            found.add((node.module or "").removeprefix("lomo_ds."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lomo_ds.") for a in node.names if a.name.startswith("lomo_ds.")}
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module: str) -> None:
    assert room_of(module) in FLOOR_OF, f"{module} stands on no floor; give it one"
    for imported in imports_of(module):
        same_package = module.partition(".")[0] == imported.partition(".")[0]
        down = FLOOR_OF[room_of(imported)] < FLOOR_OF[room_of(module)]
        assert down or same_package, f"{module} imports {imported}, which stands on its own floor or above"


@pytest.mark.parametrize("module", [module for module in modules() if room_of(module) != "zero3"])
def test_only_zero3_reads_what_deepspeed_adds_to_a_parameter(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    source = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    names = {node.attr for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Attribute)}
    assert not {name for name in names if name.startswith("ds_")} - {"ds_config"}
