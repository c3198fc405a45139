"""evaluate with Inception: the same numbers after a kill and on any mesh, and what it refuses.

Inception, with random weights, runs in test_scoring only; here a projection of the pixels stands for it (conftest.py).
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import ImageFiles
from PIL import Image

from rar_jax import cli, load
from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError, NonFiniteError
from rar_jax.evaluation import chunks, image_batches, program, scores
from rar_jax.evaluation.chunks import Chunk, ChunkStore, accumulate_chunks
from rar_jax.evaluation.image_sets import open_image_set
from rar_jax.evaluation.program import Program, Settings
from rar_jax.evaluation.reference import Reference, write_reference
from rar_jax.generators import rar
from rar_jax.metrics import frechet, moments
from rar_jax.metrics.sums import ScoreTotals
from rar_jax.parallel.mesh import MeshConfig, make_mesh

SETTINGS = Settings(seed=3, batch_size=8, chunk=20)  # 20 is 8 + 8 + 4: the last batch of a chunk is filled up
NUM, REFERENCE_NUM = 40, 30


def write_images(path: pathlib.Path, num: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """Smooth random images as an ADM .npz: as different from the samples as photographs are from noise."""
    small = np.random.default_rng(seed).integers(0, 256, (num, 4, 4, 3), np.uint8)
    images = np.repeat(np.repeat(small, side // 4, axis=1), side // 4, axis=2)
    np.savez(path, arr_0=images)
    return images


def open_program(settings: Settings = SETTINGS, reference: pathlib.Path | None = None) -> Program:
    return program.open_program(pathlib.Path("inception"), settings, reference_path=reference)


def write_reference_of(folder: pathlib.Path, num: int = REFERENCE_NUM) -> pathlib.Path:
    write_images(folder / "images.npz", num)
    path = folder / "reference.npz"
    scores.make_reference(open_program(), open_image_set(str(folder / "images.npz")), path, quiet=True)
    return path


def score(pair: Any, out: pathlib.Path, reference: pathlib.Path | None, **changed: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = {"samples": NUM, "samples_npz": True, "quiet": True} | changed
    scorer = open_program(reference=reference)
    return scores.score_samples(scorer, str(pair.generator), out, tokenizer=str(pair.tokenizer), **keywords)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(what, first image, images) of every chunk that is computed."""
    spans: list[tuple[str, int, int]] = []

    def recorded(store: ChunkStore, compute: Any, *, description: str, **keywords: Any) -> ScoreTotals:
        def recorded_compute(start: int, count: int) -> Chunk:
            spans.append((description, start, count))
            return compute(start, count)

        return accumulate_chunks(store, recorded_compute, description=description, **keywords)

    monkeypatch.setattr(program, "accumulate_chunks", recorded)
    return spans


ALL_CHUNKS = [("evaluate", 0, 20), ("evaluate", 20, 20), ("reference images", 0, 20), ("reference images", 20, 10)]


def numbers(result: dict[str, Any]) -> dict[str, float]:
    found = {k: v for k, v in result.items() if isinstance(v, float) and k != "seconds"}
    assert found.keys() == {"fid", "sfid", "inception_score", "precision", "recall", "kid"}
    return found


# ---------------------------------------------------------------- killed, resumed, damaged


