"""Images to tokens, once: what a killed run goes on with, what two processes make, what training accepts."""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from rar_jax import experiment
from rar_jax.data.sources import ArraySource, load_source
from rar_jax.errors import ConfigError, StoreError
from rar_jax.models import Model
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.manifest import file_sha256
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.tokens import tokenize as program
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.tokenize import write_store
from rar_jax.tokens.writer import TokenStoreWriter
from rar_jax.weights import maskgit_vq


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- the store


def test_tokens_are_the_images(tiny: Any, straight: pathlib.Path) -> None:
    store, source = TokenStore(straight), load_source("digits", "heldout")
    store.verify()
    images = source.gather(np.arange(360))
    rows = store.gather(np.arange(360))
    np.testing.assert_array_equal(rows["labels"], images["labels"])
    np.testing.assert_array_equal(rows["ids"], images["ids"])
    expected = np.asarray(
        tokenizer.encode(tiny.config, maskgit_vq.load(tiny.weights, image_size=8)[1], images["images"])
    )
    assert (rows["tokens"] == expected).mean() > 0.999  # a near tie may fall the other way on four devices
    assert len(np.unique(expected)) > 4
    card = store.card
    assert card["tokenizer_sha256"] == file_sha256(tiny.weights)
    assert (card["num_records"], card["num_images"], card["num_bad_images"]) == (360, 360, 0)
    assert card["records_per_class"] == np.bincount(images["labels"]).tolist()
    assert (card["crops"], card["spec"]) == (["whole image"], {"shape": [16], "dtype": "uint16", "vocab": 32})
    assert [shard["span"] for shard in card["shards"]] == [[k, min(k + 50, 360)] for k in range(0, 360, 50)]


