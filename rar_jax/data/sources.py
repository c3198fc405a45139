"""Where images come from: random access to uint8 images with their labels, one spec string each.

A kind of source is one subclass of `ImageSource` and one line in `_KINDS`. Everything downstream asks
for batches through `gather`, which a source in memory answers with a single copy.
"""

from __future__ import annotations

import gzip
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rar_jax.config import ConfigError, nearest, require

Split = Literal["train", "heldout"]
Record = dict[str, Any]
Batch = dict[str, np.ndarray]


class ImageSource:
    """Random access to labelled images; also a source for `grain.MapDataset.source`.

    A record is {"images": uint8 (h, w, c), "labels": int32, "ids": int64}; ids are unique in a split.
    Subclasses offer `__len__` and `__getitem__`, and `gather` where a batch can be had at once.
    """

    def __init__(self, *, image_shape: tuple[int, int, int], class_names: Sequence[str]) -> None:
        self.image_shape = image_shape
        self.class_names = tuple(class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        raise NotImplementedError

    def gather(self, indices: np.ndarray) -> Batch:
        """Records at `indices` (int64 (b,)): "images" uint8 (b, h, w, c), "labels" int32 (b,), "ids" int64 (b,)."""
        records = [self[int(i)] for i in indices]
        return {key: np.stack([r[key] for r in records]) for key in ("images", "labels", "ids")}


class ArraySource(ImageSource):
    """Images held in memory.

    Args:
      images: uint8 (n, h, w, c).  labels: ints (n,) in [0, len(class_names)).  ids: ints (n,), default 0..n-1.

    Raises: ConfigError if the arrays do not fit each other or a label has no class.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str], ids: np.ndarray | None = None
    ) -> None:
        require(
            images.ndim == 4 and images.dtype == np.uint8, f"images are {images.dtype} {images.shape}, not uint8 4-D"
        )
        require(len(images) > 0, "the source holds no images")
        require(len(images) == len(labels), f"{len(images)} images but {len(labels)} labels")
        bad = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
        if bad.size:
            raise ConfigError(f"label {labels[bad[0]]} of record {bad[0]} is outside the {len(class_names)} classes")
        super().__init__(image_shape=images.shape[1:], class_names=class_names)
        self._arrays: Batch = {
            "images": images,
            "labels": labels.astype(np.int32),
            "ids": (np.arange(len(images)) if ids is None else ids).astype(np.int64),
        }

    def __len__(self) -> int:
        return len(self._arrays["labels"])

    def __getitem__(self, index: int) -> Record:
        return {key: array[index] for key, array in self._arrays.items()}

    def gather(self, indices: np.ndarray) -> Batch:
        return {key: array[indices] for key, array in self._arrays.items()}


class TfdsSource(ImageSource):
    """A prepared TensorFlow Datasets image set, read without TensorFlow; one decode a record.

    Raises: ConfigError if the name is unknown, not prepared on this machine, or not fixed-size labelled images.
    """

    def __init__(self, name: str, split: Split, *, image_size: int | None = None) -> None:
        # Imported here because it takes a second and only this source needs it.
        import tensorflow_datasets as tfds

        tfds_split = {"train": "train", "heldout": "test"}[split]
        try:
            # Never download here: on a pod every process would, and into its own disk.
            self._data: Any = tfds.data_source(name, split=tfds_split, download=False)
            features: Any = tfds.builder(name).info.features
        except tfds.core.DatasetNotFoundError:
            raise ConfigError(f"tfds:{name}: no such dataset in TFDS.{nearest(name, _few_builders(name))}") from None
        except (KeyError, ValueError, NotImplementedError, FileNotFoundError) as error:
            reason = str(error.args[0] if error.args else error).split("\n")[0]
            command = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
            raise ConfigError(
                f"tfds:{name}: split '{tfds_split}' cannot be read ({reason}): prepare it once, in Python: "
                f"import tensorflow_datasets as tfds; {command} "
                "(preparing most datasets needs TensorFlow, in any environment; reading does not; idx:FOLDER needs neither)"
            ) from None
        if features is None or not {"image", "label"} <= set(features):
            raise ConfigError(f"tfds:{name} has no 'image' and 'label': only labelled image datasets can be used")
        shape = features["image"].shape
        if None in shape:
            raise ConfigError(f"tfds:{name} has images of many sizes {shape}: they need a crop, give one size")
        self._image_size = image_size
        super().__init__(image_shape=_padded_shape(shape, image_size), class_names=features["label"].names)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        record = self._data[index]
        image = pad_images(record["image"][None], self._image_size)[0]
        return {"images": image, "labels": np.int32(record["label"]), "ids": np.int64(index)}


def load_source(spec: str, split: Split, *, image_size: int | None = None) -> ImageSource:
    """Opens a source of images.

    Args:
      spec: "digits" (scikit-learn's 8x8 digits, nothing to download), "idx:FOLDER" (files as MNIST's) or
        "tfds:NAME" (a prepared TFDS dataset).
      split: "train", or "heldout" (t10k files, TFDS's "test", 360 of the digits).
      image_size: pad images with zeros, symmetrically, to this height and width; None leaves them.

    Raises: ConfigError, one line, for a wrong spec, missing or corrupt files, or images larger than image_size.
    """
    kind, _, argument = spec.partition(":")
    require(split in ("train", "heldout"), f"split '{split}' is neither 'train' nor 'heldout'")
    if kind not in _KINDS:
        raise ConfigError(f"no source '{spec}'.{nearest(kind, _KINDS)}")
    require(bool(argument) == (kind != "digits"), f"source '{spec}': write one of digits, idx:FOLDER, tfds:NAME")
    return _KINDS[kind](argument, split, image_size)


def pad_images(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Zero-pads uint8 (n, h, w, c) to (n, image_size, image_size, c); an odd rest goes below and right."""
    target = _padded_shape(images.shape[1:], image_size)
    rest = [0, *(t - n for t, n in zip(target, images.shape[1:], strict=True))]
    return np.pad(images, [(r // 2, r - r // 2) for r in rest]) if any(rest) else images


def _padded_shape(shape: Sequence[int], image_size: int | None) -> tuple[int, int, int]:
    height, width, channels = shape
    if image_size is None:
        return height, width, channels
    if max(height, width) > image_size:
        raise ConfigError(f"images are {height}x{width}, larger than image_size={image_size}: raise image_size")
    return image_size, image_size, channels


# ---------------------------------------------------------------- digits


def _digits(_: str, split: Split, image_size: int | None) -> ImageSource:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    ids = digits_split(bunch.target)[split]
    names = [str(name) for name in bunch.target_names]
    return ArraySource(pad_images(images[ids], image_size), bunch.target[ids], class_names=names, ids=ids)


def digits_split(labels: np.ndarray, *, heldout: int = 360) -> dict[str, np.ndarray]:
    """The fixed stratified split: ids (places in load_digits) of "train" (1437) and "heldout" (360), ascending.

    Each class gives its share of the 360, rounded by largest remainder (ties to the smaller class): its first
    images in the order of `np.random.RandomState(0).permutation(1797)`, a stream that NumPy has frozen.
    """
    counts = np.bincount(labels)
    share = counts * heldout / len(labels)
    take = np.floor(share).astype(int)
    most_short = np.argsort(take - share, kind="stable")[: heldout - take.sum()]
    take[most_short] += 1
    order = np.random.RandomState(0).permutation(len(labels))
    ids = np.concatenate([order[labels[order] == c][:k] for c, k in enumerate(take)])
    return {"train": np.setdiff1d(np.arange(len(labels)), ids), "heldout": np.sort(ids)}


# ---------------------------------------------------------------- IDX files


def _idx(argument: str, split: Split, image_size: int | None) -> ImageSource:
    folder = pathlib.Path(argument).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"idx:{argument}: no such folder; Fashion-MNIST is Debian's package dataset-fashion-mnist "
            "(idx:/usr/share/datasets/fashion-mnist) or tfds:fashion_mnist"
        )
    prefix = {"train": "train", "heldout": "t10k"}[split]
    images = read_idx(_find_idx(folder, f"{prefix}-images-idx3-ubyte"), ndim=3)[..., None]
    labels = read_idx(_find_idx(folder, f"{prefix}-labels-idx1-ubyte"), ndim=1)
    if (names_file := folder / "classes.txt").is_file():
        names = names_file.read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    else:
        # From the training labels in both splits: a held-out file may lack the last class.
        every = labels if split == "train" else read_idx(_find_idx(folder, "train-labels-idx1-ubyte"), ndim=1)
        names = [str(c) for c in range(int(every.max(initial=0)) + 1)]
    try:
        return ArraySource(pad_images(images, image_size), labels, class_names=names)
    except ConfigError as error:
        raise ConfigError(f"idx:{argument}: {error}") from None


def _find_idx(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ConfigError(f"idx:{folder}: no file {name} or {name}.gz")


def read_idx(path: pathlib.Path, *, ndim: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes (plain or .gz), uint8 with `ndim` dimensions.

    Raises: ConfigError naming the file, and the bytes expected and found, if it is not whole.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is not a whole gzip file ({error}): fetch it again") from None
    header, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    if data[:4] != magic or len(data) < header:
        raise ConfigError(
            f"{path} is no IDX file of {ndim} dimensions: expected {header} bytes of header from {magic.hex()}, "
            f"found {len(data)} bytes from {data[:4].hex()}"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=ndim, offset=4))
    # Python's int: a corrupt header can ask for more than int64 holds.
    expected = header + int(np.prod(np.array(shape, dtype=object)))
    if len(data) != expected:
        raise ConfigError(f"{path}: expected {expected} bytes for {shape}, found {len(data)}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# ---------------------------------------------------------------- TFDS


def _tfds(argument: str, split: Split, image_size: int | None) -> ImageSource:
    return TfdsSource(argument, split, image_size=image_size)


def _few_builders(name: str) -> list[str]:
    """Names that begin alike, so that the message stays one line though TFDS knows a thousand."""
    import tensorflow_datasets as tfds

    return [known for known in tfds.list_builders(with_community_datasets=False) if known[:3] == name[:3]]


_KINDS: dict[str, Callable[[str, Split, int | None], ImageSource]] = {"digits": _digits, "idx": _idx, "tfds": _tfds}
