"""The rules of the house: who may import whom, what is packaged, what no file may hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"mlip": "mlip", "mlip.calculators": "calculators", "mlip.data": "data"}
FOLDERS["mlip.training"] = "training"

# Part of the package -> what it may import of the package at run time, and which libraries beside
# the standard library, numpy and torch.  The longest prefix counts.
# The same table is in docs/architecture.md.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "mlip": (set(), set()),
    "mlip.__main__": ({"mlip.cli"}, set()),
    "mlip.config": (set(), {"pydantic", "yaml"}),
    "mlip.allocator": (set(), set()),
    "mlip.nn": ({"mlip.nn"}, {"e3nn"}),
    "mlip.nn.zbl": ({"mlip.nn"}, {"ase.data", "ase.units"}),
    "mlip.nn.cohesion": ({"mlip.nn"}, {"ase.data"}),
    "mlip.nn.rotations": ({"mlip.nn"}, {"scipy"}),
    "mlip.nn.cuequivariance_blocks": ({"mlip.nn"}, {"cuequivariance", "cuequivariance_torch"}),
    "mlip.data": (
        {"mlip.data", "mlip.config"},
        {"ase", "h5py", "matscipy", "torch_geometric", "rich", "scipy"},
    ),
    "mlip.models": (
        {"mlip.models", "mlip.nn", "mlip.data.graph", "mlip.config"},
        {"pydantic", "e3nn"},
    ),
    "mlip.wrappers": (
        {"mlip.wrappers", "mlip.nn", "mlip.data.graph", "mlip.config"},
        {"pydantic"},
    ),
    "mlip.potential": ({"mlip.nn", "mlip.data.graph"}, set()),
    "mlip.rotation_orbit": ({"mlip.potential", "mlip.nn", "mlip.data.graph"}, set()),
    "mlip.compiled": ({"mlip.nn", "mlip.data.graph"}, set()),
    "mlip.recorded": ({"mlip.compiled"}, set()),
    "mlip.facet_gradient": ({"mlip.compiled", "mlip.models", "mlip.nn", "mlip.data.graph"}, set()),
    "mlip.backends": (
        {
            "mlip.models",
            "mlip.potential",
            "mlip.nn",
            "mlip.data.graph",
            "mlip.compiled",
            "mlip.facet_gradient",
            "mlip.recorded",
        },
        set(),
    ),
    "mlip.pretrained": (set(), set()),
    "mlip.tensorfile": (set(), {"safetensors"}),
    "mlip.modelcard": ({"mlip.pretrained", "mlip.tensorfile"}, set()),
    "mlip.checkpoint": (
        {"mlip.models", "mlip.wrappers", "mlip.potential", "mlip.nn", "mlip.config"}
        | {"mlip.modelcard", "mlip.pretrained", "mlip.tensorfile"},
        {"safetensors", "ase.data", "e3nn"},
    ),
    "mlip.programfile": (
        {"mlip.backends", "mlip.checkpoint", "mlip.compiled", "mlip.models", "mlip.potential"}
        | {"mlip.tensorfile"},
        set(),
    ),
    "mlip.evaluation": (
        {"mlip.evaluation", "mlip.potential", "mlip.checkpoint", "mlip.data", "mlip.pretrained"}
        | {"mlip.tensorfile", "mlip.nn", "mlip.rotation_orbit"},
        {"ase", "h5py", "matplotlib", "rich", "scipy"},
    ),
    "mlip.training": (
        {"mlip.training", "mlip.evaluation", "mlip.checkpoint", "mlip.potential", "mlip.data"}
        | {"mlip.models", "mlip.wrappers", "mlip.nn", "mlip.config", "mlip.pretrained"}
        | {"mlip.allocator", "mlip.backends", "mlip.compiled"},
        {"ase", "h5py", "matplotlib", "pydantic", "rich", "yaml", "torch_geometric", "tensorboard"}
        | {"wandb", "e3nn"},
    ),
    "mlip.calculators": (
        {"mlip.calculators", "mlip.checkpoint", "mlip.pretrained", "mlip.potential", "mlip.data"}
        | {"mlip.rotation_orbit", "mlip.wrappers", "mlip.backends"}
        | {"mlip.compiled", "mlip.programfile", "mlip.nn.buckets", "mlip.nn.neighborhoods"},
        {"ase", "matscipy", "matplotlib", "rich", "scipy", "spglib"},
    ),
    "mlip.mace_export": (set(), {"ase", "mace"}),
    "mlip.mace_import": (
        {"mlip.mace_export", "mlip.checkpoint", "mlip.data.graph", "mlip.models"}
        | {"mlip.nn", "mlip.potential"},
        {"ase.data"},
    ),
    "mlip.cli": ({"mlip"}, {"typer", "rich", "ase"}),
    "mlip.cli_models": ({"mlip"}, {"typer"}),
}
LIGHT = {"mlip", "mlip.__main__", "mlip.cli", "mlip.cli_models", "mlip.config", "mlip.pretrained"}
LIGHT |= {"mlip.modelcard", "mlip.tensorfile", "mlip.allocator"}  # these are imported without torch
ALWAYS = {*sys.stdlib_module_names, "numpy", "torch"}


def modules() -> dict[str, Path]:
    """Name and file of every module, found by walking the folders."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):  # rglob does not enter the links
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "mlip" and parts[0] in ("calculators", "data", "training"):
                continue
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether at the top) of every import that runs; not those for type checkers."""
    todo: list[tuple[ast.AST, bool]] = [(tree, True)]
    while todo:
        node, top = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += [(child, top) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                # `from mlip.data import graph` imports the module mlip.data.graph
                full = f"{module}.{alias.name}"
                yield (full if full in MODULES else module), node.lineno, top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo += [(child, top and not inside) for child in ast.iter_child_nodes(node)]


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def test_the_tree_is_found() -> None:
    assert {
        "mlip",
        "mlip.checkpoint",
        "mlip.data.graph",
        "mlip.training",
        "mlip.calculators",
    } <= set(MODULES)
    assert not [name for name in MODULES if name.startswith("mlip.mlip")]


@pytest.mark.parametrize("name", MODULES)
def test_imports_keep_to_the_rules(name: str) -> None:
    rule = max((r for r in RULES if within(name, {r}) and (r != "mlip" or name == "mlip")), key=len)
    inner, libraries = RULES[rule]
    for module, line, top in imports(TREES[name]):
        where = f"{MODULES[name].relative_to(ROOT)}:{line} imports {module}"
        assert not module.startswith("."), f"{where}: imports are absolute"
        if within(module, {"mlip"}):
            assert module == "mlip" or within(module, inner), f"{where}: {rule} may not"
        else:
            assert within(module, ALWAYS | libraries), f"{where}: {rule} may not"
        if name in LIGHT and top:
            light = within(module, ALWAYS - {"torch", "numpy"} | libraries) or module in LIGHT
            assert light and module.split(".")[0] != "ase", f"{where}: at the top, but slow"


def test_models_do_not_import_each_other() -> None:
    for name, tree in TREES.items():
        if name.startswith("mlip.models."):
            assert not [m for m, _, _ in imports(tree) if within(m, {"mlip.models"})], name


def test_the_table_of_imports_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for rule, (inner, libraries) in RULES.items():
        cells = [", ".join(f"`{item}`" for item in sorted(items)) for items in (inner, libraries)]
        row = f"| `{rule}` | {cells[0] or 'nothing'} | {cells[1]} |"
        assert row in text, f"docs/architecture.md lacks the row\n{row}"


def test_package_list_is_the_tree() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    folders = {
        name.rpartition(".")[0] for name, path in MODULES.items() if path.name != "__init__.py"
    }
    assert set(setup["packages"]) == packages
    assert folders - {""} <= packages, "a folder with modules lacks its __init__.py"
    assert setup["package-dir"] == {name: folder for name, folder in FOLDERS.items()}


@pytest.mark.parametrize("name", ["calculators", "data", "training"])
def test_links_are_relative_and_right(name: str) -> None:
    link = ROOT / "mlip" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (link / "__init__.py").is_file()


def test_names_of_files_say_something() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    foreign = {"ase", "torch", "e3nn", "h5py", "numpy", "matscipy", "yaml", "typing", "types"}
    for name in MODULES:
        assert name.rpartition(".")[2] not in vague | foreign, name


def test_files_are_short_enough_to_read() -> None:
    folders = {*FOLDERS.values(), "tests", "examples", "benchmarks"}
    python = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in python if (n := p.read_text().count("\n")) > 600}
    assert not long


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and public methods of public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_explained(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    bare = [item for item, node in public(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not bare, f"{name}: no docstring on {', '.join(bare)}"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Files of the wheel and of the source archive, built from a copy of the tracked files."""
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("building needs setuptools >= 77")
    except PackageNotFoundError:
        pytest.skip("building needs setuptools")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for line in listed.stdout.splitlines():
        if (
            line.startswith(("benchmarks/", "examples/data/", "tests/"))
            or not (ROOT / line).exists()
        ):
            continue
        target = copy / line
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / line).is_symlink():
            target.symlink_to((ROOT / line).readlink())
        else:
            target.write_bytes((ROOT / line).read_bytes())
    build = (
        "import sys; from setuptools import build_meta as b; out = sys.argv[1]; "
        "b.build_sdist(out); b.build_wheel(out)"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(out)],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    return {"wheel": set(zipfile.ZipFile(wheel).namelist()), "sdist": inside}


def test_wheel_holds_every_module_and_the_trained_models(archives: dict[str, set[str]]) -> None:
    expected = {
        f"{name.replace('.', '/')}.py" for name, p in MODULES.items() if p.stem != "__init__"
    }
    expected |= {
        f"{n.replace('.', '/')}/__init__.py" for n, p in MODULES.items() if p.stem == "__init__"
    }
    expected |= {
        f"mlip/pretrained/{p.name}" for p in (ROOT / "mlip/pretrained").glob("*.safetensors")
    }
    assert expected <= archives["wheel"]
    others = {
        n for n in archives["wheel"] - expected if ".dist-info/" not in n and n.endswith(".py")
    }
    assert not others
    assert any(name.endswith("licenses/LICENSE") for name in archives["wheel"])


def test_source_archive_can_be_built_from(archives: dict[str, set[str]]) -> None:
    expected = {str(path.relative_to(ROOT)) for path in MODULES.values()}
    assert expected | {"pyproject.toml", "README.md", "LICENSE"} <= archives["sdist"]
