"""The papers' tests: statistics by hand, verdicts on made-up rows, the file and the page."""

import itertools
import math
import time

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.papers import (
    SYSTEMS,
    daisy,
    dimee,
    distredge,
    distree,
    guarantee,
    hierarchical,
    jei_dnn,
    main,
    mdi_exit,
    real,
    saving,
    system,
    watch,
)
from benchmarks.papers.common import Row, append, at_thresholds, budget_rule, mean_and_error, paired_interval, read
from benchmarks.papers.page import write
from fastee.errors import FasteeError


def test_the_budget_rule_sends_each_exit_its_share():
    score = np.random.default_rng(0).random((1000, 3))
    q = 0.8
    p = np.array([q, q**2, q**3, q**4])
    p /= p.sum()
    thresholds = budget_rule(score, q)
    left = np.ones(1000, bool)
    for m in range(3):
        leaves = left & (score[:, m] >= thresholds[m])
        assert leaves.sum() == int(1000 * p[m]) and (score[left & ~leaves, m] < score[leaves, m].min()).all()
        left &= ~leaves
    assert budget_rule(score[:3], 0.01).tolist() == [math.inf] * 3 or budget_rule(score[:3], 0.01)[1:].tolist() == [math.inf] * 2
    label, y = np.tile([0, 1, 2, 3], (4, 1)), np.array([0, 1, 2, 3])
    own = np.array([[0.9, 0, 0], [0.1, 0.9, 0], [0.1, 0.1, 0.9], [0.1, 0.1, 0.1]])
    assert at_thresholds(own, label, y, np.array([0.1, 0.2, 0.3, 1.0]), [0.5] * 3) == (1.0, pytest.approx(0.4))


def test_statistics():
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2.0 and error == pytest.approx(1 / math.sqrt(3)) and math.isnan(mean_and_error([1.0])[1])
    difference = np.random.default_rng(0).normal(0.1, 1.0, 4000)
    low, high = paired_interval(difference)
    assert low < difference.mean() < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.1)


def gate_rows(gain):
    rows = []
    for seed in range(3):
        rows += [Row("jei_dnn", "quick", seed, jei_dnn.BUDGET, "official code", 0.5 + 0.4 * c, c, c) for c in (0.2, 0.5, 0.9)]
        rows += [Row("jei_dnn", "quick", seed, jei_dnn.JEI, "official code", 0.5 + 0.4 * c + gain, c, t)
                 for t, c in zip(jei_dnn.TRADES, np.linspace(0.8, 0.3, 8), strict=True)]  # fmt: skip
    return rows


@pytest.mark.parametrize(("gain", "want"), [(0.01, "reproduced"), (0.002, "direction only"), (-0.01, "not reproduced")])
def test_jei_verdicts(gain, want):
    assert jei_dnn.verdict(gate_rows(gain))[0] == want


@pytest.mark.parametrize(("depths", "want"), [
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], "reproduced"), ([[1, 2, 3, 4, 5], [1, 3, 2, 4, 6]], "direction only"), ([[3, 2, 3, 1, 2]] * 2, "not reproduced"),
])  # fmt: skip
def test_daisy_verdicts(depths, want):
    rows = [Row("daisy", "quick", s, "DAISY", "official code", None, 0.5, snr, {"exit_layer": d}) for s, row in enumerate(depths) for snr, d in zip(daisy.SNR, row, strict=True)]
    assert daisy.verdict(rows)[0] == want


@pytest.mark.parametrize(("costs", "accuracy", "want"), [
    ([0.5, 0.7, 0.9, 1.1], 0.85, "reproduced"), ([0.5, 0.7, 0.9, 1.1], 0.80, "direction only"), ([1.1, 1.0, 0.9, 0.8], 0.85, "not reproduced"),
])  # fmt: skip
def test_hierarchical_verdicts(costs, accuracy, want):
    rows = [Row("hierarchical", "quick", s, "end to end", "baseline", 0.855, 1.0) for s in (0, 1)]
    rows += [Row("hierarchical", "quick", s, hierarchical.OURS, "reconstructed", accuracy, c, r) for s in (0, 1) for c, r in zip(costs, hierarchical.RATES, strict=True)]
    assert hierarchical.verdict(rows)[0] == want


def team_rows(saving, loss):
    rows = []
    for seed in range(3):
        rows.append(Row("distree", "quick", seed, "no exits", "baseline", 0.86, 1.0))
        for method in (distree.DELTA, "entropy", "max_prob", "patience", distree.OURS):
            rows.append(Row("distree", "quick", seed, method, "baseline", 0.86 - loss, 1 - saving - 0.01 * seed))
    return rows


