"""Digits as latents of a posterior, drawn by a flow; on four devices, parameters and activations sharded."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Everything that the run is made of."""
    config, toys = ConfigDict(), "tests.contracts.toys"
    config.mesh = ConfigDict(dict(fsdp=2, tensor=2))
    config.data = ConfigDict(dict(source="digits", image_size=8, channels=1, num_classes=10, train_records=1437))
    config.tokenizer = ConfigDict(dict(name=f"{toys}.latents"))
    every = dict(log_every=1, eval_every=20, eval_records=128, checkpoint_every=20)
    config.tokenizer_train = ConfigDict(dict(steps=40, batch_size=64, learning_rate=3e-2, weight_decay=0.0, **every))
    recipe = ConfigDict(dict(steps=40, batch_size=64, learning_rate=1e-2, **every))
    config.classifier = ConfigDict(dict(widths=(8, 8), features=16, train=recipe))
    config.generator = ConfigDict(dict(name=f"{toys}.flow", width=32))
    config.train = ConfigDict(dict(steps=40, batch_size=64, learning_rate=1e-2, ema_decay=0.9, **every))
    config.sampling = ConfigDict(dict(scale=2.0, num_steps=4))
    config.evaluate = ConfigDict(dict(samples=40, live_samples=20, batch_size=20, grid_per_class=2))
    return config
