"""What the check of a bundle finds, what it says, and with which exit code it ends."""

import io
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnx
import pytest
import smallrun
from bundles import CPU, Content, described, flipped, linear_model, make_content, sealed, write_folder, write_zip

from compress.bundle import check
from compress.bundle.samples import pack_arrays


@pytest.fixture(scope="module")
def content() -> Content:
    """A whole bundle; not to be changed."""
    return sealed(make_content())


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Check something and return the exit code and what was printed, without what was measured."""

    def call(*arguments: object) -> tuple[int, list[str]]:
        code = check.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert said.err == ""
        return code, re.sub(r"measured \S+ ms here", "measured X ms here", said.out).splitlines()

    return call


Say = Callable[..., tuple[int, list[str]]]


# -- a bundle that is as it should be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_a_whole_bundle_passes(content: Content, tmp_path: Path, say: Say, write: Any) -> None:
    size = sum(map(len, content.values()))
    assert say(write(content, tmp_path / "it")) == (
        0,
        [
            f"pass     integrity  4 files, {size:,} bytes, each as the manifest states",
            "pass     provider   CPUExecutionProvider was asked for and is in use, 1 thread",
            "pass     parity     largest difference 0 (tolerance 0.0001), top-1 the same on 6 of 6",
            "skipped  latency    no promise in milliseconds was made; measured X ms here, 0.5 ms where it was verified "
            "(Imaginary 9000, CPUExecutionProvider, 1 thread)",
            "PASSED: 3 checks made, none failed.",
        ],
    )


def test_a_promise_in_milliseconds_is_held_to(tmp_path: Path, say: Say) -> None:
    path = write_zip(sealed(make_content(max_latency_ms=1e6)), tmp_path / "it.zip")
    code, lines = say(path, "--repeats", 3)
    assert code == 0
    assert lines[3].startswith(
        "pass     latency    median of 3 calls in 3 sittings, at most 1e+06 ms was promised; measured X ms here"
    )
    assert lines[4] == "PASSED: 4 checks made, none failed."


def test_a_promise_that_is_not_kept_fails(tmp_path: Path, say: Say) -> None:
    path = write_zip(sealed(make_content(max_latency_ms=1e-6)), tmp_path / "it.zip")
    code, lines = say(path)
    assert code == 1
    assert lines[3].startswith(
        "fail     latency    median of 50 calls in 6 sittings, at most 1e-06 ms was promised; measured"
    )
    assert lines[4] == "FAILED: latency failed, of 4 checks made."


def test_the_model_is_opened_anew_for_each_sitting_as_it_was_verified(
    content: Content, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    opened: list[dict[str, Any]] = []
    real = onnxruntime.InferenceSession

    def open_session(model: Any, options: Any, **others: Any) -> Any:
        opened.append({"spins": options.get_session_config_entry("session.force_spinning_stop")})
        return real(model, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    assert say(write_zip(content, tmp_path / "it.zip"), "--repeats", 12)[0] == 0
    assert opened == [{"spins": "1"}] * 6


def test_on_a_gpu_no_copy_is_timed(content: Content) -> None:
    """The binding, on the CPU; the outputs are those of a plain call."""
    promises = check.Promises(content["model.json"])
    session = check.open_session(content["model.onnx"], promises, CPU, 1)
    inputs = np.ones((2, 1, 2, 2), np.float32)
    call = check._bound_call(session, promises, "cpu")
    call(inputs)
    call(inputs)
    assert check.timed_call(session, promises, CPU)(inputs).shape == (2, 3)
    asked = []
    binding = type("Session", (), {"io_binding": lambda self: asked.append("bound")})()
    check.timed_call(binding, promises, "CUDAExecutionProvider")
    assert asked == ["bound"]


@pytest.mark.parametrize("cores", [1, 2, None])
def test_threads_are_no_more_than_the_cores_there_are(
    content: Content, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch, cores: int | None
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    measured = json.loads(content["model.json"])["measured"] | {"threads": 65_536}
    here = "2 threads" if cores == 2 else "1 thread"
    code, lines = say(write_zip(sealed(described(content, measured=measured)), tmp_path / "it.zip"))
    assert code == 0
    assert lines[1] == (
        f"pass     provider   CPUExecutionProvider was asked for and is in use, {here}: verified with 65,536, but this "
        "machine has no more cores"
    )
    assert lines[3].endswith(f"(Imaginary 9000, CPUExecutionProvider, 65,536 threads); not comparable, {here} here")


@pytest.mark.parametrize(("cores", "said"), [(1, "1 core"), (4, "4 cores")])
def test_more_threads_than_cores_cannot_be_asked_for(
    content: Content,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    said: str,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    path = write_zip(content, tmp_path / "it.zip")
    with pytest.raises(SystemExit, match="2"):
        check.main([str(path), "--threads", "65536"])
    assert f"--threads must be at most the {said} of this machine, got 65,536" in capsys.readouterr().err
    assert check.main([str(path), "--threads", str(cores)]) == 0


def test_an_outcome_that_cannot_be_written_is_told(
    content: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    path, out = write_zip(content, tmp_path / "it.zip"), tmp_path / "out.json"
    assert check.main([str(path), "--json", str(out)]) == 4
    said = capsys.readouterr()
    assert said.out.endswith("PASSED: 3 checks made, none failed.\n")
    assert said.err == f"'{out}' cannot be written: Permission denied.\n"
    assert check.main([str(path), "--json", str(out), "--max-latency-ms", "1e-6"]) == 1


def test_the_command_line_goes_before_what_was_promised(
    content: Content, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    path = write_zip(content, tmp_path / "it.zip")
    code, lines = say(path, "--max-latency-ms", "1e-6")
    assert (code, "at most 1e-06 ms was asked for; " in lines[3]) == (1, True)
    code, lines = say(path, "--max-latency-ms", "1e6", "--threads", 2, "--tolerance", "0.5", "--provider", CPU)
    assert code == 0
    assert lines[1].endswith("is in use, 2 threads")
    assert "(tolerance 0.5)" in lines[2]


@pytest.mark.parametrize("batch", [1, 2, 4, 9])
def test_a_fixed_batch_is_filled(tmp_path: Path, say: Say, batch: int) -> None:
    content = make_content(batch) if 6 % batch == 0 else make_content()
    signature = json.loads(make_content(2)["model.json"])["signature"]
    signature["inputs"][0]["shape"][0] = batch
    content = described(content | {"model.onnx": linear_model(batch=batch)}, signature=signature)
    code, lines = say(write_zip(sealed(content), tmp_path / "it.zip"))
    assert code == 0
    assert lines[2].endswith("top-1 the same on 6 of 6")


def test_a_model_that_did_not_pass_its_verification_is_named(content: Content, tmp_path: Path, say: Say) -> None:
    verdict = {"passed": False, "checks": [{"name": "max_drop.top1", "status": "fail"}]}
    path = write_zip(sealed(described(content, verdict=verdict)), tmp_path / "it.zip")
    code, lines = say(path)
    assert code == 0
    assert "Warning: this model did not pass its verification: max_drop.top1. It was bundled all the same." in lines


def test_the_outcome_is_written_as_json(content: Content, tmp_path: Path, say: Say) -> None:
    path, out = write_zip(content, tmp_path / "it.zip"), tmp_path / "out.json"
    assert say(path, "--json", out)[0] == 0
    values = json.loads(out.read_text(encoding="utf-8"))
    assert (values["passed"], values["exit_code"]) == (True, 0)
    assert [(one["name"], one["status"]) for one in values["checks"]] == [
        ("integrity", "pass"), ("provider", "pass"), ("parity", "pass"), ("latency", "skipped"),
    ]  # fmt: skip
    assert say(path, "--json", out, "--max-latency-ms", "1e-6")[0] == 1
    values = json.loads(out.read_text(encoding="utf-8"))
    assert (values["passed"], values["exit_code"], values["checks"][3]["limit"]) == (False, 1, 1e-6)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["it.zip", "out.json"]


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_found(content: Content) -> None:
    check.check_integrity(content)
    generator = random.Random(11)
    for name in sorted(content):
        for _ in range(60):
            place, bit = generator.randrange(len(content[name])), generator.randrange(8)
            with pytest.raises(check.Stop, match=r"."):
                check.check_integrity(content | {name: flipped(content[name], place, bit)})


def test_every_bit_of_the_manifest_and_of_the_signature_counts(content: Content) -> None:
    signed = content | {check.SIGNATURE: check.build_signature(bytes(range(64)))}
    check.check_integrity(signed)
    for name in (check.MANIFEST, check.SIGNATURE):
        for place in range(len(signed[name])):
            with pytest.raises(check.Stop, match=r"."):
                check.check_integrity(signed | {name: flipped(signed[name], place, place % 8)})


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_missing_added_and_changed_files_are_all_named(content: Content, tmp_path: Path, say: Say, write: Any) -> None:
    changed = {**content, "model.onnx": linear_model(seed=3), "extra.txt": b""}
    del changed["README.md"]
    digests = [check._sha256(one["model.onnx"])[:16] for one in (content, changed)]
    assert say(write(changed, tmp_path / "it")) == (
        4,
        [
            f"fail     integrity  README.md is missing; extra.txt was added; model.onnx must have sha256 "
            f"{digests[0]}..., got {digests[1]}...",
            "FAILED: integrity failed, of 1 check made.",
        ],
    )


def with_manifest(content: Content, change: Callable[[dict[str, Any]], object]) -> Content:
    """Return content with a changed manifest that is in order otherwise."""
    values = json.loads(content[check.MANIFEST])
    del values["sha256"]
    change(values)
    return content | {check.MANIFEST: check._manifest_text(values)}


MANIFESTS: dict[str, tuple[Callable[[Content], Content], str]] = {
    "gone": (
        lambda c: {k: v for k, v in c.items() if k != "manifest.json"},
        "this is no bundle: it has no manifest.json",
    ),
    "text": (lambda c: c | {"manifest.json": b"text"}, "manifest.json is damaged: it is no JSON"),
    "deep": (lambda c: c | {"manifest.json": b"[" * 10**5}, "manifest.json is damaged: it is no JSON"),
    "list": (lambda c: c | {"manifest.json": b"[]"}, "manifest.json is not that of a bundle, or damaged"),
    "foreign": (lambda c: c | {"manifest.json": b"{}"}, "manifest.json is not that of a bundle, or damaged"),
    "space": (
        lambda c: c | {"manifest.json": c["manifest.json"] + b" "},
        "manifest.json is damaged: its bytes are not those that were written",
    ),
    "newer": (
        lambda c: with_manifest(c, lambda v: v.update(schema=2)),
        "manifest.json has schema 2, this program reads 1: use the check.py beside it",
    ),
    "no files": (
        lambda c: with_manifest(c, lambda v: v.update(files=3)),
        "manifest.json does not list bytes and sha256 of every file",
    ),
    "no digest": (
        lambda c: with_manifest(c, lambda v: v["files"].update(x={"bytes": 1})),
        "manifest.json does not list bytes and sha256 of every file",
    ),
    "another name": (
        lambda c: with_manifest(c, lambda v: v["files"].update({"../x\n": v["files"]["README.md"]})),
        "'../x\\n' is missing",
    ),
    "no model": (
        lambda c: sealed({k: v for k, v in c.items() if k != "model.onnx"}),
        "model.onnx is not in the manifest",
    ),
    "signature": (lambda c: c | {"manifest.sig": b"ed25519"}, "manifest.sig is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MANIFESTS))
def test_a_manifest_that_is_none_is_refused(content: Content, tmp_path: Path, say: Say, case: str) -> None:
    change, message = MANIFESTS[case]
    code, lines = say(write_zip(change(content), tmp_path / "it.zip"))
    assert (code, lines[0]) == (4, f"fail     integrity  {message}")


@pytest.mark.parametrize("data", [b"x", bundles.raw_zip(("../x", b"1"))], ids=["no archive", "a path that leads out"])
def test_nothing_is_unpacked_of_what_is_no_bundle(tmp_path: Path, say: Say, data: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "it.zip").write_bytes(data)
    assert say(tmp_path / "in" / "it.zip")[0] == 4
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "it.zip"]


def test_a_folder_holds_plain_files_only(content: Content, tmp_path: Path, say: Say) -> None:
    folder = write_folder(content, tmp_path / "it")
    (folder / "inside").mkdir()
    message = f"fail     integrity  '{folder}' holds 'inside', which is no file of a bundle"
    assert say(folder) == (4, [message, "FAILED: integrity failed, of 1 check made."])
    (folder / "inside").rmdir()
    (folder / "README.md").unlink()
    (tmp_path / "other.md").write_bytes(content["README.md"])
    (folder / "README.md").symlink_to(tmp_path / "other.md")
    code, lines = say(folder)
    assert code == 4
    assert lines[0].endswith("holds 'README.md', which is no file of a bundle")
    (folder / "README.md").unlink()
    (folder / "read\nme").write_bytes(b"")
    code, lines = say(folder)
    assert code == 4
    assert lines[0].endswith("holds 'read\\nme', which is no file of a bundle")


def test_a_folder_of_many_files_is_no_bundle(content: Content, tmp_path: Path, say: Say) -> None:
    folder = write_folder(content | {f"x{i}": b"" for i in range(60)}, tmp_path / "it")
    code, lines = say(folder)
    assert (code, lines[0]) == (4, f"fail     integrity  '{folder}' holds 65 files, a bundle has at most 64")


def test_what_is_not_there_or_no_bundle_is_told(tmp_path: Path, say: Say) -> None:
    code, lines = say(tmp_path / "nowhere")
    assert (code, lines[0]) == (4, f"fail     integrity  '{tmp_path / 'nowhere'}' does not exist")
    code, lines = say(tmp_path)
    assert (code, lines[0]) == (4, f"fail     integrity  '{tmp_path}' is no bundle: it has no manifest.json")
    code, lines = say("/dev/null")
    assert (code, lines[0]) == (4, "fail     integrity  '/dev/null' is neither a folder nor a file")


# -- a whole bundle of something else ---------------------------------------------------------------------------------


def test_another_model_fails_parity(content: Content, tmp_path: Path, say: Say) -> None:
    other = sealed(content | {"model.onnx": linear_model(seed=3)})
    code, lines = say(write_zip(other, tmp_path / "it.zip"))
    assert code == 1
    assert re.fullmatch(
        r"fail     parity     largest difference [1-9]\S* \(tolerance 0.0001\), top-1 the same on [0-5] of 6", lines[2]
    )
    assert lines[-1] == "FAILED: parity failed, of 3 checks made."


def test_another_class_fails_parity_however_small_the_difference(content: Content, tmp_path: Path, say: Say) -> None:
    arrays = check.read_samples(content["samples.npz"])
    expected = arrays["expected"].copy()
    expected[0] = np.roll(expected[0], 1)
    other = sealed(content | {"samples.npz": pack_arrays(arrays | {"expected": expected})})
    code, lines = say(write_zip(other, tmp_path / "it.zip"), "--tolerance", 100)
    assert code == 1
    assert lines[2].endswith("(tolerance 100), top-1 the same on 5 of 6")


def with_one_class_changed(content: Content) -> Content:
    """Return content that expects another class for the first of the six images."""
    arrays = check.read_samples(content["samples.npz"])
    expected = arrays["expected"].copy()
    expected[0] = np.roll(expected[0], 1)
    return sealed(content | {"samples.npz": pack_arrays(arrays | {"expected": expected})})


@pytest.mark.parametrize(("share", "code"), [(0.8, 0), (5 / 6, 0), (0.9, 1), (1.0, 1), (None, 1)])
def test_as_many_classes_as_promised_must_be_the_same(tmp_path: Path, say: Say, share: float | None, code: int) -> None:
    promised = {} if share is None else {"min_agreement": share}
    content = with_one_class_changed(make_content(tolerance=100, **promised))
    found, lines = say(write_zip(content, tmp_path / "it.zip"))
    said = "" if share in (None, 1.0) else f" (at least {100 * share:g} % must be)"
    assert (found, lines[2].endswith(f"(tolerance 100), top-1 the same on 5 of 6{said}")) == (code, True)


def test_nan_is_within_no_tolerance() -> None:
    samples = {"inputs": np.zeros((2, 1), np.float32), "expected": np.zeros((2, 3), np.float32)}
    is_same, told, difference = check.check_parity(lambda _: np.full((2, 3), np.nan), samples, None, 1e9)
    assert not is_same
    assert math.isnan(difference)
    assert told.startswith("largest difference nan")


def test_outputs_of_another_shape_fail(content: Content, tmp_path: Path, say: Say) -> None:
    arrays = check.read_samples(content["samples.npz"])
    other = content | {"samples.npz": pack_arrays(arrays | {"expected": arrays["expected"][:, :2]})}
    code, lines = say(write_zip(sealed(other), tmp_path / "it.zip"))
    assert (code, lines[2]) == (1, "fail     parity     outputs must have shape (6, 2), got (6, 3)")


def test_inputs_that_do_not_fit_the_model_fail(content: Content, tmp_path: Path, say: Say) -> None:
    arrays = check.read_samples(content["samples.npz"])
    other = content | {"samples.npz": pack_arrays(arrays | {"inputs": arrays["inputs"].astype(np.float64)})}
    code, lines = say(write_zip(sealed(other), tmp_path / "it.zip"))
    assert code == 1
    assert lines[2].startswith("fail     parity     model.onnx must run on its samples, ONNX Runtime says: ")


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "a/b", "..\\x", "C:\\x", "model.onnx.data"])
def test_a_model_that_reads_other_files_is_not_opened(
    content: Content, tmp_path: Path, say: Say, location: str
) -> None:
    other = sealed(content | {"model.onnx": linear_model(location=location)})
    code, lines = say(write_zip(other, tmp_path / "it.zip"))
    message = f"model.onnx keeps weights in {location!a}, which is no file of the bundle: it was not opened"
    assert (code, lines[1]) == (4, f"fail     integrity  {message}")


def test_weights_in_a_file_of_the_bundle_are_read(content: Content, tmp_path: Path, say: Say) -> None:
    model = linear_model(location="model.onnx.data")
    whole = sealed(content | {"model.onnx": model, "model.onnx.data": bundles.linear_weights()})
    assert say(write_zip(whole, tmp_path / "it.zip"))[0] == 0
    assert say(write_folder(whole, tmp_path / "it"))[0] == 0
    wrong = sealed(whole | {"model.onnx.data": bundles.linear_weights(seed=4)})
    assert say(write_zip(wrong, tmp_path / "it.zip"))[0] == 1


def test_names_of_files_are_found_wherever_a_model_keeps_tensors() -> None:
    def outside(place: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(data_type=1, dims=[1], name=place, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="offset", value="0")
        tensor.external_data.add(key="location", value=place)
        return tensor

    inner = onnx.GraphProto(initializer=[outside("inner")])
    value = onnx.helper.make_attribute("value", outside("constant"))
    values = onnx.AttributeProto(name="values", type=onnx.AttributeProto.TENSORS, tensors=[outside("several")])
    sparse = onnx.SparseTensorProto(values=outside("sparse"), indices=outside("indices"))
    node = onnx.NodeProto(op_type="If", attribute=[onnx.helper.make_attribute("then", inner), value, values])
    function = onnx.FunctionProto(
        name="f", node=[onnx.NodeProto(attribute=[onnx.helper.make_attribute("v", outside("f"))])]
    )
    graph = onnx.GraphProto(node=[node], initializer=[outside("plain")], sparse_initializer=[sparse])
    training = onnx.TrainingInfoProto(algorithm=onnx.GraphProto(initializer=[outside("training")]))
    model = onnx.ModelProto(graph=graph, functions=[function], training_info=[training])
    names = {"inner", "constant", "several", "sparse", "indices", "f", "plain", "training"}
    assert check.external_names(model.SerializeToString()) == names


def test_a_model_whose_graphs_lie_too_deep_is_refused() -> None:
    data = b""
    for _ in range(150):  # field 1 of a graph is a node, 5 of it an attribute, 6 of that a graph
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size, length = len(data), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            data = tag + length + bytes([size]) + data
    with pytest.raises(ValueError, match="its graphs lie in each other too deep"):
        check._entries(memoryview(data), "graph", 0).__next__()


FOREIGN = {
    "text": (b"no model at all", "integrity  model.onnx is no ONNX model: "),
    "nothing": (b"", "provider   model.onnx must be a model that ONNX Runtime can open: "),
    "names": (linear_model(name="pixels"), "provider   model.onnx must have the input 'images', it has pixels"),
    "cut": (linear_model()[:-20], "integrity  model.onnx is no ONNX model: a field is longer than its message"),
}


@pytest.mark.parametrize("case", list(FOREIGN))
def test_a_foreign_model_is_refused(content: Content, tmp_path: Path, say: Say, case: str) -> None:
    data, message = FOREIGN[case]
    code, lines = say(write_zip(sealed(content | {"model.onnx": data}), tmp_path / "it.zip"))
    assert code == 4
    assert lines[1].startswith(f"fail     {message}")
    assert len(lines) == 3


def npy_header(dtype: str, count: int) -> bytes:
    """Return the head of an array file, whatever follows it."""
    line = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({count},)}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


def archived(data: bytes) -> Callable[[dict[str, Any]], bytes]:
    return lambda arrays: check.build_archive({"x.npy": data})


NO_ARRAY = "samples.npz holds 'x.npy', which is no array of numbers: "
NO_FIT = f"{NO_ARRAY}ValueError('its header does not fit its content')"
SAMPLES: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "no archive": (lambda a: b"text", "samples.npz is no zip archive"),
    "no array": (archived(b"text"), NO_ARRAY),
    "objects": (archived(npy_header("|O", 1) + b"8" * 8), NO_FIT),
    "larger than it is": (archived(npy_header("<f4", 10**12) + b"8" * 8), NO_FIT),
    "no inputs": (
        lambda a: pack_arrays({"expected": a["expected"]}),
        "samples.npz must hold an array 'inputs' with a batch axis",
    ),
    "no images": (
        lambda a: pack_arrays(a | {"inputs": a["inputs"][:0]}),
        "samples.npz must hold an array 'inputs' with a batch axis",
    ),
    "fewer": (
        lambda a: pack_arrays(a | {"inputs": a["inputs"][:3]}),
        "samples.npz must hold as many outputs as inputs",
    ),
}


@pytest.mark.parametrize("case", list(SAMPLES))
def test_samples_that_are_none_are_refused(content: Content, tmp_path: Path, say: Say, case: str) -> None:
    change, message = SAMPLES[case]
    arrays = check.read_samples(content["samples.npz"])
    code, lines = say(write_zip(sealed(content | {"samples.npz": change(arrays)}), tmp_path / "it.zip"))
    assert code == 4
    assert lines[1].startswith(f"fail     integrity  {message}")


DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "schema": ({"schema": 2}, "model.json must have schema 1, got 2"),
    "no promises": ({"promises": {}}, "model.json lacks a value, or has one of another kind: KeyError('tolerance')"),
    "two inputs": (
        {"signature": {"inputs": [1, 2], "outputs": [3]}},
        "model.json lacks a value, or has one of another",
    ),
    "a negative promise": (
        {"promises": {"tolerance": -1, "max_latency_ms": None}},
        "model.json lacks a value, or has one of another kind: TypeError('-1 is no number of at least 0')",
    ),
    "more than all": (
        {"promises": {"tolerance": 1, "min_agreement": 1.5, "max_latency_ms": None}},
        "model.json lacks a value, or has one of another kind: TypeError('1.5 is no share')",
    ),
    "a list": ({"verdict": []}, "model.json lacks a value, or has one of another kind: "),
}


@pytest.mark.parametrize("case", list(DESCRIPTIONS))
def test_a_description_that_is_none_is_refused(content: Content, tmp_path: Path, say: Say, case: str) -> None:
    change, message = DESCRIPTIONS[case]
    code, lines = say(write_zip(sealed(described(content, **change)), tmp_path / "it.zip"))
    assert code == 4
    assert lines[1].startswith(f"fail     integrity  {message}")


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 10**5])
def test_a_description_that_is_no_object_is_refused(content: Content, tmp_path: Path, say: Say, data: bytes) -> None:
    code, lines = say(write_zip(sealed(content | {"model.json": data}), tmp_path / "it.zip"))
    assert code == 4
    assert lines[1].startswith("fail     integrity  model.json lacks a value, or has one of another kind: ")


# -- what is not there ------------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_there_is_told(content: Content, tmp_path: Path, say: Say) -> None:
    code, lines = say(write_zip(content, tmp_path / "it.zip"), "--provider", "NoExecutionProvider")
    assert code == 5
    assert re.fullmatch(
        r"fail     provider   NoExecutionProvider was asked for, but onnxruntime \S+ offers .*CPUExecution\w+ here",
        lines[1],
    )


class _FallenBack:
    """A session of ONNX Runtime that has taken another provider in silence."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def get_providers(self) -> list[str]:
        return [CPU]


