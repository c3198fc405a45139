"""Seconds of the authors' PyTorch code, to set beside `rar-jax bench`: PYTHON docs/measurements/theirs.py {sample,train,decode} --checkout DIR

PYTHON: of an environment with torch and omegaconf. DIR: bytedance/1d-tokenizer at commit 942a96f. RAR-B's width and random weights:
draws of `RAR.generate` with guidance and its KV cache; steps with AdamW, clipping and dropout; decodings of 256 x 256 pixels.
The first one is printed too, it warms up. Of timm they take only its MLP, which stands here, since timm wants torchvision.
"""

import argparse
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("what", choices=["sample", "train", "decode"])
parser.add_argument("--checkout", type=pathlib.Path, required=True)
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--depth", type=int, default=24)
parser.add_argument("--width", type=int, default=768)
parser.add_argument("--channels-last", action="store_true", help="decode: in the layout that oneDNN likes")
args = parser.parse_args()


class Mlp(nn.Module):
    """timm.layers.Mlp, as far as it is used."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: type[nn.Module], drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(in_features, hidden_features), act_layer(), nn.Dropout(drop)
        self.fc2, self.drop2 = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def stand_in(name: str, **contents: Any) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(contents)
    return module


def generator() -> Any:
    from modeling.rar import RAR  # type: ignore[import-not-found]

    sizes = {"hidden_size": args.width, "num_hidden_layers": args.depth, "intermediate_size": 4 * args.width}
    sizes |= {"num_attention_heads": 16, "image_seq_len": 256, "condition_num_classes": 1000, "use_checkpoint": False}
    rates = {"dropout": 0.1, "attn_drop": 0.1, "class_label_dropout": 0.1}
    model = RAR(OmegaConf.create({"model": {"vq_model": {"codebook_size": 1024}, "generator": {**sizes, **rates}}}))
    for p in model.parameters():  # adaLN too, which starts at 0
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    return model


def sample() -> Callable[[], Any]:
    model, labels = generator().eval(), torch.arange(args.batch_size)
    return torch.no_grad()(lambda: model.generate(labels, 16.0, 1.0, 2.75))


def train() -> Callable[[], Any]:
    model = generator().train()
    model.set_random_ratio(1.0)
    kernels, others = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": kernels, "weight_decay": 0.03}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.96))
    tokens, labels = (
        torch.randint(0, n, shape) for n, shape in ((1024, (args.batch_size, 256)), (1000, (args.batch_size,)))
    )

    def step() -> None:
        condition = model.preprocess_condition(labels.clone(), cond_drop_prob=0.1)
        logits, targets = model(tokens, condition, return_labels=True)
        logits = logits[:, : targets.shape[1]]  # nothing is to be predicted from the last token
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decode() -> Callable[[], Any]:
    from modeling.modules.maskgit_vqgan import Decoder  # type: ignore[import-not-found]

    sizes = {"channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "num_res_blocks": 2, "hidden_channels": 128}
    sizes |= {"num_channels": 3, "z_channels": 256, "resolution": 256, "dropout": 0.0}
    decoder = Decoder(OmegaConf.create(sizes)).eval()
    if args.channels_last:
        decoder = decoder.to(memory_format=torch.channels_last)
    latents = torch.randn(args.batch_size, 256, 16, 16)
    return torch.no_grad()(lambda: decoder(latents))


sys.path.insert(0, str(args.checkout))
stand_in("timm").__path__ = []
stand_in("timm.layers", Mlp=Mlp)
# Their package imports all of their models; two files of it are enough.
stand_in("modeling.modules", BaseModel=nn.Module).__path__ = [str(args.checkout / "modeling" / "modules")]
torch.set_num_threads(os.cpu_count() or 1)
torch.manual_seed(0)
work = {"sample": sample, "train": train, "decode": decode}[args.what]()
for _ in range(args.repeats):
    began = time.perf_counter()
    work()
    print(f"{args.what}, batch size {args.batch_size}: {time.perf_counter() - began:.2f} s", flush=True)
