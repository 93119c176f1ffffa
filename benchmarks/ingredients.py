"""What an ingredient of the recipe is worth on frozen towers: recall on two halves of Flickr8k's validation images.

    python -m benchmarks.ingredients --captions-path data/flickr8k

Linear heads train on the features of the frozen towers of `compact`, each row with one change. A row is chosen on the
first 500 validation images (a fixed permutation) and confirmed on the other 500, each half searched by itself; rsum is
the mean of the seeds, and the interval that of the difference to the first row, by a paired bootstrap over images.
benchmarks/recall.md keeps the table.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clip_scratch.data.captions import read_captions, split_of
from clip_scratch.data.loaders import CaptionedImages, build_loaders
from clip_scratch.device import keep_freed_memory
from clip_scratch.evaluation.bootstrap import interval, resampled_recalls
from clip_scratch.evaluation.retrieval import ranks
from clip_scratch.models.build import build_model
from clip_scratch.presets import Speedrun
from clip_scratch.training.losses import positive_pairs

from .batch_size import hits

BINS = 8  # of the sorted values of a feature over the grid, for learned pooling
TOPS = (1, 5, 10)


@dataclass
class Arguments:
    """Compare ingredients on frozen towers."""

    captions_path: str  # the captions file or folder, as `train` takes it
    only: list[str] = field(default_factory=list)  # rows whose names contain one of these; none: all
    epochs: int = 12
    seeds: int = 3
    model_name: str = Speedrun.model_name
    image_weights: str = Speedrun.image_weights
    size: int = 224


@dataclass
class Data:
    """Features of N images and their captions, of which `own` (C,) names the image; words (N, W) of the images."""

    image: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]
    own: torch.Tensor
    same: torch.Tensor  # (C,) ids of captions that read the same
    words: torch.Tensor


@dataclass
class Recipe:
    """The settings of a row; those of the first row are near the speedrun's."""

    epochs: int = 12
    batch_size: int = 400
    captions: int = 5  # of an image in a step
    rate: float = 5e-3
    decay: float = 0.05
    image_dropout: float = 0.5
    text_dropout: float = 0.1
    temperature: float = 1 / 30
    dim: int = 256
    image_pool: str = "mean"
    text_pool: str = "mean"
    is_mlp: bool = False
    muon: float = 0.0  # rate of Muon for the heads' matrices
    hinge: float = 0.0  # weight of the hardest negatives
    is_decoupled: bool = False
    soft: float = 0.0  # share of the target that the captions' similarity decides
    words: float = 0.0  # weight of the bag of words
    mixup: float = 0.0  # parameter of the Beta distribution


ROWS = {
    "recipe": {},
    "image pooling: mean + max": {"image_pool": "mean + top1"},
    "image pooling: mean + top 5": {"image_pool": "mean + top5"},
    "image pooling: mean + top 10": {"image_pool": "mean + top10"},
    "image pooling: learned (GPO)": {"image_pool": "learned"},
    "text pooling: mean + max": {"text_pool": "mean + max"},
    "loss: + hardest negatives, 0.5": {"hinge": 0.5},
    "loss: + hardest negatives, 5": {"hinge": 5.0},
    "loss: decoupled": {"is_decoupled": True},
    "loss: soft labels, 0.2": {"soft": 0.2},
    "loss: soft labels, 0.5": {"soft": 0.5},
    "loss: + bag of words, 0.3": {"words": 0.3},
    "data: one caption a step": {"captions": 1},
    "data: two captions a step": {"captions": 2},
    "data: mixup": {"mixup": 0.2},
    "head: mlp": {"is_mlp": True},
    "head: 512 dimensions": {"dim": 512},
    "head: 1,024 dimensions": {"dim": 1024},
    "dropout: image 0.3": {"image_dropout": 0.3},
    "dropout: image 0.7": {"image_dropout": 0.7},
    "dropout: text 0.3": {"text_dropout": 0.3},
    "optimiser: rate 2e-3": {"rate": 2e-3},
    "optimiser: rate 1e-2": {"rate": 1e-2},
    "optimiser: decay 0.5": {"decay": 0.5},
    "optimiser: Muon, 5e-3": {"muon": 5e-3},
    "optimiser: Muon, 2e-2": {"muon": 2e-2},
    "temperature: from 1/14": {"temperature": 1 / 14},
    "temperature: from 1/60": {"temperature": 1 / 60},
    "batch: 200": {"batch_size": 200},
    "batch: 800": {"batch_size": 800},
    "epochs: 24": {"epochs": 24},
}


