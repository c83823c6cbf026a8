"""`compress init`: data sets of other kinds than class folders, networks of other channels, refusals with a remedy."""

import gzip
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from initial import BUILD, call, factory, halves, picture, tiny, write_arrays, write_folder
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from compress.config.load import load_pipeline
from compress.config.schema.pipeline import PipelineConfig

MASKS = """
from torch import nn

def build(classes=4):
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, classes, 1))
"""
NUMBER = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0),
    )
"""


def network(text: str) -> tuple[str, ...]:
    """Write a factory and random weights of its network to the current folder."""
    Path("net.py").write_text(text, encoding="utf-8")
    names: dict[str, Callable[..., nn.Module]] = {}
    exec(text, names)
    torch.manual_seed(0)
    torch.save(names["build"]().state_dict(), "best.pt")
    return "net.py:build", "--weights", "best.pt"


def init(*arguments: object) -> PipelineConfig:
    done = call("init", *arguments)
    assert done.exit_code == 0, done.output
    assert "pipeline.yaml is written. Change the budget there if you like" in done.stdout
    return load_pipeline(Path("pipeline.yaml"), environ={}).config


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_masks(images: Path, masks: Path, count: int, inside: int = 2) -> None:
    random = np.random.default_rng(count)
    for place in (images, masks):
        place.mkdir(parents=True)
    for number in range(count):
        pixels = picture(number % 3, random, (16, 16), 3)
        mask = (pixels.mean(-1) > 135).astype(np.uint8) * inside
        Image.fromarray(pixels).save(images / f"{number}.png")
        Image.fromarray(mask).save(masks / f"{number}.png")


@pytest.mark.parametrize("layout", ["{half}/{kind}", "{kind}/{half}"])
def test_masks_in_both_orders_of_folders(layout: str) -> None:
    for half, count in (("train", 24), ("val", 12)):
        places = [Path("set") / layout.format(half=half, kind=kind) for kind in ("images", "masks")]
        write_masks(places[0], places[1], count)
    config = init("set", *network(MASKS))
    assert config.task.name == "segmentation"
    assert Path(config.data.train.masks) == (Path("set") / layout.format(half="train", kind="masks")).absolute()
    assert Path(config.data.evaluation.images) == (Path("set") / layout.format(half="val", kind="images")).absolute()
    assert "miou" in config.stages[-1].gates.max_drop


def test_masks_without_halves() -> None:
    write_masks(Path("set/images"), Path("set/masks"), 30)
    assert init("set", *network(MASKS)).data.evaluation == 7


def test_masks_in_arrays_and_numbers() -> None:
    random = np.random.default_rng(0)
    images = np.stack([picture(number % 3, random, (16, 16), 3) for number in range(40)])
    np.savez("masks.npz", x=images, y=(images.mean(-1) > 135).astype(np.uint8))
    assert init("masks.npz", *network(MASKS)).task.name == "segmentation"
    np.savez("numbers.npz", x=images, y=images.mean((1, 2, 3)).astype(np.float32) / 255)
    config = init("numbers.npz", *network(NUMBER), "--force")
    assert config.task.name == "regression"
    assert 0 < config.stages[-1].gates.max_rise["rmse"] < 0.05


def test_images_without_labels_are_held_to_agreement() -> None:
    write_folder(Path("plain"), 20, labelled=False)
    assert init("plain", *network(BUILD)).stages[-1].gates.min == {"agreement": 0.85}


def test_arrays_by_other_names() -> None:
    random, labels = np.random.default_rng(0), np.arange(60) % 3
    images = np.stack([picture(kind, random, (16, 16), 3) for kind in labels])
    np.savez("keras.npz", x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:])
    config = init("keras.npz", *network(BUILD))
    assert (config.data.train.image_key, config.data.evaluation.label_key) == ("x_train", "y_test")
    np.savez("named.npz", images=images, labels=labels[:, None], classes=np.array(["a", "b", "c"]))
    config = init("named.npz", "net.py:build", "--weights", "best.pt", "--force")
    assert (config.data.train.image_key, config.data.train.label_key) == ("images", "labels")


def test_files_of_mnist() -> None:
    random = np.random.default_rng(0)
    Path("mnist").mkdir()
    for half, count in (("train", 60), ("t10k", 30)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = np.stack([picture(kind, random, (20, 20), 1)[..., 0] for kind in labels])
        with gzip.open(f"mnist/{half}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">HBB3I", 0, 8, 3, *images.shape) + images.tobytes())
        with gzip.open(f"mnist/{half}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">HBBI", 0, 8, 1, count) + labels.tobytes())
    config = init("mnist", *network(BUILD.replace("channels=3", "channels=1")))
    assert config.data.preprocessing.channels == "L"
    assert Path(config.data.evaluation.labels).name == "t10k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(("pictures", "channels"), [(1, 3), (3, 1)])
def test_the_network_decides_about_channels(pictures: int, channels: int) -> None:
    halves(Path("set"), channels=pictures)
    config = init("set", *network(BUILD.replace("channels=3", f"channels={channels}")))
    assert config.data.preprocessing.channels == ("L" if channels == 1 else "RGB")


def test_halves_of_other_names_and_classes_named_like_halves() -> None:
    write_folder(Path("set/Training"), 10)
    write_folder(Path("set/Testing"), 6)
    config = init("set", *network(BUILD))
    assert Path(config.data.evaluation.folder).name == "Testing"
    write_folder(Path("vehicles"), 10)
    for old, new in zip(("disc", "square", "stripes"), ("bus", "car", "train"), strict=True):
        Path("vehicles", old).rename(Path("vehicles", new))
    config = init("vehicles", "net.py:build", "--weights", "best.pt", "--force")
    assert Path(config.data.train.folder).name == "vehicles"


def test_hidden_folders_are_no_classes() -> None:
    write_folder(Path("photos"), 10)
    write_folder(Path("photos/.cache"), 2)
    assert Path(init("photos", *network(BUILD)).data.train.folder).name == "photos"


def test_a_factory_with_a_number_of_classes_gets_it() -> None:
    write_folder(Path("photos"), 10)
    network(BUILD)
    Path("net.py").write_text(BUILD.replace("classes=3", "classes"), encoding="utf-8")
    config = init("photos", "net.py:build", "--weights", "best.pt")
    assert config.stages[0].model.kwargs == {"classes": 3}


def test_an_onnx_file_with_open_sizes_and_one_with_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.permute(0, 3, 1, 2))

    halves(Path("set"))
    inner = tiny(Path()).eval()
    sizes = {"pixels": {0: "n", 1: "h", 2: "w"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is what writes open sizes
        torch.onnx.export(  # noqa: TID251 - a file of another program
            Last(inner),
            (torch.zeros(1, 32, 32, 3),),
            "net.onnx",
            input_names=["pixels"],
            dynamic_axes=sizes,
            dynamo=False,
        )
    config = init("set", "net.onnx")
    assert config.data.preprocessing.layout == "NHWC"
    assert config.stages[0].model.inputs == {"pixels": (32, 32, 3)}


@pytest.mark.parametrize("kind", ["compiled", "lightning", "sorted"])
def test_checkpoints_with_prefixes_or_sorted_names(kind: str) -> None:
    write_folder(Path("photos"), 10)
    torch.manual_seed(0)
    state = models.shufflenet_v2_x0_5(num_classes=3).state_dict()
    if kind == "sorted":
        save_file(state, "best.safetensors")
    elif kind == "compiled":
        torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, "best.pt")
    else:
        torch.save({"state_dict": {f"net.{name}": value for name, value in state.items()}}, "best.pt")
    config = init("photos", "best.safetensors" if kind == "sorted" else "best.pt")
    assert config.stages[0].model.torchvision == "shufflenet_v2_x0_5"
    assert config.stages[0].model.kwargs == {"num_classes": 3}


DARK = """
import torch
from torch import nn

