"""`rar_jax.load(...)`: weights, tokenizer and jitted sampler in one object, for notebooks and other programs."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import ConfigError, build, find_module, require
from rar_jax.guidance import Guidance
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, param_shardings
from rar_jax.sampling.sampler import Model, check_pair, sample_images, sample_keys, to_uint8
from rar_jax.training.checkpoint import CheckpointError, good_step, load_params
from rar_jax.training.workdir import Workdir


class Pipeline:
    """A generator and its tokenizer, ready to sample.

    Attributes:
      params: {"generator": decoding parameters, "tokenizer": parameters}, an argument of `sample_fn`.
      guidance: what `sample` uses unless told otherwise.
      class_names: one a class, or numbers where there are no names.
    """

    def __init__(
        self,
        generator: Model,
        tokenizer: Model,
        generator_params: Any,
        tokenizer_params: Any,
        *,
        guidance: Guidance | None = None,
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
        dtype: Any = None,
    ) -> None:
        check_pair(generator, tokenizer)
        self.generator, self.tokenizer, self.mesh = generator, tokenizer, mesh
        self.guidance = guidance or Guidance(0.0)
        self.class_names = tuple(class_names) or tuple(str(i) for i in range(generator.config.num_classes))
        params = {"generator": generator_params, "tokenizer": tokenizer_params}
        if mesh is not None:
            axes = {name: m.module.axes(m.config) for name, m in (("generator", generator), ("tokenizer", tokenizer))}
            params = jax.device_put(params, param_shardings(axes, params, mesh))
        prepared = generator.module.prepare(generator.config, params["generator"], dtype=dtype)
        self.params = {"generator": prepared, "tokenizer": jax.tree.map(jnp.asarray, params["tokenizer"])}
        self._jitted = jax.jit(self.sample_fn)

    @property
    def generator_params(self) -> Any:
        """The generator's decoding parameters."""
        return self.params["generator"]

    @property
    def tokenizer_params(self) -> Any:
        """The tokenizer's parameters."""
        return self.params["tokenizer"]

    def sample_fn(self, params: Any, labels: jax.Array, keys: jax.Array, guidance: Guidance) -> jax.Array:
        """uint8 images (b, y, x, c); pure and jittable, for use inside a program of one's own.

        Args:
          params: `pipeline.params`, passed as an argument so that a jit does not bake the weights in.
          labels: int (b,). keys: typed PRNG keys (b,), one a sample.
          guidance: traced; changing its numbers does not compile again.
        """
        return sample_images(self.generator, self.tokenizer, params, labels, keys, guidance)

    def sample(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        guidance: Guidance | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws one image a label.

        Args:
          labels: class numbers, (b,).
          seed: image i is a function of (seed, i, its label), whatever the batch size and the mesh.
          guidance: default `self.guidance`.
          batch_size: images at a time; default all, at most 64.

        Returns: uint8 (b, y, x, c).
        Raises: ConfigError for a label that is no class.
        """
        labels_b = np.asarray(labels).reshape(-1)
        require(
            labels_b.dtype.kind in "iu" or not labels_b.size, f"labels are {labels_b.dtype}: give class numbers (ints)"
        )
        require(0 <= seed < 2**32, f"seed is {seed}: it must be in 0..4294967295 (uint32)")
        require(batch_size is None or batch_size >= 1, f"batch_size is {batch_size}: it must be at least 1")
        require(
            guidance is None or isinstance(guidance, Guidance),
            f"guidance is {guidance!r}: give rar_jax.Guidance(scale, power, temperature)",
        )
        classes = self.generator.config.num_classes
        if bad := [int(label) for label in labels_b if not 0 <= label < classes]:
            raise ConfigError(f"label {bad[0]} is outside the classes 0..{classes - 1}")
        if not labels_b.size:
            raise ConfigError("no labels: give at least one class to sample")
        size = batch_size or min(len(labels_b), 64)
        divisor = 1 if self.mesh is None else batch_divisor(self.mesh)
        size = -(-size // divisor) * divisor
        images = []
        for start in range(0, len(labels_b), size):
            ids_b = np.arange(start, start + size) % len(labels_b)  # the last batch is filled up, and cut again
            batch = labels_b[ids_b].astype(np.int32), sample_keys(seed, jnp.asarray(ids_b))
            if self.mesh is not None:
                batch = jax.device_put(batch, batch_sharding(self.mesh))
            out = self._jitted(self.params, *batch, guidance or self.guidance)
            images.append(np.asarray(out)[: len(labels_b) - start])
        return np.concatenate(images)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (b, y, x, c) as the tokenizer keeps them: encoded, decoded, rounded."""
        module, config = self.tokenizer.module, self.tokenizer.config

        def through(params: Any, images_byxc: jax.Array) -> jax.Array:
            return to_uint8(module.decode(config, params, module.encode(config, params, images_byxc)))

        return np.asarray(jax.jit(through)(self.tokenizer_params, jnp.asarray(images)))


def load(
    path_or_name: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> Pipeline:
    """Loads a work directory, or a released generator file with its tokenizer's.

    Args:
      path_or_name: a work directory of `rar-jax run`, or a RAR file (.bin, .pth, .safetensors).
      tokenizer: MaskGIT-VQ file; needed with a generator file.
      mesh: devices to spread over (default: one). dtype: what the generator's weights are cast to, e.g. "bfloat16".

    Raises: ConfigError or WeightsError that say what is missing.
    """
    path = pathlib.Path(path_or_name)
    if dtype is not None:
        try:
            known = jnp.dtype(dtype).name in ("float32", "bfloat16")
        except TypeError:
            known = False
        require(known, f"dtype is {dtype!r}: it must be 'float32' or 'bfloat16'")
    if path.is_dir():
        require(tokenizer is None, f"{path} is a work directory, which has its own tokenizer: leave tokenizer out")
        return _load_workdir(Workdir(path), mesh, dtype)
    if not path.is_file():
        raise ConfigError(f"{path}: no such work directory or weights file")
    if tokenizer is None:
        raise ConfigError(f"{path} is a generator's file: give its tokenizer's too, load(..., tokenizer=...)")
    from rar_jax.interop import maskgit_vq, rar

    generator_config, generator_params = rar.load(path)
    tokenizer_config, tokenizer_params = maskgit_vq.load(tokenizer)
    return Pipeline(
        Model(find_module("generators", "rar"), generator_config),
        Model(find_module("tokenizers", "maskgit_vq"), tokenizer_config),
        generator_params,
        tokenizer_params,
        mesh=mesh,
        dtype=dtype,
    )


def load_model(config: dict[str, Any], kind: str) -> Model:
    """The generator or tokenizer ("generators", "tokenizers") of a resolved experiment."""
    section = config[kind[:-1]]
    module = find_module(kind, section["name"])
    return Model(module, build(module.Config, section, where=f"config.{kind[:-1]}", ignore=("name",)))


def _load_workdir(workdir: Workdir, mesh: Mesh | None, dtype: Any) -> Pipeline:
    config = workdir.read_config()
    params = {}
    for stage in ("generator", "tokenizer"):
        if (good := good_step(workdir.checkpoints(stage))) is None:
            raise CheckpointError(
                f"{workdir.path} has no good {stage} checkpoint yet: finish it with "
                f"`rar-jax run --config {config['name']} --workdir {workdir.path}`"
            )
        params[stage] = load_params(workdir.checkpoints(stage), good[0])
    return Pipeline(
        load_model(config, "generators"),
        load_model(config, "tokenizers"),
        params["generator"],
        params["tokenizer"],
        guidance=build(Guidance, config["guidance"], where="config.guidance"),
        class_names=config["data"]["class_names"],
        mesh=mesh,
        dtype=dtype,
    )