@pytest.mark.parametrize(("saving", "loss", "want"), [
    (0.3, 0.005, "reproduced"), (0.1, 0.005, "direction only"), (0.3, 0.02, "not reproduced"), (-0.02, 0.0, "not reproduced"),
])  # fmt: skip
def test_distree_verdicts(saving, loss, want):
    assert distree.verdict(team_rows(saving, loss))[0] == want


def pool_rows(pools, cascade, drop=0.002, low=-0.004):
    rows = []
    for seed in range(2):
        about = {"low": low, "high": 0.0, "routed_right": 0.5, "majority": 0.6}
        rows.append(Row("dimee", "quick", seed, "all-cloud", "baseline", 0.9, 1.0))
        for method in (dimee.POOLS, dimee.CASCADE, "SplitEE (bandit)", "DeeBERT (entropy)", "PABEE (patience)", dimee.FREE, dimee.OURS, dimee.STRICT):
            rows.append(Row("dimee", "quick", seed, method, "baseline", 0.9 - drop, pools, None, about))
        for rule in (dimee.CASCADE, dimee.RANDOM, dimee.MAJORITY):
            rows += [Row("dimee", "quick", seed, f"{rule}, curve", "baseline", a, c, c) for a, c in ((0.8, 0.1), (0.9 - drop, cascade), (0.9, 1.1))]
    return rows


@pytest.mark.parametrize(("rows", "want"), [
    (pool_rows(0.5, 0.6), "reproduced"), (pool_rows(0.5, 0.4), "direction only"), (pool_rows(0.7, 0.8), "not reproduced"),
    (pool_rows(0.5, 0.6, drop=0.004), "not reproduced"), (pool_rows(0.5, 0.6, low=-0.007), "not reproduced"),
])  # fmt: skip
def test_dimee_verdicts(rows, want):
    assert dimee.verdict(rows)[0] == want


def told(n=3000, layers=6, seed=0):
    """Two classes; a later layer is surer and more often right."""
    rng = np.random.default_rng(seed)
    y, ease = rng.integers(0, 2, n), rng.normal(1, 1, n)
    margin = (2 * y - 1)[:, None] * (ease[:, None] * np.linspace(0.6, 2, layers) + 0.6 * rng.normal(size=(n, layers)))
    embedding = np.column_stack([ease, rng.normal(size=n)])
    return real.Said(np.stack([-margin, margin], 2).astype(np.float32), y, embedding, np.arange(1, layers + 1) / layers)


def test_dimee_rows():
    val, test = told(seed=1), told(seed=2)
    rows = {(r.method, r.point): r for r in dimee.judged("quick", 0, val, test)}
    of = lambda method: rows[method, None]
    full = of("all-cloud")
    assert full.cost == pytest.approx(1.0) and full.accuracy == pytest.approx(test.right[:, -1].mean()) and (full.extra["low"], full.extra["high"]) == (0.0, 0.0)
    assert of("mobile only").cost == pytest.approx(0.4 / 1.7) and of("edge only").cost == pytest.approx(1.1 / 1.7)
    assert dimee.layered().tolist() == pytest.approx([0.2, 0.4, 0.9, 1.1, 1.8, 2.0])  # as path_cost: 0.4 | + 0.3 | + 0.3 + 0.5
    # All-easy routing is the cascade: its cost is that of the climb to the tier that was sure.
    alpha = of(dimee.CASCADE).extra["alpha"]
    p = test.stats("max_prob")
    end = np.where(p[:, 1] >= alpha, 1, np.where(p[:, 3] >= alpha, 3, 5))
    assert of(dimee.CASCADE).cost == pytest.approx(dimee.layered()[end].mean() / 1.7)
    assert of(dimee.CASCADE).accuracy == pytest.approx(test.right[np.arange(len(end)), end].mean())
    assert {m for m, point in rows if point is not None} == {f"{r}, curve" for r in (dimee.POOLS, dimee.CASCADE, dimee.RANDOM, dimee.MAJORITY)}
    assert of(dimee.FREE).cost <= of("DeeBERT (entropy)").cost + 0.02  # one threshold per exit holds every shared one; the rows that judge are others


