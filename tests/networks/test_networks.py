"""Networks of torchvision and timm are built by name, without weights or with those that their library offers."""

import sys
import urllib.error
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from compress.checkpoint.rebuild import build_module, with_one_array
from compress.errors import ArtifactError, ModelError, PackageMissing
from compress.model.artifacts import FactorySpec
from compress.networks.detectors import DETECTORS, Loss, Postprocess, raw_detector
from compress.networks.weights import fit_prefix, read_weights
from compress.networks.wiring import signature_of
from compress.networks.zoo import pretrained_state
from compress.stages.load import load_network

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def spec(kind: Any, name: str, **kwargs: Any) -> FactorySpec:
    return FactorySpec(kind, name, kwargs)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_a_network_of_timm_by_name():
    module = build_module(spec("timm", "mobilenetv3_small_050", num_classes=7))
    assert module(IMAGES).shape == (2, 7)
    with pytest.raises(ModelError, match=r"timm has no network named 'resnet81'\.\nHint: did you mean 'resnet\d+'\?"):
        build_module(spec("timm", "resnet81"))
    with pytest.raises(ModelError, match=r"'resnet18' must build .*num_clases=3.*got TypeError"):
        build_module(spec("timm", "resnet18", num_clases=3))


def test_without_timm_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PackageMissing, match=r"needs the package timm, which is not installed(.|\n)*pip install 'timm"):
        build_module(spec("timm", "resnet18"))


def test_building_fetches_nothing(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    build_module(spec("torchvision", "lraspp_mobilenet_v3_large"))
    build_module(spec("torchvision", "ssdlite320_mobilenet_v3_large"))


@pytest.mark.parametrize(("aux", "names"), [(False, ["out"]), (True, ["out", "aux"])])
def test_a_segmentation_network_gives_its_outputs_by_name(aux: bool, names: list[str]):
    given = spec("torchvision", "deeplabv3_mobilenet_v3_large", num_classes=5, aux_loss=aux)
    module = with_one_array(build_module(given), given, IMAGES)
    signature = signature_of(module, given, IMAGES)
    assert [output.name for output in signature.outputs] == names
    assert signature.outputs[0].shape == ("batch", 5, 64, 64)


def test_an_auxiliary_head_that_is_no_output_goes():
    given = FactorySpec("torchvision", "fcn_resnet50", {"num_classes": 5, "aux_loss": True}, outputs=("out",))
    module = build_module(given)
    assert module.aux_classifier is not None
    wanted = module(IMAGES)["out"]
    plain = with_one_array(module, given, IMAGES)
    assert torch.allclose(plain(IMAGES), wanted, atol=1e-5)
    assert not any(name.startswith("aux_classifier") for name in plain.state_dict())


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_detectors_of_two_stages_are_refused_by_name_with_the_reason(name: str):
    with pytest.raises(ModelError, match=rf"'{name}' of torchvision cannot be used: a detector of two stages crops"):
        build_module(spec("torchvision", name))


# -- detectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_of_a_raw_detector_are_those_of_torchvision(name: str):
    size = {"ssd300_vgg16": (300, 300), "ssdlite320_mobilenet_v3_large": (320, 320)}.get(name, (96, 128))
    kwargs: dict[str, Any] = {"num_classes": 4}
    if not name.startswith("ssd"):
        kwargs |= {"min_size": 96, "max_size": 128}
    original = models.get_model(name, weights=None, weights_backbone=None, **kwargs).eval()
    torch.manual_seed(0)
    for parameter in original.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.05)
    raw = build_module(spec("torchvision", name, **kwargs, score_thresh=0.02))
    raw.load_state_dict(original.state_dict())
    original.score_thresh = 0.02
    assert raw_detector(original).state_dict().keys() == original.state_dict().keys() == raw.state_dict().keys()
    images = list(torch.rand(2, 3, *size))
    with torch.no_grad():
        wanted = original(images)
        outputs = raw(original.transform(images)[0].tensors)
    assert {"cls_logits", "bbox_regression"} <= set(outputs)
    found = Postprocess(raw)(outputs, size)
    assert sum(len(one["boxes"]) for one in wanted) > 10
    for got, want in zip(found, wanted, strict=True):
        assert all(torch.allclose(got[key].float(), want[key].float(), atol=1e-3) for key in want)


