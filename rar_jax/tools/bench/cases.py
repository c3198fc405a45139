"""Make the cases that `rar-jax bench` times, one per batch size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import require
from rar_jax.data.loader import batches
from rar_jax.errors import TripCountError
from rar_jax.experiment import Experiment
from rar_jax.keys import sample_keys
from rar_jax.metrics.features import extract_features
from rar_jax.models import Model, TokenSpec, prepare_params, store_spec, token_spec
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.networks.layers import dropout_bits
from rar_jax.parallel.arrays import prefetch_batches
from rar_jax.parallel.mesh import batch_divisor, matmul_dtype
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.sampling import sample_images
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter
from rar_jax.tools.costs import Cost, count_costs
from rar_jax.training.step import compile_training
from rar_jax.weights.stages import model_shardings

# The options of each bench besides the batch size.
OPTIONS: dict[str, tuple[str, ...]] = {
    "sample": ("dtype", "decode"),
    "train": ("dtype",),
    "evaluate": ("whole",),
    "loader": ("records",),
    "tokenize": ("dtype", "decode"),
}
LOADER_STEPS = 100  # batches in one repeat: a single batch is too short to time


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time, and how.

    what: a key of OPTIONS. batch_sizes: default, the experiment's own. dtype: of the matmuls; default, the verb's.
    decode: for sample, decode the tokens; for tokenize, decode instead of encoding. whole: for evaluate, also sample
    and decode. records: size of the store that the loader reads.
    """

    what: str
    batch_sizes: tuple[int, ...] = ()
    repeats: int = 5
    dtype: str | None = None
    decode: bool = False
    whole: bool = False
    records: int = 1_000_000

    def __post_init__(self) -> None:
        require(self.what in OPTIONS, f"bench '{self.what}': it must be one of {', '.join(OPTIONS)}")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("dtype", "decode", "whole", "records"):
            verbs = [verb for verb, names in OPTIONS.items() if name in names]
            used = self.what in verbs or getattr(self, name) == defaults[name]
            require(used, f"--{name} applies to bench {' and '.join(verbs)}, not to {self.what}: leave it out")
        require(self.dtype in (None, "float32", "bfloat16"), f"--dtype is {self.dtype}: it must be float32 or bfloat16")
        smallest = min((1, *self.batch_sizes))
        for name, number in (("batch-size", smallest), ("repeats", self.repeats), ("records", self.records)):
            require(number >= 1, f"--{name} is {number}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch size of one bench.

    run: does `steps` steps and returns the arrays to wait for. items: units (images, steps, records) in one step.
    cost: of one step, None if unknown. more: further results, read after the last run.
    """

    batch_size: int
    items: int
    unit: str
    run: Callable[[], Any]
    steps: int = 1
    compile_seconds: float | None = None
    cost: Cost | None = None
    more: Callable[[], dict[str, Any]] = dict


def select_batch_sizes(experiment: Experiment, mesh: Mesh, options: Options) -> tuple[int, ...]:
    """The requested batch sizes, or the experiment's.

    Raises: ConfigError for one that does not divide over the mesh.
    """
    own = experiment.train.batch_size if options.what in ("train", "loader") else experiment.evaluate.batch_size
    parts = batch_divisor(mesh)
    for size in options.batch_sizes or (own,):
        require(size % parts == 0, f"batch size {size} is not divisible by the {parts} devices: give --batch-size")
    return options.batch_sizes or (own,)


def select_dtype(experiment: Experiment, options: Options) -> str:
    """The requested matmul dtype or the verb's; float32 on devices without bfloat16."""
    own = {"train": experiment.generator, "tokenize": experiment.tokenizer}.get(options.what)
    return matmul_dtype(options.dtype or (get_setting(own, "dtype") if own else "float32"))


def get_setting(model: Model, name: str) -> Any:
    """A config field that not every model has. Raises: ConfigError if missing."""
    require(hasattr(model.config, name), f"{model.module.__name__}.Config has no field '{name}', which bench needs")
    return getattr(model.config, name)


# ---------------------------------------------------------------- cases


def make_sample_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Labels to tokens; with `decode` to images, with `whole` to Inception features."""
    generator, tokenizer = experiment.generator, experiment.tokenizer
    prepared = prepare_params(generator, draw_params(generator, mesh), dtype=select_dtype(experiment, options))
    params = {"generator": prepared}
    if options.decode or options.whole:
        params["tokenizer"] = draw_params(tokenizer, mesh)
    if options.whole:
        params["inception"] = _draw_inception(mesh)

    def sample(params: Any, labels: jax.Array, keys: jax.Array, sampling: Any) -> Any:
        if "tokenizer" not in params:
            return generator.module.sample(generator.config, params["generator"], labels, keys=keys, sampling=sampling)
        images = sample_images(generator, tokenizer, params, labels, keys, sampling)
        return extract_features(params["inception"], images) if "inception" in params else images

    for size in select_batch_sizes(experiment, mesh, options):
        labels = jnp.arange(size, dtype=jnp.int32) % experiment.data.num_classes
        batch = jax.device_put((labels, sample_keys(0, jnp.arange(size))), batch_sharding(mesh))
        yield _make_network_case(mesh, size, sample, params, *batch, experiment.sampling)


def make_train_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """The training step of training/loop.py, with the optimizer, on random tokens."""
    module, recipe = experiment.generator.module, experiment.train
    config = dataclasses.replace(experiment.generator.config, dtype=select_dtype(experiment, options))
    state: Any = None
    for size in select_batch_sizes(experiment, mesh, options):
        setup = compile_training(module, config, dataclasses.replace(recipe, batch_size=size), mesh)
        if state is None:
            state = _draw_state(setup.abstract_state)
        labels = np.arange(size, dtype=np.int32) % experiment.data.num_classes
        batch = {"tokens": _draw_tokens(token_spec(experiment.generator), size), "labels": labels}
        batch = jax.device_put(batch, batch_sharding(mesh))
        key = jax.random.key(0, impl="threefry2x32")
        compiled, seconds, cost = _compile(mesh, size, setup.step, state, batch, key)

        def run(compiled: Any = compiled, batch: Any = batch, key: Any = key) -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, key)
            return metrics["loss"]

        yield Case(size, 1, "steps", run, compile_seconds=seconds, cost=cost)


def make_image_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Images to tokens (with `decode`, back) or, for "evaluate", to features."""
    if options.what == "evaluate":
        function, params = extract_features, _draw_inception(mesh)
    else:
        config = dataclasses.replace(experiment.tokenizer.config, dtype=select_dtype(experiment, options))
        tokenizer = Model(experiment.tokenizer.module, config)
        function = functools.partial(tokenizer.module.decode if options.decode else tokenizer.module.encode, config)
        params = draw_params(tokenizer, mesh)
    for size in select_batch_sizes(experiment, mesh, options):
        inputs = (
            _draw_tokens(token_spec(experiment.tokenizer), size) if options.decode else _draw_images(experiment, size)
        )
        yield _make_network_case(mesh, size, function, params, jax.device_put(inputs, batch_sharding(mesh)))


def make_loader_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Shuffled batches of a token store, on the devices as the training loop has them."""
    with tempfile.TemporaryDirectory() as folder:
        store = _write_random_store(experiment, pathlib.Path(folder) / "store", options.records)
        # Bytes of a record in a batch, and in the file that it is read from.
        stored = sum(path.stat().st_size for path in pathlib.Path(store.folder).glob("*.npy")) / len(store)
        record = sum(x.nbytes for x in store.gather(np.arange(1)).values()) + stored
        for size in select_batch_sizes(experiment, mesh, options):
            stream = batches(store, global_batch=size, seed=0, start_step=0, num_workers=experiment.data.workers)
            waits: list[float] = []
            run = functools.partial(_read_batches, prefetch_batches(stream, mesh), waits)

            def longest_wait(waits: list[float] = waits) -> dict[str, float]:
                return {"longest_wait_seconds": max(waits[LOADER_STEPS:])}  # without the warm-up

            with contextlib.closing(stream):  # pyright: ignore[reportArgumentType]
                cost = Cost(0, size * record)
                yield Case(size, size, "records", run, steps=LOADER_STEPS, cost=cost, more=longest_wait)


def make_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """The cases of `options.what`."""
    makers = {"train": make_train_cases, "loader": make_loader_cases, "sample": make_sample_cases}
    make = make_sample_cases if options.whole else makers.get(options.what, make_image_cases)
    return make(experiment, mesh, options)


def _read_batches(stream: Iterator[Any], waits: list[float]) -> None:
    for _ in range(LOADER_STEPS):
        began = time.perf_counter()
        jax.block_until_ready(next(stream))
        waits.append(time.perf_counter() - began)


def _make_network_case(mesh: Mesh, size: int, function: Callable[..., Any], *args: Any) -> Case:
    compiled, seconds, cost = _compile(mesh, size, jax.jit(function), *args)
    return Case(size, size, "images", functools.partial(compiled, *args), compile_seconds=seconds, cost=cost)


def _compile(mesh: Mesh, batch_size: int, jitted: Any, *args: Any) -> tuple[Any, float, Cost | None]:
    """Return the program, its compile seconds, and its cost, None if data-dependent."""
    began = time.perf_counter()
    with sharded(mesh):
        traced = jitted.trace(*args)
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    try:
        return compiled, seconds, count_costs(traced.jaxpr)
    except TripCountError:
        return compiled, seconds, None


# ---------------------------------------------------------------- random weights and inputs


def draw_params(model: Model, mesh: Mesh) -> Any:
    """Draw noise in the shapes of a model's parameters, sharded as rules.py says."""
    shapes = jax.eval_shape(functools.partial(model.module.init, model.config), jax.random.key(0))
    return _draw(shapes, model_shardings(model, mesh))


def _draw_inception(mesh: Mesh) -> Any:
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    return _draw(shapes, jax.tree.map(lambda _: replicated(mesh), shapes))


def _draw_state(abstract: Any) -> Any:
    at = jax.tree.map(lambda s: s.sharding, abstract)
    params = _draw(abstract["params"], at.pop("params"))
    rest = {name: abstract[name] for name in at}
    zeros = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest), out_shardings=at)
    return {"params": params, **zeros()}


