"""RAR on scikit-learn's 1,797 digits of 8x8 pixels: the whole job in minutes on two CPU cores.

rar-jax run --config experiments/digits.py --workdir runs/digits
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Everything that the run is made of."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.precision = "float32"
    config.data = ml_collections.ConfigDict(
        dict(source="digits", image_size=8, channels=1, num_classes=10, train_records=1437)
    )
    config.tokenizer = ml_collections.ConfigDict(
        dict(
            name="maskgit_vq", image_size=8, channels=1, base_width=32, width_multipliers=(1, 2), blocks_per_level=1,
            latent_width=16, codebook_size=64, restart_every=10, restart_until="50%",
        )
    )  # fmt: skip
    config.tokenizer_train = ml_collections.ConfigDict(
        dict(
            steps=900, batch_size=64, learning_rate=2e-3, warmup="5%", beta2=0.99, weight_decay=1e-4,
            eval_every=300, eval_records=360, checkpoint_every=300,
        )
    )  # fmt: skip
    config.classifier = ml_collections.ConfigDict(
        dict(
            widths=(32, 64), features=64,
            train=ml_collections.ConfigDict(
                dict(
                    steps=300, batch_size=128, learning_rate=3e-3, warmup="10%", beta2=0.99, weight_decay=0.05,
                    eval_every=100, eval_records=360, checkpoint_every=300,
                )
            ),
        )
    )  # fmt: skip
    config.generator = ml_collections.ConfigDict(
        dict(
            name="rar", num_tokens=16, codebook_size=64, num_classes=10, width=96, depth=4, num_heads=4, mlp_width=384,
            dropout=0.1, attention_dropout=0.1, label_dropout=0.1, anneal_start="50%", anneal_end="75%",
        )
    )  # fmt: skip
    config.train = ml_collections.ConfigDict(
        dict(
            steps=800, batch_size=64, learning_rate=2e-3, warmup="10%", eval_every=200, eval_records=360,
            checkpoint_every=200,
        )
    )  # fmt: skip
    config.sampling = ml_collections.ConfigDict(dict(scale=2.0, power=1.0, temperature=1.0))
    config.evaluate = ml_collections.ConfigDict(dict(samples=1000, live_samples=360, batch_size=200, grid_per_class=10))
    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    return config
