"""Train the network that ``fastee.data.demo_network()`` loads, on the full training file of Fashion-MNIST.

    nice -n 10 python tools/train_demo_network.py [--source DIR] [--out FILE] [--epochs 6] [--seed 0] [--threads 1]

The images of the embedded val split, and every training image that is byte-identical to one of the embedded val or test
splits, are left out, so that calibration and test are honest. Throw-away linear heads behind stage1..stage3 add
`--aux` x cross-entropy each (deep supervision, arXiv 1409.5185): the stages then hold features a linear exit head can read.
The heads are not saved; the demo attaches and fits its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from make_fashion_sample import choose, digest_rows, read_official  # noqa: E402

from fastee.data.networks import SmallResNet  # noqa: E402
from fastee.data.sample import load, normalisation, row_digest  # noqa: E402


def augment(x: Tensor, shift: int, random: torch.Generator) -> Tensor:
    """Flip each image left-right with probability 1/2 and shift it by up to `shift` pixels; the border is black."""
    rows, _, height, width = x.shape
    x = torch.where(torch.rand(rows, 1, 1, 1, generator=random) < 0.5, x.flip(3), x)
    x = F.pad(x, (shift,) * 4, value=float(x.min()))
    top, left = torch.randint(0, 2 * shift + 1, (2, rows), generator=random)
    y = (top[:, None] + torch.arange(height))[:, :, None]
    z = (left[:, None] + torch.arange(width))[:, None, :]
    return x[torch.arange(rows)[:, None, None], 0, y, z][:, None]


def forward(net: SmallResNet, heads: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Return the logits of the throw-away heads and of the network."""
    x = net.stem(net.pixels(x))
    logits = []
    for i, name in enumerate(net.stage_names):
        x = getattr(net, name)(x)
        if i < len(heads):
            logits.append(heads[i](x.mean((2, 3))))
    return [*logits, net.head(x.mean((2, 3)))]


@torch.inference_mode()
def accuracies(net: SmallResNet, heads: nn.ModuleList, x: Tensor, y: Tensor) -> list[float]:
    """Return the accuracy of each head and of the network."""
    net.eval()
    right = sum(
        torch.stack([(z.argmax(1) == t).sum() for z in forward(net, heads, b)])
        for b, t in zip(x.split(500), y.split(500), strict=True)
    )
    net.train()
    return [round(float(r) / len(y), 4) for r in right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent.parent / "fastee" / "data"
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=here / "demo_network.safetensors")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--aux", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random = torch.Generator().manual_seed(args.seed)

    official = read_official(args.source)
    rows = choose(official, 0)
    for split, found in rows.items():
        if digest_rows(found) != row_digest("fashion_mnist_sample", split):
            raise SystemExit(f"{args.source}: its rows do not make the embedded {split} split; run make_fashion_sample.py")
    images, labels = official["train"]
    held_out = {official["train"][0][row].tobytes() for row in rows["val"]} | {official["test"][0][row].tobytes() for row in rows["test"]}
    keep = np.asarray([image.tobytes() not in held_out for image in images])
    mean, std = normalisation()

    def normalised(x: np.ndarray) -> Tensor:
        return (torch.from_numpy(x[:, None].copy()).float() / 255 - mean) / std

    x, y = normalised(images[keep]), torch.from_numpy(labels[keep].astype(np.int64))
    test_x, test_y = normalised(official["test"][0]), torch.from_numpy(official["test"][1].astype(np.int64))
    val_x, val_y = load("fashion_mnist_sample", "val").tensors

    net = SmallResNet().to(memory_format=torch.channels_last)
    heads = nn.ModuleList(nn.Linear(getattr(net, name)[-1].conv2.out_channels, 10) for name in net.stage_names[:-1])
    decayed = [p for p in [*net.parameters(), *heads.parameters()] if p.ndim > 1]
    plain = [p for p in [*net.parameters(), *heads.parameters()] if p.ndim <= 1]
    optimiser = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}], lr=args.lr, momentum=0.9, nesterov=True
    )
    steps = args.epochs * (len(x) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=args.lr, total_steps=steps, pct_start=0.25)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        order = torch.randperm(len(x), generator=random)
        for batch in order[: len(x) // args.batch * args.batch].split(args.batch):
            *early, last = forward(net, heads, augment(x[batch], 2, random))
            loss = F.cross_entropy(last, y[batch]) + args.aux * sum(F.cross_entropy(z, y[batch]) for z in early)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{args.epochs} {seconds:.0f} s val {accuracies(net, heads, val_x, val_y)}", flush=True)

    state = {
        key: (value.half() if value.is_floating_point() and "running" not in key else value).contiguous()
        for key, value in net.state_dict().items()
        if "num_batches_tracked" not in key
    }
    # The shipped weights are fp16: the recorded accuracies are those of the shipped weights.
    net.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    embedded = load("fashion_mnist_sample", "test").tensors
    about = {
        "widths": [getattr(net, name)[-1].conv2.out_channels for name in net.stage_names],
        "blocks": [len(getattr(net, name)) for name in net.stage_names],
        "mean": mean,
        "std": std,
        "accuracy_val": accuracies(net, heads, val_x, val_y)[-1],
        "accuracy_test": accuracies(net, heads, *embedded)[-1],
        "accuracy_official_test": accuracies(net, heads, test_x, test_y)[-1],
        "throw_away_heads_official_test": accuracies(net, heads, test_x, test_y)[:-1],
        "training_images": len(x),
        "left_out_val_rows_sha256": digest_rows(rows["val"]),
        "epochs": args.epochs,
        "batch": args.batch,
        "lr": args.lr,
        "aux": args.aux,
        "seed": args.seed,
        "seconds": round(seconds),
        "made_by": "tools/train_demo_network.py",
    }
    save_file(state, args.out, metadata={"fastee": json.dumps(about)})
    print(json.dumps(about, indent=2))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
