"""What `rar-jax bench` times: each function here yields a Case for each batch size, its weights random and drawn once."""

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
from rar_jax.evaluation.image_batches import batch_samples
from rar_jax.evaluation.program import Network, Program, Settings
from rar_jax.experiment import Experiment
from rar_jax.metrics.features import extract_features
from rar_jax.models import Model
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.networks.layers import dropout_bits
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import prefetch_batches
from rar_jax.parallel.mesh import batch_divisor, matmul_dtype
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.sampling import sample_images, sample_keys
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter
from rar_jax.tools.bench.ceilings import Cost
from rar_jax.training.loop import compile_training
from rar_jax.weights.stages import model_shardings

# What each bench can be told besides the batch size.
READS: dict[str, tuple[str, ...]] = {
    "sample": ("dtype", "decode"),
    "train": ("dtype",),
    "evaluate": ("whole",),
    "loader": ("records",),
    "tokenize": ("dtype", "decode"),
}
LOADER_STEPS = 100  # batches in one repeat: one alone is too short to time


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time, and how.

    what: a key of READS. batch_sizes: default, the experiment's own. dtype: of the matmuls; default, that of the verb.
    decode: sample: decode too; tokenize: decode instead of encoding. whole: evaluate: sampling and decoding too.
    records: of the store that the loader reads.
    """

    what: str
    batch_sizes: tuple[int, ...] = ()
    repeats: int = 5
    dtype: str | None = None
    decode: bool = False
    whole: bool = False
    records: int = 1_000_000

    def __post_init__(self) -> None:
        require(self.what in READS, f"bench '{self.what}': it must be one of {', '.join(READS)}")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("dtype", "decode", "whole", "records"):
            if name not in READS[self.what] and getattr(self, name) != defaults[name]:
                verbs = " and ".join(verb for verb, names in READS.items() if name in names)
                require(False, f"--{name} is of bench {verbs}, not of {self.what}: leave it out")
        require(self.dtype in (None, "float32", "bfloat16"), f"--dtype is {self.dtype}: it must be float32 or bfloat16")
        for name, number in (("--batch-size", min((1, *self.batch_sizes))), ("--repeats", self.repeats)):
            require(number >= 1, f"{name} is {number}: it must be at least 1")
        require(self.records >= 1, f"--records is {self.records}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch size of one bench.

    run: does `steps` steps, and returns what to wait for. items: units (images, steps, records) in one step.
    cost: of one step, None where it is not known. more: further numbers, asked for after the last run.
    """

    batch_size: int
    items: int
    unit: str
    run: Callable[[], Any]
    steps: int = 1
    compile_seconds: float | None = None
    cost: Cost | None = None
    more: Callable[[], dict[str, Any]] = dict


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds until what it returns is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


Cases = Callable[[Experiment, Mesh, Options], Iterator[Case]]


def batch_sizes(experiment: Experiment, mesh: Mesh, options: Options) -> tuple[int, ...]:
    """Those that are asked for, or the experiment's. Raises: ConfigError for one that does not divide over the mesh."""
    whole = experiment.train.batch_size if options.what in ("train", "loader") else experiment.evaluate.batch_size
    sizes = options.batch_sizes or (whole,)
    for size in sizes:
        parts = batch_divisor(mesh)
        require(size % parts == 0, f"batch size {size} is not divisible by the {parts} devices: give --batch-size")
    return sizes


def computes_in(experiment: Experiment, options: Options) -> str:
    """The dtype that a bench multiplies in: what it is told, or what the verb of that name would take; float32, as those do, where
    the device has no bfloat16."""
    own = {"train": experiment.generator, "tokenize": experiment.tokenizer}.get(options.what)
    return matmul_dtype(options.dtype or (own.config.dtype if own else "float32"))


# ---------------------------------------------------------------- generator


def sample_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Labels to tokens, with the experiment's guidance; with `decode`, to images."""
    generator, tokenizer, guidance = experiment.generator, experiment.tokenizer, experiment.guidance
    dtype = computes_in(experiment, options)
    params = _decoding_params(generator, mesh, dtype)
    if options.decode:
        params = {"generator": params, "tokenizer": random_params(tokenizer, mesh)}

    def sample(params: Any, labels: jax.Array, keys: jax.Array, guidance: Any) -> jax.Array:
        if options.decode:
            return sample_images(generator, tokenizer, params, labels, keys, guidance)
        return generator.module.sample(generator.config, params, labels, keys=keys, guidance=guidance)

    for size in batch_sizes(experiment, mesh, options):
        labels = jnp.arange(size, dtype=jnp.int32) % generator.config.num_classes
        batch = jax.device_put((labels, sample_keys(0, jnp.arange(size))), batch_sharding(mesh))
        compiled, seconds = _compile(mesh, size, jax.jit(sample), params, *batch, guidance)
        cost = _sampling_cost(experiment, size, dtype)
        if options.decode:
            cost = _sum(cost, _decoding_cost(tokenizer, params["tokenizer"], size))
        run = functools.partial(compiled, params, *batch, guidance)
        yield Case(size, size, "images", run, compile_seconds=seconds, cost=cost)


