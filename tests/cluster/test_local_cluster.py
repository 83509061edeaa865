import socket
import struct
import time
from concurrent.futures import wait

import pytest
import torch
import zmq
from answers import equal_local, local_answers, rows

import fastee
from fastee.cluster import codec as codecs
from fastee.cluster.client import Client
from fastee.cluster.frame import MAGIC, VERSION, Flag, Frame, Kind, decode, encode
from fastee.cluster.messages import Refused, from_payload
from fastee.cluster.transport import PeerEvent, ZmqTransport
from fastee.errors import ClusterError, FingerprintMismatch, Rejected

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("plan", [None, [0, 1, 2], [2, 2, 2], [0, 0, 0], [1, 0, 1]], ids=str)
def test_answers_equal_local_ones_bit_for_bit(cluster, net, plan):
    x = rows(24)
    out = cluster(x, plan=plan, codec="raw")
    assert equal_local(out, net, x)
    assert len(set(out.exit.tolist())) > 1 and not out.forced.any() and out.errors == [None] * 24
    if plan:
        assert out.node.tolist() == [plan[min(k, len(plan) - 1)] for k in out.exit.tolist()]


def test_int8_answers_are_close(cluster, net):
    x = rows(16)
    out = cluster(x, plan=[0, 1, 2], codec="int8", exits=False)
    want = torch.cat([net.full(x[i : i + 1]) for i in range(16)]).detach()
    assert torch.allclose(out.logits, want, atol=0.05 * float(want.abs().max()))
    assert not torch.equal(out.logits, want)
    raw = cluster(x, plan=[0, 1, 2], codec="raw", exits=False)
    # Two cuts of 8*8*8 values: 1024 bytes less to carry, headers and the answer stay.
    assert (raw.wire_bytes - out.wire_bytes == 2 * (3 * 512 - 4)).all()


def test_exits_off_runs_to_the_end_on_the_plan(cluster, net):
    x = rows(8)
    out = cluster(x, plan=[0, 1, 2], exits=False, codec="raw", deadline=5.0)
    assert (out.exit == 2).all() and (out.node == 2).all()
    assert torch.allclose(out.logits, net.full(x), atol=1e-5)


def test_latency_and_bytes_are_those_of_the_links(cluster):
    out = cluster(rows(6), plan=[2, 2, 2], codec="raw", exits=False)
    # Out 5 ms, back 5 ms; 256 bytes of input and 40 of answer with their headers.
    assert (out.latency > 0.010).all() and (out.wire_bytes > 256 + 40).all() and (out.wire_bytes < 900).all()
    here = cluster(rows(6), plan=[0, 0, 0])
    assert (here.wire_bytes == 0).all() and (here.node == 0).all()


def test_an_empty_batch_gives_an_empty_result(cluster):
    out = cluster(rows(2)[:0])
    assert len(out) == 0 and out.latency.shape == (0,) and out.logits.shape == (0, 10)


def test_a_stream_of_futures(cluster, net):
    x = rows(20)
    futures = [cluster.submit(x[i : i + 1], codec="raw") for i in range(20)]
    assert not wait(futures, timeout=10).not_done
    want = local_answers(net, x)
    for i, future in enumerate(futures):
        answer = future.result()
        assert torch.equal(answer.logits, want["logits"][i]) and answer.exit == want["exit"][i]
        assert answer.latency > 0


def test_stats_conserve_tasks(cluster):
    time.sleep(0.3)  # link bytes come with heartbeats: those of earlier tests must be in
    before = cluster.stats()
    futures = [cluster.submit(rows(1), plan=[1, 1, 1], codec="raw") for _ in range(30)]
    while not all(f.done() for f in futures):
        now = cluster.stats()
        assert now["tasks"] == now["answers"] + now["errors"] + now["pending"]
        time.sleep(0.005)
    wait(futures, timeout=10)
    after = cluster.stats()
    assert after["pending"] == 0 and after["answers"] - before["answers"] == 30
    assert sum(after["exits"].values()) == sum(after["served"].values()) == after["answers"]
    assert after["served"]["edge"] - before["served"].get("edge", 0) == 30
    time.sleep(0.3)
    grown = cluster.stats()["link_bytes"]["mobile->edge"] - before["link_bytes"]["mobile->edge"]
    assert 30 * (256 + 96) < grown < 30 * 600


def test_an_impossible_deadline_is_a_typed_error_per_task(cluster):
    # The way there and back is over 10 ms of link, so 9 cannot do, and a loaded machine has time to say so before they are over.
    with pytest.raises(Rejected, match="cannot meet the deadline"):
        cluster(rows(2), deadline=0.009, plan=[2, 2, 2])
    out = cluster(rows(3), deadline=0.009, plan=[2, 2, 2], on_error="return")
    assert all(isinstance(e, Rejected) for e in out.errors)
    assert (out.label == -1).all() and (out.node == -1).all() and out.latency.isnan().all() and out.logits.isnan().all()


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"deadline": 0}, ValueError, "deadline: expected seconds > 0, got 0"),
        ({"deadline": "1"}, TypeError, "deadline: expected seconds or None, got str"),
        ({"plan": [0, 1]}, ValueError, "plan: expected 3 node indices in 0..2"),
        ({"plan": [0, 1, 3]}, ValueError, "plan: expected 3 node indices in 0..2"),
        ({"codec": "int9"}, ValueError, "did you mean 'int8'"),
        ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore'"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_arguments_are_named(cluster, options, error, why):
    with pytest.raises(error, match=why):
        cluster(rows(1), **options)
    with pytest.raises(ValueError, match="x_row: expected one row, got 2"):
        cluster.submit(rows(2))