@pytest.mark.parametrize("name", DETECTORS)
def test_the_loss_of_a_raw_detector_is_that_of_torchvision(name: str):
    torch.manual_seed(0)
    original = models.get_model(name, weights=None, weights_backbone=None, num_classes=4).eval()
    for parameter in original.head.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    original.transform.normalize = lambda image: image
    size = (300, 300) if name == "ssd300_vgg16" else (128, 160)
    original.transform.fixed_size = size[::-1]
    images = torch.rand(2, 3, *size)
    targets = [
        {"boxes": torch.tensor([[10.0, 20, 70, 100], [80, 30, 150, 120]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    original.training = True  # of the detector alone: its losses, by batch norms as they are
    with torch.no_grad():
        wanted = original(list(images), targets)
    raw = build_module(spec("torchvision", name, num_classes=4))
    raw.load_state_dict(original.state_dict())
    outputs = raw(images)
    for detector in (raw, original):
        found = Loss(detector, size)(outputs, targets)
        assert found.item() == pytest.approx(sum(value.item() for value in wanted.values()), rel=1e-4)
    found.backward()
    assert all(parameter.grad is not None for parameter in raw.head.parameters())
    elsewhere = [{**one, "boxes": one["boxes"] * 0.5} for one in targets]
    assert Loss(raw, size)(outputs, elsewhere).item() != pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize("take", [Postprocess, lambda network: Loss(network, (32, 32))])
def test_boxes_and_losses_are_of_detectors_only(take: Any):
    with pytest.raises(ModelError, match="takes a single-stage detector of torchvision, got ResNet"):
        take(models.resnet18())


# -- weights that the library offers -----------------------------------------------------------------------------------


def test_pretrained_weights_are_those_the_library_fetches(monkeypatch: pytest.MonkeyPatch):
    fetched = models.squeezenet1_1(weights=None).state_dict()
    for value in fetched.values():
        value.copy_(torch.randn_like(value))
    asked: list[str] = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **_: asked.append(url) or dict(fetched)
    )
    module = load_network(spec("torchvision", "squeezenet1_1"), "pretrained")
    assert len(asked) == 1
    assert "squeezenet1_1" in asked[0]
    assert all(torch.equal(value, fetched[name]) for name, value in module.state_dict().items())


def test_pretrained_weights_of_timm(monkeypatch: pytest.MonkeyPatch):
    fetched, create = timm.create_model("mobilenetv3_small_050").eval(), timm.create_model
    asked: list[bool] = []

    def make(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked.append(pretrained)
        return fetched if pretrained else create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", make)
    module = load_network(spec("timm", "mobilenetv3_small_050"), "pretrained")
    assert asked.count(True) == 1
    assert torch.equal(module(IMAGES), fetched(IMAGES))


def test_auxiliary_heads_and_epsilons_of_pretrained_weights_are_brought_in_line(monkeypatch: pytest.MonkeyPatch):
    get_model = models.get_model

    def trained(name: str, weights: str | None = None, **kwargs: Any) -> nn.Module:
        made = get_model(name, weights=None, **{**kwargs, "aux_loss": True} if weights else kwargs).eval()
        if weights:
            for part in made.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eps = 0.01
        return made

    own = trained("fcn_resnet50", "DEFAULT", weights_backbone=None, num_classes=3)
    monkeypatch.setattr(models, "get_model", lambda name, **given: own if given["weights"] else trained(name, **given))
    module = load_network(spec("torchvision", "fcn_resnet50", num_classes=3), "pretrained")
    with torch.no_grad():
        got, wanted = module(IMAGES), own(IMAGES)
    assert list(got) == ["out"]
    assert torch.allclose(got["out"], wanted["out"], atol=1e-4)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), OSError("offline"), RuntimeError("no weights")])
def test_weights_that_cannot_be_fetched_are_an_artifact_error(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(
        ArtifactError, match=rf"'squeezenet1_1' could not be had, got {type(error).__name__}: "
    ) as caught:
        pretrained_state(spec("torchvision", "squeezenet1_1"))
    assert caught.value.exit_code == 4
    assert "give a file of weights" in str(caught.value.hint)


def test_pretrained_weights_of_a_factory_are_refused():
    with pytest.raises(ModelError, match="must stand beside a network of timm or torchvision"):
        load_network(spec("factory", f"{nets.__file__}:chain"), "pretrained")


# -- state dicts in wrappings ------------------------------------------------------------------------------------------

STATE = nets.build("chain").state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": {"state_dict": s}, "epoch": 1},
        lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
        lambda s: {"model": {k: v * 0 for k, v in s.items()}, "model_ema": {"module": s}},
        lambda s: {"network": {f"_orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"module.backbone.net.{k}": v for k, v in s.items()}},
        lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_a_state_dict_is_found_in_its_wrappings(wrap: Any, tmp_path: Path):
    torch.save(wrap(STATE), tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt", list(STATE))
    assert set(found) == set(STATE)
    assert all(torch.equal(found[name], value) for name, value in STATE.items())


def test_prefixes_of_safetensors_are_stripped_too(tmp_path: Path):
    save_file({f"model.{name}": value for name, value in STATE.items()}, tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors", list(STATE))) == set(STATE)


def test_a_prefix_stays_where_stripping_does_not_make_more_fit():
    one = torch.ones(1)
    assert set(fit_prefix({"net.a": one, "net.b": one}, ["net.a", "net.b"])) == {"net.a", "net.b"}
    assert set(fit_prefix({"net.a": one, "b": one}, ["a", "b"])) == {"net.a", "b"}
    assert set(fit_prefix({"net.a": one}, ["c"])) == {"net.a"}


def test_quantised_tensors_are_refused(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give them up; files are still around
        torch.save({"weight": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"must be not quantised, weight is not"):
        read_weights(tmp_path / "w.pt")


# -- what a factory must not return ------------------------------------------------------------------------------------


def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nets.build("chain"), nets.EXAMPLE)


def _rounded() -> nn.Module:
    module = nets.build("chain")
    module.head = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.linear"})()
    return module


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_scripted, r"must return a network of Python code, got a scripted one \(\w+\)(.|\n)*can be the weights"),
        (_rounded, r"in float32, got a quantised one: head \(Linear\)(.|\n)*`quantize` stage"),
        (lambda: nn.Linear, "must return a network, got the class Linear itself"),
        (lambda: nn.LazyLinear(3), "whose parameters have shapes, these have none: weight"),
        (lambda: nn.Linear(2, 3, device="meta"), "tensors hold values, these are on the meta device: weight, bias"),
        (lambda: SimpleNamespace(), r"must return a torch\.nn\.Module, got SimpleNamespace"),
        (lambda: 1 / 0, "got ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_factory_returns_is_checked(make: Any, match: str):
    from compress.networks.factories import call_factory

    with pytest.raises(ModelError, match=match):
        call_factory(make, spec("factory", "nets.py:make"))


def test_a_class_is_a_factory_and_a_wrapper_for_many_devices_is_taken_off(tmp_path: Path):
    from compress.networks.factories import call_factory

    assert isinstance(call_factory(nn.Linear, spec("factory", "n:Linear", in_features=2, out_features=3)), nn.Linear)
    wrapped = nn.DataParallel(nets.build("chain"))
    assert call_factory(lambda: wrapped, spec("factory", "n:m")) is wrapped.module