@pytest.mark.parametrize("at", [0, 3, 8, 15, 17])
def test_killed_and_resumed_is_the_same_to_the_bit(
    at: int, tiny: Any, straight: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the k-th rename of 18: making.json, eight shards and what stands beside them, the card."""
    renamed: list[str] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if len(renamed) == at:
            raise RuntimeError("killed")
        renamed.append(pathlib.Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RuntimeError, match="killed"):
        tiny.make(tmp_path / "s")
    assert len(renamed) == at
    monkeypatch.undo()
    encoded: list[int] = []
    gather = program.sequential_batches
    monkeypatch.setattr(
        program, "sequential_batches", lambda *a, **k: encoded.append(len(k["spans"])) or gather(*a, **k)
    )
    tiny.make(tmp_path / "s")
    whole = sum(name.endswith(".json") and name.startswith("shard") for name in renamed)
    assert encoded == [8 - whole]  # the shards that were whole are not made again
    assert contents(tmp_path / "s") == contents(straight)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    tiny: Any, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.iterdir()}
    tiny.make(straight)
    with pytest.raises(StoreError, match=r'holds a finished store of something else \(source: "digits \(heldout\)"'):
        tiny.make(straight, split="train")
    other = tmp_path / "other.safetensors"
    maskgit_vq.save(other, tiny.config, tokenizer.init(tiny.config, jax.random.key(9)))
    with pytest.raises(StoreError, match=r"something else \(tokenizer_sha256: "):
        tiny.make(straight, weights=str(other))
    assert {p: p.stat().st_mtime_ns for p in straight.iterdir()} == before
    TokenStoreWriter(tmp_path / "begun", {**TokenStore(straight).card, "source": "x"}, source_records=360)
    with pytest.raises(StoreError, match="holds the beginning of another store"):
        tiny.make(tmp_path / "begun")


class TenOfSome(ArraySource):
    """Ten "crops" of each of 20 images; images 3 and 11 could not be decoded, and the next image stands in."""

    crop = "ten"
    listed = (("README.md", "not an image by its suffix"),)
    problems = (*listed, ("img3.jpg", "truncated"), ("img11.jpg", "no JPEG"))

    def __len__(self) -> int:
        return 200

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        image = indices // 10
        bad = np.isin(image, [3, 11])
        rows = super().gather(image + bad)
        rows["images"] = (
            np.roll(rows["images"], 1, axis=1) * (indices % 10 > 4)[:, None, None, None] + rows["images"] // 2
        )
        return {**rows, "crops": (indices % 10).astype(np.int16), "bad": bad}


def test_crops_and_bad_images(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 records 20 are left out and counted; the others are all there, with image and crop."""
    digits = load_source("digits", "heldout").gather(np.arange(30))
    source = TenOfSome(digits["images"], digits["labels"], class_names=[str(i) for i in range(10)])
    monkeypatch.setattr(experiment, "load_source", lambda *_, **__: source)
    tiny.make(tmp_path / "s", shard_records=34, quiet=False)
    out = capsys.readouterr().out
    assert "2 images could not be decoded" in out and "img3.jpg: truncated" in out and "images" in out
    assert "README.md" not in out, "which is no image that was left out"
    store = TokenStore(tmp_path / "s")
    store.verify()
    records = np.concatenate([np.load(tmp_path / "s" / shard["name"]) for shard in store.card["shards"]])
    expected = [(image, crop) for image in range(20) for crop in range(10) if image not in (3, 11)]
    assert list(zip(records["source_id"].tolist(), records["crop"].tolist(), strict=True)) == expected
    card = store.card
    assert [card[f"num_{k}"] for k in ("records", "images", "bad_records", "bad_images")] == [180, 18, 20, 2]
    assert [i for s in card["shards"] for i in s["bad_records"]] == [*range(30, 40), *range(110, 120)]
    assert len(card["crops"]) == 10 and card["records_per_crop"] == [18] * 10
    images = source.gather(np.array([10 * image + crop for image, crop in expected]))["images"]
    tokens = np.asarray(tokenizer.encode(tiny.config, maskgit_vq.load(tiny.weights, image_size=8)[1], images))
    assert (tokens == records["tokens"]).mean() > 0.999


def test_random_crops_are_refused(tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source("digits", "heldout")
    monkeypatch.setattr(source, "crop", "random", raising=False)
    monkeypatch.setattr(experiment, "load_source", lambda *_, **__: source)
    with pytest.raises(ConfigError, match="random crops cannot be tokenized"):
        tiny.make(tmp_path / "s")


def test_batches_do_not_reach_over_a_shard(tiny: Any, tmp_path: pathlib.Path) -> None:
    """The encoder of this test gives away its batch: the sum of its images. Shards of 50 in batches of 16."""
    source = load_source("digits", "heldout")

    class Telltale:
        @staticmethod
        def encode(_: Any, params: Any, images: jax.Array) -> jax.Array:
            return jax.numpy.broadcast_to(images.astype("int32").sum() % 32 + params, (len(images), 16))

    mesh = make_mesh(tiny.experiment().mesh)
    card = tiny.card()
    writer = TokenStoreWriter(tmp_path / "s", card, source_records=360, shard_records=50)
    model: Any = Model(Telltale, None)  # pyright: ignore
    written = write_store(writer, source, model, np.int32(0), mesh, batch_size=16, quiet=True)
    assert written.records == 360
    tokens = TokenStore(tmp_path / "s").gather(np.arange(360))["tokens"][:, 0]
    images = source.gather(np.arange(360))["images"].astype(np.int64)
    for begin in range(0, 360, 50):
        end = min(begin + 50, 360)
        for at in range(begin, end, 16):
            last = min(at + 16, end)
            filled = images[at:last].sum() + (16 - (last - at)) * images[0].sum()
            np.testing.assert_array_equal(tokens[at:last], filled % 32)


class Slow(ArraySource):
    """Takes 50 ms a batch."""

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.05)
        return super().gather(indices)


@pytest.mark.parametrize(("slow", "least", "most"), [("loader", 0.6, 2.0), ("encoder", 0.0, 0.4)])
def test_the_wait_for_the_loader_is_reported(
    slow: str, least: float, most: float, tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 batches of 50 ms each, of the loader or of the encoder: of the former all are waited for but those that it had
    ready when the encoder was compiled, of the latter none."""
    digits = load_source("digits", "heldout").gather(np.arange(80))
    kind = Slow if slow == "loader" else ArraySource
    source = kind(digits["images"], digits["labels"], class_names=[str(i) for i in range(10)])

    class Sleeper:
        @staticmethod
        def encode(_: Any, params: Any, images: jax.Array) -> jax.Array:
            def tokens(images: np.ndarray) -> np.ndarray:
                time.sleep(0.05 * (slow == "encoder"))
                return np.zeros((len(images), 16), np.int32)

            return jax.pure_callback(tokens, jax.ShapeDtypeStruct((len(images), 16), np.int32), images)

    mesh = make_mesh(tiny.experiment().mesh)
    writer = TokenStoreWriter(tmp_path / "s", tiny.card(), source_records=80, shard_records=80)
    model: Any = Model(Sleeper, None)  # pyright: ignore
    written = write_store(writer, source, model, np.int32(0), mesh, batch_size=4, name="tokenize it")
    assert written.records == 80 and written.seconds > written.waited > 0
    assert least < written.waited < most, written
    told = capsys.readouterr().err
    assert f"tokenize it: 80 records in {written.seconds:.1f} s" in told
    assert f"loader wait {written.waited / written.seconds:.1%}" in told


def test_colour_files_for_a_grey_experiment(tiny: Any, tmp_path: pathlib.Path) -> None:
    """They become grey, as in training; asked for without channels they would be refused as of another shape."""
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(2):  # of which one is held out
            pixels = np.full((9, 11, 3), 10 * label + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{i}.png")
    tiny.make(tmp_path / "store", source=f"folder:{tmp_path / 'images'}", split="train")
    assert sorted(TokenStore(tmp_path / "store").gather(np.arange(10))["labels"]) == list(range(10))