def test_an_input_that_the_net_cannot_take_is_an_error_not_a_loss(cluster):
    with pytest.raises(ClusterError, match="segment 0 on node 'mobile'"):
        cluster(torch.zeros(2, 5, 8, 8), plan=[0, 0, 0])
    assert len(cluster(rows(2))) == 2


def test_another_model_is_refused_with_the_reason(cluster):
    ports = cluster._client._ports
    stranger = Client(
        ("mobile", "edge", "cloud"), ports, b"x" * 16, cluster._client._links, credit=8, grace=0.2, timeout=5.0
    )
    try:
        assert stranger.wait_ready(5.0)
        future = stranger.submit((rows(1),), None, b"", Flag.NONE, 255, from_now=True)
        with pytest.raises(FingerprintMismatch, match="load the same net"):
            future.result(5)
    finally:
        stranger.close()
    raw = ZmqTransport("c:0000000000000007")
    try:
        raw.connect("n0", "127.0.0.1", ports[0].ctl, ports[0].bulk)
        table, payload = codecs.pack((rows(1),))
        frame, reply, end = Frame(Kind.TASK, task=3, origin=7, fingerprint=b"y" * 16, tensors=table, payload=payload), None, time.monotonic() + 5
        while reply is None and time.monotonic() < end:
            for item in raw.receive(0.05):
                if isinstance(item, PeerEvent):
                    assert raw.try_send("n0", encode(frame), bulk=True)
                else:
                    reply = decode(item.parts)
        assert reply.kind is Kind.REFUSED and reply.task == 3
        assert from_payload(reply, Refused).code == "fingerprint" and (b"y" * 16).hex() in from_payload(reply, Refused).reason
    finally:
        raw.close()


def test_garbage_on_a_nodes_ports_does_not_hurt(cluster, net):
    alive = [node.pid for node in cluster.nodes]
    context = zmq.Context()
    try:
        for at in cluster._client._ports:
            for port in (at.ctl, at.bulk):
                with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
                    plain.sendall(bytes(range(256)) * 64)
                dealer = context.socket(zmq.DEALER)
                dealer.setsockopt(zmq.LINGER, 0)
                dealer.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
                dealer.connect(f"tcp://127.0.0.1:{port}")
                good = encode(Frame(Kind.TASK, task=1, origin=2, payload=b"x"))
                huge = MAGIC + struct.pack("<H", VERSION) + b"\xff" * 200
                for parts in ([b""], [b"a", b"b", b"c"], [huge], [good[0][:50]], [good[0], b"y"], [bytes(2 << 20)], [b"\x80" * 90]):
                    dealer.send_multipart(parts)
                dealer.close(linger=500)
        out = cluster(rows(12), plan=[0, 1, 2], codec="raw")
        assert equal_local(out, net, rows(12))
        assert [node.pid for node in cluster.nodes] == alive and all(node.alive for node in cluster.nodes)
    finally:
        context.destroy(linger=0)


def test_idle_nodes_do_not_spin(cluster):
    def cpu():
        ticks = 0
        for node in cluster.nodes:
            with open(f"/proc/{node.pid}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / 100

    before, began = cpu(), time.monotonic()
    time.sleep(1.0)
    # Three processes with ten heartbeats a second to three peers; one that spins would burn a whole core.
    assert (cpu() - before) / (time.monotonic() - began) / 3 < 0.15


def test_what_is_no_network_is_refused_before_anything_starts(net):
    with pytest.raises(TypeError, match="expected an EarlyExit"):
        fastee.local_cluster(torch.nn.Linear(2, 2))
    for options, why in [
        ({"nodes": 0}, "nodes: expected"),
        ({"slowdown": [1, 2]}, "slowdown: expected 3 factors"),
        ({"slowdown": 0.5}, "slowdown"),
        ({"link": "fast"}, "link must be"),
        ({"names": ("a", "a", "b")}, "names"),
        ({"thresholds": [0.5]}, "thresholds: expected 2"),
        ({"credit": 0}, "credit"),
        ({"codec": "zip"}, "codec"),
    ]:
        with pytest.raises(ValueError, match=why):
            fastee.local_cluster(net, **{"nodes": 3, **options})


def test_any_policy_runs_live(net):
    """MDI-Exit queues every task and lets the queues decide where it goes on: nobody may wait for ever, alone or with peers."""
    for nodes in (1, 2):
        with fastee.local_cluster(net, nodes=nodes, link="100mbit 1ms", slowdown=20, codec="raw", policy="mdi_exit", params={"t_o": 2}, timeout=15) as cluster:
            futures = [cluster.submit(x[None]) for x in rows(60)]
            answers = [future.result(20) for future in futures]
            assert len({a.exit for a in answers}) > 1 and cluster.stats()["errors"] == 0
            assert {a.node for a in answers} == set(range(nodes)), "a node alone does it all, a second one takes part"
    with pytest.raises(ValueError, match="mdi_exti.*did you mean 'mdi_exit'"):
        fastee.local_cluster(net, nodes=1, policy="mdi_exti")
    with pytest.raises(ValueError, match="params has no 't_x'"):
        fastee.local_cluster(net, nodes=1, policy="mdi_exit", params={"t_x": 1})


def test_the_python_transport_serves_a_cluster(net, monkeypatch):
    """There the client's thread owns the sockets, and a caller only waits for it."""
    monkeypatch.setenv("FASTEE_TRANSPORT", "python")
    with fastee.local_cluster(net, nodes=2, link="100mbit 1ms", timeout=15) as cluster:
        x = rows(6)
        assert equal_local(cluster(x, plan=[0, 1, 1], codec="raw"), net, x)
        assert cluster.submit(x[:1]).result(15).label == int(net(x[:1]).label)
