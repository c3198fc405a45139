"""Checkpoints are restored bitwise on any mesh; a damaged one is named and skipped; every failure is reported."""

import asyncio
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rar_jax.errors import CheckpointError
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.runs import checkpoint
from rar_jax.runs.checkpoint import Checkpointer, good_step, load_params, read_meta
from rar_jax.runs.manifest import verify_manifest

SPECS = {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec("fsdp"), "step": PartitionSpec()}


def numbers(seed: int, ema: bool = True) -> dict[str, Any]:
    """A state with every bit pattern that float32 has room for: NaNs, infinities, denormals, -0."""
    rng = np.random.default_rng(seed)

    def tree() -> dict[str, np.ndarray]:
        bits = {"kernel": rng.integers(0, 2**32, (8, 12), np.uint32), "bias": rng.integers(0, 2**32, (8,), np.uint32)}
        return {name: x.view(np.float32) for name, x in bits.items()}

    state = {"step": np.int32(seed), "params": tree(), "opt_state": ({"mu": tree()}, {}), "ema": {}, "extra": {}}
    return state | ({"ema": tree()} if ema else {})


def shardings_of(state: Any, mesh: Mesh) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, SPECS[path[-1].key]), state)


def put(state: Any, mesh: Mesh) -> Any:
    return jax.device_put(state, shardings_of(state, mesh))


def abstract(state: Any, mesh: Mesh) -> Any:
    def leaf(x: Any, at: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=at)

    return jax.tree.map(leaf, state, shardings_of(state, mesh))


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p), str(x.dtype), np.asarray(x).tobytes()) for p, x in leaves]


def one() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def save(folder: pathlib.Path, steps: range, *, keep: int = 9, ema: bool = True, mesh: Mesh | None = None) -> None:
    checkpointer = Checkpointer(folder, keep=keep)
    for step in steps:
        checkpointer.save(step, put(numbers(step, ema), mesh or one()), {"stage": "test", "step": step})
    checkpointer.close()


def restore(folder: pathlib.Path, mesh: Mesh) -> Any:
    checkpointer = Checkpointer(folder, keep=9)
    state = checkpointer.restore(abstract(numbers(0), mesh))
    checkpointer.close()
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Steps 1 and 2, saved on four devices as fsdp; tests do not change it."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, range(1, 3), mesh=make_mesh(MeshConfig(1, 4, 1)))
    return folder


@pytest.fixture
def folder(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of `saved` to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


# ---------------------------------------------------------------- to the bit


@pytest.mark.parametrize("config", [None, MeshConfig(2, 1, 2), MeshConfig(1, 2, 2)], ids=str)
def test_saved_on_four_devices_and_restored_on_other_meshes(saved: pathlib.Path, config: MeshConfig | None) -> None:
    mesh = make_mesh(config) if config else one()
    state = restore(saved, mesh)
    assert bits(state) == bits(numbers(2))
    assert jax.tree.structure(state) == jax.tree.structure(numbers(2))
    for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(shardings_of(state, mesh)), strict=True):
        assert x.sharding.is_equivalent_to(at, x.ndim)


def test_restored_where_an_event_loop_is_running(saved: pathlib.Path) -> None:
    async def cell() -> Any:  # of a notebook
        return restore(saved, one())

    assert bits(asyncio.run(cell())) == bits(numbers(2))


def test_saved_on_one_device_and_restored_on_four(tmp_path: pathlib.Path) -> None:
    save(tmp_path, range(5, 6))
    state = restore(tmp_path, make_mesh(MeshConfig(1, 4, 1)))
    assert bits(state) == bits(numbers(5))
    assert {s.data.shape for s in state["params"]["kernel"].addressable_shards} == {(2, 12)}


