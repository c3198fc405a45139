r"""RAR on a folder of your own images, in colour, cut to 64x64 pixels: from zero, in hours on a laptop.

    rar-jax run --config my_images --config.data.source=folder:PATH --workdir runs/mine

PATH/CLASS/IMAGE, a folder a class, as ImageNet is unpacked; images that lie in PATH itself are one class. Classes and
images are counted there, and noted in runs/mine/config.json: with other images the same command asks for another
--workdir. 5 % of each class is held out, or PATH/val if there is PATH/train. With a quarter of the pixels:

    --config.data.image_size=32 --config.tokenizer.image_size=32 "--config.tokenizer.width_multipliers=(1,2,4)"

Of few images (less than some thousands) expect samples that resemble them closely; a new random crop each time it is
drawn makes more of each: --config.data.on_the_fly=True --config.data.crop=random

Or fine-tuned from released weights, 256x256 pixels, on an accelerator (experiments/my_images_rar_b.py):

    rar-jax run --config my_images_rar_b --config.data.source=folder:PATH --workdir runs/mine_rar_b \
        --config.tokenizer.weights=maskgit-vqgan-imagenet-f16-256.bin --config.init_from=rar_b.bin
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Return the experiment without data.source. There is no classifier: one class needs none."""
    config = ml_collections.ConfigDict()
    config.data = ml_collections.ConfigDict(
        dict(image_size=64, channels=3, num_classes=None, class_names=None, train_records=None)
    )
    config.tokenizer = ml_collections.ConfigDict(
        dict(
            name="maskgit_vq", image_size=64, base_width=32, width_multipliers=(1, 1, 2, 4), blocks_per_level=1,
            latent_width=32, codebook_size=512, restart_every=20, restart_until="60%",
        )
    )  # fmt: skip
    config.tokenizer_train = ml_collections.ConfigDict(
        dict(
            steps=2000, batch_size=32, learning_rate=1e-3, warmup="5%", beta2=0.99, weight_decay=1e-4,
            eval_every=500, eval_records=512, checkpoint_every=250,
        )
    )  # fmt: skip
    config.generator = ml_collections.ConfigDict(
        dict(
            name="rar", num_tokens=64, codebook_size=512, width=128, depth=6, num_heads=4, mlp_width=512,
            dropout=0.1, attention_dropout=0.1, label_dropout=0.1, anneal_start="50%", anneal_end="75%",
        )
    )  # fmt: skip
    config.train = ml_collections.ConfigDict(
        dict(
            steps=4000, batch_size=64, learning_rate=1e-3, warmup="10%", eval_every=500, eval_records=512,
            checkpoint_every=250,
        )
    )  # fmt: skip
    config.sampling = ml_collections.ConfigDict(dict(scale=2.0, power=1.0, temperature=1.0))
    return config
