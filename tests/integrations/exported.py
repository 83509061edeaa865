"""Small networks of three kinds with exits of which about half of twelve rows take the first, exported as ONNX."""

import math

import small_nets
import torch

import fastee

TOKENS = {"input_ids": torch.arange(12 * 9).view(12, 9) % 50, "attention_mask": (torch.arange(9) < torch.arange(12)[:, None] % 7 + 3).long()}
FAMILIES = {
    "residual": (small_nets.ResNet, ["layer1", "layer2"], lambda: torch.randn(12, 3, 16, 16), {}),
    "transformer": (small_nets.ViT, ["blocks.1"], lambda: torch.randn(12, 3, 16, 16), {}),
    "encoder": (small_nets.Encoder, ["layers.0"], lambda: TOKENS, {"pool": "mean_tokens", "mask": "attention_mask"}),
}


def exported(family, folder):
    """Return the network, its twelve rows and where its files are."""
    torch.manual_seed(0)
    make, exits, example, options = FAMILIES[family]
    x = example()
    net = fastee.attach(make(), exits=exits, example=x, **options).eval()
    with torch.no_grad():
        u = net.exit_step(0, net.run_segment(0, net.inputs.flat(x))).confidence.sort().values
    net.set_rule(thresholds=[float(u[5:7].mean()), *[math.inf] * (net.num_exits - 1)])
    return net, x, fastee.export(net, folder / "net", format="onnx")
