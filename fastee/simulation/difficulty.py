"""How sure and how right each exit is on each sample: recorded from a real network, or made up."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass

import numpy as np

_MAX_ROWS = 1 << 24


@dataclass(frozen=True, eq=False)
class DifficultyTrace:
    """`confidence` fp64 [rows, K] (score u, larger = surer), `correct` bool [rows, K+1] (last: the network's end); optional, NaN-free or not
    given: `gate`, `delta` [rows, K], `label` int [rows, K], `pool` int [rows].

    >>> DifficultyTrace.synthetic([0.7, 0.8, 0.9], rows=100).confidence.shape
    (100, 2)
    """

    confidence: np.ndarray
    correct: np.ndarray
    gate: np.ndarray | None = None
    delta: np.ndarray | None = None
    label: np.ndarray | None = None
    pool: np.ndarray | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        confidence, correct = np.array(self.confidence), np.array(self.correct)
        if confidence.dtype.kind not in "fiu" or confidence.ndim != 2:
            raise ValueError(f"DifficultyTrace: confidence must be float [rows, K], got {confidence.dtype} {list(confidence.shape)}")
        rows, exits = confidence.shape
        if correct.dtype != bool or correct.shape != (rows, exits + 1):
            raise ValueError(f"DifficultyTrace: correct must be bool [{rows}, {exits + 1}], got {correct.dtype} {list(correct.shape)}")
        if not 1 <= rows <= _MAX_ROWS:
            raise ValueError(f"DifficultyTrace: must have 1..{_MAX_ROWS} rows, got {rows}")
        put("confidence", np.ascontiguousarray(confidence, np.float64))
        put("correct", np.ascontiguousarray(correct))
        for name, kinds, shape in (("gate", "f", (rows, exits)), ("delta", "f", (rows, exits)), ("label", "iu", (rows, exits)), ("pool", "iu", (rows,))):
            value = getattr(self, name)
            if value is None:
                continue
            value = np.array(value)
            if value.dtype.kind not in kinds or value.shape != shape:
                raise ValueError(f"DifficultyTrace: {name} must be {list(shape)}, got {value.dtype} {list(value.shape)}")
            if kinds == "iu" and value.size and (value.min() < -1 or value.max() >= 1 << 31):
                raise ValueError(f"DifficultyTrace: {name} must be in -1..2**31-1")
            put(name, np.ascontiguousarray(value, np.float64 if kinds == "f" else np.int64))

    @property
    def num_exits(self) -> int:
        return self.confidence.shape[1]

    @classmethod
    def synthetic(cls, accuracy, rows: int = 4096, seed: int = 0, noise: float = 0.7) -> DifficultyTrace:
        """Made up: a sample of difficulty q in (0, 1) is right at exit e where q < accuracy[e], and the score is a noisy function of the
        margin accuracy[e] - q, in (0, 1). Right at a shallow exit therefore mostly means right at a deep one, and surer means right more often.

        Labels are of 10 classes; deltas and gates follow the scores; pools are the thirds of a noisy difficulty, right for 56 % of the samples.
        """
        accuracy = np.asarray(accuracy, np.float64)
        if accuracy.ndim != 1 or not len(accuracy) or not ((accuracy > 0) & (accuracy < 1)).all():
            raise ValueError(f"DifficultyTrace: accuracy must hold numbers in (0, 1), one per exit and end, got {accuracy.tolist()}")
        rng = np.random.default_rng([seed, 7])
        q = rng.random(rows)
        margin = accuracy - (q[:, None] + 0.03 * rng.normal(size=(rows, len(accuracy))))
        correct = margin > 0
        score = 1 / (1 + np.exp(-(6 * margin + noise * rng.normal(size=margin.shape))))[:, :-1]
        truth = rng.integers(0, 10, rows)
        wrong = (truth[:, None] + rng.integers(1, 10, (rows, len(accuracy)))) % 10
        label = np.where(correct, truth[:, None], wrong)[:, :-1]
        delta = np.clip(1.2 * (1 - score) + 0.05 * rng.normal(size=score.shape), 0, 1.4)
        return cls(score, correct, gate=score.copy(), delta=delta, label=label, pool=np.clip(3 * (q + 0.35 * rng.normal(size=rows)), 0, 2).astype(np.int64))

    @classmethod
    def record(cls, net, loader) -> DifficultyTrace:
        """Run every exit of `net` (an EarlyExit) on batches (inputs, labels) and note its score, label and correctness.

        `net` needs `num_segments`, `run_segment(i, carry)`, `exit_step(i, carry, logits=True)`.
        """
        import torch

        confidence, correct, label = [], [], []
        with torch.inference_mode():
            for x, y in loader:
                carry, scores, right, said = (x if isinstance(x, tuple) else (x,)), [], [], []
                for i in range(net.num_segments):
                    carry = tuple(net.run_segment(i, carry))
                    if i == net.num_segments - 1:
                        right.append(carry[0].argmax(1) == y)
                        break
                    step = net.exit_step(i, carry, logits=True)
                    scores.append(step.confidence.double())
                    said.append(step.label)
                    right.append(step.label == y)
                confidence.append(torch.stack(scores, 1).numpy() if scores else np.zeros((len(y), 0)))
                correct.append(torch.stack(right, 1).numpy())
                label.append(torch.stack(said, 1).numpy() if said else np.zeros((len(y), 0), np.int64))
        if not confidence:
            raise ValueError("record: loader must give at least one batch")
        return cls(np.concatenate(confidence), np.concatenate(correct), label=np.concatenate(label))

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__ if getattr(self, name) is not None}
        np.savez_compressed(path, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike) -> DifficultyTrace:
        """Read what `save` wrote; no pickled object is accepted."""
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"DifficultyTrace: {os.fspath(path)!r} is no .npz of arrays: {error}") from None
        unknown = sorted(set(columns) - set(cls.__dataclass_fields__))
        if unknown or "confidence" not in columns or "correct" not in columns:
            raise ValueError(f"DifficultyTrace: the file must hold confidence and correct, got {sorted(columns)}")
        return cls(**columns)