def train_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """The step of training/loop.py, optimizer and all, on random tokens."""
    module, recipe = experiment.generator.module, experiment.train
    config = dataclasses.replace(experiment.generator.config, dtype=computes_in(experiment, options))
    flops = getattr(module, "train_flops", None)
    state: Any = None
    for size in batch_sizes(experiment, mesh, options):
        setup = compile_training(module, config, dataclasses.replace(recipe, batch_size=size), mesh)
        step: Any = setup.step
        if state is None:
            state = _random_state(setup.abstract_state)
        labels = np.arange(size, dtype=np.int32) % config.num_classes
        tokens = _random_tokens(experiment.generator, size)
        batch = jax.device_put({"tokens": tokens, "labels": labels}, batch_sharding(mesh))
        key = jax.random.key(0, impl="threefry2x32")
        compiled, seconds = _compile(mesh, size, step, state, batch, key)

        def run(compiled: Any = compiled, batch: Any = batch, key: Any = key) -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, key)
            return metrics["loss"]

        # Parameters and optimizer are read and written once; how often activations go through memory is XLA's choice.
        cost = Cost(flops(config, batch_size=size), 2 * _size(state)) if flops else None
        more: Any = lambda size=size: {"images_a_step": size}  # noqa: E731
        yield Case(size, 1, "steps", run, compile_seconds=seconds, cost=cost, more=more)


# ---------------------------------------------------------------- images


def tokenize_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Images to tokens, or with `decode` tokens to images."""
    config = dataclasses.replace(experiment.tokenizer.config, dtype=computes_in(experiment, options))
    tokenizer = Model(experiment.tokenizer.module, config)
    function = functools.partial(tokenizer.module.decode if options.decode else tokenizer.module.encode, config)
    params = random_params(tokenizer, mesh)
    for size in batch_sizes(experiment, mesh, options):
        given = _random_tokens(tokenizer, size) if options.decode else _random_images(experiment, size)
        yield _feed_forward(mesh, function, params, given)


def evaluate_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Images to Inception features, or with `whole` labels to their sums, in the one program of `rar-jax evaluate`."""
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))["params"]
    inception = _random(shapes, jax.tree.map(lambda _: replicated(mesh), shapes))
    if not options.whole:
        for size in batch_sizes(experiment, mesh, options):
            yield _feed_forward(mesh, extract_features, inception, _random_images(experiment, size))
        return
    models = (experiment.generator, experiment.tokenizer)
    params = {"generator": _decoding_params(models[0], mesh, None), "tokenizer": random_params(models[1], mesh)}
    for size in batch_sizes(experiment, mesh, options):
        program = Program(Network(inception, "random"), mesh, Settings(batch_size=size), None)
        samples = batch_samples(models, params, experiment.guidance, num=size, seed=0)
        run = functools.partial(program.score, samples, 0, size)
        # It is compiled inside its first call: that takes so much longer than the second.
        first, second = seconds_of(run), seconds_of(run)
        cost = _sum(_sampling_cost(experiment, size, None), _decoding_cost(models[1], params["tokenizer"], size))
        cost = _sum(cost, _cost_by_xla(extract_features, inception, _random_images(experiment, size)))
        yield Case(size, size, "images", run, compile_seconds=first - second, cost=cost)


def _feed_forward(mesh: Mesh, function: Callable[..., Any], params: Any, given: np.ndarray) -> Case:
    array = jax.device_put(given, batch_sharding(mesh))
    compiled, seconds = _compile(mesh, len(given), jax.jit(function), params, array)
    cost, run = _cost_by_xla(function, params, given), functools.partial(compiled, params, array)
    return Case(len(given), len(given), "images", run, compile_seconds=seconds, cost=cost)


# ---------------------------------------------------------------- data


def loader_cases(experiment: Experiment, mesh: Mesh, options: Options) -> Iterator[Case]:
    """Shuffled batches of a token store, placed on the devices as the training loop has them."""
    with tempfile.TemporaryDirectory() as folder:
        store = _random_store(experiment, pathlib.Path(folder) / "store", options.records)
        # Bytes of a record in a batch, and in the file that it is read from.
        record = _size(store.gather(np.arange(1))) + _stored_bytes(store)
        for size in batch_sizes(experiment, mesh, options):
            stream = batches(store, global_batch=size, seed=0, start_step=0, num_workers=experiment.data.workers)
            placed, waits = prefetch_batches(stream, mesh), []

            def run(placed: Any = placed, waits: list[float] = waits) -> None:
                for _ in range(LOADER_STEPS):
                    waits.append(seconds_of(functools.partial(next, placed)))

            more: Any = lambda waits=waits: {"longest_wait_seconds": max(waits[LOADER_STEPS:])}  # noqa: E731 (warm-up left out)
            with contextlib.closing(stream):  # pyright: ignore[reportArgumentType]
                yield Case(size, size, "records", run, steps=LOADER_STEPS, cost=Cost(0, size * record), more=more)


def _stored_bytes(store: TokenStore) -> float:
    """Of one record on the disk."""
    return sum(path.stat().st_size for path in store.folder.glob("*.npy")) / len(store)


