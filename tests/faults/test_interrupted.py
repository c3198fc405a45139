"""Tokenizing and evaluating, killed and preempted: they go on behind the last shard or chunk, and nothing is lost or doubled."""

from __future__ import annotations

import functools
import json
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import cheap_inception
import jax
import numpy as np
import poisoned
import pytest
from commands import TINY, Command, finish, start, terminate, wait_for

from rar_jax.data.sources import load_source
from rar_jax.evaluation.reference import write_reference
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.tokens.store import TokenStore
from rar_jax.weights import maskgit_vq

VQ = tokenizer.Config(
    image_size=8, channels=1, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8, codebook_size=32
)  # fmt: skip


def kill(running: list[Command]) -> None:
    running[0].kill()
    running[0].wait(60)
    assert running[0].returncode == -9


def preempt(running: list[Command]) -> None:
    assert terminate(running) < 10
    finish(running, -signal.SIGTERM)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".json")}


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., list[Command]], pathlib.Path]:
    """Function that starts to tokenize the digits into a folder, 144 shards of 10; and a folder where that was not disturbed."""
    folder = tmp_path_factory.mktemp("tokenized")
    maskgit_vq.save(folder / "vq.safetensors", VQ, tokenizer.init(VQ, jax.random.key(0)))
    flags = ["--config", str(TINY), "--config.tokenizer.restart_every=0", "--source=digits", "--shard-records=10"]
    flags += ["--batch-size=2", "--weights", str(folder / "vq.safetensors")]

    def begin(out: pathlib.Path, **rest: Any) -> list[Command]:
        return start("tokenize", None, *flags, "--out", str(out), **rest)

    finish(begin(folder / "straight"))
    writer = "rar_jax.tokens.writer:TokenStoreWriter"
    return functools.partial(begin, before=functools.partial(poisoned.slow, writer, "shard", 0.05)), folder / "straight"


def shards(folder: pathlib.Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def test_tokenizing(tokenized: Any, tmp_path: pathlib.Path) -> None:
    begin, straight = tokenized
    for stop, after in ((kill, 5), (preempt, 30)):
        running = begin(tmp_path / "s")
        wait_for(lambda after=after: shards(tmp_path / "s") >= after, running)
        stop(running)
        assert after <= shards(tmp_path / "s") < 144 and not (tmp_path / "s" / "card.json").exists()
    there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("shard-*.npy")}
    finish(begin(tmp_path / "s"))
    kept = sum((tmp_path / "s" / name).stat().st_mtime_ns == when for name, when in there.items())
    assert kept >= len(there) - 1, "all but the one that may have been cut off between its two renames"
    assert contents(tmp_path / "s") == contents(straight)
    store = TokenStore(tmp_path / "s")
    store.verify()
    images = load_source("digits", "train", image_size=8, channels=1)
    assert len(store) == len(images) == 1437
    assert sorted(store.gather(np.arange(1437))["ids"]) == sorted(images.gather(np.arange(1437))["ids"])


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_two_that_tokenize(tokenized: Any, tmp_path: pathlib.Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process notices by its heartbeat. Launch scripts start both again."""
    monkeypatch.setenv("RAR_JAX_HEARTBEAT_SECONDS", "5")
    begin, straight = tokenized
    running = begin(tmp_path / "s", processes=2)
    wait_for(lambda: shards(tmp_path / "s") >= 10, running)
    terminate(running, which)
    assert running[which].returncode == -signal.SIGTERM and running[1 - which].returncode != 0
    finish(begin(tmp_path / "s"))
    assert contents(tmp_path / "s") == contents(straight)


def test_evaluating(released_pair: Any, tmp_path: pathlib.Path) -> None:
    pair = ("--weights", str(released_pair.generator), "--tokenizer", str(released_pair.tokenizer))
    about = {"n": 100, "protocol": "adm", "weights_sha256": "0" * 64, "source": "made up"}
    write_reference(tmp_path / "reference.npz", mean=np.zeros(12), cov=np.eye(12), **about)
    sizes = (
        f"--reference={tmp_path / 'reference.npz'}",
        "--inception=any",
        "--samples=200",
        "--chunk=4",
        "--batch-size=4",
    )

    def begin(out: pathlib.Path) -> list[Command]:
        flags = (*pair, *sizes, "--samples-npz", "--out", str(out))
        return start("evaluate", None, *flags, before=cheap_inception.patch)

    def chunks() -> int:
        return len(list((tmp_path / "stopped").glob("chunks/*/images_*.npy")))

    finish(begin(tmp_path / "straight"))
    for stop, after in ((kill, 3), (preempt, 15)):
        running = begin(tmp_path / "stopped")
        wait_for(lambda after=after: chunks() >= after, running)
        stop(running)
        assert after <= chunks() < 50 and not (tmp_path / "stopped" / "result.json").exists()
    finish(begin(tmp_path / "stopped"))
    results = []
    for name in ("straight", "stopped"):
        told = json.loads((tmp_path / name / "result.json").read_text())
        with np.load(tmp_path / name / "samples.npz") as file:
            images = file["arr_0"]
        assert images.shape[0] == 200
        results.append(({k: v for k, v in told.items() if isinstance(v, float) and k != "seconds"}, images.tobytes()))
    assert results[0] == results[1] and {"inception_score", "fid"} <= results[0][0].keys()