# ---- features


@torch.inference_mode()
def features(model, data: CaptionedImages, captions: list[str]) -> Data:
    """Pooled grids of the image tower, pooled tokens of the text tower."""
    image, text, tokens = {}, {}, data.tokens
    for rows in torch.arange(len(data)).split(64):
        pixels = model.normalize_pixels(data.pixels(0, rows.tolist())).contiguous(memory_format=torch.channels_last)
        grid = model.image_encoder.model.forward_features(pixels).flatten(2).sort(-1, descending=True).values
        pooled = {f"top{k}": grid[..., :k].mean(-1) for k in TOPS} | {"mean": grid.mean(-1)}
        pooled["bins"] = torch.stack([part.mean(-1) for part in grid.tensor_split(BINS, -1)], -1).half()  # (B, D, BINS)
        for name, values in pooled.items():
            image.setdefault(name, []).append(values)
    for rows in torch.arange(len(tokens)).split(64):
        ids, mask = tokens.batch(rows.numpy())
        hidden, there = model.text_encoder.model(input_ids=ids, attention_mask=mask)[0], mask[..., None].bool()
        text.setdefault("mean", []).append((hidden * there).sum(1) / there.sum(1))
        text.setdefault("max", []).append(hidden.masked_fill(~there, -torch.inf).amax(1))
    image, text = ({name: torch.cat(parts) for name, parts in pooled.items()} for pooled in (image, text))
    order = torch.from_numpy(data.rows).long()  # captions by image
    own = torch.arange(len(data)).repeat_interleave(torch.from_numpy(data.counts).long())
    same = torch.from_numpy(np.asarray(data.caption_ids))[order].long()
    return Data(
        image, {name: rows[order] for name, rows in text.items()}, own, same, bag_of_words(captions, order, own)
    )


def bag_of_words(captions: list[str], order: torch.Tensor, own: torch.Tensor, least: int = 20) -> torch.Tensor:
    """The words of each image's captions that occur in `least` or more, weighted by rarity, each row to a sum of 1."""
    sets = [set(captions[row].lower().split()) for row in order.tolist()]
    counts = Counter(itertools.chain.from_iterable(sets))
    vocabulary = {word: column for column, word in enumerate(word for word, n in counts.items() if n >= least)}
    bags = torch.zeros(int(own.max()) + 1, max(1, len(vocabulary)))
    for image, words in zip(own.tolist(), sets, strict=True):
        for word in words & vocabulary.keys():
            bags[image, vocabulary[word]] = np.log(len(sets) / counts[word])
    return bags / bags.sum(1, keepdim=True).clamp(min=1e-9)


# ---- heads and losses


