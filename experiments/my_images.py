"""RAR on a folder of your own images, in colour, cut to 64x64 pixels: from zero, in hours on a laptop.

    rar-jax run --config my_images --config.data.source=folder:PATH --workdir runs/mine

PATH/CLASS/IMAGE, a folder a class, as ImageNet is unpacked; images without class folders are one class. Classes, their
names and the images are counted there. 5 % of each class is held out, or PATH/val if there is PATH/train.

Or from released weights, in 256x256 pixels and on an accelerator: experiments/my_images_rar_b.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Everything that the run is made of; data.source is left to the command line."""
    config = ConfigDict()
    config.data = ConfigDict(dict(image_size=64, channels=3, num_classes=None, class_names=None, train_records=None))
    config.tokenizer = ConfigDict(
        dict(
            name="maskgit_vq", image_size=64, base_width=32, width_multipliers=(1, 1, 2, 4), blocks_per_level=1,
            latent_width=32, codebook_size=512, restart_every=20, restart_until="60%",
        )
    )  # fmt: skip
    config.tokenizer_train = ConfigDict(
        dict(
            steps=2000, batch_size=32, learning_rate=1e-3, warmup="5%", beta2=0.99, weight_decay=1e-4,
            eval_every=500, eval_records=512, checkpoint_every=250,
        )
    )  # fmt: skip
    # num_classes is the data's.
    config.generator = ConfigDict(
        dict(
            name="rar", num_tokens=64, codebook_size=512, width=128, depth=6, num_heads=4, mlp_width=512,
            dropout=0.1, attention_dropout=0.1, label_dropout=0.1, anneal_start="50%", anneal_end="75%",
        )
    )  # fmt: skip
    config.train = ConfigDict(
        dict(
            steps=4000, batch_size=64, learning_rate=1e-3, warmup="10%", eval_every=500, eval_records=512,
            checkpoint_every=250,
        )
    )  # fmt: skip
    config.guidance = ConfigDict(dict(scale=2.0, power=1.0, temperature=1.0))
    config.evaluate = ConfigDict(dict(grid_per_class=10, grid_classes=10))
    return config
