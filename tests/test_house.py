"""The house rules: who may import whom, one configuration, one version, and no text that only one machine understands."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import accelerated
import reference

ROOT = Path(__file__).parents[1]
ROOMS = ("reference", "kernels", "accelerated")
TESTING = {"tests", "benchmarks", "notebooks"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What each room may import besides the standard library and itself. None: any library.
ALLOWED = {"reference": {"numpy", "safetensors"}, "kernels": {"numpy", "ml_dtypes", "cupy"}, "accelerated": None}
CYTHON = {"cython", "libc"}  # what a .pyx may also cimport


def sources(room: str) -> list[Path]:
    found = sorted([*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.pyx")])
    assert found, f"{room}/ holds no source"
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, lazy: bool = True) -> set[str]:
    """The full names that a source imports; `lazy=False` leaves out imports inside functions and under TYPE_CHECKING."""
    if path.suffix == ".pyx":
        return set(re.findall(r"^\s*(?:from|cimport|import)\s+([\w.]+)", path.read_text(), re.MULTILINE))
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    found = set()
    for node in walk(ast.parse(path.read_text(), str(path)), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def walk(node: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        if lazy or not deferred:
            yield from walk(child, lazy)


def run(code: str, **environment: str) -> str:
    """Run Python in a process of its own, in the checkout, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Hides the libraries named in `absent`, as if they were not installed; `import_all` imports every module of a room.
WITHOUT = """
import importlib, importlib.machinery, pkgutil, sys
class Installed:
    finders = list(sys.meta_path)
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)
sys.meta_path[:] = [Installed()]
def import_all(room):
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    for path in sources(room):
        for name in imports(path):
            top = name.partition(".")[0]
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert top not in TESTING, where
            if ALLOWED[room] is None:
                assert top != "reference", where
            elif top not in sys.stdlib_module_names | {room}:
                assert top in ALLOWED[room] | (CYTHON if path.suffix == ".pyx" else set()), where


def test_no_module_imports_itself_in_a_circle():
    modules = {module_name(path): path for room in ROOMS for path in sources(room)}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = {t if t in modules else t.rpartition(".")[0] for t in imports(path, lazy=False)}
        graph[name] = {t for t in targets if t in modules and t != name}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(modules)
    # Between rooms a function that imports late counts as well.
    rooms = {room: {n.partition(".")[0] for p in sources(room) for n in imports(p)} & set(ROOMS) - {room} for room in ROOMS}
    assert list(graphlib.TopologicalSorter(rooms).static_order())


def test_reference_runs_on_numpy_and_safetensors_alone():
    code = f"""
import sys
import numpy, safetensors.numpy
before = set(sys.modules)
absent = {{"torch", "torchvision", "timm", "scipy", "cupy", "ml_dtypes", "PIL", "matplotlib", "accelerated", "kernels"}}
{WITHOUT}
import_all("reference")
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""
    new = {name for name in run(code).split() if name not in sys.stdlib_module_names}
    new = {name for name in new if not name.startswith(("_cython_", "cython_runtime", "numpy"))}  # Cython's own bookkeeping
    assert new == {"reference"}


def test_kernels_is_cheap_to_import_and_never_raises():
    code = """
import sys
{}
before = set(sys.modules)
import kernels
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""
    with_all = set(run(code.format("")).split())
    assert "kernels" in with_all
    assert not with_all & {"cupy", "torch", "scipy", "accelerated", "reference"}, "a GPU library is imported before it is needed"
    run(code.format("absent = {'cupy', 'cupy_backends', 'ml_dtypes', 'torch'}\n" + WITHOUT))


def test_accelerated_never_loads_reference():
    run(f"""
absent = {{"reference", "tests"}}
{WITHOUT}
import_all("accelerated")
""")


def test_inference_needs_no_optional_package():
    optional = "mitsuba drjit pydantic pydantic_settings rich tensorboard transformers sklearn cv2 scipy cupy webdataset"
    run(f"""
