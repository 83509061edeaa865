"""Inputs of the tiny network of this folder, and what it answers to them in this process."""

import torch


def rows(count, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1)


def local_answers(net, x):
    """The same rows answered in this process, one by one."""
    outs = [net(x[i : i + 1]) for i in range(len(x))]
    return {name: torch.cat([getattr(o, name) for o in outs]) for name in ("logits", "label", "confidence", "exit")}


def equal_local(out, net, x):
    want = local_answers(net, x)
    return all(torch.equal(getattr(out, name), value) for name, value in want.items())
