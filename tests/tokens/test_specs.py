"""Token stores of ids and of latents, of any shape."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from rar_jax.errors import StoreError
from rar_jax.models import TokenSpec
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter


@pytest.mark.parametrize(
    "spec", [TokenSpec((4, 4, 3), "float16"), TokenSpec((5,), "float32"), TokenSpec((3, 2), "uint8", 200)], ids=str
)
def test_any_spec(tmp_path: pathlib.Path, spec: TokenSpec) -> None:
    """Latents keep their dtype, ids become int32, and shards are sized by bytes."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((40, *spec.shape)) if spec.vocab is None else rng.integers(0, 200, (40, *spec.shape))
    card = {"spec": dataclasses.asdict(spec), "num_classes": 1, "class_names": ["a"], "crops": ["whole"]}
    card |= {"source": "made up", "tokenizer_sha256": None}
    writer = TokenStoreWriter(tmp_path, card, source_records=40)
    assert writer.shard_records == 2**26 // writer.dtype.itemsize
    rest = np.zeros(40, int), np.arange(40), np.zeros(40, int)
    with writer.shard(0) as shard:
        shard.append(tokens, *rest)
    writer.finish()
    store = TokenStore(tmp_path)
    store.verify()
    found = store.gather(np.arange(40))["tokens"]
    assert store.spec == spec and found.dtype == (spec.dtype if spec.vocab is None else np.int32)
    np.testing.assert_array_equal(found, tokens.astype(found.dtype))
    if spec.vocab is None:
        writer = TokenStoreWriter(tmp_path / "bad", card, source_records=40)
        tokens.reshape(40, -1)[7, 2] = 1e6 if spec.dtype == "float16" else np.nan  # 1e6 overflows
        with pytest.raises(StoreError, match="record 7 has a latent that is not finite"), writer.shard(0) as shard:
            shard.append(tokens, *rest)