def test_load_params_gives_the_ema_where_there_is_one(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for step in (1, 2):
        params, raw = load_params(saved, step), load_params(saved, step, raw=True)
        assert bits(params) == bits(numbers(step)["ema"]) != bits(raw) == bits(numbers(step)["params"])
        assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    save(tmp_path, range(3, 4), ema=False)
    assert bits(load_params(tmp_path, 3)) == bits(numbers(3, ema=False)["params"])


def test_an_empty_folder(tmp_path: pathlib.Path) -> None:
    assert good_step(tmp_path) is None and good_step(tmp_path / "none") is None
    assert restore(tmp_path / "new", one()) is None


def test_later_changes_of_the_state_are_not_saved(tmp_path: pathlib.Path) -> None:
    """The loop donates the state to the next step while the save is under way."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    state = put(numbers(1), one())
    checkpointer.save(1, state, {})
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    jax.block_until_ready(change(state))
    checkpointer.close()
    assert bits(restore(tmp_path, one())) == bits(numbers(1))


def test_poll_writes_the_manifest_and_is_free_otherwise(tmp_path: pathlib.Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.poll()
    checkpointer.save(1, put(numbers(1), one()), {"stage": "test"})
    for _ in range(10_000):
        checkpointer.poll()
        if (tmp_path / "1" / "manifest.json").exists():
            break
        jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    checkpointer.close()
    assert (good := good_step(tmp_path)) is not None and good[0] == 1
    assert json.loads((tmp_path / "1" / "meta.json").read_text()) == {"stage": "test"}


# ---------------------------------------------------------------- the manifest


def test_the_manifest_holds_the_sums_of_all_files(saved: pathlib.Path) -> None:
    step = saved / "2"
    assert read_meta(saved, 2) == {"stage": "test", "step": 2}
    manifest = json.loads((step / "manifest.json").read_text())
    files = {
        str(p.relative_to(step)): p.read_bytes() for p in step.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    assert "meta.json" in files and any(f.startswith("state-") for f in files)
    sums = {name: {"sha256": hashlib.sha256(b).hexdigest()} for name, b in files.items()}
    assert manifest["files"] == sums
    assert good_step(saved) == (2, manifest["sha256"]) == (2, verify_manifest(step))
    assert verify_manifest(saved / "1") != verify_manifest(step)


TICKS = itertools.count(1)


def overwrite(path: pathlib.Path, content: bytes) -> None:
    """Writes, with a time of its own: sums are computed again for a file that has changed, and disk clocks are coarse."""
    path.write_bytes(content)
    os.utime(path, ns=(next(TICKS), next(TICKS)))


def files_of(step: pathlib.Path) -> Iterator[pathlib.Path]:
    return (p for p in sorted(step.rglob("*")) if p.is_file())


def assert_passed_over(folder: pathlib.Path, named: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Step 2 is not good and the file is named; step 1 is used."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rar_jax.runs.checkpoint"):
        good = good_step(folder)
    assert good is not None and good[0] == 1, named
    (record,) = caplog.records
    assert record.getMessage().startswith(f"checkpoint step 2 is skipped: {named} "), record.getMessage()


def test_a_flipped_bit_in_any_file(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    files = list(files_of(folder / "2"))
    assert {"manifest.json", "meta.json", "manifest.ocdbt"} <= {p.name for p in files} and len(files) >= 4
    for path in files:
        whole = path.read_bytes()
        for place in rng.integers(0, 8 * len(whole), 12 if path.name == "manifest.json" else 3) if whole else []:
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << int(place % 8)
            overwrite(path, damaged)
            assert_passed_over(folder, path, caplog)
        overwrite(path, whole)
    good = good_step(folder)
    assert good is not None and good[0] == 2


def test_any_file_deleted_or_cut(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in files_of(folder / "2"):
        whole = path.read_bytes()
        path.unlink()
        assert_passed_over(folder, path, caplog)
        for kept in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            overwrite(path, whole[:kept])
            assert_passed_over(folder, path, caplog)
        overwrite(path, whole)


@pytest.mark.parametrize("name", [".DS_Store", "state/surplus", "state/new/surplus", "manifest.json.tmp"])
def test_a_file_added_does_no_harm(folder: pathlib.Path, name: str) -> None:
    path = folder / "2" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    good = good_step(folder)
    assert good is not None and good[0] == 2
    assert bits(restore(folder, one())) == bits(numbers(2))


def test_two_files_exchanged(folder: pathlib.Path) -> None:
    a, b = (folder / "2" / "meta.json", next((folder / "2").glob("state-*")) / "manifest.ocdbt")
    contents = a.read_bytes(), b.read_bytes()
    overwrite(b, contents[0])
    overwrite(a, contents[1])
    good = good_step(folder)
    assert good is not None and good[0] == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '"x"', '{"files": 3, "sha256": ""}', '{"files": {}, "sha256": 1}']
)
def test_a_manifest_that_is_none(folder: pathlib.Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "2" / "manifest.json"
    path.write_text(content)
    assert_passed_over(folder, path, caplog)


def test_the_manifest_of_another_step(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(folder / "1" / "manifest.json", folder / "2" / "manifest.json")
    with caplog.at_level(logging.WARNING):
        good = good_step(folder)
    assert good is not None and good[0] == 1 and "checkpoint step 2 is skipped: " in caplog.text


def test_no_good_step_at_all(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (folder / str(step) / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert good_step(folder) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint step {step} is skipped: {folder / str(step) / 'manifest.json'} is missing: the save did not finish"
        for step in (2, 1)
    ]
    assert restore(folder, one()) is None
    save(folder, range(1, 3))
    assert bits(restore(folder, one())) == bits(numbers(2))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


# ---------------------------------------------------------------- restoring after damage


def damage_ocdbt(step: pathlib.Path) -> None:
    largest = max(files_of(next(step.glob("state-*"))), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(largest, content)


@pytest.mark.parametrize(
    ("damage", "stays"),
    [
        (damage_ocdbt, True),
        (lambda step: (step / "meta.json").unlink(), True),
        (lambda step: shutil.rmtree(next(step.glob("state-*"))), True),
        (lambda step: (step / "manifest.json").write_text("{"), True),
        (lambda step: (step / "manifest.json").unlink(), False),
        (lambda step: [p.unlink() for p in list(files_of(step))], False),
    ],
    ids=["bit", "meta", "state", "manifest", "no_manifest", "nothing"],
)
def test_the_step_before_is_restored_and_the_bad_one_written_again(
    folder: pathlib.Path, damage: Callable[[pathlib.Path], Any], stays: bool
) -> None:
    """The files of a damaged step stay until the next commit, those of an unfinished one do not."""
    damage(folder / "2")
    left = {p: p.read_bytes() for p in files_of(folder / "2") if p.name != "manifest.json"}
    checkpointer = Checkpointer(folder, keep=2)
    assert bits(checkpointer.restore(abstract(numbers(0), one()))) == bits(numbers(1))
    assert (folder / "2").exists() == stays
    if stays:
        left[folder / "2" / "discarded.json"] = b'"damaged"'
        assert {p: p.read_bytes() for p in files_of(folder / "2")} == left
    checkpointer.save(2, put(numbers(2), one()), {})
    checkpointer.close()
    good = good_step(folder)
    assert good is not None and good[0] == 2 and not (folder / "2" / "discarded.json").exists()
    assert bits(restore(folder, one())) == bits(numbers(2))


def test_a_discarded_step_is_deleted_after_the_next_commit(folder: pathlib.Path) -> None:
    damage_ocdbt(folder / "2")
    checkpointer = Checkpointer(folder, keep=9)
    checkpointer.restore(abstract(numbers(0), one()))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    checkpointer.save(3, put(numbers(3), one()), {})
    checkpointer.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3"]


def test_damaged_steps_and_no_good_one_stop_everything(folder: pathlib.Path) -> None:
    """Hours of work must not be started again in silence; nothing is moved."""
    for step in (1, 2):
        damage_ocdbt(folder / str(step))
    before = sorted(str(p) for p in folder.rglob("*"))
    checkpointer = Checkpointer(folder, keep=2)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore(abstract(numbers(0), one()))
    checkpointer.close()
    assert str(caught.value).startswith(f"no step in {folder} is good; 2 is damaged") and "\n" not in str(caught.value)
    assert sorted(str(p) for p in folder.rglob("*")) == before


def test_retention(tmp_path: pathlib.Path) -> None:
    save(tmp_path, range(1, 6), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["4", "5"]
    verify_manifest(tmp_path / "4")
    verify_manifest(tmp_path / "5")


def test_a_training_that_is_sent_back_saves_the_same_step_again(tmp_path: pathlib.Path) -> None:
    save(tmp_path, range(1, 3))
    checkpointer = Checkpointer(tmp_path, keep=9)
    assert int(checkpointer.restore(abstract(numbers(0), one()), before=2)["step"]) == 1
    checkpointer.save(2, put(numbers(7), one()), {})
    checkpointer.close()
    assert bits(restore(tmp_path, one())) == bits(put(numbers(7), one()))


# ---------------------------------------------------------------- errors in the background


def call(checkpointer: Checkpointer, how: str) -> None:
    """Each of the ways in which the loop meets its checkpointer again."""
    if how == "save":
        checkpointer.save(2, put(numbers(2), one()), {})
    elif how == "poll":
        for _ in range(100_000):
            checkpointer.poll()
            np.linalg.inv(np.eye(64))
    else:
        getattr(checkpointer, how)()


@pytest.mark.parametrize("how", ["wait", "poll", "save", "close"])
def test_a_save_that_fails_in_the_background_is_raised(tmp_path: pathlib.Path, how: str) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, put(numbers(1), one()), {"not json": object()})
        call(checkpointer, how)
    assert good_step(tmp_path) is None and not (tmp_path / "2").exists()


@pytest.mark.parametrize("how", ["wait", "poll", "save", "close"])
def test_a_manifest_that_cannot_be_written_is_raised(
    tmp_path: pathlib.Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: pathlib.Path) -> None:
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, put(numbers(1), one()), {})

    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / '1'}'"):
        call(checkpointer, how)
    assert good_step(tmp_path) is None and not (tmp_path / "2").exists()
    monkeypatch.undo()
    checkpointer.close()


def test_files_that_vanish_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing: the save did not finish"):
        verify_manifest(tmp_path)