def test_patience_and_the_bandit():
    assert dimee.patience(np.array([[0, 0, 1, 1, 1, 1]])).tolist() == [[0, 1, 0, 1, 2]]
    said = told(2000)
    hit, cost = dimee.splitee(said, 0.8)
    legal = {round(0.2 * i, 6) for i in range(1, 7)} | {1.7}
    assert set(np.round(cost, 6)) <= legal and hit[cost > 1.65].tolist() == said.right[cost > 1.65, -1].tolist()
    never, all_cloud = dimee.splitee(said, 1.1)
    assert (all_cloud[6:] >= 1.2 - 1e-9).all() and never.tolist() == said.right[:, -1].tolist()


def test_the_greedy_grid_keeps_the_drop_and_every_exit_saves():
    said = told(4000)
    score, right = said.stats("max_prob")[:, :-1], said.right
    found = guarantee.greedy_grid(score, right, said.cost)
    assert all(t in (*guarantee.PROBABILITIES, math.inf) for t in found) and any(t < math.inf for t in found)
    spent, drop = guarantee.judge(score, right, said.cost, found)
    assert drop <= guarantee.MAX_DROP and spent < said.cost[-1]
    assert spent >= guarantee.judge(score, right, said.cost, guarantee.shared_grid(score, right, said.cost))[0] - 0.2


def test_guarantee_trials(monkeypatch):
    monkeypatch.setattr(guarantee, "TRIALS", 10)
    said = told(3000)

    class Quiet:
        def print(self, _):
            pass

    rows = {r.method: r for r in guarantee.trials("quick", (said.stats("max_prob")[:, :-1], said.right, said.cost), 0.5, 0, Quiet())}
    assert rows["ltt"].extra["rows"] == 1500 and rows["ltt"].extra["trials"] == 10 and rows["crc (in expectation)"].extra["trials"] == 1
    assert rows["ltt"].accuracy >= 0.8 and rows["known answers"].cost < rows["ltt"].cost < said.cost[-1] and rows["ltt"].extra["drop"] < 0.01


def alarm_rows(films, tweets, false):
    rows = []
    for rate in watch.RATES:
        rows.append(Row("watch", "quick", 0, "films", "ours", films, 0.5, rate, {"rang": false, "passed": 0.0, "disagree": 0.01}))
        rows.append(Row("watch", "quick", 0, "films -> tweets", "ours", tweets, 0.5, rate, {"rang": 1.0, "passed": 1.0, "disagree": 0.1}))
    return rows


@pytest.mark.parametrize(("tweets", "false", "want"), [(0.96, 0.01, "reproduced"), (0.9, 0.01, "direction only"), (1.0, 0.02, "not reproduced")])
def test_watch_verdicts(tweets, false, want):
    assert watch.verdict(alarm_rows(0.99, tweets, false))[0] == want


def test_the_alarm_rings_at_the_audit_that_proves_it():
    stream = np.zeros(4000, bool)
    stream[2000:] = True
    at = watch.first_alarm(stream, np.arange(0, 4000, 10))
    assert 2000 < at < 2300 and at % 10 == 0 and watch.first_alarm(~stream[:0], np.arange(0)) == 0
    assert watch.first_alarm(np.zeros(4000, bool), np.arange(4000)) == 4000


def traced(seed):
    return mdi_exit.DifficultyTrace.synthetic([0.6, 0.75, 0.82, 0.86, 0.88], 2000, seed=seed)


@pytest.fixture
def mesh_rows(monkeypatch):
    monkeypatch.setattr(mdi_exit, "recorded", lambda quick: (traced(1), traced(2), [0.2] * 5, [784.0, 1568.0, 1568.0, 784.0, 392.0], [0.6, 0.75, 0.82, 0.86, 0.88]))
    monkeypatch.setattr(mdi_exit, "TASKS", {True: 1500})

    class Quiet:
        def print(self, _):
            pass

    return mdi_exit.run(0, True, Quiet())


def test_mdi_exit_rows(mesh_rows):
    at = {(r.method, r.point): r for r in mesh_rows}
    rate = lambda way, topology: at[f"{way}, {topology}", None].extra["per_second"]
    for topology, (n, _) in mdi_exit.TOPOLOGIES.items():  # 50 ms per sample on each of n workers; the directed ring also waits for its neighbours
        assert rate(mdi_exit.NONE, topology) <= 20 * n * 1.06
        if topology != "3 ring":
            assert rate(mdi_exit.NONE, topology) >= 20 * n * 0.9 and rate(mdi_exit.MDI, topology) > 1.3 * rate(mdi_exit.NONE, topology)
        assert at[f"{mdi_exit.NONE}, {topology}", None].cost == 1.0
        fixed = at[f"{mdi_exit.ADAPTED}, {topology}", mdi_exit.FIXED]
        assert fixed.accuracy == fixed.extra["useful"] <= fixed.extra["answered"]
    cost = np.cumsum([0.2] * 5)
    theta = mdi_exit.shared(traced(1), cost)
    k = np.where((traced(1).confidence >= theta).any(1), (traced(1).confidence >= theta).argmax(1), 4)
    right = traced(1).correct
    assert right[:, -1].mean() - right[np.arange(2000), k].mean() <= mdi_exit.TOLERANCE


