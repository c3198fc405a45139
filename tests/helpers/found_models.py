"""The models that contract tests are run on."""

import pathlib

from rar_jax.models import find_module, module_names

TOYS = pathlib.Path(__file__).parents[1] / "contracts" / "toys"


def list_models(kind: str) -> list[str]:
    """Return the package's models of a kind, and the toys: modules without a test in tests/contracts/toys."""
    toys = [f"tests.contracts.toys.{path.stem}" for path in sorted(TOYS.glob("[!_]*.py"))]
    toys = [name for name in toys if not name.rpartition(".")[2].startswith("test_")]
    offers = {"generators": "sample", "tokenizers": "encode"}[kind]
    return module_names(kind) + [name for name in toys if hasattr(find_module(kind, name), offers)]