class Pool(nn.Module):
    """Named pools side by side, or a learned weighting of the sorted values (GPO, arXiv:2011.04305, in bins)."""

    def __init__(self, name: str):
        super().__init__()
        self.names = name.split(" + ")
        self.weights = nn.Parameter(torch.zeros(BINS)) if name == "learned" else None

    def forward(self, pools: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        if self.weights is not None:
            return pools["bins"][rows].float() @ self.weights.softmax(0)
        return torch.cat([pools[name][rows] for name in self.names], 1)


class Mlp(nn.Module):
    """The projection head of the default pair."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(width, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.norm(x + self.second(F.gelu(x)))


class Heads(nn.Module):
    """Both heads and the temperature."""

    def __init__(self, recipe: Recipe, data: Data):
        super().__init__()
        self.recipe = recipe
        self.pools = nn.ModuleDict({"image": Pool(recipe.image_pool), "text": Pool(recipe.text_pool)})
        one = torch.zeros(1, dtype=torch.long)
        widths = {name: self.pools[name](getattr(data, name), one).shape[1] for name in self.pools}
        make = Mlp if recipe.is_mlp else nn.Linear
        self.heads = nn.ModuleDict({name: make(width, recipe.dim) for name, width in widths.items()})
        self.log_scale = nn.Parameter(torch.tensor(-np.log(recipe.temperature)))
        self.classifier = nn.Linear(recipe.dim, data.words.shape[1])

    def project(self, name: str, data: Data, rows: torch.Tensor) -> torch.Tensor:
        """Embeddings (rows, dim), not normalised."""
        rate = self.recipe.image_dropout if name == "image" else self.recipe.text_dropout
        pooled = self.pools[name](getattr(data, name), rows)
        return self.heads[name](F.dropout(pooled, rate, self.training))


def loss_of(heads: Heads, data: Data, images: torch.Tensor, captions: torch.Tensor, warm: bool) -> torch.Tensor:
    """The loss of a batch of images (B,) and captions (C,)."""
    recipe, own = heads.recipe, data.own[captions]
    projected, texts = heads.project("image", data, images), heads.project("text", data, captions)
    positive = positive_pairs(images, own, data.same[captions])  # (B, C)
    target, mixed = positive.float(), projected
    if recipe.mixup:
        share = torch.distributions.Beta(recipe.mixup, recipe.mixup).sample()
        other = torch.roll(torch.arange(len(images)), 1)
        mixed, target = share * projected + (1 - share) * projected[other], share * target + (1 - share) * target[other]
    cosines = F.normalize(mixed, dim=1) @ F.normalize(texts, dim=1).T
    logits = heads.log_scale.exp().clamp(max=100) * cosines
    to_text, to_image = target / target.sum(1, keepdim=True), target.T / target.T.sum(1, keepdim=True)
    if recipe.soft:  # the captions' similarity to an image's own, by the frozen sentence encoder
        teacher = F.normalize(data.text["mean"][captions], dim=1)
        alike = 20 * (to_text @ (teacher @ teacher.T))
        to_text = (1 - recipe.soft) * to_text + recipe.soft * alike.softmax(1)
        to_image = (1 - recipe.soft) * to_image + recipe.soft * alike.T.softmax(1)
    if recipe.is_decoupled:  # the positives take no part in the denominator (arXiv:2110.06848)
        among = logits.masked_fill(positive, -torch.inf)
        loss = (among.logsumexp(1) - (to_text * logits).sum(1)).mean()
        loss = (loss + (among.T.logsumexp(1) - (to_image * logits.T).sum(1)).mean()) / 2
    else:
        loss = (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_image)) / 2
    if recipe.hinge and warm:  # VSE++ (arXiv:1707.05612), margin 0.2
        wrong, right = (
            cosines.masked_fill(positive, -1),
            cosines[torch.searchsorted(images, own), torch.arange(len(own))],
        )
        hardest = (0.2 + wrong.amax(0) - right).relu().mean()
        hardest += (0.2 + wrong.amax(1)[torch.searchsorted(images, own)] - right).relu().mean()
        loss = loss + recipe.hinge * hardest
    if recipe.words:
        loss = loss + recipe.words * F.cross_entropy(heads.classifier(projected), data.words[images])
    return loss


def trained(recipe: Recipe, data: Data, seed: int) -> Heads:
    """Train the heads; returns the moving average of their weights over about a fifth of the steps."""
    torch.manual_seed(seed)
    heads = Heads(recipe, data).train()
    n = len(data.words)
    steps = recipe.epochs * -(-n // recipe.batch_size)
    matrices = [p for p in heads.heads.parameters() if p.ndim == 2]
    others = [p for p in heads.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": others, "weight_decay": 0.0}]
    if recipe.muon:
        optimizers = [torch.optim.Muon(matrices, recipe.muon, weight_decay=recipe.decay)]
    else:
        optimizers, groups = [], [*groups, {"params": matrices}]
    optimizers.append(torch.optim.AdamW(groups, recipe.rate, weight_decay=recipe.decay))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 0.5 + 0.5 * np.cos(np.pi * s / steps)))
        for optimizer in optimizers
    ]
    average = torch.optim.swa_utils.AveragedModel(
        heads, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(min(0.99, 1 - 5 / steps))
    )
    first = torch.searchsorted(data.own, torch.arange(n))
    counts = torch.bincount(data.own, minlength=n)
    for epoch in range(recipe.epochs):
        order = torch.randperm(n)
        for images in order.split(recipe.batch_size):
            images = images.sort().values
            turns = (torch.arange(recipe.captions) + epoch * recipe.captions) % counts[images, None].clamp(min=1)
            captions = (first[images, None] + turns).flatten().unique()
            loss = loss_of(heads, data, images, captions, warm=epoch >= recipe.epochs // 4)
            heads.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            average.update_parameters(heads)
    return average.module.eval()


# ---- the table


@torch.no_grad()
def of_half(heads: Heads, data: Data, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Hits and queries of each image of a half, searched by itself: (n, 6), (n, 6)."""
    captions = torch.isin(data.own, images).nonzero().flatten()
    own = torch.searchsorted(images, data.own[captions])
    embedded = (F.normalize(heads.project(name, data, rows), dim=1) for name, rows in
                (("image", images), ("text", captions)))  # fmt: skip
    return hits(*ranks(*embedded, own), own.numpy(), len(images))


def main(arguments: Arguments) -> None:
    """Print the table."""
    keep_freed_memory()
    cfg = Speedrun(
        captions_path=arguments.captions_path, image_cache=True, cached_views=0, device="cpu", precision="fp32",
        model_name=arguments.model_name, image_weights=arguments.image_weights, size=arguments.size, max_captions=0,
    )  # fmt: skip
    table, model, parts, began = read_captions(cfg), build_model(cfg).eval(), {}, time.perf_counter()
    for split in ("train", "valid"):
        df = split_of(table, split, cfg.captions_path)
        data = build_loaders(df, model.tokenizer, split, cfg).dataset
        parts[split] = features(model, data, df["caption"].tolist())
    print(f"features in {time.perf_counter() - began:.0f} s")
    compare(arguments, parts["train"], parts["valid"])


def compare(arguments: Arguments, train: Data, valid: Data, rows: dict[str, dict] = ROWS) -> None:
    """Print a row for each change of the recipe."""
    n = len(valid.words)
    halves = [half.sort().values for half in torch.randperm(n, generator=torch.Generator().manual_seed(0)).chunk(2)]
    base: list[np.ndarray] = []
    print(f"{'':<34}{'first half':>11}{'to the first row':>18}{'other half':>12}{'to the first row':>18}{'R@1':>13}  s")
    for name, changes in rows.items():
        if base and arguments.only and not any(word in name for word in arguments.only):
            continue
        began, recipe = time.perf_counter(), replace(Recipe(epochs=arguments.epochs), **changes)
        models = [trained(recipe, train, seed) for seed in range(arguments.seeds)]
        line = f"{name:<34}"
        for number, half in enumerate(halves):
            found = [of_half(heads, valid, half) for heads in models]
            hit, sizes = np.mean([h for h, _ in found], 0), found[0][1]
            samples = 100 * resampled_recalls(hit, sizes).sum(1)
            base += [samples] if len(base) <= number else []
            low, high = interval(samples - base[number])
            line += f"{100 * (hit.sum(0) / sizes.sum(0)).sum():>{11 + number}.1f}{f'{low:+.1f} to {high:+.1f}':>18}"
        whole = [of_half(heads, valid, torch.arange(n)) for heads in models]
        recalls = 100 * np.mean([h.sum(0) / s.sum(0) for h, s in whole], 0)
        print(f"{line}{f'{recalls[0]:.1f} {recalls[3]:.1f}':>13}  {time.perf_counter() - began:.0f}", flush=True)


if __name__ == "__main__":
    import tyro

    from clip_scratch.errors import run_command

    run_command(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.ingredients")))
