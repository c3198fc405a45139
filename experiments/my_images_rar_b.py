r"""RAR-B (261 M parameters), fine-tuned from the released weights on a folder of your own images, in 256x256 pixels.

    rar-jax run --config my_images_rar_b --config.data.source=folder:PATH --workdir runs/mine_rar_b \
        --config.tokenizer.weights=maskgit-vqgan-imagenet-f16-256.bin --config.init_from=rar_b.bin

PATH as for experiments/my_images.py. Without the two files named, those that were downloaded before are used (any
`rar-jax sample --weights rar_b --download ...`). The tokenizer is taken as it is; the generator keeps all its weights
except the class embeddings, which are initialized. A step costs as much per image as one of experiments/rar_b.py, so
it needs an accelerator. It has not been measured yet.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Everything that the run is made of, but for data.source."""
    config = ml_collections.ConfigDict()
    config.precision = "bfloat16"
    config.init_from = "rar_b"
    # The paper's ten crops of each image; data.on_the_fly=True and crop="random" make still more of few images.
    config.data = ml_collections.ConfigDict(
        dict(image_size=256, channels=3, num_classes=None, class_names=None, train_records=None, crop="ten")
    )
    config.tokenizer = ml_collections.ConfigDict(
        dict(name="maskgit_vq", image_size=256, dtype="float32", weights="maskgit-vqgan-imagenet-f16-256")
    )
    # In raster order from the start: that is how the released weights ended.
    config.generator = ml_collections.ConfigDict(
        dict(name="rar", width=768, depth=24, num_heads=16, mlp_width=3072, anneal_start=0, anneal_end=0)
    )
    config.train = ml_collections.ConfigDict(
        dict(steps=5000, batch_size=64, learning_rate=1e-4, warmup="10%", eval_every=500, checkpoint_every=500)
    )
    config.sampling = ml_collections.ConfigDict(dict(scale=4.0, power=1.0, temperature=1.0))
    config.evaluate = ml_collections.ConfigDict(dict(grid_per_class=4))
    return config
