"""The three floors: lipflow < pipeline < cluster. Imports only point down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCIENCE_MAY_IMPORT = {"lipflow", "torch", "numpy", "numba", "zuko", "safetensors", "pydantic", "nvdiffrast"}
DATA_MAY_NOT_IMPORT = {"cluster", "ray", "mlflow"}


def imported_packages(source: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            packages.add(source.relative_to(ROOT).parts[0])
    return packages


def modules_of(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no modules in {package}/"
    return found


@pytest.mark.parametrize("source", modules_of("lipflow"), ids=lambda path: str(path.relative_to(ROOT)))
def test_science_imports_only_its_few_libraries(source, stdlib_names):
    assert imported_packages(source) - SCIENCE_MAY_IMPORT - stdlib_names == set()


@pytest.mark.parametrize("source", modules_of("pipeline"), ids=lambda path: str(path.relative_to(ROOT)))
def test_data_floor_knows_nothing_of_ray_mlflow_or_the_jobs(source):
    assert imported_packages(source) & DATA_MAY_NOT_IMPORT == set()


@pytest.fixture(scope="module")
def stdlib_names() -> set[str]:
    import sys

    return set(sys.stdlib_module_names)
