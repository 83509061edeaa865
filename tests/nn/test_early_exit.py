import copy
import functools
import math
import re
import subprocess
import sys

import cloudpickle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import FAMILIES, Encoder, ResNet, ViT, images, logits, rows_of, tokens
from torch import nn

import fastee
from fastee import ops
from fastee.nn import EarlyExit, ExitHead, ExitResult


@pytest.fixture
def net():
    torch.manual_seed(0)
    backbone = ResNet()
    for m in backbone.modules():  # statistics that are not those of a fresh batch norm
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    backbone.eval()
    net = fastee.attach(backbone, ["layer1", "layer2"], 10, images(2))
    for head in net.heads:
        head.norm.running_mean.normal_(0, 0.1)
        head.norm.running_var.uniform_(0.5, 1.5)
        head.linear.weight.data.mul_(4)
    return net


def scores(net, x, i):
    carry = net.inputs.flat(x)
    with torch.no_grad():
        for j in range(i + 1):
            carry = net.run_segment(j, carry)
        return net.exit_step(i, carry).confidence


def split_rule(net, x):
    """Thresholds that send rows to every exit."""
    a, b = scores(net, x, 0).sort().values, scores(net, x, 1).sort().values
    return [float((a[-3] + a[-4]) / 2), float((b[len(b) // 2] + b[len(b) // 2 - 1]) / 2)]


def test_the_full_answer_is_the_backbones_bit_for_bit(net):
    x = images(7)
    with torch.no_grad():
        want = net.backbone(x)
        assert torch.equal(net.full(x), want)
        assert torch.equal(net(x).logits, want)
        net.set_rule(thresholds=[0.1, 0.1])
        assert torch.equal(net.full(x), want)
        net.train()
        net.backbone.eval()
        assert torch.equal(net.full(x), want)


@pytest.mark.parametrize("family", ["encoder_mask", "two_inputs", "vit_container"])
def test_the_full_answer_with_other_inputs(family):
    torch.manual_seed(0)
    make, exits, inputs = FAMILIES[family]
    backbone = make().eval()
    net, x = fastee.attach(backbone, exits, 10, inputs(2)), inputs(3)
    want = backbone(**x) if isinstance(x, dict) else backbone(*x) if isinstance(x, tuple) else backbone(x)
    assert torch.equal(logits(net.full(x)), logits(want))
    out = net(x)
    assert torch.equal(out.logits, logits(want)) and out.exit.tolist() == [net.num_exits] * 3
    if isinstance(x, dict):
        assert torch.equal(net(**x).logits, out.logits)
    elif isinstance(x, tuple):
        assert torch.equal(net(*x).logits, out.logits)


def test_thresholds_zero_send_all_out_first_and_two_sends_none(net):
    x = images(9)
    net.set_rule(measure="max_prob", thresholds=[0.0, 0.0])
    out = net(x)
    assert out.exit.tolist() == [0] * 9
    torch.testing.assert_close(out.logits, net.heads[0](net.run_segment(0, (x,))[0]), rtol=1e-4, atol=1e-4)
    net.set_rule(thresholds=[2.0, 2.0])
    out = net(x)
    assert out.exit.tolist() == [2] * 9
    torch.testing.assert_close(out.logits, net.backbone(x), rtol=1e-4, atol=1e-5)
    net.set_rule(thresholds=[math.inf, 0.0])
    assert net(x).exit.tolist() == [1] * 9


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "energy"])
def test_a_batch_answers_like_its_rows_one_by_one(net, measure):
    x = images(16)
    net.set_rule(measure=measure)
    rule = split_rule(net, x)
    net.set_rule(thresholds=rule)
    out = net(x)
    assert sorted(set(out.exit.tolist())) == [0, 1, 2]
    for i in range(16):
        alone = net(x[i : i + 1])
        assert alone.exit.tolist() == [int(out.exit[i])] and alone.label.tolist() == [int(out.label[i])]
        torch.testing.assert_close(alone.logits[0], out.logits[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.confidence[0], out.confidence[i], rtol=1e-4, atol=1e-5)


def test_answers_come_back_in_the_order_of_the_rows(net):
    x = images(16)
    net.set_rule(thresholds=split_rule(net, x))
    out, order = net(x), torch.randperm(16)
    again = net(x[order])
    assert torch.equal(again.exit, out.exit[order]) and torch.equal(again.label, out.label[order])
    torch.testing.assert_close(again.logits, out.logits[order], rtol=1e-4, atol=1e-4)
    assert torch.equal(out.label, out.logits.argmax(1))
    stats = ops.row_stats(out.logits)
    torch.testing.assert_close(out.confidence, stats.max_prob, rtol=1e-5, atol=1e-6)


@functools.cache
def three_layers():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    net = fastee.attach(body, ["1", "3"], 4, torch.randn(1, 6), norm=None)
    for head in net.heads:
        head.linear.weight.data.mul_(3)
    return net


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.lists(st.sampled_from([-1.0, 0.3, 0.5, 0.9, 2.0, math.inf]), min_size=2, max_size=2), st.integers(0, 1000))
def test_every_row_takes_the_first_exit_that_accepts_it(rows, rule, seed):
    net = three_layers()
    torch.manual_seed(seed)
    net.set_rule(thresholds=rule)
    x = 3 * torch.randn(rows, 6)
    out = net(x)
    with torch.no_grad():
        taps, final = net.taps(x) if rows else ([torch.empty(0, 8)] * 2, torch.empty(0, 4))
        heads = [h.classify(t).softmax(1) for h, t in zip(net.heads, taps, strict=True)]
    for i in range(rows):
        close = any(abs(float(h[i].max()) - t) < 1e-5 for h, t in zip(heads, rule, strict=True))
        want = next((k for k, t in enumerate(rule) if float(heads[k][i].max()) >= t and t < math.inf), 2)
        assert close or int(out.exit[i]) == want
    assert out.logits.shape == (rows, 4) and out.label.shape == out.confidence.shape == out.exit.shape == (rows,)
    assert out.label.dtype == out.exit.dtype == torch.int64 and out.confidence.dtype == torch.float32


def test_an_empty_batch_answers_empty(net):
    for rule in ([math.inf] * 2, [0.5, 0.5]):
        net.set_rule(thresholds=rule)
        for deadline in (None, 0.1):
            out = net(torch.empty(0, 3, 16, 16), deadline=deadline)
            assert out.logits.shape == (0, 10) and out.label.tolist() == out.exit.tolist() == out.confidence.tolist() == []
            assert len(out) == 0 and "0 rows" in repr(out)


def test_rows_with_nan_never_leave_early(net):
    x = images(4)
    x[2] = math.nan
    net.set_rule(thresholds=[0.0, 0.0])
    out = net(x)
    assert out.exit.tolist() == [0, 0, 2, 0]
    assert int(out.label[2]) == -1 and math.isnan(float(out.confidence[2]))


def test_all_leaving_at_once_stops_the_run(net):
    ran = []
    run = net.run_segment
    object.__setattr__(net, "run_segment", lambda i, carry: ran.append((i, len(carry[0]))) or run(i, carry))
    x = images(8)
    net.set_rule(thresholds=[0.0, 0.0])
    net(x)
    assert ran == [(0, 8)]
    ran.clear()
    net.set_rule(thresholds=split_rule(net, x))
    ran.clear()
    net(x)
    assert [i for i, _ in ran] == [0, 1, 2] and ran[0][1] == 8 and ran[1][1] == 5 and 0 < ran[2][1] < 5


def test_train_mode_gives_the_logits_of_all_heads_with_gradients(net):
    net.train()
    out = net(images(4))
    assert [list(z.shape) for z in out] == [[4, 10]] * 3
    sum(z.sum() for z in out).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    net.eval()
    x = images(4)
    with torch.no_grad():
        taps, final = net.taps(x)
        assert torch.equal(final, net.backbone(x))
        assert torch.equal(net.heads[0](net.run_segment(0, (x,))[0]), net.heads[0].classify(taps[0]))


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", None])
@pytest.mark.parametrize("pool", ["mean", "cls", "mean_tokens", "last", "none"])
def test_the_fused_head_answers_like_the_plain_one(norm, pool):
    torch.manual_seed(0)
    head = ExitHead(16, 5, pool, norm)
    for p in head.parameters():
        p.data.normal_()
    if norm == "batch":
        head.norm.running_mean.normal_()
        head.norm.running_var.uniform_(0.1, 2)
    head.eval()
    x = {"mean": torch.randn(6, 16, 3, 3), "none": torch.randn(6, 16)}.get(pool, torch.randn(6, 7, 16))
    mask = torch.rand(6, 7).gt(0.3).float() if pool == "mean_tokens" else None
    if mask is not None:
        mask[:, 0] = 1
    z = head(x, mask)
    for backend in (None, "reference"):
        step = head.step(x, "margin", 0.2, mask=mask, logits=True, backend=backend)
        torch.testing.assert_close(step.logits, z, rtol=1e-4, atol=1e-4)
    head.linear.weight.data.add_(1)
    with torch.no_grad():
        head.linear.bias.add_(1)
        torch.testing.assert_close(head.step(x, "margin", 0.2, mask=mask, logits=True).logits, head(x, mask), rtol=1e-4, atol=1e-3)


def test_set_rule_keeps_what_is_not_given(net):
    net.set_rule(measure="entropy", thresholds=[-0.1, -0.2])
    net.set_rule(thresholds=[-0.3, -0.4])
    assert net.measure == "entropy" and net.thresholds == [-0.3, -0.4]
    net.thresholds.append(1.0)  # a copy
    assert net.thresholds == [-0.3, -0.4]


BAD_RULES = [
    (dict(measure="max_probs"), ValueError, "measure: expected one of ['max_prob', 'margin', 'entropy', 'energy', 'patience', 'gate'], got 'max_probs', did you mean 'max_prob'?"),
    (dict(measure=3), TypeError, "measure: expected one of ['max_prob', 'margin', 'entropy', 'energy', 'patience', 'gate'], got int 3"),
    (dict(thresholds=[0.5]), ValueError, "thresholds: expected 2 numbers, one per exit ['layer1', 'layer2'], got 1"),
    (dict(thresholds=[0.5, math.nan]), ValueError, "thresholds: the threshold of exit 'layer2' is NaN, expected a number or inf"),
    (dict(thresholds=0.5), TypeError, "thresholds: expected 2 numbers, one per exit, got 0.5"),
    (dict(thresholds=["a", "b"]), TypeError, "thresholds: expected 2 numbers, one per exit, got ['a', 'b']"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "error", "message"), BAD_RULES)
def test_bad_rules_are_named_and_change_nothing(net, rule, error, message):
    net.set_rule(measure="margin", thresholds=[0.1, 0.2])
    with pytest.raises(error, match=re.escape(message)):
        net.set_rule(**rule)
    assert net.measure == "margin" and net.thresholds == [0.1, 0.2]


BAD_CALLS = [
    (lambda net: net(images(2), deadline="soon"), TypeError, "deadline: expected seconds as a number, got str 'soon'"),
    (lambda net: net(images(2), deadline=math.nan), ValueError, "deadline: expected seconds, got NaN"),
    (lambda net: net(3), TypeError, "x: expected a tensor, a tuple or a dict of tensors, got int"),
    (lambda net: net((images(2), images(2))), ValueError, "x: expected 1 inputs ['x'], got 2"),
    (lambda net: net({"y": images(2)}), ValueError, "x: expected the inputs ['x'], missing ['x'], unknown ['y']"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_calls_are_named(net, call, error, message):
    net.set_rule(thresholds=[0.5, 0.5])
    with pytest.raises(error, match=re.escape(message)):
        call(net)


def test_inputs_of_different_batch_sizes_are_refused():
    torch.manual_seed(0)
    net = fastee.attach(Encoder().eval(), ["layers.0"], 10, tokens(2))
    net.set_rule(thresholds=[0.5])
    x = tokens(4)
    x["attention_mask"] = x["attention_mask"][:3]
    with pytest.raises(ValueError, match=re.escape("x: input 'attention_mask' must have 4 rows like the first input, got [3, 9]")):
        net(x)


def test_networks_travel_to_another_process(tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules["small_nets"])
    bundle, prints = [], []
    for family in ("vit", "encoder_branch", "constant"):  # torch.fx, torch.export, values that are no attribute
        torch.manual_seed(0)
        make, exits, inputs = FAMILIES[family]
        net, x = fastee.attach(make().eval(), exits, 10, inputs(2)), inputs(6)
        cut = scores(net, x, 0).sort().values
        net.set_rule(thresholds=[float((cut[2] + cut[3]) / 2)] + [math.inf] * (net.num_exits - 1))
        bundle.append((net, x, net(x)))
        prints.append(net.fingerprint)
    (tmp_path / "nets").write_bytes(cloudpickle.dumps(bundle))
    code = (
        f"import cloudpickle, torch\nfor net, x, out in cloudpickle.load(open({str(tmp_path / 'nets')!r}, 'rb')):\n mine = net(x)\n"
        " assert torch.equal(mine.exit, out.exit) and torch.equal(mine.label, out.label) and set(out.exit.tolist()) == {0, net.num_exits}\n"
        " torch.testing.assert_close(mine.logits, out.logits)\n print(net.fingerprint)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == prints


def test_the_fingerprint_follows_weights_exits_and_architecture(net):
    first = net.fingerprint
    assert re.fullmatch("[0-9a-f]{32}", first) and net.fingerprint == first
    net.set_rule(thresholds=[0.3, 0.4])
    assert net.fingerprint == first
    with torch.no_grad():
        net.heads[1].linear.bias[0] += 1e-3
    second = net.fingerprint
    with torch.no_grad():
        net.backbone.fc.weight[0, 0] += 1e-3
    third = net.fingerprint
    other = fastee.attach(net.backbone, ["layer1"], 10, images(1)).fingerprint
    assert len({first, second, third, other}) == 4


def test_a_deep_copy_is_a_network_of_its_own(net):
    x = images(8)
    net.set_rule(thresholds=split_rule(net, x))
    twin = copy.deepcopy(net)
    want = net(x)
    with torch.no_grad():
        for p in net.backbone.parameters():
            p.zero_()
    assert torch.equal(twin(x).logits, want.logits)
    assert not torch.equal(net(x).logits, want.logits)


def test_weights_loaded_or_moved_later_reach_the_segments(net):
    x, other = images(4), ResNet().eval()
    net.backbone.load_state_dict(other.state_dict(), assign=True)
    net.set_rule(thresholds=[2.0, 2.0])
    torch.testing.assert_close(net(x).logits, other(x), rtol=1e-4, atol=1e-5)
    net.double()
    out = net(x.double())
    assert out.logits.dtype == torch.float64
    torch.testing.assert_close(out.logits, other.double()(x.double()))


def test_constants_move_with_the_network():
    torch.manual_seed(0)
    make, exits, inputs = FAMILIES["constant"]
    net, x = fastee.attach(make().eval(), exits, 10, inputs(2)), inputs(3)
    net.set_rule(thresholds=[2.0, 2.0])
    torch.testing.assert_close(net(x).logits, net.full(x))
    assert not any(k.startswith("constants") for k in net.state_dict())


def test_autocast_runs_every_path(net):
    x = images(8)
    net.set_rule(thresholds=split_rule(net, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert torch.isfinite(out.logits.float()).all() and out.logits.shape == (8, 10)
    net.set_rule(thresholds=[math.inf] * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(net(x).logits, net.backbone(x)) and net(x).logits.dtype == torch.bfloat16


def test_answers_of_mixed_dtypes_come_in_the_widest_one(net):
    x = images(8)
    net.set_rule(thresholds=split_rule(net, x))
    net.heads[1].double()
    out = net(x)
    assert [part[3].logits.dtype for part in out._source.parts] == [torch.float32, torch.float64, torch.float32]
    assert out.logits.dtype == torch.float64 and out.logits.argmax(1).tolist() == out.label.tolist()


def test_hooks_of_leaf_modules_fire_in_segments(net):
    seen = []
    handle = net.backbone.fc.register_forward_hook(lambda *_: seen.append(1))
    net.set_rule(thresholds=[2.0, 2.0])
    net(images(2))
    handle.remove()
    assert seen == [1]


@pytest.mark.slow
def test_compiled_segments_answer_alike(net):
    x = images(8)
    net.set_rule(thresholds=split_rule(net, x))
    want = net(x)
    net.compile_segments(backend="aot_eager")
    got = net(x)
    assert torch.equal(got.exit, want.exit)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["resnet", "vit", "encoder_branch"])
def test_a_segment_exports_with_only_its_own_weights(family):
    torch.manual_seed(0)
    make, exits, inputs = FAMILIES[family]
    net, x = fastee.attach(make().eval(), exits, 10, inputs(2)), inputs(2)
    carry = net.run_segment(0, net.inputs.flat(x))
    segment = net.segment(1)
    assert 0 < sum(p.numel() for p in segment.parameters()) < sum(p.numel() for p in net.backbone.parameters())
    program = torch.export.export(segment, carry, strict=False)
    for got, want in zip(program.module()(*carry), net.run_segment(1, carry), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_state_dict_round_trip(net):
    x = images(4)
    torch.manual_seed(9)
    other = fastee.attach(ResNet().eval(), ["layer1", "layer2"], 10, images(1))
    missing = other.load_state_dict(net.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    for n in (net, other):
        n.set_rule(thresholds=[0.0, 0.0])
    assert torch.equal(other(x).logits, net(x).logits)
    assert other.fingerprint == net.fingerprint


def test_a_result_is_lazy_kept_and_not_iterable(net):
    out = net(images(3))
    with pytest.raises(AttributeError):
        out._label  # noqa: B018
    assert out.label is out.label and out.logits is out.logits
    with pytest.raises(TypeError):
        iter(out)
    assert isinstance(out, ExitResult) and repr(out) == "ExitResult(3 rows, 10 classes, rows per exit [0, 0, 3])"
    assert out.forced.tolist() == [False] * 3


def test_with_exits_off_the_backbone_runs_once_and_gradients_flow(net):
    calls = []
    handle = net.backbone.register_forward_hook(lambda *_: calls.append(1))
    x = images(2).requires_grad_()
    net(x).logits.sum().backward()
    handle.remove()
    assert calls == [1] and x.grad is not None


def test_vit_rows_leave_through_class_tokens():
    torch.manual_seed(0)
    net = fastee.attach(ViT().eval(), ["blocks.0", "blocks.2"], 10, images(2), norm="layer")
    x = images(10)
    net.set_rule(thresholds=split_rule(net, x))
    out = net(x)
    assert set(out.exit.tolist()) == {0, 1, 2}
    i = int((out.exit == 1).nonzero()[0])
    alone = net(rows_of(x, torch.tensor([i])))
    assert alone.exit.tolist() == [1]
    torch.testing.assert_close(alone.logits[0], out.logits[i], rtol=1e-4, atol=1e-4)
    assert isinstance(net, EarlyExit)
