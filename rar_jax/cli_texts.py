"""What `rar-jax --help` and the --help of each verb say."""

DESCRIPTION = """\
Train and sample autoregressive image generators in JAX.

  rar-jax run --config experiments/digits.py --workdir runs/digits     the whole job, pixels to distance
  rar-jax sample --weights runs/digits --classes 3,7 --out pictures    images of the classes 3 and 7
  rar-jax sample --weights rar_b --download --classes "golden retriever" --out pictures    from the released weights
"""

OVERRIDES = """
Any number of the experiment can be changed:
  --config.train.steps=10 --config.mesh.fsdp=4 --config.generator.dropout=0.0
Durations are steps (1000), a share of the training ('50%') or epochs ('200ep').
An experiment file is code: use only those that you trust.
"""
RUN = """\
Trains the tokenizer and the classifier, tokenizes, trains the generator, samples and scores it, and draws pictures. A
stage whose output exists and verifies is skipped: the same command again resumes after a crash, or does nothing.
"""
TRAIN = """\
The stages lean on one another: tokenizer, then (tokenize), then generator; the generator's live distance also needs the
classifier.
"""
TOKENIZE = """\
  rar-jax tokenize --config digits --workdir runs/digits           tokens/train and tokens/heldout there
  rar-jax tokenize --config rar_b --source tfds:imagenet2012 --weights TOKENIZER.bin --out tokens
  rar-jax tokenize --verify tokens --weights TOKENIZER.bin         checksums, counts, and a picture of a sample
  rar-jax tokenize --import maskgitvq.jsonl --out tokens           the authors' file, and back: --export tokens --out FILE
The same command goes on where a killed one was. Train on a store with --config.data.tokens=DIR.
"""
EVALUATE = """\
  rar-jax evaluate --weights rar_b --inception INCEPTION.pth --reference VIRTUAL_imagenet256_labeled.npz --out scores
  rar-jax evaluate --workdir runs/mine --inception INCEPTION.pth --reference mine.npz
  rar-jax evaluate --images FOLDER --inception INCEPTION.pth --reference mine.npz --out scores
  rar-jax evaluate --make-reference FOLDER --inception INCEPTION.pth --out mine.npz
  rar-jax evaluate --workdir runs/mine --steps all --inception INCEPTION.pth --reference mine.npz --samples 5000
  rar-jax evaluate --reconstruction --tokenizer TOKENIZER.bin --images FOLDER --inception INCEPTION.pth --out scores
FID, sFID, Inception Score, precision, recall and KID as the ADM suite defines them. The same command resumes.

  rar-jax evaluate --config digits --workdir runs/digits
Without Inception's weights: the Frechet distance on classifier features (fd_classifier, not FID) of samples, held-out images
and an untrained generator.
"""
SAMPLE = """\
  rar-jax sample --weights runs/digits --classes 3,7 --per-class 8 --out pictures
  rar-jax sample --weights rar_b.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --classes 207 --out pictures
  rar-jax sample --weights rar_b --download --classes "golden retriever,tench" --out pictures
"""
CONVERT = """\
  rar-jax convert --weights rar_b.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --out rar_b     for --weights rar_b
  rar-jax convert --weights rar_b.bin --out rar_b.safetensors
  rar-jax convert --weights runs/imagenet --out mine.bin                      a file that the authors' code loads
Records the sha256 of what was read and written.
"""
BENCH = """\
  rar-jax bench sample --config rar_b --batch-size 1,8 --repeats 3      labels to tokens; with --decode to images
  rar-jax bench train --config rar_b --batch-size 8 --dtype float32     the training step
  rar-jax bench evaluate --config rar_b --batch-size 16                 Inception; with --whole sampling and decoding too
  rar-jax bench tokenize --config rar_b --batch-size 8                  images to tokens; with --decode tokens to images
  rar-jax bench loader --config rar_b                                   records/s from a store made for it
Weights are random and no files are needed. The ceilings (a large matmul, memory) are measured in the same run; the share is
the time that arithmetic or memory traffic must take at those rates, whichever is longer, over the time measured.
"""