def rated(mdi, adapted, drop=0.0):
    rows = []
    for topology in mdi_exit.TOPOLOGIES:
        for way in (mdi_exit.NONE, mdi_exit.SHIPPED, mdi_exit.MDI, mdi_exit.OURS, mdi_exit.PLACED, mdi_exit.ADAPTED):
            per_second = mdi if way == mdi_exit.MDI else 10.0
            rows.append(Row("mdi_exit", "quick", 0, f"{way}, {topology}", "ours", 0.9 - (drop if way == mdi_exit.MDI else 0), 1.0, None, {"per_second": per_second}))
            rows.append(Row("mdi_exit", "quick", 0, f"{way}, {topology}", "ours", 0.5, 1.0, 1.25, {"useful": adapted if way == mdi_exit.ADAPTED else 0.6}))
    return rows


@pytest.mark.parametrize(("rows", "want"), [
    (rated(11.1, 0.7), "reproduced"), (rated(10.9, 0.7), "direction only"), (rated(12, 0.7, drop=0.02), "direction only"), (rated(12, 0.6), "direction only"),
    (rated(10.9, 0.5), "not reproduced"),
])  # fmt: skip
def test_mdi_exit_verdicts(rows, want):
    assert mdi_exit.verdict(rows)[0] == want


def timed(one, many, drop):
    rows = [Row("saving", "quick", 0, "backbone alone", "baseline", 0.9, 1.0)]
    for method in (saving.SEARCHED, saving.GUARANTEED):
        rows.append(Row("saving", "quick", 0, f"{method}, multiply-adds", "ours", 0.9 - drop, 0.5))
        rows += [Row("saving", "quick", 0, f"{method}, seconds", "ours", 0.9 - drop, c, b) for b, c in ((1, one), (32, many))]
    return rows


@pytest.mark.parametrize(("one", "many", "drop", "want"), [
    (0.64, 0.65, 0.004, "reproduced"), (0.64, 0.66, 0.004, "direction only"), (0.5, 1.1, 0.004, "not reproduced"), (0.5, 0.5, 0.006, "not reproduced"),
])  # fmt: skip
def test_saving_verdicts(one, many, drop, want):
    assert saving.verdict(timed(one, many, drop))[0] == want


@pytest.mark.parametrize(("macs", "drop", "want"), [(0.55, 0.004, "reproduced"), (0.56, 0.004, "direction only"), (1.0, 0.0, "not reproduced"), (0.5, 0.006, "not reproduced")])
def test_the_residual_network_is_judged_by_its_multiply_adds(macs, drop, want):
    rows = [msgspec.structs.replace(r, size="full, CIFAR-10", cost=macs if "multiply" in r.method else r.cost) for r in timed(2.0, 2.0, drop)]
    assert saving.verdict(rows)[0] == want


def test_seconds_are_those_of_the_two_ways():
    class Net:
        def __call__(self, x):
            time.sleep(0.001)

        def full(self, x):
            time.sleep(0.004)

    ours, alone = saving.seconds(Net(), [(None, None)] * 30, 20, 0)
    assert 0.02 <= ours < alone and alone >= 0.08


def test_batches_of_sentences_and_images():
    ids = [[1] * (1 + i % 7) for i in range(500)]
    plain = real.Sentences(ids, np.arange(500), size=64)
    rows = [r for (_, _), y in plain for r in y.tolist()]
    assert sorted(rows) == list(range(500)) == sorted(torch.cat(plain.rows()).tolist()) and len(plain) == len(list(plain)) == 8
    for (x, mask), y in plain:
        assert mask.sum(1).tolist() == [1 + i % 7 for i in y.tolist()] and (x == mask).all()
    part = real.Sentences(ids, np.arange(500), size=64, share=0.3)
    torch.manual_seed(0)
    one, other = ([r for _, y in part for r in y.tolist()] for _ in range(2))
    assert len(set(one)) == 150 and set(one) != set(other) and len(part) == 3
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    (a, _), (b, _) = (next(iter(real.Images(x, np.zeros(20, np.int64), share=s))) for s in (None, 1.0))
    assert a.shape == b.shape == (20, 3, 32, 32) and not torch.equal(a, b) and torch.equal(a, real.pixels(x))
    assert a.amax() <= (1 - 0.406) / 0.225 + 1e-5 and a.amin() >= -0.485 / 0.229 - 1e-5