def _random_store(experiment: Experiment, folder: pathlib.Path, records: int) -> TokenStore:
    spec, codes = experiment.generator.module.token_spec(experiment.generator.config), _codes(experiment.generator)
    require(spec.dtype == jnp.int32, f"bench loader reads stores of codes, the generator has {spec.dtype} tokens")
    data, n = experiment.data, int(np.prod(spec.shape))
    card = {"codebook_size": codes, "grid": list(spec.shape), "num_classes": data.num_classes, "crops": ["whole image"]}
    card |= {"class_names": list(data.class_names), "source": "random", "tokenizer_sha256": None}
    writer = TokenStoreWriter(folder, card, source_records=records)
    for j in writer.missing():
        begin, end = writer.span(j)
        rng = np.random.default_rng(j)
        tokens, labels = rng.integers(0, codes, (end - begin, n)), rng.integers(0, data.num_classes, end - begin)
        with writer.shard(j) as shard:
            shard.append(tokens, labels, np.arange(begin, end), np.zeros(end - begin, int))
    writer.finish()
    return TokenStore(folder)


# ---------------------------------------------------------------- random weights and inputs


def random_params(model: Model, mesh: Mesh) -> Any:
    """Noise in the shapes of a model's parameters, placed as rules.py says."""
    shapes = jax.eval_shape(functools.partial(model.module.init, model.config), jax.random.key(0))
    return _random(shapes, model_shardings(model, mesh))


def _decoding_params(generator: Model, mesh: Mesh, dtype: str | None) -> Any:
    return generator.module.prepare(generator.config, random_params(generator, mesh), dtype=dtype)


def _random_state(abstract: Any) -> Any:
    at = jax.tree.map(lambda s: s.sharding, abstract)
    memory.check_arrays(abstract, at, "random weights and the optimizer's state")
    params = _random(abstract["params"], at["params"])
    rest = {name: part for name, part in abstract.items() if name != "params"}
    zeros = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest),
        out_shardings={name: at[name] for name in rest},
    )
    return {"params": params, **zeros()}


def _random(shapes: Any, at: Any) -> Any:
    """Uniform noise of standard deviation 0.02 by the hash that dropout uses: threefry's took 14 s for RAR-B on two cores."""

    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        half_width = 0.02 * 3**0.5
        noise = [
            (dropout_bits(keys[i], leaf.shape).astype(jnp.float32) * 2**-31 - 1) * half_width
            for i, leaf in enumerate(leaves)
        ]
        return tree.unflatten([x.astype(leaf.dtype) for x, leaf in zip(noise, leaves, strict=True)])

    memory.check_arrays(shapes, at, "random weights")
    return jax.jit(draw, out_shardings=at)(jax.random.key(0))


def _random_tokens(model: Model, size: int) -> np.ndarray:
    spec, rng = model.module.token_spec(model.config), np.random.default_rng(0)
    if spec.dtype == jnp.int32:
        return rng.integers(0, _codes(model), (size, *spec.shape), np.int32)
    return rng.standard_normal((size, *spec.shape), np.float32)


def _random_images(experiment: Experiment, size: int) -> np.ndarray:
    data = experiment.data
    shape = (size, data.image_size, data.image_size, data.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _codes(model: Model) -> int:
    return model.config.codebook_size


# ---------------------------------------------------------------- compiling and counting


def _compile(mesh: Mesh, batch_size: int, jitted: Any, *args: Any) -> tuple[Any, float]:
    """The compiled program, and the seconds that tracing and compiling took. Raises: ConfigError if it would not fit in memory."""
    began = time.perf_counter()
    with sharded(mesh):
        compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - began
    memory.check(compiled, batch_size, divisor=batch_divisor(mesh), where="--batch-size")
    return compiled, seconds


def _sampling_cost(experiment: Experiment, size: int, dtype: str | None) -> Cost | None:
    """None for a generator that does not offer the counts."""
    module, config = experiment.generator.module, experiment.generator.config
    if not (hasattr(module, "sample_flops") and hasattr(module, "sample_bytes")):
        return None
    given = {"batch_size": size, "guided": experiment.guidance.enabled}
    return Cost(module.sample_flops(config, **given), module.sample_bytes(config, **given, dtype=dtype))


def _decoding_cost(tokenizer: Model, params: Any, size: int) -> Cost | None:
    return _cost_by_xla(
        functools.partial(tokenizer.module.decode, tokenizer.config), params, _random_tokens(tokenizer, size)
    )


def _cost_by_xla(function: Callable[..., Any], params: Any, given: np.ndarray) -> Cost | None:
    """Of a network without loops, whose operations XLA counts right; bytes: parameters, input and output, once.

    None where the platform does not count.
    """
    lowered = jax.jit(function).lower(params, given)
    flops = (lowered.cost_analysis() or {}).get("flops")
    return Cost(flops, _size((params, given, lowered.out_info))) if flops else None


def _sum(a: Cost | None, b: Cost | None) -> Cost | None:
    return None if a is None or b is None else a + b


def _size(tree: Any) -> int:
    """Bytes of a tree of arrays or of shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
