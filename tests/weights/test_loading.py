"""Which module reads a file, and what a file does not tell."""

import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from torch_files import read_tensors, write_state_dict

import rar_jax
from rar_jax import cli
from rar_jax.errors import ConfigError, WeightsError
from rar_jax.models import Model
from rar_jax.tokenizers import maskgit_vq
from rar_jax.weights.loading import Reading, open_pair, open_weights, recognize_file
from rar_jax.weights.mapping import param_shapes, write_safetensors
from rar_jax.weights.maskgit_vq import FILES, FORMAT


def test_a_file_is_recognized_by_its_keys(golden: pathlib.Path, inception_file: pathlib.Path) -> None:
    assert recognize_file(golden / "rar" / "rar_tiny.bin") == ("generators", "rar")
    assert recognize_file(golden / "maskgit_vq" / "maskgit_vq_tiny.bin") == ("tokenizers", "maskgit_vq")
    assert recognize_file(inception_file) == ("networks", "inception")


def test_a_file_of_no_known_model_names_the_keys(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"pos_embedding": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"w\.safetensors holds no known model: .*'target_aware_pos_embed' \(rar\)"):
        open_weights(path, "generators")
    # `models` says it.
    with pytest.raises(WeightsError, match=r"w\.safetensors: 'lm_head.weight' is missing"):
        open_weights(path, "generators", reading=Reading(models=["rar"]))


def test_a_file_of_another_system_names_both(golden: pathlib.Path, inception_file: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match=r"is a tokenizer \(maskgit_vq\), not a generator"):
        open_weights(golden / "maskgit_vq" / "maskgit_vq_tiny.bin", "generators")
    with pytest.raises(WeightsError, match=r"is a generator \(rar\), not a tokenizer"):
        open_weights(golden / "rar" / "rar_tiny.bin", "tokenizers")
    with pytest.raises(WeightsError, match=r"is a network \(inception\), not a generator \(rar\)"):
        open_weights(inception_file, "generators", reading=Reading(models=["rar"]))


# ---------------------------------------------------------------- facts


def test_facts_are_given_or_missing_or_unknown(golden: pathlib.Path) -> None:
    file = golden / "maskgit_vq" / "maskgit_vq_tiny.bin"
    opened = open_weights(file, "tokenizers", reading=Reading(facts={"image_size": 32}))
    assert opened.model.config.image_size == 32
    assert open_weights(file, "tokenizers", like=opened.model).model.config.image_size == 32
    with pytest.raises(WeightsError, match="does not tell image_size: give --fact image_size=VALUE"):
        open_weights(file, "tokenizers")
    with pytest.raises(ConfigError, match="unknown fact 'num_tokens': they are image_size"):
        open_weights(file, "tokenizers", reading=Reading(facts={"image_size": 16, "num_tokens": 64}))
    with pytest.raises(WeightsError, match=r"--fact image_size is 'big' \(str\): it must be int"):
        open_weights(file, "tokenizers", reading=Reading(facts={"image_size": "big"}))
    with pytest.raises(ConfigError, match="unknown fact 'image_size': these files tell everything"):
        open_weights(golden / "rar" / "rar_tiny.bin", "generators", reading=Reading(facts={"image_size": 16}))
    with pytest.raises(ConfigError, match="--model rar: these weights are read by maskgit_vq"):
        open_weights(file, "tokenizers", reading=Reading(facts={"image_size": 16}, models=["rar"]))
    with pytest.raises(
        ConfigError, match=r"draws 16 ids of 32 codes, .* decodes 16 ids of 48 codes.*--fact image_size=V"
    ):
        open_pair(
            golden / "rar" / "rar_tiny.bin", file, reading=Reading(facts={"image_size": 8}, models=["maskgit_vq"])
        )