def test_a_provider_that_is_not_in_use_is_told(
    content: Content, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CoreMLExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", _FallenBack)
    code, lines = say(write_zip(content, tmp_path / "it.zip"), "--provider", "CoreMLExecutionProvider")
    message = "CoreMLExecutionProvider was asked for, ONNX Runtime fell back to CPUExecutionProvider"
    assert (code, lines[1]) == (5, f"fail     provider   {message}")


@pytest.mark.parametrize(
    ("package", "arguments", "line"),
    [
        ("onnxruntime", [], "fail     provider   onnxruntime is not installed: pip install onnxruntime"),
        ("numpy", [], "fail     provider   numpy is not installed: pip install numpy"),
        (
            "cryptography",
            ["--public-key", "key.pem"],
            "fail     signature  --public-key needs the package cryptography, which is not installed: "
            "pip install 'cryptography>=43'",
        ),
    ],
)
def test_a_package_that_is_not_there_is_told(
    content: Content, tmp_path: Path, package: str, arguments: list[str], line: str
) -> None:
    path = write_zip(content, tmp_path / "it.zip")
    code = (
        f"import sys; sys.modules['{package}'] = None; sys.argv = ['check.py', {str(path)!r}, *{arguments!r}]\n"
        f"import runpy; runpy.run_path({check.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout.splitlines()[1] == line


# -- outputs that were computed elsewhere -----------------------------------------------------------------------------


def computed(content: Content) -> np.ndarray:
    """Return the outputs that a bundle expects."""
    with np.load(io.BytesIO(content["samples.npz"])) as arrays:
        return np.array(arrays["expected"])


def test_outputs_of_another_runtime_are_judged_with_numpy_alone(content: Content, tmp_path: Path) -> None:
    path, mine = write_zip(content, tmp_path / "it.zip"), tmp_path / "mine.npy"
    np.save(mine, computed(content) + np.float32(5e-5))
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        f"sys.argv = ['check.py', {str(path)!r}, '--outputs', {str(mine)!r}]\n"
        f"import runpy; runpy.run_path({check.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1] == "skipped  provider   the outputs were computed elsewhere, they are those in 'mine.npy'"
    pattern = r"pass     parity     largest difference \S+e-05 \(tolerance 0\.0001\), top-1 the same on 6 of 6"
    assert re.fullmatch(pattern, lines[2]), lines[2]
    assert lines[3:] == [
        "skipped  latency    nothing was timed: the outputs were computed elsewhere",
        "PASSED: 2 checks made, none failed.",
    ]


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_outputs_of_all_samples_are_judged_whatever_the_batch_of_the_file(tmp_path: Path, say: Say, batch: int) -> None:
    content = make_content(batch) if 6 % batch == 0 else make_content()
    signature = json.loads(make_content(2)["model.json"])["signature"]
    signature["inputs"][0]["shape"][0] = batch
    path, mine = write_zip(sealed(described(content, signature=signature)), tmp_path / "it.zip"), tmp_path / "mine.npz"
    outputs = computed(content)
    np.savez(mine, logits=outputs, other=[1])
    assert say(path, "--outputs", mine)[0] == 0
    outputs[-1] += 0.01
    np.savez(mine, logits=outputs)
    code, lines = say(path, "--outputs", mine)
    assert (code, lines[2].split()[:2]) == (1, ["fail", "parity"])
    assert say(path, "--outputs", mine, "--tolerance", 0.1)[0] == 0


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


GIVEN: dict[str, tuple[Callable[[np.ndarray], Any], int, str]] = {
    "rows": (lambda right: right[:5], 1, "output 'logits' must have 6 rows, its shape is (5, 3)"),
    "no_axis": (lambda right: np.float32(1), 1, "output 'logits' must have 6 rows, its shape is ()"),
    "shape": (lambda right: right[:, :2], 1, "outputs must have shape (6, 3), got (6, 2)"),
    "nan": (lambda right: right * np.nan, 1, "largest difference nan (tolerance 0.0001), top-1 the same on"),
    "text": (lambda right: right.astype(str), 1, "output 'logits' must be numbers, it is <U"),
    "pickle": (lambda right: np.array([Evil()] * 6), 4, "must be a .npy or .npz file without pickles: "),
}


@pytest.mark.parametrize("case", list(GIVEN))
def test_outputs_that_are_wrong_are_named(content: Content, tmp_path: Path, say: Say, case: str) -> None:
    change, code, message = GIVEN[case]
    np.save(tmp_path / "mine.npy", change(computed(content)), allow_pickle=True)
    found, lines = say(write_zip(content, tmp_path / "it.zip"), "--outputs", tmp_path / "mine.npy")
    assert found == code
    (line,) = (line for line in lines if line.startswith("fail"))
    assert message in line
    assert not any("executed" in line for line in lines)


def test_a_file_of_outputs_that_is_none_is_named(content: Content, tmp_path: Path, say: Say) -> None:
    path = write_zip(content, tmp_path / "it.zip")
    (tmp_path / "mine.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez(tmp_path / "others.npz", scores=computed(content))
    for name, message in (
        ("missing.npy", "must be a .npy or .npz file without pickles: 'No such file or directory'"),
        ("mine.npz", "must be a .npy or .npz file without pickles: "),
        ("others.npz", "must hold 'logits', it holds 'scores'"),
    ):
        code, lines = say(path, "--outputs", tmp_path / name)
        assert code == 4
        assert lines[1].startswith("fail     parity ")
        assert message in lines[1]


def test_outputs_exclude_what_is_only_for_a_model_that_runs(
    content: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--provider", CPU), ("--threads", 1), ("--max-latency-ms", 5)):
        with pytest.raises(SystemExit, match="2"):
            check.main([str(tmp_path), "--outputs", "mine.npy", option, str(value)])
        assert f"--outputs and {option} exclude each other" in capsys.readouterr().err


# -- signatures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys of several kinds."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    folder = tmp_path_factory.mktemp("keys")
    made = {"own": ed25519.Ed25519PrivateKey.generate(), "other": ed25519.Ed25519PrivateKey.generate(),
            "curve": ec.generate_private_key(ec.SECP256R1())}  # fmt: skip
    for name, key in made.items():
        plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.pem").write_bytes(plain)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    locked = made["own"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "locked.pem").write_bytes(locked)
    (folder / "text.pem").write_text("no key", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def signed(content: Content, keys: Path) -> Content:
    from compress.bundle.signing import sign

    return content | {check.SIGNATURE: check.build_signature(sign(content[check.MANIFEST], keys / "own.pem"))}


def test_a_signed_bundle_is_known_by_its_key(signed: Content, keys: Path, tmp_path: Path, say: Say) -> None:
    path = write_zip(signed, tmp_path / "it.zip")
    code, lines = say(path, "--public-key", keys / "own.pub")
    assert code == 0
    assert re.fullmatch(
        rf"pass     signature  signed with the key of '{keys}/own\.pub', sha256 \w{{16}}\.\.\.", lines[1]
    )
    assert say(path)[0] == 0


def test_another_key_or_no_signature_fails_and_nothing_is_run(
    content: Content, signed: Content, keys: Path, tmp_path: Path, say: Say
) -> None:
    path = write_zip(signed, tmp_path / "it.zip")
    message = f"fail     signature  the bundle must be signed with the key of '{keys / 'other.pub'}', it is not"
    code, lines = say(path, "--public-key", keys / "other.pub")
    assert (code, lines[1:]) == (1, [message, "FAILED: signature failed, of 2 checks made."])
    code, lines = say(write_zip(content, path), "--public-key", keys / "own.pub")
    assert (code, lines[1]) == (1, "fail     signature  the bundle must be signed, it has no manifest.sig")


def test_content_sealed_anew_does_not_fit_the_signature(signed: Content, keys: Path, tmp_path: Path, say: Say) -> None:
    forged = sealed(signed | {"README.md": b"# Another\n"})
    path = write_zip(forged, tmp_path / "it.zip")
    assert say(path)[0] == 0
    assert say(path, "--public-key", keys / "own.pub")[0] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.pub", "public key '{}' cannot be read: No such file or directory"),
        ("text.pem", "'{}' must hold a public key in PEM form; openssl pkey -in KEY.pem -pubout makes one"),
        ("own.pem", "'{}' must hold a public key in PEM form; openssl pkey -in KEY.pem -pubout makes one"),
        ("curve.pub", "'{}' must hold an Ed25519 public key, it is a key of {kind}"),
    ],
)
def test_a_public_key_that_is_none_is_refused(
    signed: Content, keys: Path, tmp_path: Path, say: Say, name: str, message: str
) -> None:
    code, lines = say(write_zip(signed, tmp_path / "it.zip"), "--public-key", keys / name)
    assert code == 4
    wanted = re.escape(message.format(keys / name, kind="KIND")).replace("KIND", "(EllipticCurve|EC)")
    assert re.fullmatch(f"fail     signature  {wanted}", lines[1])


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "argument --threads: must be a whole number from 1 to 65536, got '0'"),
        (["--threads", "two"], "argument --threads: must be a whole number from 1 to 65536, got 'two'"),
        (["--repeats", "-1"], "argument --repeats: must be a whole number from 1 to 65536, got '-1'"),
        (["--max-latency-ms", "0"], "argument --max-latency-ms: must be a number above 0, got '0'"),
        (["--max-latency-ms", "nan"], "argument --max-latency-ms: must be a number above 0, got 'nan'"),
        (["--tolerance", "inf"], "argument --tolerance: must be a number above 0, got 'inf'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (
            ["--json", "nowhere/out.json"],
            "--json must be a file to write, 'nowhere/out.json' is in a folder that does not",
        ),
        (["--json", "."], "--json must be a file to write, '.' is a folder"),
    ],
)
def test_a_wrong_command_line_is_refused(
    content: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = write_zip(content, tmp_path / "it.zip")
    with pytest.raises(SystemExit, match="2"):
        check.main([str(path), *arguments])
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err


def test_the_outcome_is_not_written_into_the_bundle(
    content: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = write_folder(content, tmp_path / "it"), write_zip(content, tmp_path / "it.zip")
    for bundle, out in ((folder, folder / "out.json"), (path, path)):
        with pytest.raises(SystemExit, match="2"):
            check.main([str(bundle), "--json", str(out)])
        assert f"--json must lie outside of the bundle, which '{out}' would change" in capsys.readouterr().err
    assert check.main([str(folder)]) == check.main([str(path)]) == 0


def test_a_fault_of_the_program_itself_is_a_sentence(
    content: Content, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "Promises", lambda _: 1 / 0)
    code, lines = say(write_zip(content, tmp_path / "it.zip"))
    assert code == 70
    assert lines[1].startswith("fail     program    a fault of check.py itself, please report it: ZeroDivisionError")


def test_the_command_checks_without_torch(content: Content, tmp_path: Path) -> None:
    path = write_zip(content, tmp_path / "it.zip")
    code = (
        "import sys\nfrom compress.cli.commands import app\n"
        "try:\n"
        f"    app(['check', {str(path)!r}, '--repeats', '2'])\n"
        "finally:\n"
        "    assert not {'torch', 'onnx'} & set(sys.modules)\n"
    )
    process = smallrun.start(code=code)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "PASSED: 3 checks made, none failed." in out


def test_the_command_ends_with_the_exit_code_of_the_check(content: Content, tmp_path: Path) -> None:
    path = write_zip(content, tmp_path / "it.zip")
    done = smallrun.call("check", str(path), "--max-latency-ms", "1e-6", "--json", str(tmp_path / "out.json"))
    assert (done.exit_code, "FAILED: latency failed" in done.stdout) == (1, True)
    assert (tmp_path / "out.json").is_file()
    assert smallrun.call("check", str(tmp_path / "nowhere.zip")).exit_code == 4
    assert smallrun.call("check", str(path), "--provider", "None").exit_code == 5
    assert smallrun.call("check").exit_code == 2
    shown = smallrun.call("check", "--help")
    assert (shown.exit_code, "usage: compress check" in shown.stdout, "--public-key" in shown.stdout) == (0, True, True)


# -- by itself --------------------------------------------------------------------------------------------------------


def test_a_file_that_was_added_is_not_imported(content: Content, tmp_path: Path) -> None:
    whole = sealed(content | {"check.py": Path(check.__file__).read_bytes()})
    folder = write_folder(whole, tmp_path / "it")
    for name in ("json", "numpy", "zlib", "onnxruntime"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    done = subprocess.run([sys.executable, folder / "check.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, "")
    assert "json.py was added; numpy.py was added; onnxruntime.py was added; zlib.py was added" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback(content: Content, tmp_path: Path) -> None:
    path = write_zip(content, tmp_path / "it.zip")
    command = f'"{sys.executable}" -u "{check.__file__}" "{path}" | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