def _draw(shapes: Any, at: Any) -> Any:
    """Draw uniform noise by the hash of dropout, which is faster than threefry."""

    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        bits = [dropout_bits(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        noise = [(x.astype(jnp.float32) * 2**-31 - 1) * (0.02 * 3**0.5) for x in bits]
        return tree.unflatten([x.astype(leaf.dtype) for x, leaf in zip(noise, leaves, strict=True)])

    return jax.jit(draw, out_shardings=at)(jax.random.key(0))


def _draw_tokens(spec: TokenSpec, size: int, seed: int = 0) -> np.ndarray:
    rng, shape = np.random.default_rng(seed), (size, *spec.shape)
    if spec.vocab is None:
        return rng.standard_normal(shape, np.float32).astype(spec.dtype)
    return rng.integers(0, spec.vocab, shape, np.int32)


def _draw_images(experiment: Experiment, size: int) -> np.ndarray:
    data = experiment.data
    shape = (size, data.image_size, data.image_size, data.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _write_random_store(experiment: Experiment, folder: pathlib.Path, records: int) -> TokenStore:
    data, spec = experiment.data, store_spec(experiment.tokenizer)
    card = {"spec": dataclasses.asdict(spec), "num_classes": data.num_classes, "crops": ["whole image"]}
    card |= {"class_names": list(data.class_names), "source": "random", "tokenizer_sha256": None}
    writer = TokenStoreWriter(folder, card, source_records=records)
    for j in writer.missing():
        begin, end = writer.span(j)
        rows = end - begin
        tokens, labels = _draw_tokens(spec, rows, j), np.random.default_rng(j).integers(0, data.num_classes, rows)
        with writer.shard(j) as shard:
            shard.append(tokens, labels, np.arange(begin, end), np.zeros(rows, int))
    writer.finish()
    return TokenStore(folder)
