"""Four fake CPU devices for every test, and rank promotion is an error. Set before JAX starts its backend.

The tests compile thousands of tiny programs and run each a few times: without LLVM's optimizations they take half the time. What the
numbers mean does not change; RAR_JAX_TESTS_AS_SHIPPED=1 compiles as users do (`bash .ci/run long` runs the model's tests so). Tried,
and not kept: XLA's older emitter of fusions (--xla_cpu_use_fusion_emitters=false), two thirds of the time again, but the last bit of
AdamW then differs between two programs that tests/training/test_on_the_fly.py compares to the bit.
"""

import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", "RAR_JAX_TESTS_AS_SHIPPED" not in os.environ)
# Many tests compile the same program. One folder for this run, which the workers of `pytest -n` inherit; one that was given is
# kept, so that the next run finds in it what this one compiled. Only what takes long is worth it, and writing a program down is
# where jaxlib 0.10.2 was once seen to crash.
KEPT = "RAR_JAX_TEST_CACHE" in os.environ
CACHE = os.environ.setdefault("RAR_JAX_TEST_CACHE", tempfile.mkdtemp(prefix="rar_jax_tests_"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure() -> None:
    """Only the first process removes the folder; workers of `pytest -n` are told of theirs by PYTEST_XDIST_WORKER."""
    if "PYTEST_XDIST_WORKER" not in os.environ and not KEPT:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_file() -> Iterator[None]:
    """Compiled programs of a file of tests go with it: a worker that kept all of them grew to 8 GB."""
    yield
    jax.clear_caches()


GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the reference outputs."""
    return GOLDEN


class Parity:
    """Checks a measured number against its bound and remembers both: `PARITY_TABLE=docs/parity.md pytest` writes them down."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, float]] = {}

    def check(self, quantity: str, measured: float, bound: float) -> None:
        """Asserts that the number is at most its bound."""
        worst = max(float(measured), self.rows.get(quantity, (0.0, 0.0))[0])
        self.rows[quantity] = (worst, bound)
        assert float(measured) <= bound, f"{quantity}: {measured}, bound {bound}"

    def table(self) -> str:
        """Markdown."""
        rows = [f"| {name} | {bound:g} | {measured:.2g} |" for name, (measured, bound) in self.rows.items()]
        return "\n".join(["| quantity | bound | measured |", "|---|---|---|", *rows, ""])


@pytest.fixture(scope="session")
def parity() -> Iterator[Parity]:
    """Where tests of parity with the authors' code leave what they measured."""
    measured = Parity()
    yield measured
    if path := os.environ.get("PARITY_TABLE"):
        text = pathlib.Path(path).read_text()
        begin, end = "<!-- measured -->\n", "<!-- end -->"
        head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        pathlib.Path(path).write_text(head + measured.table() + tail)


@pytest.fixture(scope="session")
def inception_state() -> dict[str, np.ndarray]:
    """Random weights of the FID network by released name: those of the golden features."""
    from tests.golden.inception import make_state

    return make_state(GOLDEN / "inception")


@pytest.fixture(scope="session")
def inception_file(inception_state: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same as a file, in torch-fidelity's layout."""
    import safetensors.numpy

    path = tmp_path_factory.mktemp("inception") / "weights-inception.safetensors"
    safetensors.numpy.save_file(inception_state, path)
    return path


class Pair(NamedTuple):
    """Files of a generator and a tokenizer that fit, in the released layout."""

    generator: pathlib.Path
    tokenizer: pathlib.Path


@pytest.fixture(scope="session")
def released_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny RAR of 64 tokens and 10 classes, and a tokenizer of 16x16 pixels: random weights, nothing trained."""
    from rar_jax.generators import rar
    from rar_jax.tokenizers import maskgit_vq
    from rar_jax.weights import maskgit_vq as interop_vq
    from rar_jax.weights import rar as interop_rar

    folder = tmp_path_factory.mktemp("released")
    pair = Pair(folder / "rar_mini.safetensors", folder / "vq_mini.safetensors")
    rar_config = dataclasses.replace(rar.TINY, num_tokens=64)  # 8 x 8
    params = rar.init(rar_config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    interop_rar.save(pair.generator, rar_config, params)
    vq_config = maskgit_vq.Config(
        image_size=16, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8, codebook_size=32
    )
    interop_vq.save(pair.tokenizer, vq_config, maskgit_vq.init(vq_config, jax.random.key(1)))
    return pair


from stand_ins import cheap, straight, tiny  # noqa: E402, F401 (fixtures; after the settings above, since they import JAX)
