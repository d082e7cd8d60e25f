"""The rules of the house: light imports, one direction, docstrings, pins that agree with the declared bounds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "apache_beam", "transformers", "open_clip", "faiss", "duckdb", "aiohttp")
PACKAGES = ("pairmill", "schemas", "filters", "captioners", "pipelines")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after some code."""
    code += "\nimport sys; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(next(line for line in done.stdout.splitlines() if line.startswith("MODULES")).split()[1:])


def test_importing_the_packages_loads_nothing_heavy():
    assert not modules_after("import pairmill, filters, captioners, schemas, pipelines") & set(HEAVY)


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['pairmill', '--help']\nfrom pairmill.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass"
    loaded = modules_after(code)
    assert not loaded & {*HEAVY, "pyarrow", "numpy", "pydantic", "deltalake"}


def test_modules_of_policy_load_nothing_heavy():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("schemas", "filters", "captioners", "pipelines")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert not modules_after(f"import {', '.join(names)}") & set(HEAVY)


def test_imports_point_one_way():
    if importlib.util.find_spec("importlinter") is None:
        pytest.fail("import-linter is not installed; pip install -r requirements-dev.txt")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_module_says_what_it_is_for(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def read_pins(name: str) -> dict[str, list[Requirement]]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins: dict[str, list[Requirement]] = {}
    for line in lines:
        if line and not line.startswith(("#", "-r ")):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def test_all_that_is_declared_is_pinned_and_the_pins_fit():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = read_pins("requirements.txt")
    for declared, file, pins in (
        (project["dependencies"], "requirements.txt", base),
        # extras of what the base pins (ray[default]) are pinned by what they add
        (project["optional-dependencies"]["dev"], "requirements-dev.txt", base | read_pins("requirements-dev.txt")),
    ):
        for requirement in map(Requirement, declared):
            found = pins.get(canonicalize_name(requirement.name))
            assert found, f"{requirement.name} is in pyproject.toml, but not in {file}"
            for pin in found:
                version = str(pin.specifier).removeprefix("==")
                assert requirement.specifier.contains(version), f"{file} pins {pin}, pyproject.toml wants {requirement}"


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_pins_are_exact_and_unique_for_each_python(file: str):
    for name, found in read_pins(file).items():
        assert all(re.fullmatch(r"==[\w.+]+", str(pin.specifier)) for pin in found), name
        for version in ("3.10", "3.11", "3.12"):
            environment = {"python_version": version, "sys_platform": "linux", "platform_machine": "x86_64"}
            chosen = [pin for pin in found if pin.marker is None or pin.marker.evaluate(environment)]
            assert len(chosen) <= 1, f"{name} has {len(chosen)} pins for Python {version}"


def test_the_project_names_no_machine():
    """No path and no package index of the machine it was written on."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # an unpacked source archive
        files = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".toml", ".txt", ".md", ".yaml")]
    else:
        files = [ROOT / name for name in listed.stdout.splitlines()]
    telling = re.compile("|".join(("extra-" + "index-url", "find-" + "links", "/" + r"(home|root)/\w+/")))
    for path in files:
        if (
            path.is_file()
            and path.suffix in (".py", ".toml", ".txt", ".md", ".yaml", ".yml", "")
            and os.access(path, os.R_OK)
        ):
            found = telling.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path.relative_to(ROOT)} holds {found[0]!r}"