class Dark(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        bright = x.mean((1, 2, 3))[:, None]
        return -40 * (bright - torch.tensor([0.2, 0.5, 0.8])) ** 2 + 0 * self.fc(self.body(x).mean((2, 3)))

build = Dark
"""


def test_preprocessing_is_found_by_trial() -> None:
    labels = np.arange(90) % 3
    images = np.repeat((51 + 76 * labels).astype(np.uint8), 16 * 16 * 3).reshape(90, 16, 16, 3)
    np.savez("set.npz", x=images, y=labels)
    done = call("init", "set.npz", *network(DARK))
    assert done.exit_code == 0, done.output
    assert "Preprocessing found by trial: mean [0], std [1]. " in done.stdout
    text = Path("pipeline.yaml").read_text(encoding="utf-8")
    assert "preprocessing:       # found by trial: " in text
    config = load_pipeline(Path("pipeline.yaml"), environ={}).config
    assert (config.data.preprocessing.mean, config.data.preprocessing.std) == ((0.0,), (1.0,))
    np.savez("set.npz", x=images, y=(labels + 1) % 3)
    done = call("init", "set.npz", "net.py:build", "--weights", "best.pt", "--force")
    assert "Preprocessing found" not in done.output, "no preprocessing mends shifted labels"
    assert "The baseline is at chance level" in done.stderr


def test_few_images_are_warned_about() -> None:
    write_folder(Path("photos"), 8)
    for number in range(1, 8):
        Path("photos", "disc", f"disc{number}.png").unlink()
    done = call("init", "photos", *network(BUILD))
    assert done.exit_code == 0, done.output
    assert "Warning: Classes with fewer than 4 images are missing in some splits: disc (1).\n" in done.stderr
    assert "Warning: 4 evaluation images show drops of 31 percentage points and more." in done.stderr
    text = Path("pipeline.yaml").read_text(encoding="utf-8")
    assert "max_drop: {top1: 0.15}    # 15 percentage points of top-1; 4 images are too few to decide it\n" in text


def refusals() -> dict[str, tuple[tuple[object, ...], str, str]]:
    """Return case -> arguments, message, hint."""
    halves(Path("set"))
    weights = network(BUILD)
    write_folder(Path("boxes/images"), 2, labelled=False)
    Path("boxes/labels").mkdir()
    Path("boxes/labels/disc0.txt").write_text("0 0.5 0.5 0.1 0.1\n", encoding="utf-8")
    write_folder(Path("table"), 4, labelled=False)
    Path("table/labels.csv").write_text("file,label\n", encoding="utf-8")
    write_folder(Path("spare"), 6)
    Path("spare/notes").mkdir()
    write_folder(Path("few"), 2)
    write_masks(Path("binary/images"), Path("binary/masks"), 20, inside=255)
    write_folder(Path("held/test"), 4)
    arrays = np.load(write_arrays(Path("all.npz"), 6))
    np.savez("first.npz", x=arrays["x"].transpose(0, 3, 1, 2), y=arrays["y"])
    np.savez("real.npz", x=arrays["x"].astype(np.float32) / 255, y=arrays["y"])
    np.savez("hot.npz", x=arrays["x"], y=np.eye(3, dtype=np.int64)[arrays["y"]])
    np.savez("odd.npz", a=arrays["x"], b=arrays["y"], c=arrays["y"])
    Path("m.h5").write_bytes(b"x")
    torch.manual_seed(0)
    net = models.resnet18(num_classes=3)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    torch.save(net.state_dict(), "stem.pt")
    torch.save(models.resnet18(num_classes=1).state_dict(), "one.pt")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, "optimizer.pt")
    return {
        "boxes": (("boxes", *weights), "'boxes' holds boxes, such as 'boxes/labels/disc0.txt'.", "docs/yolo.md"),
        "a table": (("table", *weights), "'table/labels.csv' is a table of labels", "one folder for each class"),
        "a table alone": (("table/labels.csv", *weights), "is a table of labels", "docs/tasks.md"),
        "an empty class": (("spare", *weights), "must hold an image, none in notes.", "Move folders that are no"),
        "six images": (("few", *weights), "at least 12 images, they hold 6.", "hundreds of evaluation images"),
        "masks of 0 and 255": (("binary", *weights), "the first 20 hold 0 and 255.", "Write 1 in place of 255"),
        "no train": (("held", *weights), "'held' must have a folder train/, it has test.", "DATA is one of these"),
        "channels first": (("first.npz", *weights), "with the channels first.", "x.transpose(0, 2, 3, 1)"),
        "floats": (("real.npz", *weights), "got float32 from 0 to 1.", "(255 * x).round()"),
        "one-hot": (("hot.npz", *weights), "got one row of classes for each image.", "Store y.argmax(1)."),
        "three arrays": (("odd.npz", *weights), "got a uint8 (18, 16, 16, 3), b int64", "Name them x and y"),
        "misspelt data": (("cifar10", *weights), "DATA 'cifar10' does not exist.", "did you mean 'CIFAR10'?"),
        "Keras": (("set", "m.h5"), "MODEL 'm.h5' is no checkpoint", "MODEL is one of these"),
        "misspelt": (("set", "resnet81", "--weights", "stem.pt"), "no network named 'resnet81'", "did you mean"),
        "no function": (("set", "net.py", *weights[1:]), "The file defines build.", "net.py:build"),
        "a stem of CIFAR": (("set", "stem.pt"), "conv1.weight (64, 3, 3, 3) in place of (64, 3, 7, 7).", "file.py"),
        "one output": (("set", "one.pt"), "The network has one output for 3 classes", "docs/tasks.md"),
        "no weights": (("set", "optimizer.pt"), "it holds epoch (int), optimizer (dict)", "state_dict"),
        "another network": (("set", "resnet34", "--weights", "stem.pt"), "must fit the network exactly", "Check"),
    }  # fmt: skip


def test_refusals_name_value_and_remedy() -> None:
    for case, (arguments, message, hint) in refusals().items():
        done = call("init", *arguments)
        assert done.exit_code in (2, 3, 4), (case, done.output)
        said, _, remedy = done.stderr.partition("Hint: ")
        assert message in said, (case, done.stderr)
        assert hint in remedy, (case, done.stderr)
        assert not Path("pipeline.yaml").exists(), case


@pytest.mark.parametrize("kind", ["masks", "numbers", "no labels"])
def test_files_of_other_kinds_run(kind: str) -> None:
    if kind == "masks":
        write_masks(Path("set/images"), Path("set/masks"), 30)
        init("set", *network(MASKS))
    elif kind == "numbers":
        images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
        np.savez("numbers.npz", x=images, y=images.mean((1, 2, 3)).astype(np.float32) / 255)
        init("numbers.npz", *network(NUMBER))
    else:
        write_folder(Path("set"), 12, labelled=False)
        init("set", *factory(Path()))
    done = call("run", "pipeline.yaml", "--set", "stages.verify.resources=null")
    assert done.exit_code in (0, 1, 6), done.output
    assert "not made" not in done.output, "every gate that init writes can be measured"
