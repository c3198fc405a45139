"""Paths in buckets, and what is kept there besides checkpoints."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from buckets import serve

from rar_jax.errors import ConfigError, ObjectStoreError
from rar_jax.evaluation.chunks import Chunk, ChunkStore, accumulate_chunks
from rar_jax.metrics.inception_score import SplitSums
from rar_jax.metrics.moments import Moments
from rar_jax.metrics.sums import ScoreTotals, Sums
from rar_jax.runs import bucket
from rar_jax.runs.bucket import BucketPath, list_files, make_path, remove_tree
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter


@pytest.fixture(scope="module")
def google() -> Iterator[dict[str, str]]:
    with serve("gs") as reached:
        yield reached


@pytest.fixture
def url(google: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> str:
    for name, value in google.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    return f"gs://bucket/{tmp_path.name}"


def test_a_path(url: str) -> None:
    root = make_path(f"{url}//")
    assert isinstance(root, BucketPath) and str(root) == url and str(root / "a" / "b") == f"{url}/a/b"
    assert make_path(root) is root and make_path("runs/x") == pathlib.Path("runs/x")


@pytest.mark.parametrize(
    "wrong", ["gs://bucket", "gs://", "s3:///x", "http://a/b", "gs://bucket/../x", "S3://bucket/x"]
)
def test_an_invalid_url(wrong: str) -> None:
    with pytest.raises(ConfigError, match="is not a bucket URL: write gs://BUCKET/PATH"):
        make_path(wrong)


def test_files(url: str) -> None:
    root = make_path(url)
    assert isinstance(root, BucketPath)
    assert not root.exists() and list(root.iterdir()) == [] and not root.is_dir()
    for name, content in {"a/x": b"12", "a/b/y": b"", "a0": b"z"}.items():
        (root / name).write_bytes(content)
    assert root.is_dir() and (root / "a").is_dir() and not (root / "a").is_file() and (root / "a0").is_file()
    assert [path.name for path in root.iterdir()] == ["a", "a0"] and list_files(root) == ["a/b/y", "a/x", "a0"]
    assert [path.name for path in root.glob("*0")] == ["a0"]
    assert (root / "a" / "x").read_bytes() == b"12" and (root / "a" / "b" / "y").read_text() == ""
    remove_tree(root / "a")
    assert list_files(root) == ["a0"]
    (root / "a0").unlink()
    for use in ((root / "a0").unlink, (root / "a0").read_bytes):
        with pytest.raises(FileNotFoundError):
            use()
    (root / "a0").unlink(missing_ok=True)


def test_an_unreachable_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    monkeypatch.setattr(bucket, "RETRIES", 1)
    with pytest.raises(ObjectStoreError, match=r"gs://away/x cannot be reached \(.*\): check that the bucket exists"):
        make_path("gs://away/x").exists()


def test_small_files_of_a_work_directory(url: str) -> None:
    """What one machine sends another fetches; checkpoints and tokens are not copied."""
    one = Workdir(url)
    one.claim({"name": "a", "seed": 0})
    (one.path / "metrics.jsonl").write_text("1\n")
    (one.path / "grids").mkdir()
    (one.path / "grids" / "x.png").write_bytes(b"picture")
    (one.path / "half.json.tmp").write_text("half")
    (one.root / "checkpoints" / "x").mkdir(parents=True)
    one.send()
    other = Workdir(url).fetch()
    assert list_files(other.path) == [".remote", "config.json", "grids/x.png", "metrics.jsonl"]
    assert (other.path / "metrics.jsonl").read_text() == "1\n" and other.read_config() == {"name": "a", "seed": 0}
    assert Workdir(other.path).root == one.root, "the folder leads to the bucket"
    (one.path / "metrics.jsonl").write_text("1\n2\n")
    (one.path / "grids" / "x.png").unlink()
    one.send()
    assert list_files(one.root) == ["config.json", "metrics.jsonl"]
    assert (one.root / "metrics.jsonl").read_bytes() == b"1\n2\n"
    with pytest.raises(ConfigError, match="belongs to a run of 'a' with another config"):
        Workdir(url).claim({"name": "a", "seed": 1})


def test_a_token_store(url: str, tmp_path: pathlib.Path) -> None:
    """Two processes write their shards to the bucket, a killed one resumes, and readers map a cache."""
    card = {
        "spec": {"shape": [4], "dtype": "uint16", "vocab": 16},
        "num_classes": 2,
        "class_names": ["a", "b"],
        "crops": ["whole"],
    }
    card |= {"source": "test", "tokenizer_sha256": None}
    folder = Workdir(url).tokens("train")

    def write(process: int, most: int) -> bool:
        writer = TokenStoreWriter(
            folder, card, source_records=6, shard_records=2, process_index=process, process_count=2
        )
        for j in writer.missing()[:most]:
            with writer.shard(j) as shard:
                begin, end = writer.span(j)
                ids = np.arange(begin, end)
                shard.append(np.tile(ids[:, None], (1, 4)), ids % 2, ids, ids * 0)
        return writer.finish()

    assert not write(0, 1)
    assert not write(1, 9)
    assert write(0, 9)
    store = TokenStore(folder)
    assert store.gather(np.arange(6))["tokens"][:, 0].tolist() == list(range(6))
    store.verify()
    cached = list((tmp_path / ".cache").rglob("*.npy"))
    assert len(cached) == 3 and not list_files(make_path(tmp_path / ".cache"))[0].endswith(".tmp")
    assert [name for name in list_files(folder) if not name.endswith(".npy")] == ["card.json"]


def test_an_evaluation_resumes_from_its_chunks(url: str) -> None:
    """Another machine continues after the last finished chunk, and reads the arrays that were kept."""
    computed: list[int] = []

    def compute(start: int, count: int) -> Chunk:
        computed.append(start)
        x = np.arange(start, start + count, dtype=np.float32)[:, None]
        moments = Moments(np.float32(count), x.sum(0), x.T @ x)
        split = SplitSums(np.float32(count), np.float32(start), np.ones(4, np.float32))
        return Chunk(Sums(moments, moments, split), {"x": x})

    def run(images: int) -> tuple[ScoreTotals, np.ndarray]:
        workdir = Workdir(url)  # a temporary folder of its own
        assert workdir.chunks is not None
        store = ChunkStore(workdir.chunks, {"a": 1}, ("x",))
        how: dict[str, Any] = {"images": images, "chunk": 10, "split_size": 20, "description": "d", "quiet": True}
        return accumulate_chunks(store, compute, **how), store.concatenate("x")

    run(20)
    totals, x = run(25)
    assert computed == [0, 10, 20] and totals.done == 25 and x[:, 0].tolist() == list(range(25))
    assert totals.pool3 is not None and totals.pool3.sum.tolist() == [sum(range(25))]
    assert not [name for name in Workdir(url).fetch().path.rglob("*") if "totals" in name.name], "read when needed"
