"""`--tensor N`: devices that share one copy of the generator draw what each would alone."""

import json
import pathlib
from typing import Any

import cheap_inception
import jax
import numpy as np
import pytest

from rar_jax import cli, load
from rar_jax.errors import ConfigError
from rar_jax.evaluation import program
from rar_jax.generators.rar import Sampling
from rar_jax.keys import sample_keys
from rar_jax.metrics import sums
from rar_jax.parallel.mesh import MeshConfig, make_mesh

SAMPLING = Sampling(2.0, 1.0, 1.0)


def drawn(pair: Any, tensor: int) -> tuple[np.ndarray, int]:
    """Tokens (b, n) of all classes, and the bytes of the generator that a device holds."""
    pipeline = load(pair.generator, tokenizer=pair.tokenizer, mesh=make_mesh(MeshConfig(tensor=tensor)))
    model, params = pipeline.generator, pipeline.generator_params
    labels = np.arange(16, dtype=np.int32) % 10

    @jax.jit
    def tokens(params: Any) -> jax.Array:
        return model.module.sample(
            model.config, params, labels, keys=sample_keys(3, np.arange(len(labels))), sampling=SAMPLING
        )

    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    return np.asarray(tokens(params)), held


def test_the_tokens_are_those_of_one_device(released_pair: Any) -> None:
    alone, whole = drawn(released_pair, 1)
    assert len(np.unique(alone)) > 10
    saved = {}
    for tensor in (2, 4):
        shared, held = drawn(released_pair, tensor)
        np.testing.assert_array_equal(shared, alone)
        saved[tensor] = whole - held
    # Of what is cut (the tables, large in a generator this small, are not) a half and three quarters are elsewhere.
    assert 2 * saved[2] > 0.4 * whole and 3 * saved[2] == 2 * saved[4], (saved, whole)


def test_evaluate_scores_the_same_samples(
    released_pair: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in [(sums, "POOL3"), (sums, "SPATIAL"), (sums, "CLASSES"), (program, "extract_features")]:
        monkeypatch.setattr(module, name, getattr(module, name))  # what `patch` changes is put back
    for name in ("load_inception", "read_reference"):
        monkeypatch.setattr(program, name, getattr(program, name))
    cheap_inception.patch()
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8))
    argv = ["evaluate", "--inception=any", "--batch-size=8", "--quiet"]
    made = ["--make-reference", str(tmp_path / "images.npz"), "--out", str(tmp_path / "reference.npz")]
    assert cli.main([*argv, *made]) == 0, capsys.readouterr().err
    argv += ["--weights", str(released_pair.generator), "--tokenizer", str(released_pair.tokenizer), "--samples=24"]
    argv += [
        "--samples-npz",
        "--sampling.scale=2",
        "--sampling.power=1",
        "--reference",
        str(tmp_path / "reference.npz"),
    ]
    results, images = [], []
    for tensor in (1, 2):
        out = tmp_path / str(tensor)
        assert cli.main([*argv, f"--tensor={tensor}", "--out", str(out)]) == 0, capsys.readouterr().err
        results.append(json.loads((out / "result.json").read_text()))
        with np.load(out / "samples.npz") as file:
            images.append(file["arr_0"])
    # The same tokens; pixels are summed in another order, and one that is nearly whole may be rounded the other way.
    apart = np.abs(images[1].astype(int) - images[0])
    assert apart.max() <= 1 and np.count_nonzero(apart) <= 20, (apart.max(), np.count_nonzero(apart))
    for name in ("fid", "sfid", "inception_score"):
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert results[0]["fid"] > 1e-3


def test_an_axis_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="'tensor': 3} does not multiply to 4 devices"):
        make_mesh(MeshConfig(tensor=3))