absent = set({optional.split()})
{WITHOUT}
import torch, accelerated
model = accelerated.create_model("dpt_tiny").eval()
with torch.inference_mode():
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 32, 48)
import accelerated.predict
""")


def test_both_forms_hold_one_table_of_configurations():
    assert reference.CONFIGS == accelerated.CONFIGS
    for name in reference.CONFIGS:
        for changes in (
            {},
            {"readout": "add", "taps": [0, 1, 2, 3]},
            {"task": "segmentation"},
            {"task": "segmentation", "num_classes": 59},
        ):
            ours, theirs = reference.configuration(name, **changes), accelerated.configuration(name, **changes)
            assert ours == theirs
            assert list(ours) == list(theirs), "the order of the keys is what a weight file shows"
            assert ours is not reference.CONFIGS[name]


def test_the_reference_infers_unless_it_is_told_to_train():
    told = []
    for path in sorted((ROOT / "reference").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                named = [*node.args.args[len(node.args.args) - len(node.args.defaults) :]]
                told += [ast.unparse(d) for a, d in zip(named, node.args.defaults, strict=True) if a.arg == "training"]
    assert len(told) > 5
    assert set(told) == {"False"}


def test_unknown_configurations_are_refused_alike():
    for changes in ({"name": "dpt_huge"}, {"name": "dpt_base", "task": "normals"}, {"name": "dpt_base", "num_classes": 3}):
        messages = set()
        for form in (reference, accelerated):
            with pytest.raises(ValueError, match=str(list(changes.values())[-1])) as caught:
                form.configuration(**changes)
            messages.add(str(caught.value))
        assert len(messages) == 1, messages


def test_one_version():
    version = PROJECT["version"]
    assert importlib.metadata.version(PROJECT["name"]) == version
    for room in ROOMS:
        text = (ROOT / room / "__init__.py").read_text()
        stated = re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE)
        assert stated in ([], [version]), f"{room} states version {stated}, pyproject.toml {version}"
    assert reference.__version__ == version
    newest = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_transformers_runs_beside_our_kernels():
    """`transformers` looks for the PyPI package of that name, finds our folder, and must leave it alone."""
    out = run(
        """
import kernels
import torch, transformers
from transformers.utils import import_utils
assert not import_utils.is_kernels_available()
config = transformers.DPTConfig(
    image_size=32, patch_size=16, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
    backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, is_hybrid=False,
)
depth = transformers.DPTForDepthEstimation(config).eval()(torch.zeros(1, 3, 32, 32)).predicted_depth
assert depth.shape == (1, 32, 32) and depth.isfinite().all()
print(kernels.__file__, getattr(import_utils, "KERNELS_MIN_VERSION", ""), getattr(import_utils, "KERNELS_MAX_VERSION", ""))
""",
        HF_HUB_OFFLINE="1",
    )
    file, *accepted = out.rsplit(maxsplit=2)
    assert Path(file) == ROOT / "kernels" / "__init__.py"
    version = Version(PROJECT["version"])
    for least, below in [("0.18.2", "0.19.0"), accepted] if len(accepted) == 2 else [("0.18.2", "0.19.0")]:
        assert not Version(least) <= version < Version(below), f"transformers would take version {version} for the PyPI package's"


def test_no_extra_brings_the_other_kernels():
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")
    waiting = [(PROJECT["name"], frozenset(PROJECT["optional-dependencies"]))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        assert name != "kernels"
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed here, as the CUDA 12 wheels beside CUDA 13's
        for requirement in map(Requirement, lines):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                waiting.append((requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)))
    assert len(seen) > 30, "the walk did not follow the requirements"


# Absolute paths of one machine, and talk of how the text came to be. The brackets keep this file from matching itself.
FOREIGN = re.compile(
    r"/wor[k]/|/roo[t]/|/hom[e]/\w|/Use[r]s/\w|/opt/py[p]i|/tm[p]/|\.\./share[d]|\bshare[d]/(design|paper|style|fixtures)"
    r"|\b(this|previous|next|earlier|later|another) sessio[n]\b|\bissu[e] #?\d|\bsub-?agent[s]?\b|\bhelper sessio[n]"
    r"|\bthe lea[d] (will|commits)|\bthe brie[f] (says|asks)|contract\.m[d]"
)


def text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        return [path for path in (ROOT / name for name in listed.stdout.split("\0") if name) if path.is_file()]
    folders = [*ROOMS, "tests", "notebooks", "benchmarks"]  # unpacked without git
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_the_text_belongs_to_no_machine():
    found = []
    for path in text_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture or an archive
        found += [f"{path.relative_to(ROOT)}:{i}: {m[0]}" for i, line in enumerate(lines, 1) for m in FOREIGN.finditer(line)]
    assert not found, "\n".join(found)
