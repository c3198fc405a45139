"""The digits job at its smallest: every stage, every kind of dropout, both annealing boundaries, in seconds."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Everything that the run is made of."""
    config = ConfigDict()
    config.data = ConfigDict(dict(source="digits", image_size=8, channels=1, num_classes=10, train_records=1437))
    config.tokenizer = ConfigDict(
        dict(
            name="maskgit_vq", image_size=8, channels=1, base_width=8, width_multipliers=(1, 2), blocks_per_level=1,
            latent_width=8, codebook_size=32, restart_every=4, restart_until="50%",
        )
    )  # fmt: skip
    config.tokenizer_train = ConfigDict(
        dict(
            steps=12, batch_size=64, learning_rate=2e-3, log_every=1, eval_every=6, eval_records=128, checkpoint_every=6
        )
    )
    config.classifier = ConfigDict(
        dict(
            widths=(8, 8),
            features=16,
            train=ConfigDict(
                dict(steps=8, batch_size=64, learning_rate=3e-3, eval_every=8, eval_records=128, checkpoint_every=8)
            ),
        )
    )
    config.generator = ConfigDict(
        dict(
            name="rar", num_tokens=16, codebook_size=32, num_classes=10, width=32, depth=2, num_heads=4, mlp_width=64,
            anneal_start="50%", anneal_end="75%",
        )
    )  # fmt: skip
    config.train = ConfigDict(
        dict(
            steps=24, batch_size=64, learning_rate=2e-3, warmup="10%", log_every=1, eval_every=12, eval_records=128,
            checkpoint_every=8,
        )
    )  # fmt: skip
    config.sampling = ConfigDict(dict(scale=2.0, power=1.0))
    config.evaluate = ConfigDict(dict(samples=40, live_samples=20, batch_size=20, grid_per_class=2))
    return config
