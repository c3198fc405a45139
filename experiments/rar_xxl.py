"""RAR-XXL on ImageNet-256 (1499 M parameters): the paper's recipe, 400 epochs. Published FID: 1.48.

    rar-jax run --config experiments/rar_xxl.py --workdir runs/rar_xxl

The tokenizer is the released one (16 x 16 tokens an image, 1024 codes). Durations are shares of train.steps:
62,500 steps of warm-up, annealing from step 125,000 to 187,500.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Everything that the run is made of; what is not here is the default of its dataclass, which is the paper's."""
    config = ml_collections.ConfigDict()
    config.precision = "bfloat16"
    config.data = ml_collections.ConfigDict(
        dict(
            source="tfds:imagenet2012", image_size=256, channels=3, num_classes=1000, class_names="imagenet",
            train_records=1_281_167,
        )
    )  # fmt: skip
    config.tokenizer = ml_collections.ConfigDict(
        dict(name="maskgit_vq", image_size=256, dtype="float32", weights="maskgit-vqgan-imagenet-f16-256")
    )
    config.generator = ml_collections.ConfigDict(
        dict(
            name="rar", width=1408, depth=40, num_heads=16, mlp_width=6144, anneal_start="50%", anneal_end="75%",
            remat=True,  # the activations of 32 images a chip would not fit beside the states
        )
    )  # fmt: skip
    config.train = ml_collections.ConfigDict(
        dict(steps=250_000, batch_size=2048, warmup="25%", log_every=100, eval_every=5000, checkpoint_every=2500)
    )
    config.sampling = ml_collections.ConfigDict(dict(scale=8.0, power=1.2, temperature=1.02))
    config.evaluate = ml_collections.ConfigDict(dict(grid_per_class=4))
    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=4, tensor=1))
    return config
