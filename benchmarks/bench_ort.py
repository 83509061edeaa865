"""An onnxruntime session that leaves early beside the plain session of the whole network: a ResNet and a BERT, batch 1, half of the samples easy.

A call of every case answers SAMPLES inputs one by one. The threshold stands between the two halves' scores at the exit: after a third of the
layers, and in the ResNet also after the first block, where `bench_attach` has it. The rows that stay must have the labels of the plain
session, and its logits within 1e-4.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

import fastee
from fastee.testing.bench import Case, Context, Group

from .bench_attach import ResNet20

SAMPLES, LAYERS, WIDTH, TOKENS, CLASSES = 8, 6, 384, 64, 10


class Bert(nn.Module):
    """An encoder of MiniLM's size: 6 layers, 384 wide, 12 heads; the answer is read from the first token."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(1000, WIDTH), nn.Parameter(torch.randn(TOKENS, WIDTH) / 50)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, 0.0, "gelu", batch_first=True) for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.embed(x) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.out(x[:, 0])


def options():
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = made.inter_op_num_threads = 1
    return made


def beside(name: str, body: nn.Module, exit_: str, rows: torch.Tensor, shape: str) -> Group:
    """Return the group of one network: the session with an exit after `exit_`, and the plain one, on each of `rows` by itself."""
    import onnxruntime

    from fastee.integrations.onnxruntime import Session

    body.eval()
    with tempfile.TemporaryDirectory() as folder:
        net = fastee.attach(body, [exit_], CLASSES, rows[:1]).eval()
        fastee.export(net, f"{folder}/net", format="onnx")
        exported, off = (Session(f"{folder}/net", net.fingerprint, options=options()) for _ in range(2))
        whole = torch.onnx.export(body, (rows[:1],), input_names=["x"], dynamo=True, verbose=False)
        whole.save(f"{folder}/whole.onnx", external_data=False)
        plain = onnxruntime.InferenceSession(f"{folder}/whole.onnx", options(), providers=["CPUExecutionProvider"])
    score = exported.set_rule(thresholds=[0.0])(rows).confidence.sort().values
    exported.set_rule(thresholds=[float(score[SAMPLES // 2 - 1 : SAMPLES // 2 + 1].mean())])
    port = exported.runner.manifest.segments[0].inputs[0].name
    ours, theirs = [{port: r[None].numpy()} for r in rows], [{"x": r[None].numpy()} for r in rows]
    easy = 0
    for mine, other in zip(ours, theirs, strict=True):
        (logits, label, _, exit_taken), (want,) = exported.run(None, mine), plain.run(None, other)
        if exit_taken[0] == 0:
            easy += 1
        elif label[0] != want[0].argmax() or not np.allclose(logits, want, atol=1e-4, rtol=0):
            raise RuntimeError(f"{name}: a row that stayed got {label[0]}, the plain session says {want[0].argmax()}")
    if easy != SAMPLES // 2:
        raise RuntimeError(f"{name}: {easy} of {SAMPLES} rows left early")
    off.set_rule(thresholds=[math.inf])
    one_by_one = lambda run, feeds: lambda: [run(None, f) for f in feeds]
    found = [
        Case("fastee", one_by_one(exported.run, ours), note=f"Session.run, {easy} of {SAMPLES} leave at {exit_!r}"),
        Case("exits_off", one_by_one(off.run, ours), note="Session.run, the exit off: the same segments to the end"),
        Case("onnxruntime", one_by_one(plain.run, theirs), note="InferenceSession.run of the whole network"),
    ]
    return Group("session", f"{name}, {SAMPLES} x {shape}, exit after {exit_}", "fp32", found, baseline="onnxruntime", bars=(">= 1.3x onnxruntime",))


def cases(ctx: Context) -> Iterator[Group]:
    torch.manual_seed(ctx.seed)
    for exit_ in ("layer1.0", "layer1"):
        yield beside("resnet20", ResNet20(), exit_, torch.randn(SAMPLES, 3, 32, 32), "1x3x32x32")
    yield beside(f"bert {LAYERS} x {WIDTH}", Bert(), "layers.1", torch.randint(0, 1000, (SAMPLES, TOKENS)), f"1x{TOKENS} tokens")