def test_what_was_made_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTEE_CACHE", str(tmp_path / "deep" / "cache"))
    made = []

    def make(rows):
        made.append(rows.start)
        return {"a": np.arange(rows.start, min(rows.stop, 6000))}

    for _ in range(2):
        assert real._in_parts("x", 6000, make)["a"].tolist() == list(range(6000))
    assert made == [0, 2500, 5000]
    monkeypatch.setenv("FASTEE_DATA", str(tmp_path / "none"))
    with pytest.raises(FasteeError, match="FASTEE_DATA: expected the folder of the experiments' data sets, got '.*none'"):
        real.data()


def test_a_given_resnet_is_the_published_shape():
    with torch.no_grad():
        net = real.CifarResNet(9).eval()
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 853_018  # 0.85 M, table 6 of arXiv 1512.03385
    block = real.Block(4, 8, 2)
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    x = torch.rand(1, 4, 6, 6)
    assert torch.equal(block.eval()(x)[:, 2:6], x[:, :, ::2, ::2]) and not block(x)[:, [0, 1, 6, 7]].any()


def test_rows_are_kept_and_the_last_one_counts(tmp_path):
    path = tmp_path / "sub" / "papers.jsonl"
    append(path, team_rows(0.1, 0.0))
    append(path, team_rows(0.3, 0.0))
    assert len(path.read_text().splitlines()) == 36 and len(read(path)) == 18 and distree.verdict(read(path))[0] == "reproduced"
    assert all(r.date and r.torch for r in read(path)) and read(tmp_path / "none.jsonl") == []
    path.write_text(path.read_text() + "{nonsense\n")
    with pytest.raises(ValueError, match="line 37: not a row"):
        read(path)


def test_the_page_holds_every_method_and_verdict(tmp_path):
    write(tmp_path / "papers.md", team_rows(0.1, 0.0) + gate_rows(0.01))
    page = (tmp_path / "papers.md").read_text()
    for text in ("**direction only**", "**reproduced**", distree.DELTA, distree.PUBLISHED, "| max_prob, budget rule | official code | 0.2 |", "3 seeds"):
        assert text in page
    assert page.count("## ") == 2
    assert (tmp_path / "papers" / "jei_dnn-quick.svg").read_text().count("<path") > 20 and "(papers/distree-quick.svg)" in page


def test_systems(capsys):
    assert main("list", [], True, None) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SYSTEMS)
    with pytest.raises(FasteeError, match="papers: expected one of .*, got 'jei', did you mean 'jei_dnn'"):
        system("jei")
    with pytest.raises(FasteeError, match="papers: expected one of sst2, clinc150, cifar10, cifar10-branch, got 'sst', did you mean 'sst2'"):
        main("prepare", ["sst"], False, None)


def split_rows(osds, ours):
    rows = []
    for seed, rate in itertools.product(range(2), (50.0, 300.0)):
        for name in distredge.BASELINES:
            rows.append(Row("distredge", "quick, VGG-16", seed, name, "baseline", None, 1.0, rate, dict.fromkeys(distredge.GROUPS, 2.0 if name == "aofl" else 3.0)))
        rows.append(Row("distredge", "quick, VGG-16", seed, distredge.OSDS, "reconstructed", None, 1.0, rate, {g: osds(g) for g in distredge.GROUPS}))
        rows.append(Row("distredge", "quick, VGG-16", seed, distredge.OURS, "ours", None, 1.0, rate, dict.fromkeys(distredge.GROUPS, ours)))
    return rows


def test_distredge_follows_its_rule():
    assert distredge.ratios(split_rows(lambda g: 1.6, 1.0), distredge.OSDS) == {(g, r): 1.25 for g in distredge.GROUPS for r in (50.0, 300.0)}
    verdict, said = distredge.verdict(split_rows(lambda g: 1.6, 1.5))
    assert verdict == "reproduced" and "ours slower than OSDS in 0 of 24 runs" in said and "median 1.25x" in said
    assert distredge.verdict(split_rows(lambda g: 1.6 if g != "4 nano" else 2.5, 1.7))[0] == "direction only"
    assert distredge.verdict(split_rows(lambda g: 1.9, 1.0))[0] == "not reproduced"
    assert "ours slower than OSDS in 24 of 24 runs" in distredge.verdict(split_rows(lambda g: 1.6, 1.7))[1]
