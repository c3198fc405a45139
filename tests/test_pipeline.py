"""rar_jax.load: the same images from a file, from a converted directory and on a mesh; the original's logits in bfloat16."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rar_jax
from rar_jax import cli
from rar_jax.errors import CheckpointError, ConfigError, DeviceMemoryError
from rar_jax.generators import rar as generator
from rar_jax.generators.rar import Sampling
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.weights import maskgit_vq, rar
from tests.golden import max_difference

LABELS = [3, 1, 4, 1, 5]
SAMPLING = {"scale": 3.0, "power": 1.0, "temperature": 1.1}


@pytest.fixture(scope="module")
def images(released_pair: Any) -> np.ndarray:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    return pipeline.sample(LABELS, seed=7, **SAMPLING)


def test_images(images: np.ndarray) -> None:
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 5, "the same class twice is two images"


def test_a_converted_directory_gives_the_same(released_pair: Any, tmp_path: pathlib.Path, images: np.ndarray) -> None:
    argv = ["--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--out", tmp_path / "d"]
    assert cli.main(["convert", "--quiet", *map(str, argv)]) == 0
    pipeline = rar_jax.load(tmp_path / "d")
    np.testing.assert_array_equal(pipeline.sample(LABELS, seed=7, **SAMPLING), images)
    assert pipeline.sampling == Sampling() and pipeline.class_names == tuple("0123456789")
    with pytest.raises(ConfigError, match="has its own tokenizer: leave tokenizer out"):
        rar_jax.load(tmp_path / "d", tokenizer=released_pair.tokenizer)


@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_a_mesh_gives_the_same(released_pair: Any, images: np.ndarray, mesh: tuple[int, int, int]) -> None:
    devices = make_mesh(MeshConfig(*mesh))
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer, mesh=devices)
    again = pipeline.sample(LABELS, seed=7, **SAMPLING)
    # Sums in another order: a pixel may be truncated to the number below.
    assert np.abs(again.astype(int) - images).max() <= 1 and np.mean(again != images) < 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_do_not_matter(released_pair: Any, images: np.ndarray, batch_size: int) -> None:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    batches = list(pipeline.sample_batches(LABELS, seed=7, **SAMPLING, batch_size=batch_size))
    assert len(batches) == pipeline.batch_count(5, batch_size) and [len(b) for b in batches][:-1] == [batch_size] * (
        len(batches) - 1
    )
    again = np.concatenate(batches)
    assert np.abs(again.astype(int) - images).max() <= 1 and np.mean(again != images) < 0.01


def test_a_fact_tells_the_size_of_the_image(released_pair: Any, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(generator.TINY, num_tokens=9)
    rar.save(tmp_path / "w.safetensors", config, generator.init(config, jax.random.key(0)))
    with pytest.raises(ConfigError, match=r"draws 9 ids .* decodes 64 ids .*, or give --fact image_size=VALUE"):
        rar_jax.load(tmp_path / "w.safetensors", tokenizer=released_pair.tokenizer)
    pipeline = rar_jax.load(tmp_path / "w.safetensors", tokenizer=released_pair.tokenizer, facts={"image_size": 6})
    assert pipeline.sample([1]).shape == (1, 6, 6, 3)


def test_inside_a_program_of_ones_own(released_pair: Any, images: np.ndarray) -> None:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    from rar_jax.keys import sample_keys

    @jax.jit
    def mean_colour(params: Any, labels: jax.Array, sampling: Sampling) -> jax.Array:
        keys = sample_keys(7, jnp.arange(5))
        return pipeline.sample_fn(params, labels, keys, sampling).astype(jnp.float32).mean(axis=(1, 2))

    ours = mean_colour(pipeline.params, jnp.asarray(LABELS), pipeline.make_sampling(SAMPLING))
    np.testing.assert_allclose(ours, images.astype(np.float64).mean(axis=(1, 2)), atol=0.5)


def test_the_program_of_the_guide(released_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/released_weights.md, with a tiny model in RAR-B's place."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "released_weights.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0].replace("[207, 360]", "[3, 1]")
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    monkeypatch.setattr(rar_jax, "load", lambda name, download: pipeline)
    names: dict[str, Any] = {}
    exec(code, names)
    ours = pipeline.sample([3, 1], seed=0, scale=4.0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(names["means"], ours, atol=0.5)


# ---------------------------------------------------------------- bfloat16


def test_bfloat16_chooses_as_float32_does(golden: pathlib.Path, parity: Any) -> None:
    """At least 98 % of the greedy choices under teacher forcing, or the option may not be offered."""
    config, params = rar.load(golden / "rar" / "rar_tiny.bin")
    tokens = jax.random.randint(jax.random.key(0), (128, config.num_tokens), 0, config.codebook_size)
    labels = jax.random.randint(jax.random.key(1), (128,), 0, config.num_classes + 1)
    exact = generator.cached_logits(config, generator.prepare(config, params), tokens, labels)
    narrow = generator.prepare(config, params, dtype="bfloat16")
    rough = generator.cached_logits(config, narrow, tokens, labels)
    agreement = float(jnp.mean(exact.argmax(-1) == rough.argmax(-1)))
    change = float(jnp.abs(exact - rough).max())
    parity.check("bfloat16, share of greedy choices that change", 1 - agreement, 0.02)
    parity.check("bfloat16, change of the logits", change, 0.02)
    assert change > 1e-4, "nothing was rounded"
    sizes = {str(x.dtype): 0 for x in jax.tree.leaves(narrow)}
    for x in jax.tree.leaves(narrow):
        sizes[str(x.dtype)] += x.size
    kernels = jax.tree_util.tree_leaves_with_path(params["transformer"])
    assert sizes["bfloat16"] == sum(x.size for path, x in kernels if path[-1].key == "kernel")
    raster = jnp.broadcast_to(jnp.arange(config.num_tokens)[None], tokens.shape)
    whole = generator.logits(config, params, tokens, labels, raster)  # without a cache
    parity.check("logits with a cache, teacher forced", max_difference(exact, whole), 1e-5)


def test_bfloat16_samples(released_pair: Any) -> None:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer, dtype="bfloat16")
    assert pipeline.generator_params["layers"][0]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert pipeline.sample(LABELS, seed=7, **SAMPLING).shape == (5, 16, 16, 3)


# ---------------------------------------------------------------- presets


def test_a_released_size_brings_its_settings_and_names(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file, and through a converted directory."""
    config = generator.Config(width=16, depth=1, num_heads=2, mlp_width=32)  # 256 tokens, 1024 codes, 1000 classes
    rar.save(tmp_path / "w.safetensors", config, generator.init(config, jax.random.key(0)))
    vq = tokenizer.Config(image_size=16, base_width=8, width_multipliers=(1,), blocks_per_level=1, latent_width=8)
    maskgit_vq.save(tmp_path / "vq.safetensors", vq, tokenizer.init(vq, jax.random.key(0)))
    read, _ = rar.open_params(tmp_path / "w.safetensors")
    monkeypatch.setitem(rar.FILES, "rar_l", dataclasses.replace(rar.FILES["rar_l"], config=read))
    argv = [
        "--weights",
        tmp_path / "w.safetensors",
        "--tokenizer",
        tmp_path / "vq.safetensors",
        "--out",
        tmp_path / "d",
        "--quiet",
    ]
    assert cli.main(["convert", *map(str, argv)]) == 0
    for pipeline in (
        rar_jax.load(tmp_path / "w.safetensors", tokenizer=tmp_path / "vq.safetensors"),
        rar_jax.load(tmp_path / "d"),
    ):
        assert pipeline.sampling == Sampling(15.5, 2.5, 1.02)
        assert pipeline.class_names[207] == "golden retriever"


