"""What a simulated cluster does, checked against arithmetic, one rule at a time."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sim_worlds import three_tiers

from fastee.scheduling import QoS
from fastee.simulation import DifficultyTrace, Outcome, Spec, What, load_spec, simulate

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "sim").glob("*.toml"))
SURE = (np.array([[0.9, 0.9]]), np.ones((1, 3), bool))
UNSURE = (np.array([[0.1, 0.1]]), np.ones((1, 3), bool))


def lone(**changes) -> Spec:
    fields = dict(network={"seconds": [0.004, 0.002, 0.001], "wire_bytes": [[1000], [1000], [1000]]}, machines=[{"name": "here"}],
                  arrivals=[{"kind": "times", "sources": ["here"], "times": [0.0]}], thresholds=[0.5, 0.5], tasks=1)  # fmt: skip
    return Spec(**{**fields, **changes})


def pair(**changes) -> Spec:
    """Here takes 100 ms per segment, there 1 ms; 8 Mbit/s and 10 ms between them."""
    fields = dict(network={"seconds": [0.001] * 3, "wire_bytes": [[864], [4864], [4864]], "answer_bytes": 64}, machines=[{"name": "here", "slowdown": 100.0}, {"name": "there"}],
                  connections=[{"source": "here", "target": "there", "link": "8mbit 10ms"}],
                  arrivals=[{"kind": "times", "sources": ["here"], "times": [0.0]}], thresholds=[0.5, 0.5], tasks=1, qos={"deadline": 0.25}, report=0.0)  # fmt: skip
    return Spec(**{**fields, **changes})


def test_one_task_alone_takes_its_segments():
    assert simulate(lone(), UNSURE).latency.tolist() == pytest.approx([0.007])
    result = simulate(lone(), SURE)
    assert result.latency.tolist() == pytest.approx([0.004])
    assert result.exit.tolist() == [0]


def test_tasks_queue_first_come_first_served():
    spec = lone(arrivals=[{"kind": "times", "sources": ["here"], "times": [0.0, 0.001, 0.002]}], tasks=3)
    assert simulate(spec, UNSURE).latency.tolist() == pytest.approx([0.007, 0.013, 0.019])


def test_a_batch_costs_what_the_table_says():
    net = {"seconds": [0.004, 0.002, 0.001], "wire_bytes": [[1000]] * 3, "batch_sizes": [1, 3], "batch_cost": [1.0, 2.0]}
    arrivals = [{"kind": "times", "sources": ["here"], "times": [0.0, 0.001, 0.001, 0.001, 0.001]}]
    spec = lone(network=net, machines=[{"name": "here", "batch": 4}], arrivals=arrivals, tasks=5)
    result = simulate(spec, SURE, log=True)
    runs = result.lines[result.lines[:, 1] == What.RUN]
    assert runs[:, 6].tolist() == [1, 4, 4, 4, 4]  # rows
    assert result.latency.tolist() == pytest.approx([0.004] + [0.003 + 0.004 * 2.0 * 4 / 3] * 4)
    assert result.compute.tolist() == pytest.approx([0.004] + [0.004 * 2.0 / 3] * 4)


def test_an_offloaded_task_pays_the_link_both_ways():
    result = simulate(pair(), UNSURE)
    # out: (864 + 136) bytes at 1 byte/us + 10 ms; three segments of 1 ms; back: (64 + 136) bytes + 10 ms
    assert result.latency.tolist() == pytest.approx([0.001 + 0.010 + 0.003 + 0.0002 + 0.010])
    assert result.wire_bytes.tolist() == [1000 + 200]
    assert result.hops.tolist() == [1]
    assert result.node.tolist() == [1]


def test_messages_of_one_link_go_one_after_the_other_and_a_shared_medium_joins_links():
    def spec(medium):
        sides = [{"name": "here", "slowdown": 1000.0}, {"name": "a"}, {"name": "b"}]
        links = [{"source": "here", "target": t, "link": "8mbit 10ms", "both": False, "medium": medium} for t in "ab"]
        links += [{"source": t, "target": "here", "link": "8mbit 10ms", "both": False} for t in "ab"]
        net = {"seconds": [0.010] * 3, "wire_bytes": [[99_864]] * 3, "answer_bytes": 64}
        return pair(network=net, machines=sides, connections=links, arrivals=[{"kind": "times", "sources": ["here"], "times": [0.0, 0.0]}], tasks=2, qos={"deadline": 3.0})

    alone, shared = simulate(spec(None), UNSURE), simulate(spec("air"), UNSURE)
    assert sorted(alone.node.tolist()) == [1, 2]
    assert max(alone.latency) == pytest.approx(0.1 + 0.010 + 0.030 + 0.0002 + 0.010)
    assert max(shared.latency) == pytest.approx(0.2 + 0.010 + 0.030 + 0.0002 + 0.010)


def test_a_dead_node_loses_its_work_and_the_source_starts_over():
    faults = [{"kind": "death", "at": 0.012, "node": "there"}]
    result = simulate(pair(faults=faults, detect=0.05, qos={"deadline": 1.0}), UNSURE, log=True)
    assert result.outcome.tolist() == [Outcome.ANSWERED]
    assert result.node.tolist() == [0]
    # noticed 50 ms after the death, then three segments of 100 ms here
    assert result.latency.tolist() == pytest.approx([0.012 + 0.05 + 0.3])
    assert result.attempts.tolist() == [2]
    result.check()


def test_without_a_deadline_left_a_lost_task_expires_at_deadline_plus_grace():
    faults = [{"kind": "death", "at": 0.012, "node": "there"}]
    result = simulate(pair(faults=faults, detect=1.0, grace=0.125, qos={"deadline": 0.1}), UNSURE, log=True)
    assert result.outcome.tolist() == [Outcome.EXPIRED]
    assert result.lines[result.lines[:, 1] == What.END][0, 0] == 225_000_000


def test_a_restarted_node_is_used_again():
    faults = [{"kind": "death", "at": 0.5, "node": "there", "seconds": 1.0}]
    arrivals = [{"kind": "times", "sources": ["here"], "times": [0.0, 1.0, 2.0]}]
    result = simulate(pair(faults=faults, detect=0.1, arrivals=arrivals, tasks=3, qos={"deadline": 0.4}), UNSURE)
    assert result.node.tolist() == [1, 0, 1]


def test_a_freeze_stops_the_clock_of_the_work():
    faults = [{"kind": "freeze", "at": 0.0115, "node": "there", "seconds": 0.05}]
    result = simulate(pair(faults=faults, qos={"deadline": 1.0}), UNSURE)
    assert result.latency.tolist() == pytest.approx([0.0242 + 0.05])


def test_a_straggler_takes_its_factor_longer():
    result = simulate(lone(faults=[{"kind": "straggler", "at": 0.0, "node": "here", "factor": 3.0}]), UNSURE)
    assert result.latency.tolist() == pytest.approx([0.021])


def test_a_partition_makes_tasks_stay_and_ends():
    faults = [{"kind": "partition", "at": 0.5, "nodes": ["there"], "seconds": 1.0}]
    arrivals = [{"kind": "times", "sources": ["here"], "times": [0.0, 1.0, 2.0]}]
    result = simulate(pair(faults=faults, detect=0.1, arrivals=arrivals, tasks=3, qos={"deadline": 0.4}), UNSURE)
    assert result.node.tolist() == [1, 0, 1]


def test_every_lost_message_is_retried_and_every_doubled_answer_dropped():
    lost = simulate(pair(connections=[{"source": "here", "target": "there", "link": "8mbit 10ms", "loss": 1.0}], detect=0.01, qos={"deadline": None}, timeout=5.0), UNSURE, log=True)
    assert lost.outcome.tolist() == [Outcome.LOST]
    assert lost.attempts.tolist() == [17]
    doubled = simulate(pair(connections=[{"source": "here", "target": "there", "link": "8mbit 10ms", "duplicate": 1.0}]), UNSURE, log=True)
    assert doubled.outcome.tolist() == [Outcome.ANSWERED]
    doubled.check()
    two = simulate(pair(connections=[{"source": "here", "target": "there", "link": "8mbit 10ms", "duplicate": 1.0}], tasks=2,
                        arrivals=[{"kind": "times", "sources": ["here"], "times": [0.0, 1.0]}]), UNSURE)  # fmt: skip
    assert two.totals["duplicates"] == 1


def test_a_skewed_clock_changes_nothing_as_time_left_travels():
    plain = simulate(pair(), UNSURE)
    skewed = simulate(pair(faults=[{"kind": "clock", "at": 0.0, "node": "there", "offset": -1000.0}]), UNSURE)
    assert plain.latency.tolist() == skewed.latency.tolist()
    drifting = simulate(pair(faults=[{"kind": "clock", "at": 0.0, "node": "there", "drift": 900_000.0}], qos={"deadline": 0.0255}), UNSURE)
    assert drifting.latency.tolist() != plain.latency.tolist()  # a clock that runs almost twice as fast leaves no time for a third segment


def test_bursts_bring_what_they_promise():
    spec = lone(arrivals=[{"kind": "bursts", "sources": ["here"], "rate": 50.0, "factor": 4.0, "on": 1.0, "off": 3.0}], tasks=8000)
    arrival = simulate(spec, SURE).arrival
    inside = (arrival % 4.0 < 1.0).sum() / 8000
    assert inside == pytest.approx(4 / 7, abs=0.03)
    assert 8000 / arrival[-1] == pytest.approx(50 * 7 / 4, rel=0.05)


def test_a_node_more_shifts_nobody():
    small = simulate(three_tiers(), log=True)
    extra = [*msgspec.to_builtins(three_tiers().machines), {"name": "idle", "slowdown": 1000.0}]
    large = simulate(three_tiers(machines=extra), log=True)
    assert np.array_equal(small.arrival, large.arrival)
    assert np.array_equal(small.latency, large.latency)


def test_more_tasks_keep_the_earlier_arrivals():
    few, many = simulate(three_tiers(tasks=100)), simulate(three_tiers(tasks=300))
    assert np.array_equal(few.arrival, many.arrival[:100])


def test_the_summary_counts_what_the_columns_hold():
    result = simulate(three_tiers())
    s = result.summary()
    assert s["hit_rate"] == np.mean((result.outcome == Outcome.ANSWERED) & (result.latency <= 0.1))
    assert sum(s["exits"]) == (result.outcome == Outcome.ANSWERED).sum()
    assert s["bytes"] == result.wire_bytes.sum()
    price = {"mobile": 0.1, "edge": 1.0, "cloud": 5.0}
    assert result.cost.sum() == pytest.approx(sum(price[n] * u * s["seconds"] for n, u in s["utilisation"].items()), rel=1e-3)
    json.dumps(s)


def test_what_is_given_replaces_the_spec():
    result = simulate(three_tiers(), policy="threshold", tasks=50, seed=9, qos=QoS(deadline=0.3), thresholds=[0.0, 0.0])
    assert (result.policy, len(result.outcome), result.seed) == ("threshold", 50, 9)
    assert set(result.deadline) == {0.3}
    assert result.summary()["exits"][1:] == [0, 0]


def test_the_log_is_json_lines(tmp_path):
    result = simulate(three_tiers(tasks=20), log=True)
    result.save_log(tmp_path / "log.jsonl")
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(events) == len(result.lines)
    assert {e["event"] for e in events} >= {"arrive", "start", "admit", "decide", "run", "ran", "answer", "end"}
    assert sum(e["event"] == "end" for e in events) == 20


def test_a_recorded_trace_comes_back(tmp_path):
    trace = DifficultyTrace.synthetic([0.6, 0.8, 0.9], rows=500, seed=1)
    assert trace.correct.mean(axis=0) == pytest.approx([0.6, 0.8, 0.9], abs=0.06)
    trace.save(tmp_path / "t.npz")
    again = DifficultyTrace.load(tmp_path / "t.npz")
    assert np.array_equal(again.confidence, trace.confidence) and np.array_equal(again.pool, trace.pool)
    sure = trace.confidence[:, 0] > np.quantile(trace.confidence[:, 0], 0.5)
    assert trace.correct[sure, 0].mean() > trace.correct[~sure, 0].mean() + 0.2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_run_and_conserve(path):
    assert len(EXAMPLES) >= 3
    result = simulate(load_spec(path), tasks=600, log=True)
    assert result.check() == 600
    assert result.summary()["answered"] > 0.5
