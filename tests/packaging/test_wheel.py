"""The wheel as it ships, and a package of somebody else's passes beside it."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the declared backend from a copy of the tracked files."""
    pytest.importorskip("scikit_build_core")
    source = tmp_path_factory.mktemp("source")
    for name in ("elsa_compile", "passes", "runtime", "pyproject.toml", "README.md", "LICENSE"):
        origin = ROOT / name
        if origin.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(origin, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(origin, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_holds_one_package_and_the_library(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"elsa_compile"}
    for name in (
        "elsa_compile/cli.py", "elsa_compile/recipes/wanda.yaml", "elsa_compile/py.typed",
        "elsa_compile/passes/prune_wanda.py", "elsa_compile/runtime/session.py",
    ):  # fmt: skip
        assert name in names
    libraries = [n for n in names if n.startswith("elsa_compile/runtime/") and "elsa_native" in n]
    assert any(name.endswith((".so", ".dylib", ".dll")) for name in libraries)
    assert not any(n.endswith((".cpp", ".h", "CMakeLists.txt")) for n in names)
    assert not any("test" in name for name in names)


def test_the_wheel_declares_its_commands_and_dependencies(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {n.rpartition("/")[2]: n for n in archive.namelist() if ".dist-info/" in n}
    entries = archive.read(read["entry_points.txt"]).decode()
    assert "elsa-compile" in entries
    assert "elsa-run" in entries
    metadata = archive.read(read["METADATA"]).decode()
    gpu = [line for line in metadata.splitlines() if "onnxruntime-gpu" in line]
    assert any("linux" in line and "x86_64" in line for line in gpu)


def test_the_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import elsa_compile, elsa_compile.passes\n"
        "from elsa_compile.runtime import kernels\n"
        f"assert elsa_compile.__file__.startswith({str(tmp_path)!r}), elsa_compile.__file__\n"
        "assert kernels.available() == (True, ''), kernels.available()\n"
        "from elsa_compile.recipe import preset_names; assert preset_names()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Pass, PassStats, option


@dataclass(frozen=True, kw_only=True)
class ScaleWeights(Pass):
    """Multiply every weight."""

    name: ClassVar[str] = "scale-weights"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    factor: float = option(2.0, "by how much", low=0.1)

    def run(self, program, ctx):
        for weight in program.prunable.values():
            weight.parameter.data.mul_(self.factor)
        return PassStats(changed=len(program.prunable))
'''


@pytest.fixture
def plugin(tmp_path):
    """A real little package, built and unpacked: its folder."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "scaling_passes.py").write_text(_PLUGIN)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "scaling-passes"\nversion = "1.0"\n'
        '[project.entry-points."elsa_compile.passes"]\n'
        'scale-weights = "scaling_passes:ScaleWeights"\n'
        '[tool.setuptools]\npy-modules = ["scaling_passes"]\n'
    )
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--target", str(target), str(project)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_a_third_party_pass_is_found_and_runs(plugin):
    code = (
        f"import sys; sys.path.insert(0, {str(plugin)!r})\n"
        "import torch, elsa_compile\n"
        "from elsa_compile.recipe import Recipe\n"
        "from elsa_compile.cli import main\n"
        "main(['--list-passes']); main(['--explain', 'scale-weights'])\n"
        "recipe = Recipe.parse('elsa_recipe: 1\\npasses:\\n- scale-weights: {factor: 3}')\n"
        "model = torch.nn.Linear(2, 2); before = model.weight.detach().clone()\n"
        "elsa_compile.apply(model, *recipe.passes, example_inputs=(torch.ones(2, 2),))\n"
        "assert torch.equal(model.weight, before * 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^scale-weights +Multiply every weight\.$", done.stdout, re.MULTILINE)
    assert "factor: float = 2.0  (>= 0.1)" in done.stdout


def test_a_broken_third_party_pass_is_named(plugin):
    (plugin / "scaling_passes.py").write_text("import a_module_that_does_not_exist")
    code = f"import sys; sys.path.insert(0, {str(plugin)!r})\nfrom elsa_compile.cli import main\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['--list-passes']))"],
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "package scaling-passes cannot be imported" in done.stderr
