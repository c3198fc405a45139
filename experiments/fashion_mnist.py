"""RAR on Fashion-MNIST: 70,000 images of 28x28 pixels, ten kinds of clothing; a few hours on two CPU cores.

    apt-get install dataset-fashion-mnist          # puts the IDX files where data.source looks for them
    rar-jax run --config experiments/fashion_mnist.py --workdir runs/fashion_mnist

Through TFDS instead: --config.data.source=tfds:fashion_mnist (prepare it once, as the error message says; only that
needs TensorFlow).
"""

import ml_collections

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def get_config() -> ml_collections.ConfigDict:
    """Everything that the run is made of."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.precision = "float32"
    config.data = ml_collections.ConfigDict(
        dict(
            source="idx:/usr/share/datasets/fashion-mnist", image_size=28, channels=1, num_classes=10,
            class_names=CLASSES, train_records=60_000,
        )
    )  # fmt: skip
    config.tokenizer = ml_collections.ConfigDict(
        dict(
            name="maskgit_vq", image_size=28, channels=1, base_width=32, width_multipliers=(1, 2, 2),
            blocks_per_level=1, latent_width=32, codebook_size=256, restart_every=20, restart_until="60%",
        )
    )  # fmt: skip
    config.tokenizer_train = ml_collections.ConfigDict(
        dict(
            steps=1000, batch_size=64, learning_rate=1e-3, warmup="5%", beta2=0.99, weight_decay=1e-4,
            eval_every=400, eval_records=1024, checkpoint_every=200,
        )
    )  # fmt: skip
    config.classifier = ml_collections.ConfigDict(
        dict(
            widths=(16, 32, 64), features=64, flip=True,
            train=ml_collections.ConfigDict(
                dict(
                    steps=1000, batch_size=64, learning_rate=3e-3, warmup="5%", beta2=0.99, weight_decay=0.05,
                    eval_every=500, eval_records=2048, checkpoint_every=500,
                )
            ),
        )
    )  # fmt: skip
    config.generator = ml_collections.ConfigDict(
        dict(
            name="rar", num_tokens=49, codebook_size=256, num_classes=10, width=128, depth=6, num_heads=4,
            mlp_width=512, dropout=0.1, attention_dropout=0.1, label_dropout=0.1, anneal_start="50%", anneal_end="75%",
        )
    )  # fmt: skip
    config.train = ml_collections.ConfigDict(
        dict(
            steps=3600, batch_size=64, learning_rate=1e-3, warmup="10%", eval_every=500, eval_records=1024,
            checkpoint_every=250,
        )
    )  # fmt: skip
    config.sampling = ml_collections.ConfigDict(dict(scale=2.0, power=1.0, temperature=1.0))
    config.evaluate = ml_collections.ConfigDict(dict(samples=1000, live_samples=200, batch_size=200, grid_per_class=10))
    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    return config
