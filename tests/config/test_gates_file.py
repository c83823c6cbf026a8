"""A file of gates: what it may say, what stands in for what it leaves out, and how each fault is told."""

from pathlib import Path

import numpy as np
import pytest

from compress.config.gates_file import find_images, load_gates
from compress.config.schema.data import ArraysSource, FolderSource, IdxSource
from compress.errors import ConfigError, ConfigSyntaxError, ConfigValueError


def write(folder: Path, text: str) -> Path:
    (folder / "gates.yaml").write_text(text, encoding="utf-8")
    return folder / "gates.yaml"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.savez(tmp_path / "test.npz", x=np.zeros((2, 4, 4, 3), np.uint8), y=np.zeros(2, np.int64))
    return tmp_path / "test.npz"


def test_gates_conditions_and_data_are_read_and_paths_are_made_absolute(tmp_path: Path, images: Path) -> None:
    path = write(
        tmp_path,
        "evaluation: {arrays: test.npz}\nthreads: 2\nseed: 3\npreprocessing: {mean: [0.5]}\n"
        "robustness: {noise_levels: [], corruptions: [], shifted: {jpeg75: {arrays: other.npz}}}\n"
        "gates: {max_drop: {top1: 0.01}, max_memory_mb: 50}\n",
    )
    gates = load_gates(path)
    assert gates.evaluation.arrays == str(images)
    assert gates.robustness.shifted["jpeg75"].arrays == str(tmp_path / "other.npz")
    assert (gates.threads, gates.seed, gates.preprocessing.mean) == (2, 3, (0.5,))
    assert (gates.gates.max_drop, gates.gates.max_memory_mb) == ({"top1": 0.01}, 50)


def test_a_verify_stage_can_be_copied_out_of_a_pipeline(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, "stage: verify\nwarmup: 3\ngates: {min_speedup: 1.5}\n")
    assert load_gates(path, images).gates.min_speedup == 1.5


def test_without_a_file_the_defaults_hold_and_can_be_set(images: Path) -> None:
    gates = load_gates(None, images, ["gates.max_drop.top1=0.02", "preprocessing.mean=[0.5]"])
    assert gates.gates.max_drop == {"top1": 0.02}
    assert gates.preprocessing.mean == (0.5,)
    assert load_gates(None, images).gates.max_drop == {}


def test_data_on_the_command_line_goes_before_the_file(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, "evaluation: {arrays: other.npz}\n")
    assert load_gates(path, images).evaluation.arrays == str(images)
    assert load_gates(path).evaluation.arrays == str(tmp_path / "other.npz")


def test_each_kind_of_data_is_recognised(tmp_path: Path, images: Path) -> None:
    assert find_images(images) == ArraysSource(arrays=str(images))
    assert find_images(tmp_path) == ArraysSource(arrays=str(images))
    (tmp_path / "pictures" / "test" / "cat").mkdir(parents=True)
    assert find_images(tmp_path / "pictures") == FolderSource(folder=str(tmp_path / "pictures" / "test"))
    assert find_images(tmp_path / "pictures" / "test") == FolderSource(folder=str(tmp_path / "pictures" / "test"))
    digits = tmp_path / "digits"
    digits.mkdir()
    (digits / "t10k-images-idx3-ubyte.gz").touch()
    found = IdxSource(idx=str(digits / "t10k-images-idx3-ubyte.gz"), labels=str(digits / "t10k-labels-idx1-ubyte.gz"))
    assert find_images(digits) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gates: {max_drop: {top2: 0.1}}\n", r"gates.yaml:1:20: gates.max_drop.top2 is not a known key."),
        ("gates: {speedup: 2}\n", r"gates.yaml:1:9: gates.speedup is not a known key."),
        ("gates: {min: {top1: 1.5}}\n", r"gates.yaml:1:21: gates.min.top1 must be at most 1, got 1.5."),
        ("gates: {max_drop: {top1: 2}}\n",
         r"gates.yaml:1:26: gates.max_drop.top1 must be at most 1, got 2.\nHint: shares are not in percent: 0.01 is"),
        ("gates: {max: {churn: -0.1}}\n", r"gates.yaml:1:22: gates.max.churn must be at least 0, got -0.1."),
        ("batch_size: 65537\n", r"gates.yaml:1:13: batch_size must be at most 65536, got 65537."),
        ("resources: {batch_sizes: [1, 10000000]}\n",
         r"resources.batch_sizes\[1\] must be at most 65536, got 10000000."),
        ("gates: {max_size_mb: -1}\n", r"gates.yaml:1:22: gates.max_size_mb must be above 0, got -1."),
        ("robustness: {noise_levels: [], corruptions: []}\n",
         r"gates.yaml:1:13: robustness must hold noise_levels, corruptions or shifted"),
        ("evaluation: {array: test.npz}\n",
         r"evaluation must hold exactly one of the keys arrays, coco, folder, idx, masks, own, torchvision"),
        ("preprocessing: {std: [0.0]}\n", r"preprocessing.std must be above 0"),
        ("stage: prune\n", r"gates.yaml:1:8: stage must be one of verify, got 'prune'."),
        ("stages: [{stage: verify}]\n", r"gates.yaml:1:1: stages is not a known key."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, images: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigValueError, match=expected):
        load_gates(write(tmp_path, text), images)


def test_all_faults_are_told_at_once(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, "threads: 0\ngates: {max_drop: {top2: 0.1}}\nwarm: 3\n")
    with pytest.raises(ConfigValueError, match=r"threads must be at least 1") as caught:
        load_gates(path, images)
    assert "gates.max_drop.top2 is not a known key" in caught.value.message
    assert "warm is not a known key" in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"the file must hold gates, it is empty\."),
        ("- a\n", r"the file must be a mapping of keys to values"),
        ("gates: {\n", r"the YAML cannot be read"),
        ("gates: {min_speedup: 1, min_speedup: 2}\n", r"gates.min_speedup is given twice"),
    ],
)
def test_broken_yaml_is_told(tmp_path: Path, images: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigSyntaxError, match=expected):
        load_gates(write(tmp_path, text), images)


def test_what_is_missing_is_told(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: the gates file does not exist\."):
        load_gates(tmp_path / "nowhere.yaml", images)
    with pytest.raises(ConfigError, match=r"gates.yaml: evaluation must be given, or --data: a file is verified on"):
        load_gates(write(tmp_path, "threads: 1\n"))
    with pytest.raises(ConfigError, match=r"--data must be given: a file is verified on images and their labels"):
        load_gates(None)


def test_data_that_is_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no images", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--data must be images with labels, '.*text.txt' is nothing of the kind\."):
        find_images(tmp_path / "text.txt")
    with pytest.raises(ConfigError, match=r"--data must be images with labels, '.*nowhere' does not exist\."):
        find_images(tmp_path / "nowhere")


def test_a_distance_is_no_share_and_has_no_upper_bound(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, "task: classification\ngates: {max: {distance: 3}, max_rise: {distance: 2}}\n")
    assert load_gates(path, images).gates.max == {"distance": 3}
