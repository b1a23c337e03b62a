"""Imports only go up the layers, siblings and cycles apart, and the core needs no oracle."""

import ast
from pathlib import Path

import lora_jax

ROOT = Path(lora_jax.__file__).parent
LAYERS = (
    ("errors",),
    ("config",),
    ("leaves",),
    ("tree",),
    ("cache",),
    ("demo",),
    ("programs",),
    ("patterns", "quantize", "experts", "moments", "slots"),
    ("targets",),
    ("weights", "shared_input", "sharding", "hosts"),
    ("nn",),
    ("models", "adapters", "data", "bank", "bank_updates"),
    ("formats",),
    ("settle",),
    ("session",),
    ("report",),
    ("objectives",),
    (
        "train.bits",
        "train.optimizer",
        "train.step",
        "train.checksums",
        "train.interrupt",
        "train.lock",
        "train.norms",
        "train.monitor",
        "generate",
        "combine",
    ),
    ("serve",),
    (
        "train.base",
        "train.checkpoint",
        "train.directory",
        "train.environment",
        "train.outputs",
        "train.resume",
        "train.run_file",
        "train.scored",
    ),
    ("train.reference",),
    (
        "train.calibration",
        "train.epochs",
        "train.first_rows",
        "train.probe",
        "train.setup",
        "train.evaluate",
        "train.warn",
        "train.predictions",
    ),
    ("train.base_scores", "train.facts", "train.forecast", "train.ready"),
    ("train.merged", "train.strength", "train.trainer"),
    ("train.gguf",),
    ("train.export", "train.start"),
    ("audit", "train.conclude", "train.finished"),
    ("train.loop", "plan"),
    ("sweep",),
    ("cli",),
    ("start",),
    ("__main__",),
)
SIBLINGS = {"models", "adapters", "data"}
HEIGHT = {unit: height for height, units in enumerate(LAYERS) for unit in units}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in ROOT.rglob("*.py")
}


def imports(file):
    """Absolute names of what a file imports, inside functions too: `a.b` of `from a import b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["lora_jax", *file.relative_to(ROOT).parts]
            base = here[: len(here) - node.level] if node.level else []
            parts = [*base, node.module] if node.module else base
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def unit_of(name):
    """The unit of LAYERS that a module of the package belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "train" and len(parts) > 1 else parts[0]


def own_imports(module):
    """Modules of the package that a module imports, as MODULES names them."""
    for name in imports(MODULES[module]):
        if name == "lora_jax" or name.startswith("lora_jax."):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            yield ".".join(parts)


def test_imports_only_go_up():
    wrong = []
    for module in set(MODULES) - {"__init__", "train.__init__", "train"}:
        here = unit_of(module)
        assert here in HEIGHT, f"{module} has no place in LAYERS"
        for other in map(unit_of, own_imports(module)):
            siblings = {here, other} <= SIBLINGS
            if other and other != here and (siblings or HEIGHT[other] > HEIGHT[here]):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_cycles():
    left = {module: set(own_imports(module)) - {module} for module in MODULES}
    while ready := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in ready:
            del left[module]
    assert not left


def test_the_core_needs_no_oracle_and_data_no_jax():
    tops = {module: {name.split(".")[0] for name in imports(MODULES[module])} for module in MODULES}
    assert not {
        module for module, names in tops.items() if names & {"torch", "peft", "bitsandbytes"}
    }
    light = ("errors", "cache", "data", "config", "demo", "cli", "start")
    no_jax = {module for module in MODULES if unit_of(module) in light}
    assert not {module for module in no_jax if tops[module] & {"jax", "flax", "optax", "orbax"}}
    for module in MODULES:
        if unit_of(module) == "data":
            assert {unit_of(name) for name in own_imports(module)} <= {
                "cache",
                "config",
                "data",
                "demo",
                "errors",
            }
