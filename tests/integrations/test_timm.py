"""timm's models by name: the routing with a stand-in, the models themselves where timm is installed."""

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import fastee
from fastee.nn import EarlyExit


def body(channels, classes):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


@pytest.fixture
def unloaded(monkeypatch):
    """fastee's own file for timm is imported anew, before and after."""

    def forget():
        sys.modules.pop("fastee.integrations.timm", None)
        vars(fastee.integrations).pop("timm", None)

    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def stand_in(unloaded):
    """A module that answers to timm's names and signatures with one tiny network: it shows what attach asks for, nothing about timm's models."""
    made = []

    def create_model(model_name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, checkpoint_path=None, cache_dir=None, scriptable=None, exportable=None, no_jit=None, **kwargs):
        made.append((model_name, pretrained, checkpoint_path, kwargs))
        model = body(kwargs.get("in_chans", 3), kwargs.get("num_classes", 10))
        model.pretrained_cfg = {"input_size": (3, 12, 12)}
        return model

    names = ["resnet18", "vit_tiny_patch16_224"]
    module = types.ModuleType("timm")
    module.create_model, module.is_model, module.list_models = create_model, names.__contains__, lambda: names
    unloaded.setitem(sys.modules, "timm", module)
    return made


def test_a_name_asks_timm_for_the_model_and_its_size(stand_in):
    net = fastee.attach("timm/resnet18", exits=["1"], num_classes=7, in_chans=1, checkpoint_path="weights.pth")
    assert isinstance(net, EarlyExit) and stand_in == [("resnet18", False, "weights.pth", {"num_classes": 7, "in_chans": 1})]
    assert net(torch.randn(2, 1, 12, 12)).logits.shape == (2, 7)
    fastee.attach("timm/resnet18", exits=["1"])
    assert stand_in[1] == ("resnet18", False, None, {})
    for size, want in ((16, (16, 16)), ((16, 20), (16, 20))):
        assert fastee.integrations.timm.example_for(net.backbone, {"img_size": size}).shape == (1, 3, *want)
    assert fastee.attach("timm/resnet18", ["1"], example=torch.zeros(1, 3, 9, 9))(torch.randn(1, 3, 9, 9)).exit.tolist() == [1]


def test_wrong_names_say_what_to_pass(stand_in):
    with pytest.raises(ValueError, match="timm has no model 'resnet81', did you mean 'resnet18'"):
        fastee.attach("timm/resnet81", exits=["1"])
    with pytest.raises(ValueError, match="pretrained: attach downloads nothing; pass checkpoint_path="):
        fastee.attach("timm/resnet18", exits=["1"], pretrained=True)
    assert stand_in == []


def test_without_timm_the_error_says_what_to_install(unloaded):
    unloaded.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'fastee\[timm\]'"):
        fastee.attach("timm/resnet18", exits=["1"])


def test_a_module_loads_neither_framework():
    program = (
        "import sys, torch, fastee\n"
        "fastee.attach(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), ['0'], example=torch.zeros(1, 4))\n"
        "print([m for m in ('transformers', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "name, exits, shape",
    [("resnet18", ["layer1", "layer2"], {"in_chans": 1}), ("vit_tiny_patch16_224", ["blocks.3"], {"img_size": 96}), ("mobilenetv3_small_100", "auto:2", {})],
)
def test_timms_own_models_answer_as_before_and_leave_early(name, exits, shape):
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision of another build than torch
        pytest.skip(f"needs timm, with a torchvision of torch's own build: {e}")
    net = fastee.attach(f"timm/{name}", exits, num_classes=7, **shape)
    x = torch.randn(2, shape.get("in_chans", 3), *2 * [shape.get("img_size", 224)])
    with torch.no_grad():
        assert torch.equal(net(x).logits, net.backbone(x))
        net.set_rule(thresholds=[0.0] + [float("inf")] * (len(net.heads) - 1))
        assert net(x).exit.tolist() == [0, 0]