@pytest.mark.usefixtures("cheap")
def test_killed_anywhere_it_goes_on_and_ends_in_the_same_bits(
    tmp_path: pathlib.Path, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_reference_of(tmp_path)
    write_images(tmp_path / "given.npz", NUM, seed=1)

    def run(folder: str, settings: Settings = SETTINGS) -> dict[str, Any]:
        computed.clear()
        images = open_image_set(str(tmp_path / "given.npz"))
        return scores.score_images(open_program(settings, reference), images, tmp_path / folder, quiet=True)

    expected = numbers(run("straight"))
    assert computed == ALL_CHUNKS
    # A chunk writes pool3 and totals: write 2 is the second chunk's first.
    for writes, left in ((0, ALL_CHUNKS), (2, ALL_CHUNKS[1:]), (3, ALL_CHUNKS[1:]), (4, ALL_CHUNKS[2:])):
        folder = f"killed_{writes}"
        with monkeypatch.context() as patch:
            _kill_at(patch, writes)
            with pytest.raises(KeyboardInterrupt):
                run(folder)
        assert not (tmp_path / folder / "result.json").exists()
        resumed = run(folder)
        assert computed == left, writes
        assert numbers(resumed) == expected, writes

    assert numbers(run("straight")) == expected
    assert computed == [], "what is done is not done again"
    run("straight", Settings(seed=3, batch_size=8, chunk=10))
    assert [span for span in computed if span[0] == "evaluate"] == [("evaluate", i, 10) for i in (0, 10, 20, 30)]

    # A chunk's features that are gone, or cut, are made anew, not left out of the number.
    pool3 = [
        path
        for path in (tmp_path / "straight" / "chunks").glob("*/pool3_00000020.npy")
        if not path.with_name("pool3_00000010.npy").exists()  # of chunks of 10
    ]
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:500])):
        damage(pool3[0])
        assert numbers(run("straight")) == expected
        assert {span[0] for span in computed} in ({"evaluate"}, {"reference images"})

    for path in (tmp_path / "straight" / "chunks").glob("*/totals.npz"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert numbers(run("straight")) == expected
    assert computed == ALL_CHUNKS, "damaged sums are made anew"


@pytest.mark.usefixtures("cheap")
def test_killed_samples_go_on(
    released_pair: Any, tmp_path: pathlib.Path, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = score(released_pair, tmp_path / "straight", None)
    with monkeypatch.context() as patch:
        _kill_at(patch, 2)  # images, totals; the second chunk's images
        with pytest.raises(KeyboardInterrupt):
            score(released_pair, tmp_path / "killed", None)
    assert not (tmp_path / "killed" / "samples.npz").exists()
    computed.clear()
    resumed = score(released_pair, tmp_path / "killed", None)
    assert computed == [("evaluate", 20, 20)]
    assert resumed["inception_score"] == straight["inception_score"]
    assert (tmp_path / "killed/samples.npz").read_bytes() == (tmp_path / "straight/samples.npz").read_bytes()
    (ours,), (theirs,) = ((tmp_path / x / "chunks").glob("*/totals.npz") for x in ("killed", "straight"))
    with np.load(ours) as a, np.load(theirs) as b:
        assert close(ScoreTotals.from_arrays(dict(a)), ScoreTotals.from_arrays(dict(b))) == 0


def _kill_at(patch: pytest.MonkeyPatch, writes: int) -> None:
    """Dies in the write with this number, half of it on disk."""
    write, count = chunks.write_file, [0]

    def dying(path: pathlib.Path, content: bytes) -> None:
        count[0] += 1
        if count[0] > writes:
            path.with_name(f"{path.name}.1.tmp").write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        write(path, content)

    patch.setattr(chunks, "write_file", dying)


# ---------------------------------------------------------------- batches and devices

MESHES = [(1, 8), (2, 20), (4, 5)]  # devices, batch size


def mesh_of(devices: int) -> Any:
    return make_mesh(MeshConfig(), devices=jax.devices()[:devices])


def close(ours: ScoreTotals, theirs: ScoreTotals) -> float:
    """Largest difference, over the largest number of its array."""
    a, b = ours.to_arrays(), theirs.to_arrays()
    return max(float(np.abs(a[k] - b[k]).max() / (np.abs(b[k]).max() or 1)) for k in b)


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_samples_give_the_same_sums_on_any_mesh(released_pair: Any, tmp_path: pathlib.Path) -> None:
    reference = program.read_reference(write_reference_of(tmp_path))
    found = []
    for devices, batch_size in MESHES:
        mesh = mesh_of(devices)
        settings = Settings(seed=3, batch_size=batch_size, chunk=20, split_size=20)
        pipeline = load(str(released_pair.generator), tokenizer=str(released_pair.tokenizer), mesh=mesh)
        network = program.load_inception(pathlib.Path(), mesh, settings)
        scorer = Program(network, mesh, settings, reference)
        models = pipeline.generator, pipeline.tokenizer
        batches = image_batches.batch_samples(models, pipeline.params, pipeline.sampling, num=27, seed=3)
        out = tmp_path / f"{devices}_{batch_size}"
        totals, store = scorer.accumulate(batches, out, keep=("images",), description="", quiet=True)
        found.append(totals)
        images = np.concatenate(list(store.load_kept("images")))
        np.testing.assert_array_equal(images, pipeline.sample(np.arange(27) % 10, seed=3))
        assert float(found[-1].pool3.count) == found[-1].done == 27  # pyright: ignore
        assert [float(s.count) for s in found[-1].splits] == [20, 7]
    fids = [_fid(totals, reference) for totals in found]
    for (devices, batch_size), totals, fid in zip(MESHES[1:], found[1:], fids[1:], strict=True):
        assert close(totals, found[0]) < 1e-6, (devices, batch_size)
        assert fid == pytest.approx(fids[0], rel=1e-6) and fid > 1, (devices, batch_size)


def _fid(totals: ScoreTotals, reference: Reference) -> float:
    shift = np.asarray(reference.mean, np.float32)  # as the sums were taken
    return frechet.frechet_distance(reference.mean, reference.cov, *moments.finalize_moments(totals.pool3, shift))


@pytest.mark.usefixtures("cheap")
def test_images_give_the_same_sums_on_any_mesh(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "images.npz", 27)
    found = []
    for devices, batch_size in MESHES:
        mesh = mesh_of(devices)
        settings = Settings(batch_size=batch_size, chunk=20, split_size=20)
        scorer = Program(program.load_inception(pathlib.Path(), mesh, settings), mesh, settings, None)
        batches = image_batches.batch_image_set(open_image_set(str(tmp_path / "images.npz")))
        out = tmp_path / f"{devices}_{batch_size}"
        found.append(scorer.accumulate(batches, out, description="", quiet=True)[0])
        assert close(found[-1], found[0]) < 1e-6, (devices, batch_size)


@pytest.mark.usefixtures("cheap")
def test_images_that_are_not_finite_are_counted_and_an_error(
    released_pair: Any, tmp_path: pathlib.Path, computed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes of ten get a token outside the codebook; the last image, which pads batches, is one of them."""
    draw = rar.sample

    def sample(config: Any, params: Any, labels: jax.Array, **keywords: Any) -> jax.Array:
        tokens_bn = draw(config, params, labels, **keywords)
        return tokens_bn.at[:, 5].set(jnp.where((labels == 3) | (labels == 9), 32, tokens_bn[:, 5]))

    monkeypatch.setattr(rar, "sample", sample)
    for _ in range(2):  # the count is stored with the sums
        with pytest.raises(NonFiniteError, match="8 of 40 images have non-finite pixels"):
            score(released_pair, tmp_path, None)
    assert len(computed) == 2 and not (tmp_path / "result.json").exists()


@pytest.mark.usefixtures("cheap")
def test_samples_npz_holds_what_was_scored(released_pair: Any, tmp_path: pathlib.Path) -> None:
    reference = write_reference_of(tmp_path)
    drawn = score(released_pair, tmp_path / "out", reference)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    pipeline = load(str(released_pair.generator), tokenizer=str(released_pair.tokenizer))
    expected = pipeline.sample(np.arange(NUM) % 10, seed=SETTINGS.seed)
    # Another program may round a pixel to the other side of a whole number, and truncation shows it.
    difference = np.abs(images.astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 1e-3
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size[0] > 16 and grid.size[1] > 16
    images_of_samples = open_image_set(str(tmp_path / "out" / "samples.npz"))
    again = open_program(reference=reference)
    given = scores.score_images(again, images_of_samples, tmp_path / "again", quiet=True)
    assert "images_sha256" in given["made_from"] and "seed" not in given["made_from"]
    for name, value in numbers(drawn).items():
        assert given[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.usefixtures("cheap")
def test_grey_images_become_a_reference_of_three_channels(tmp_path: pathlib.Path) -> None:
    settings = Settings(batch_size=200, chunk=1000)
    made = scores.make_reference(open_program(settings), open_image_set("digits"), tmp_path / "r.npz", quiet=True)
    source = load_source("digits", "train")
    reference = program.read_reference(tmp_path / "r.npz")
    assert made["n"] == reference.n == made["images_kept"] == len(source) and reference.source == "digits (train)"
    assert reference.images is not None
    np.testing.assert_array_equal(
        reference.images.read(0, 3), np.repeat(source.gather(np.arange(3))["images"], 3, axis=-1)
    )
    with pytest.raises(ConfigError, match=r"r\.dat: a reference is a \.npz file"):
        scores.make_reference(open_program(settings), open_image_set("digits"), tmp_path / "r.dat")


# ---------------------------------------------------------------- the command


def problem(capsys: pytest.CaptureFixture[str], code: int, *argv: Any) -> str:
    """The one line of a failure."""
    capsys.readouterr()
    assert cli.main(["evaluate", "--quiet", *(str(a) for a in argv)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("rar-jax evaluate: "), err
    return err


def test_one_line_for_a_wrong_command(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "x.npz", 4)
    before = set(tmp_path.iterdir())
    out, images = tmp_path / "out", ("--images", tmp_path / "x.npz")
    weights = ("--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer)
    network = ("--inception", tmp_path / "missing.pth")
    for argv, text in (
        ((*images, "--out", out), "give Inception's weights"),
        ((*weights, "--out", out), "evaluate needs --inception (FID), or --config and --workdir"),
        ((*network, *weights, *images, "--out", out), "give one of --weights, --workdir, --images"),
        ((*network, *images, "--make-reference", tmp_path / "x.npz", "--out", out), "give one of"),
        ((*network, "--out", out), "give one of"),
        ((*network, *weights), "give --out"),
        ((*network, *weights, "--out", out, "--chunk", "3000"), "chunk is 3000: it must divide 5000"),
        ((*network, *weights, "--out", out, "--chunk", "0"), "chunk is 0"),
        ((*network, *weights, "--out", out, "--batch-size", "0"), "batch_size is 0"),
        ((*network, *weights, "--out", out, "--seed", "-1"), "seed is -1"),
        ((*network, *weights, "--out", out, "--protocol", "clean"), "protocol is 'clean'"),
        ((*network, *weights, "--out", out, "--rounding", "up"), "rounding is 'up'"),
        ((*network, "--make-reference", tmp_path / "x.npz", "--out", tmp_path / "r"), "a reference is a .npz file"),
        ((*network, "--images", tmp_path / "none", "--out", out), "none"),
        ((*network, *weights, "--out", out, "--image-size", "16"), "--image-size is of a source in --images"),
        ((*network, *images, "--out", out, "--image-size", "16"), "is read as it is: leave --image-size out"),
    ):
        assert text in problem(capsys, 2, *argv), argv
    assert set(tmp_path.iterdir()) == before, "a failure leaves nothing"


def test_one_line_for_a_wrong_file(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "x.npz", 4)
    write_reference(
        tmp_path / "other.npz", mean=np.zeros(8), cov=np.eye(8), n=9, protocol="adm", weights_sha256="0", source="x"
    )
    before = set(tmp_path.iterdir())
    weights = ("--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer)
    network, out = ("--inception", tmp_path / "missing.pth"), ("--out", tmp_path / "out")
    for what in (weights, ("--images", tmp_path / "x.npz")):
        line = problem(capsys, 1, *network, *what, *out, "--reference", tmp_path / "other.npz")
        assert "other.npz" in line and "'mu'" in line
        assert "x.npz lacks 'mu'" in problem(capsys, 1, *network, *what, *out, "--reference", tmp_path / "x.npz")
        assert "none.npz" in problem(capsys, 1, *network, *what, *out, "--reference", tmp_path / "none.npz")
        assert "missing.pth" in problem(capsys, 1, *network, *what, *out)
        line = problem(capsys, 1, "--inception", released_pair.generator, *what, *out)
        assert released_pair.generator.name in line
    assert "none.npz" in problem(capsys, 1, *network, "--images", tmp_path / "none.npz", *out)
    line = problem(
        capsys, 1, "--inception", released_pair.generator, "--make-reference", tmp_path / "x.npz", "--out",
        tmp_path / "r.npz",
    )  # fmt: skip
    assert released_pair.generator.name in line
    assert set(tmp_path.iterdir()) == before, "a failure leaves nothing"


@pytest.mark.usefixtures("cheap")
def test_the_commands_from_images_to_numbers(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "x.npz", 12)
    network = ["--quiet", "--inception", "any", "--batch-size", "8", "--chunk", "20"]
    weights = ["--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer]
    reference, out = tmp_path / "r.npz", tmp_path / "out"

    def run(*argv: Any) -> str:
        assert cli.main(["evaluate", *network, *(str(a) for a in argv)]) == 0
        return capsys.readouterr().out

    assert "n 12\n" in run("--make-reference", tmp_path / "x.npz", "--out", reference)
    argv = (*weights, "--samples", "15", "--reference", reference, "--seed", "2", "--out", out)
    text = run(*argv)
    for name in ("fid ", "sfid", "inception_score", "precision", "recall", "kid"):
        assert name in text
    assert "note: n is 15, below 2048" in text and "not a multiple of the 10 classes" in text
    assert {p.name for p in out.iterdir()} == {"result.json", "grid.png", "chunks"}
    alone = run("--images", tmp_path / "x.npz", "--out", tmp_path / "alone", "--no-neighbours")
    assert "inception_score" in alone and "fid" not in alone and "kid" not in alone
    files = ImageFiles()
    files.write_folder(tmp_path / "data" / "train", files.image_set())
    files.write_folder(tmp_path / "data" / "val", files.image_set((1, 0, 0)))
    cropped = ("--image-size", "16", "--out")
    assert "n 18\n" in run("--images", f"folder:{tmp_path}/data", *cropped, tmp_path / "cropped", "--no-neighbours")
    made_from = json.loads((tmp_path / "cropped" / "result.json").read_text())["made_from"]
    assert made_from["images_from"] == f"folder:{tmp_path}/data (train), centre crop to 16"
    assert "n 18\n" in run("--make-reference", f"folder:{tmp_path}/data", *cropped, tmp_path / "cropped.npz")
    assert program.read_reference(tmp_path / "cropped.npz").source == made_from["images_from"]
    without = run(*argv[:-1], tmp_path / "without", "--no-neighbours")
    assert "fid" in without and "kid" not in without and "precision" not in without
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *network, "--nothing"])