# ---------------------------------------------------------------- mistakes


def test_a_damaged_directory(released_pair: Any, tmp_path: pathlib.Path) -> None:
    argv = ["--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--out", tmp_path / "d"]
    assert cli.main(["convert", "--quiet", *map(str, argv)]) == 0
    (tmp_path / "d" / "checkpoints" / "generator" / "0" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good generator checkpoint: convert it again"):
        rar_jax.load(tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text('{"version": "0.2", "name": "x", "sampling": 3}')
    with pytest.raises(ConfigError, match=r"config\.json is damaged: it lacks the section 'data'"):
        rar_jax.load(tmp_path / "d")


def test_what_is_missing(released_pair: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="give its tokenizer's too"):
        rar_jax.load(released_pair.generator)
    with pytest.raises(ConfigError, match="dtype is 'int8': it must be 'float32' or 'bfloat16'"):
        rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer, dtype="int8")
    with pytest.raises(ConfigError, match="is not a work directory"):
        rar_jax.load(tmp_path)
    config = dataclasses.replace(generator.TINY, num_tokens=12)
    rar.save(tmp_path / "w.safetensors", config, generator.init(config, jax.random.key(0)))
    with pytest.raises(ConfigError, match="draws 12 ids of 32 codes, the tokenizer decodes 64 ids"):
        rar_jax.load(tmp_path / "w.safetensors", tokenizer=released_pair.tokenizer)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"labels": [10]}, r"label 10 is outside the classes 0\.\.9"),
        ({"labels": [-1]}, "label -1 is outside"),
        ({"labels": []}, "no labels"),
        ({"labels": [0.5]}, "labels are float64: give class numbers"),
        ({"labels": [1], "seed": -1}, "seed is -1"),
        ({"labels": [1], "seed": 1.5}, "seed is 1.5"),
        ({"labels": [1], "batch_size": 1.5}, "batch_size is 1.5"),
        ({"labels": [1], "batch_size": 0}, "batch_size is 0"),
        ({"labels": [1], "skale": 4.0}, "sampling of generator 'rar' has no key 'skale'. Did you mean 'scale'?"),
    ],
)
def test_wrong_calls(released_pair: Any, keywords: dict[str, Any], says: str) -> None:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    with pytest.raises(ConfigError, match=says):
        pipeline.sample(**keywords)


def test_a_batch_that_memory_does_not_hold(released_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    monkeypatch.setattr(pipeline, "_sample", lambda *_: jnp.zeros(2**50, jnp.uint8).block_until_ready())
    with pytest.raises(DeviceMemoryError, match="batch_size 4"):
        pipeline.sample([0, 1, 2, 3])


def test_reconstructing_compiles_once(released_pair: Any) -> None:
    pipeline = rar_jax.load(released_pair.generator, tokenizer=released_pair.tokenizer)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    once = pipeline.reconstruct(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "decode", None)  # tracing again would call it
        again = pipeline.reconstruct(images)
    np.testing.assert_array_equal(once, again)
    assert once.shape == images.shape and once.dtype == np.uint8