def test_a_released_size_tells_its_facts(tmp_path: pathlib.Path) -> None:
    (released,) = FILES.values()
    shapes = FORMAT.released_shapes(released.config)
    write_safetensors(tmp_path / "w.safetensors", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    model = open_weights(tmp_path / "w.safetensors", "tokenizers").model
    assert model == Model(maskgit_vq, released.config) and model.config.image_size == 256


def test_facts_on_the_command_line(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_state_dict(tmp_path / "bare.bin", read_tensors(released_pair.tokenizer))  # without a header
    argv = ["convert", "--quiet", "--weights", str(bare), "--out", str(tmp_path / "o.safetensors")]
    assert cli.main(argv) == 1 and "give --fact image_size=VALUE" in capsys.readouterr().err
    assert cli.main([*argv, "--fact", "image_size"]) == 2 and "give NAME=VALUE" in capsys.readouterr().err
    assert cli.main([*argv, "--fact", "image_size=24", "--model", "maskgit_vq"]) == 0
    assert json.loads((tmp_path / "o.safetensors.json").read_text())["config"]["image_size"] == 24
    assert open_weights(tmp_path / "o.safetensors", "tokenizers").model.config.image_size == 24
    sample = ["sample", "--weights", str(released_pair.generator), "--tokenizer", str(bare), "--out", str(tmp_path)]
    assert cli.main([*sample, "--classes", "1", "--per-class", "1", "--fact", "image_size=16"]) == 0


# ---------------------------------------------------------------- raw parameters


def test_raw_parameters_or_their_average(released_pair: Any, tmp_path: pathlib.Path) -> None:
    average = read_tensors(released_pair.generator)
    raw = {name: -x if name == "lm_head.weight" else x for name, x in average.items()}
    file = write_state_dict(tmp_path / "w.bin", raw, ema=average)
    expected = open_weights(released_pair.generator, "generators").place()["lm_head"]["kernel"]
    opened, opened_raw = (open_weights(file, "generators", reading=Reading(raw=x)) for x in (False, True))
    np.testing.assert_array_equal(opened.place()["lm_head"]["kernel"], expected)
    np.testing.assert_array_equal(opened_raw.place()["lm_head"]["kernel"], -expected)
    assert opened.sha256() != opened_raw.sha256()  # results of one are not taken for those of the other
    images = [rar_jax.load(file, tokenizer=released_pair.tokenizer, raw=x).sample([1, 2]) for x in (False, True)]
    drawn = []
    for more in ([], ["--raw"]):
        argv = [
            "sample",
            "--weights",
            str(file),
            "--tokenizer",
            str(released_pair.tokenizer),
            "--out",
            str(tmp_path / "o"),
        ]
        assert cli.main([*argv, "--classes", "1,2", "--per-class", "1", "--quiet", *more]) == 0
        drawn.append(np.stack([np.asarray(Image.open(tmp_path / "o" / f"000{n}_000.png")) for n in (1, 2)]))
    np.testing.assert_array_equal(drawn[0], images[0])
    np.testing.assert_array_equal(drawn[1], images[1])
    assert (images[0] != images[1]).any()


# ---------------------------------------------------------------- dtypes and shards


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards_read_as_float32(released_pair: Any, tmp_path: pathlib.Path, dtype: str) -> None:
    state = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in read_tensors(released_pair.generator).items()}
    shards = {f"w-{i}-of-2.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        write_safetensors(tmp_path / name, part)
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, part in shards.items() for n in part}}))
    opened = open_weights(index, "generators")
    assert opened.model == open_weights(released_pair.generator, "generators").model
    whole = write_state_dict(tmp_path / "w.bin", state)
    for params in (opened.place(), open_weights(whole, "generators").place()):
        expected = open_weights(released_pair.generator, "generators").place()
        rounded = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), expected)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
        assert jax.tree.all(jax.tree.map(np.array_equal, params, rounded))
    hashes = "".join(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in sorted(shards))
    assert opened.sha256() == hashlib.sha256(hashes.encode()).hexdigest()


def test_buffers_are_written_and_dropped(tmp_path: pathlib.Path) -> None:
    import dataclasses

    with_buffer = dataclasses.replace(FORMAT, make_buffers=lambda config: {"steps": np.arange(config.codebook_size)})
    config = maskgit_vq.TINY
    params = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), param_shapes(maskgit_vq.init, config))
    with_buffer.save(tmp_path / "w.safetensors", config, params)
    written = read_tensors(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(written["steps"], np.arange(config.codebook_size))
    assert {name: x.shape for name, x in written.items()} == with_buffer.released_shapes(config)
    assert with_buffer.count_parameters(config) == sum(x.size for x in jax.tree.leaves(params))
    assert jax.tree.all(jax.tree.map(np.array_equal, with_buffer.load(tmp_path / "w.safetensors")[1], params))
    with pytest.raises(WeightsError, match="unexpected tensor 'steps'"):
        FORMAT.load(tmp_path / "w.safetensors")
