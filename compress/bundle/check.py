"""Self-check of a deployment bundle; needs numpy and onnxruntime only.

    python check.py [FOLDER or model.zip]        in the bundle itself, or anywhere
    python check.py --outputs mine.npz           outputs that another runtime has computed for the samples
    compress check model.zip                     the same code

Each check prints a line: pass, fail or skipped. Nothing of a bundle is looked into, let alone run, before all of its
bytes are known to be those that were written.

    integrity   every file is there with the sha256 that the manifest states, and no other file; the manifest and a
                .zip are, byte for byte, what would be written for this content
    signature   with --public-key: the manifest was signed with the private half of that key
    provider    ONNX Runtime computes on the execution provider asked for and has not fallen back to another
    parity      the outputs on real images are those that were recorded, and a classifier's classes, as many as promised
    latency     the median latency keeps the promise in milliseconds; the model is opened anew up to six times

With --outputs only numpy is needed: integrity, signature and parity are checked, of a .npy file with the one output of
the model or a .npz file with an array for each, named as in model.json, for `inputs` of samples.npz in their order.

    exit code   0 all checks that could be made passed      1 a check failed         2 the command line is wrong
                4 no bundle, damaged or unreadable, and the model was not run; or --json could not be written
                5 provider, onnxruntime or another package is missing

One file, and longer than others of its project, because a bundle carries it to machines that have nothing else of it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    sys.path.pop(0)  # the bundle's own folder: a file added to it must not pass for a module before it was found

import argparse
import gc
import hashlib
import io
import json
import math
import os
import platform
import re
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

KIND, RUNTIME, CLASSIFICATION = "compress bundle", "onnxruntime", "classification"
SCHEMA = 1
MODEL, DESCRIPTION, SAMPLES = "model.onnx", "model.json", "samples.npz"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
PASSED, FAILED, USAGE, DAMAGED, UNAVAILABLE, BUG, INTERRUPTED = 0, 1, 2, 4, 5, 70, 130
MAX_FILES, MAX_BYTES, MAX_COUNT = 64, 2**31 - 1, 2**16

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIGNATURE_FORM = re.compile(rb"(ed25519 ([0-9a-f]{128})\n)sha256 ([0-9a-f]{64})\n")
_WARMUP, _REPEATS = 10, 50


class Stop(Exception):
    """A check cannot pass, and nothing after it can be made.

    Args:
        check: Its name.
        detail: What must hold, and what was got.
        exit_code: What the program ends with.
    """

    def __init__(self, check: str, detail: str, exit_code: int) -> None:
        super().__init__(detail)
        self.check, self.detail, self.exit_code = check, detail, exit_code


def damaged(detail: str) -> Stop:
    """Return the end of a bundle that is not whole, or none."""
    return Stop("integrity", detail, DAMAGED)


# -- archives: stored, in one fixed form ------------------------------------------------------------------------------

_DATE = (1980, 1, 1, 0, 0, 0)  # the first that an archive can state
_REGULAR_FILE = (stat.S_IFREG | 0o644) << 16
_UNIX = 3
_END = b"PK\x05\x06"  # of the last 22 bytes, which follow the directory
_WIDE_END = b"PK\x06\x07"  # of the 20 bytes before them in archives beyond 4 GiB
_ENTRY_BYTES = 46 + 100  # of the directory for one file: the fixed part and the longest name


def build_archive(files: Mapping[str, bytes]) -> bytes:
    """Return the one archive of some files: sorted, not compressed, no dates, the same on every machine.

    Args:
        files: Name -> content; together less than 2 GiB.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = _UNIX, _REGULAR_FILE
            archive.writestr(entry, files[name])
    return stream.getvalue()


def read_archive(data: bytes, what: str) -> dict[str, bytes]:
    """Return name -> content of an archive that `build_archive` would write, and of no other.

    Args:
        data: The archive.
        what: Its name, for messages.

    Raises:
        Stop: It is no archive, another one, or damaged anywhere.
    """
    _require_directory(data, what)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = _read_entries(archive, what, len(data))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise damaged(f"{what} is damaged: {error}") from error
    written = build_archive(files)
    if written != data:
        same = next((i for i in range(min(len(written), len(data))) if written[i] != data[i]), len(written))
        raise damaged(f"{what} is damaged, or was not written by compress: byte {same} is another one")
    return files


def _require_directory(data: bytes, what: str) -> None:
    """Refuse an archive without a directory of a bundle's size at its very end."""
    if data[-22:-18] != _END or data[-2:] != b"\0\0":
        if not data.startswith(b"PK") and _END not in data:
            raise damaged(f"{what} is no zip archive")
        raise damaged(f"{what} does not end with its directory: it was cut off, changed, or has data after it")
    if int.from_bytes(data[-10:-6], "little") > MAX_FILES * _ENTRY_BYTES or data[-42:-38] == _WIDE_END:
        raise damaged(f"{what} has a larger directory than the {MAX_FILES} files of a bundle need")


def _read_entries(archive: zipfile.ZipFile, what: str, most: int) -> dict[str, bytes]:
    """Return name -> content of an archive of at most `most` bytes that holds plain, stored files only."""
    names: set[str] = set()
    entries, total = archive.infolist(), 0
    if len(entries) > MAX_FILES:
        raise damaged(f"{what} lists {len(entries)} files, a bundle has at most {MAX_FILES}")
    for entry in entries:
        name, total = entry.orig_filename, total + entry.file_size
        if not _is_plain(name):
            raise damaged(f"{what} holds {name!a}, which is no plain file name: nothing was unpacked")
        if name in names:
            raise damaged(f"{what} holds '{name}' twice")
        names.add(name)
        if entry.flag_bits & 1:
            raise damaged(f"{what} holds '{name}' encrypted, a bundle is not")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise damaged(f"{what} holds '{name}' as a link, a bundle has files only")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise damaged(f"{what} holds '{name}' compressed, a bundle does not: nothing was unpacked")
        if entry.compress_size != entry.file_size or total > most:  # files may not lie over each other
            raise damaged(f"{what} states {entry.file_size} bytes for '{name}', which it does not hold")
    return {entry.orig_filename: archive.read(entry) for entry in entries}


def _is_plain(name: str) -> bool:
    """Return whether a name can neither lead out of a folder nor be another file on another system."""
    return _PLAIN_NAME.fullmatch(name) is not None and not name.endswith(".")


# -- content: read once, then only these bytes are used ---------------------------------------------------------------


def read_content(path: Path) -> dict[str, bytes]:
    """Return name -> content of a bundle, a folder or a .zip.

    Raises:
        Stop: It is missing or unreadable, or could not be a bundle.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise damaged(f"'{path}' does not exist")
        if not path.is_file():
            raise damaged(f"'{path}' is neither a folder nor a file")
        _require_size(path.stat().st_size, path)
        return read_archive(path.read_bytes(), f"'{path.name}'")
    except OSError as error:
        raise damaged(f"'{error.filename or path}' cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise damaged(f"'{path}' does not fit into this machine's memory") from error


def _read_folder(folder: Path) -> dict[str, bytes]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if MANIFEST not in {entry.name for entry in entries}:
        raise damaged(f"'{folder}' is no bundle: it has no {MANIFEST}")
    if len(entries) > MAX_FILES:
        raise damaged(f"'{folder}' holds {len(entries)} files, a bundle has at most {MAX_FILES}")
    total = 0
    for entry in entries:
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False) or not _is_plain(entry.name):
            raise damaged(f"'{folder}' holds {entry.name!a}, which is no file of a bundle")
        total += entry.stat(follow_symlinks=False).st_size
    _require_size(total, folder)
    return {entry.name: Path(entry.path).read_bytes() for entry in entries}


def _require_size(count: int, path: Path) -> None:
    if count > MAX_BYTES:
        raise damaged(f"'{path}' has {count:,} bytes, a bundle has at most {MAX_BYTES:,}: nothing was read")


# -- integrity --------------------------------------------------------------------------------------------------------


def build_manifest(files: Mapping[str, bytes]) -> bytes:
    """Return the manifest of some files, in its one form; its last line but one is the digest of the rest."""
    listed = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    return _manifest_text({"files": listed, "kind": KIND, "schema": SCHEMA})


def _manifest_text(values: Mapping[str, Any]) -> bytes:
    digest = _sha256(_canonical(values))
    return _canonical({**values, "sha256": digest})


def _canonical(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def build_signature(signature: bytes) -> bytes:
    """Return the content of `manifest.sig`: the signature of the manifest's bytes, and a digest of that line."""
    line = b"ed25519 " + signature.hex().encode("ascii") + b"\n"
    return line + b"sha256 " + _sha256(line).encode("ascii") + b"\n"


def check_integrity(content: Mapping[str, bytes]) -> str:
    """Compare every file with the manifest; return what was compared.

    Raises:
        Stop: Something is missing, added or changed; all of it is named.
    """
    if MANIFEST not in content:
        raise damaged(f"this is no bundle: it has no {MANIFEST}")
    listed = _read_manifest(content[MANIFEST])
    found = set(content) - {MANIFEST, SIGNATURE}
    wrong = [f"{_text(name)} is missing" for name in sorted(set(listed) - found)]
    wrong += [f"{name} was added" for name in sorted(found - set(listed))]
    for name in sorted(found & set(listed)):
        digest = _sha256(content[name])
        if digest != listed[name]["sha256"] or len(content[name]) != listed[name]["bytes"]:
            wrong.append(f"{name} must have sha256 {listed[name]['sha256'][:16]}..., got {digest[:16]}...")
    if SIGNATURE in content and not _read_signature(content[SIGNATURE]):
        wrong.append(f"{SIGNATURE} is damaged")
    wrong += [f"{name} is not in the manifest" for name in (MODEL, DESCRIPTION, SAMPLES) if name not in listed]
    if wrong:
        raise damaged("; ".join(wrong))
    return f"{len(listed)} files, {sum(map(len, content.values())):,} bytes, each as the manifest states"


def _read_manifest(data: bytes) -> dict[str, dict[str, Any]]:
    """Return name -> bytes and sha256 of a manifest that is exactly as it would be written."""
    try:
        values = json.loads(data.decode("ascii"))
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise damaged(f"{MANIFEST} is not that of a bundle, or damaged")
        schema = values.get("schema")
        if _manifest_text({key: value for key, value in values.items() if key != "sha256"}) != data:
            raise damaged(f"{MANIFEST} is damaged: its bytes are not those that were written")
    except (ValueError, RecursionError) as error:
        raise damaged(f"{MANIFEST} is damaged: it is no JSON") from error
    if schema != SCHEMA:
        raise damaged(f"{MANIFEST} has schema {schema!a}, this program reads {SCHEMA}: use the check.py beside it")
    files: Any = values.get("files")
    well_formed = isinstance(files, dict) and all(
        isinstance(one, dict) and type(one.get("bytes")) is int and isinstance(one.get("sha256"), str)
        for one in files.values()
    )
    if not well_formed:
        raise damaged(f"{MANIFEST} does not list bytes and sha256 of every file")
    listed: dict[str, dict[str, Any]] = files
    return listed


def _read_signature(data: bytes) -> bytes | None:
    """Return the signature in `manifest.sig`; None when the file was changed."""
    parts = _SIGNATURE_FORM.fullmatch(data)
    if parts is None or _sha256(parts[1]).encode("ascii") != parts[3]:
        return None
    return bytes.fromhex(parts[2].decode("ascii"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_signature(content: Mapping[str, bytes], key_file: Path) -> str:
    """Verify the manifest's signature; return whose it is.

    Raises:
        Stop: It is missing or another key's, the key cannot be used, or the package `cryptography` is missing.
    """
    key, fingerprint = _load_public_key(key_file)
    signature = _read_signature(content.get(SIGNATURE, b""))
    if signature is None:
        raise Stop("signature", f"the bundle must be signed, it has no {SIGNATURE}", FAILED)
    try:
        key.verify(signature, content[MANIFEST])
    except Exception as error:  # InvalidSignature, which cannot be named where the package may be missing
        raise Stop("signature", f"the bundle must be signed with the key of '{key_file}', it is not", FAILED) from error
    return f"signed with the key of '{key_file}', sha256 {fingerprint[:16]}..."


def _load_public_key(path: Path) -> tuple[Any, str]:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
    except ImportError as error:
        why = "--public-key needs the package cryptography, which is not installed: pip install 'cryptography>=43'"
        raise Stop("signature", why, UNAVAILABLE) from error
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise Stop("signature", f"public key '{path}' cannot be read: {error.strerror or error}", DAMAGED) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = f"'{path}' must hold a public key in PEM form; openssl pkey -in KEY.pem -pubout makes one"
        raise Stop("signature", why, DAMAGED) from error
    if not isinstance(key, Ed25519PublicKey):
        kind = type(key).__name__.strip("_").replace("PublicKey", "")
        raise Stop("signature", f"'{path}' must hold an Ed25519 public key, it is a key of {kind}", DAMAGED)
    return key, _sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


# -- what the model promises ------------------------------------------------------------------------------------------


class Promises:
    """Values of `model.json` that a check compares; each is validated before it is used.

    Attributes:
        input: Name of the one input.
        outputs: Names of the outputs; one of a classifier.
        is_classifier: Whether the output has a value for each class.
        batch: Fixed batch size of the file, None where it is open.
        tolerance: Largest difference of an output from the recorded one.
        relative: The same, as a share of the output's largest recorded value; the larger limit counts.
        min_agreement: Smallest share of images, in [0, 1], that must get the class that was recorded.
        limit_ms: Median latency that was promised; None without such a promise.
        measured_ms: Median latency where the model was verified; None where it was not measured.
        provider: On which it must keep what was promised.
        threads, batch_size: How its latency was measured.
        where: On what, in words.
        failed: Names of the checks that failed or were inconclusive when the model was verified.
    """

    def __init__(self, data: bytes) -> None:
        try:
            values = json.loads(data.decode("utf-8"))
            if values["schema"] != SCHEMA:
                raise damaged(f"{DESCRIPTION} must have schema {SCHEMA}, got {values['schema']!a}")
            (source,), targets = values["signature"]["inputs"], values["signature"]["outputs"]
            self.input, self.outputs = _text(source["name"]), [_text(one["name"]) for one in targets]
            self.is_classifier = values.get("task", CLASSIFICATION) == CLASSIFICATION
            if not targets or (self.is_classifier and len(targets) > 1):
                raise ValueError(f"{len(targets)} outputs")
            self.batch = source["shape"][0] if type(source["shape"][0]) is int else None
            promises, measured = values["promises"], values["measured"]
            self.tolerance, self.relative = _number(promises["tolerance"]), _number(promises.get("relative", 0))
            self.min_agreement = _share(promises.get("min_agreement", 1.0))
            self.limit_ms = None if promises["max_latency_ms"] is None else _number(promises["max_latency_ms"])
            self.measured_ms = None if measured["latency_ms"] is None else _number(measured["latency_ms"])
            there, machine = _text(measured["provider"]), _text(measured["machine"])
            self.provider = _text(promises.get("provider", there))
            runtime = _text(measured.get("runtime", RUNTIME))
            self.threads, self.batch_size = _whole(measured["threads"]), _whole(measured["batch_size"])
            checks = values["verdict"]["checks"]
            self.failed = [_text(one["name"]) for one in checks if one["status"] in ("fail", "inconclusive")]
            self.passed = bool(values["verdict"]["passed"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise damaged(f"{DESCRIPTION} lacks a value, or has one of another kind: {ascii(error)[:200]}") from error
        if self.batch is not None and not 1 <= self.batch <= MAX_COUNT:
            raise damaged(f"{DESCRIPTION} states a batch of {self.batch}")
        by = there if runtime == RUNTIME else f"{runtime} on {there}"
        self.where = f"{machine}, {by}, {_count(self.threads, 'thread')}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value if value.isprintable() else ascii(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise TypeError(f"{value!r} is no number of at least 0")
    return float(value)


def _share(value: Any) -> float:
    if _number(value) > 1:
        raise TypeError(f"{value!r} is no share")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise TypeError(f"{value!r} is no count")
    return value


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read_samples(data: bytes, outputs: int = 1) -> dict[str, Any]:
    """Return the arrays of `samples.npz`; inputs and the expected values of that many outputs fit each other.

    Raises:
        Stop: The file is not as `compress bundle` writes it.
    """
    numpy = _require_numpy()
    arrays: dict[str, Any] = {}
    for name, content in read_archive(data, SAMPLES).items():
        try:
            stream = io.BytesIO(content)
            numpy.lib.format.read_magic(stream)
            shape, is_fortran, dtype = numpy.lib.format.read_array_header_1_0(stream)
            if (
                is_fortran
                or dtype.kind not in "fiu"
                or math.prod(shape) * dtype.itemsize != len(content) - stream.tell()
            ):
                raise ValueError("its header does not fit its content")
            arrays[name.partition(".")[0]] = numpy.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)
        except Exception as error:  # numpy's reader raises types of every kind on a foreign header
            raise damaged(f"{SAMPLES} holds '{name}', which is no array of numbers: {ascii(error)[:100]}") from error
    for name in ("inputs", *(expected_name(place) for place in range(outputs))):
        if name not in arrays or arrays[name].ndim < 2 or len(arrays[name]) == 0:
            raise damaged(f"{SAMPLES} must hold an array '{name}' with a batch axis")
        if len(arrays["inputs"]) != len(arrays[name]):
            raise damaged(f"{SAMPLES} must hold as many outputs as inputs")
    return arrays


def expected_name(place: int) -> str:
    """Return the name of the expected values of an output: `expected`, `expected_1`, ..."""
    return f"expected_{place}" if place else "expected"


def _require_numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise Stop("provider", "numpy is not installed: pip install numpy", UNAVAILABLE) from error
    return numpy


# -- which files a model would read: protocol buffers, as far as that is needed ---------------------------------------

_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_DEEPEST = 100


def external_names(model: bytes) -> set[str]:
    """Return the names of files that hold weights of an ONNX model, wherever in its graphs they are named.

    Raises:
        ValueError: This is no ONNX model.
    """
    return {
        entry.get(2, b"").decode("utf-8", "replace")
        for entry in _entries(memoryview(model), "model", 0)
        if entry.get(1) == b"location"
    }


def _entries(data: memoryview, kind: str, depth: int) -> Iterator[dict[int, bytes]]:
    """Yield key (1) and value (2) of every entry about external data in a message and those inside of it."""
    if depth > _DEEPEST:
        raise ValueError("its graphs lie in each other too deep")
    if kind == "entry":
        yield {number: bytes(value) for number, value in _fields(data)}
        return
    for number, value in _fields(data):
        inside = _INSIDE[kind].get(number)
        if inside is not None:
            yield from _entries(value, inside, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of the fields of a message that have a length; the others are passed over."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            _, place = _varint(data, place)
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        elif wire == 2:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[place : place + length]
            place += length
        else:
            raise ValueError(f"a field is of kind {wire}")
    if place != len(data):
        raise ValueError("a field is longer than its message")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it ends within a number")
        value |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return value, place
    raise ValueError("a number is too long")


# -- the model at work ------------------------------------------------------------------------------------------------

Call = Callable[[Any], Any]


def open_session(model: bytes | str, promises: Promises, provider: str, threads: int) -> Any:
    """Return a session of the bundle's model on a provider, and on no other.

    Args:
        model: As `_loadable` returns it.
        promises: Says which input and output the model has.
        provider: Execution provider.
        threads: Inside one operator.

    Raises:
        Stop: ONNX Runtime or the provider is missing, or the model cannot be opened.
    """
    _require_numpy()
    try:
        import onnxruntime
    except ImportError as error:
        raise Stop("provider", "onnxruntime is not installed: pip install onnxruntime", UNAVAILABLE) from error
    onnxruntime.set_default_logger_severity(4)
    present = onnxruntime.get_available_providers()
    if provider not in present:
        why = f"{provider} was asked for, but onnxruntime {onnxruntime.__version__} offers {', '.join(present)} here"
        raise Stop("provider", why, UNAVAILABLE)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as where it was verified
    if _is_nvidia(provider) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises plain Exception subclasses of its own
        raise _unopened(onnxruntime, model, provider, error) from error
    used = session.get_providers()[0]
    if used != provider:
        raise Stop("provider", f"{provider} was asked for, ONNX Runtime fell back to {used}", UNAVAILABLE)
    for kind, names, given in (
        ("input", [promises.input], [one.name for one in session.get_inputs()]),
        ("output", promises.outputs, [one.name for one in session.get_outputs()]),
    ):
        if given != names:
            wanted = "', '".join(names)
            raise Stop("provider", f"{MODEL} must have the {kind} '{wanted}', it has {', '.join(given)}", DAMAGED)
    return session


def _is_nvidia(provider: str) -> bool:
    return provider.startswith(("CUDA", "Tensorrt", "NvTensorRT"))


def timed_call(session: Any, promises: Promises, provider: str) -> Call:
    """Return what is timed: a call on inputs; on a GPU inputs and outputs stay there, as where it was verified."""
    if not _is_nvidia(provider):
        return lambda inputs: session.run(promises.outputs, {promises.input: inputs})[0]
    return _bound_call(session, promises, "cuda")


def _bound_call(session: Any, promises: Promises, device: str) -> Call:
    from onnxruntime import OrtValue

    binding = session.io_binding()
    bound: list[Any] = []

    def run(inputs: Any) -> None:
        if not bound:
            bound.append(OrtValue.ortvalue_from_numpy(inputs, device, 0))
            binding.bind_ortvalue_input(promises.input, bound[0])
            for name in promises.outputs:
                binding.bind_output(name, device, 0)
            binding.synchronize_inputs()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()  # a clock stopped before that would time the start of the work

    return run


def _unopened(onnxruntime: Any, model: bytes | str, provider: str, error: Exception) -> Stop:
    """Return why a session could not be made: the provider's fault where the model opens without it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if provider != "CPUExecutionProvider":
        try:
            onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        except Exception:  # see open_session; the model is at fault, not the provider
            return Stop("provider", f"{MODEL} must be a model that ONNX Runtime can open: {lines[0][:300]}", DAMAGED)
        return Stop("provider", f"{provider} cannot start on this machine: {lines[0][:300]}", UNAVAILABLE)
    return Stop("provider", f"{MODEL} must be a model that ONNX Runtime can open: {lines[0][:300]}", DAMAGED)


def _loadable(content: Mapping[str, bytes], stack: ExitStack) -> bytes | str:
    """Return what ONNX Runtime is given: the bytes, or a path where weights lie in other files of the bundle."""
    try:
        names = external_names(content[MODEL])
    except ValueError as error:
        raise damaged(f"{MODEL} is no ONNX model: {error}") from error
    for name in sorted(names):
        if name not in content:
            raise damaged(f"{MODEL} keeps weights in {name!a}, which is no file of the bundle: it was not opened")
    if not names:
        return content[MODEL]
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-check-"))
    for name in (MODEL, *sorted(names)):
        Path(folder, name).write_bytes(content[name])
    return os.path.join(folder, MODEL)


def check_parity(
    run: Call, samples: Mapping[str, Any], batch: int | None, tolerance: float, min_agreement: float = 1.0
) -> tuple[bool, str, float]:
    """Compare the outputs with the recorded ones; return whether they agree, a sentence, the largest difference."""
    numpy = _require_numpy()
    inputs, expected = samples["inputs"], samples["expected"]
    step = batch or len(inputs)
    got = []
    for start in range(0, len(inputs), step):
        chunk = inputs[numpy.arange(start, start + step) % len(inputs)]
        got.append(run(chunk)[: len(inputs) - start])
    outputs = numpy.concatenate(got)
    if outputs.shape != expected.shape:
        return False, f"outputs must have shape {expected.shape}, got {outputs.shape}", math.inf
    difference = float(numpy.abs(outputs.astype(numpy.float64) - expected.astype(numpy.float64)).max())
    same = int((outputs.reshape(len(outputs), -1).argmax(1) == expected.reshape(len(expected), -1).argmax(1)).sum())
    detail = f"largest difference {difference:.3g} (tolerance {tolerance:g}), top-1 the same on {same} of {len(inputs)}"
    if min_agreement < 1:
        detail += f" (at least {100 * min_agreement:g} % must be)"
    return difference <= tolerance and same / len(inputs) >= min_agreement, detail, difference  # NaN is never within


def check_each_output(
    run: Call, samples: Mapping[str, Any], promises: Promises, tolerance: float, relative: float
) -> tuple[bool, str, float]:
    """Compare every output with its recorded values; return as `check_parity` does.

    Args:
        run: Call on inputs that returns all outputs.
        samples: Arrays of `samples.npz`.
        promises: Names of the outputs and the batch size.
        tolerance: Largest difference that passes.
        relative: The same, as a share of the output's largest recorded value; the larger limit counts.
    """
    numpy = _require_numpy()
    inputs = samples["inputs"]
    step = promises.batch or len(inputs)
    parts = [run(inputs[numpy.arange(start, start + step) % len(inputs)]) for start in range(0, len(inputs), step)]
    passes, described, largest = True, [], 0.0
    for place, name in enumerate(promises.outputs):
        got = numpy.concatenate([part[place] for part in parts])[: len(inputs)].astype(numpy.float64)
        expected = samples[expected_name(place)].astype(numpy.float64)
        if got.shape != expected.shape:
            return False, f"output '{name}' must have shape {expected.shape}, got {got.shape}", math.inf
        difference = float(numpy.abs(got - expected).max()) if got.size else 0.0
        limit = max(tolerance, relative * float(numpy.abs(expected).max())) if got.size else tolerance
        passes, largest = passes and difference <= limit, max(largest, difference)  # NaN is never within
        described.append(f"{difference:.3g} in '{name}' (tolerance {limit:.3g})")
    return passes, f"largest difference {', '.join(described)}, {_count(len(inputs), 'image')}", largest


# -- latency -----------------------------------------------------------------------------------------------------------

# -- begin of the arithmetic shared with the bundle's check --

SITTINGS = 6  # openings of each model
BLOCKS = 4  # of calls in a sitting
OPENING_S = 20.0  # to be spent on opening; where one opening takes more than a sixth of it, there are fewer sittings

WARM_MS = 50.0


def count_sittings(opening_s: float) -> int:
    """Return the number of sittings, at least 1, given the seconds that it takes to open all models once."""
    return max(1, min(SITTINGS, int(OPENING_S / max(opening_s, 1e-9))))


def count_warmup(asked: int, call_ms: float) -> int:
    """Return the untimed calls after a model was opened again: those asked for, of slow models 50 ms of them."""
    return max(1, min(asked, int(WARM_MS / max(call_ms, 1e-6))))


def plan_blocks(calls: int) -> list[int]:
    """Return the number of timed calls of each block, `calls` in all; a block has at least two where that is possible.

    >>> plan_blocks(10), plan_blocks(5), plan_blocks(1)
    ([3, 3, 2, 2], [3, 2], [1])
    """
    count = max(1, min(BLOCKS, calls // 2))
    return [calls // count + (number < calls % count) for number in range(count)]


def time_block(call: Callable[[], object], size: int, clock: Callable[[], float]) -> list[float]:
    """Return the milliseconds of `size` back-to-back calls; one call before them is not timed.

    So every timed call follows a call of the same model and finds the caches as that one left them.
    """
    call()
    times = []
    for _ in range(size):
        started = clock()
        call()
        times.append((clock() - started) * 1e3)
    return times


def median_of_blocks(blocks: Sequence[Sequence[float]]) -> float:
    """Return the median of the medians of the blocks: the latency of one sitting in milliseconds."""
    return median(median(block) for block in blocks)


# -- end of the arithmetic shared with the bundle's check --


def measure_latency(
    next_call: Callable[[], Call],
    opening_s: float,
    inputs: Any,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the median latency of each sitting in milliseconds, measured as `verify` measures it.

    Args:
        next_call: Opens the model and returns its call; asked once a sitting, after the last one has ended.
        opening_s: Seconds that opening takes.
        inputs: Of every call.
        repeats: Timed calls, all sittings together.
        clock: Seconds.
    """
    count = min(repeats, count_sittings(opening_s))
    found: list[float] = []
    for number in range(count):
        call = partial(next_call(), inputs)
        for _ in range(count_warmup(_WARMUP, found[0]) if found else _WARMUP):
            call()
        found.append(_time_sitting(call, repeats // count + (number < repeats % count), clock))
        del call  # the session ends before the next one is opened
    return found


def _time_sitting(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a call would be counted as its time
    try:
        return median_of_blocks([time_block(call, size, clock) for size in plan_blocks(calls)])
    finally:
        if collecting:
            gc.enable()


# -- all checks in turn -----------------------------------------------------------------------------------------------


class Outcome:
    """The checks made so far; each is printed at once.

    Args:
        say: Takes a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.checks: list[dict[str, Any]] = []
        self.exit_code = PASSED

    def add(self, name: str, status: str, detail: str, value: float | None = None, limit: float | None = None) -> None:
        """Record a check: pass, fail or skipped."""
        value = value if value is not None and math.isfinite(value) else None
        self.checks.append({"name": name, "status": status, "value": value, "limit": limit, "detail": detail})
        self.say(f"{status:8} {name:10} {detail}")
        if status == "fail" and self.exit_code == PASSED:
            self.exit_code = FAILED

    def sentence(self) -> str:
        """Return the outcome in words."""
        made = [one for one in self.checks if one["status"] != "skipped"]
        failed = [one["name"] for one in made if one["status"] == "fail"]
        count = f"{len(made)} {'check' if len(made) == 1 else 'checks'} made"
        return f"FAILED: {', '.join(failed)} failed, of {count}." if failed else f"PASSED: {count}, none failed."


def run_checks(options: argparse.Namespace, outcome: Outcome) -> None:
    """Make every check that the options ask for.

    Raises:
        Stop: A check cannot pass, and nothing after it can be made.
    """
    content = read_content(options.bundle)
    outcome.add("integrity", "pass", check_integrity(content))
    if options.public_key is not None:
        outcome.add("signature", "pass", check_signature(content, options.public_key))
    promises = Promises(content[DESCRIPTION])
    samples = read_samples(content[SAMPLES], len(promises.outputs))
    if not promises.passed:
        named = ", ".join(promises.failed) or "a check that was required was not made"
        outcome.say(f"Warning: this model did not pass its verification: {named}. It was bundled all the same.")
    if options.outputs is not None:
        _check_given(options.outputs, promises, samples, options, outcome)
        return
    provider, threads = options.provider or promises.provider, options.threads or min(promises.threads, count_cores())
    with ExitStack() as stack:
        model = _loadable(content, stack)

        def open_again() -> Any:
            return open_session(model, promises, provider, threads)

        started = time.perf_counter()
        kept = [open_again()]
        opening_s = time.perf_counter() - started
        used = f"{provider} was asked for and is in use, {_count(threads, 'thread')}"
        if options.threads is None and threads < promises.threads:
            used += f": verified with {promises.threads:,}, but this machine has no more cores"
        outcome.add("provider", "pass", used)
        _check_outputs(kept[0], promises, samples, options, outcome)
        size = promises.batch or promises.batch_size
        inputs = samples["inputs"][_require_numpy().arange(size) % len(samples["inputs"])]

        def next_call() -> Call:
            return timed_call(kept.pop() if kept else open_again(), promises, provider)

        found = measure_latency(next_call, opening_s, inputs, options.repeats)
        _check_latency(found, promises, threads, options, outcome)


def _check_given(
    path: Path, promises: Promises, samples: Mapping[str, Any], options: argparse.Namespace, outcome: Outcome
) -> None:
    """Compare outputs that were computed elsewhere with the recorded ones."""
    numpy, given = _require_numpy(), _read_outputs(path, promises.outputs)
    count = len(samples["inputs"])
    for name, array in given.items():
        if array.ndim == 0 or len(array) != count:
            raise Stop(
                "parity", f"output '{name}' must have {_count(count, 'row')}, its shape is {array.shape}", FAILED
            )
    outcome.add("provider", "skipped", f"the outputs were computed elsewhere, they are those in '{path.name}'")
    step, starts = promises.batch or count, iter(range(0, count, promises.batch or count))

    def run(_inputs: Any) -> list[Any]:
        start = next(starts)
        return [array[numpy.arange(start, start + step) % count] for array in given.values()]

    _judge_outputs(run, promises, samples, options, outcome)
    outcome.add("latency", "skipped", "nothing was timed: the outputs were computed elsewhere")


def _read_outputs(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return name -> array of each output, from a .npy or .npz file without pickles.

    Raises:
        Stop: The file cannot be read, lacks an output, or has one that is no array of numbers.
    """
    numpy = _require_numpy()
    try:
        with path.open("rb") as stream:
            found = numpy.load(stream, allow_pickle=False)
            one = isinstance(found, numpy.ndarray)
            arrays = {names[0]: found} if one else {name: found[name] for name in found.files}
    except Exception as error:  # numpy and zipfile raise types of every kind
        reason = ascii(getattr(error, "strerror", None) or error)[:200]
        raise Stop("parity", f"'{path}' must be a .npy or .npz file without pickles: {reason}", DAMAGED) from error
    if missing := [name for name in names if name not in arrays]:
        listed = ", ".join(map(ascii, arrays)) or "nothing"
        raise Stop("parity", f"'{path}' must hold {', '.join(map(ascii, missing))}, it holds {listed}", DAMAGED)
    for name in names:
        if arrays[name].dtype.kind not in "fiu":
            raise Stop("parity", f"output '{name}' must be numbers, it is {arrays[name].dtype}", FAILED)
    return {name: arrays[name] for name in names}


def count_cores() -> int:
    """Return how many threads can compute at once here; with more of them a session may never open."""
    return os.cpu_count() or 1


def _check_outputs(
    session: Any, promises: Promises, samples: Mapping[str, Any], options: argparse.Namespace, outcome: Outcome
) -> None:
    def run(inputs: Any) -> Any:
        return session.run(promises.outputs, {promises.input: inputs})

    try:
        _judge_outputs(run, promises, samples, options, outcome)
    except Exception as error:  # ONNX Runtime raises plain Exception subclasses of its own
        lines = str(error).splitlines() or [type(error).__name__]
        raise Stop("parity", f"{MODEL} must run on its samples, ONNX Runtime says: {lines[0][:300]}", FAILED) from error


def _judge_outputs(
    run: Call, promises: Promises, samples: Mapping[str, Any], options: argparse.Namespace, outcome: Outcome
) -> None:
    """Compare the outputs of a call with the recorded ones, by the promises or --tolerance."""
    tolerance = promises.tolerance if options.tolerance is None else options.tolerance
    relative = promises.relative if options.tolerance is None else 0.0
    if promises.is_classifier:
        is_same, detail, difference = check_parity(
            lambda inputs: run(inputs)[0], samples, promises.batch, tolerance, promises.min_agreement
        )
    else:
        is_same, detail, difference = check_each_output(run, samples, promises, tolerance, relative)
    outcome.add("parity", "pass" if is_same else "fail", detail, difference, tolerance)


def _check_latency(
    found: Sequence[float], promises: Promises, threads: int, options: argparse.Namespace, outcome: Outcome
) -> None:
    here = median(found)
    there = "not measured" if promises.measured_ms is None else f"{promises.measured_ms:.4g} ms"
    detail = f"measured {here:.4g} ms here, {there} where it was verified ({promises.where})"
    if threads != promises.threads:
        detail += f"; not comparable, {_count(threads, 'thread')} here"
    limit = promises.limit_ms if options.max_latency_ms is None else options.max_latency_ms
    if limit is None:
        outcome.add("latency", "skipped", f"no promise in milliseconds was made; {detail}", here)
    else:
        said = "promised" if options.max_latency_ms is None else "asked for"
        calls = f"{_count(options.repeats, 'call')} in {_count(len(found), 'sitting')}"
        detail = f"median of {calls}, at most {limit:g} ms was {said}; {detail}"
        outcome.add("latency", "pass" if here <= limit else "fail", detail, here, limit)


# -- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, program: str = "check.py", default: Path | None = None) -> int:
    """Check a bundle, print what was found and return the exit code.

    Args:
        arguments: Of the command line; by default those of this process.
        program: Its name, for help.
        default: The bundle that is checked when none is named; None to ask for one.
    """
    options = _parse(arguments, program, default)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character gets "?", not a crash
            stream.reconfigure(errors="replace")
    outcome = Outcome(print)
    try:
        _run_all(options, outcome)
        print(outcome.sentence())
        if options.json is not None:
            _write_json(options.json, outcome)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own last flush
        return outcome.exit_code or FAILED
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return outcome.exit_code


def _run_all(options: argparse.Namespace, outcome: Outcome) -> None:
    """Make the checks; whatever ends them becomes a failed check and an exit code."""
    try:
        run_checks(options, outcome)
    except Stop as stop:
        outcome.add(stop.check, "fail", stop.detail)
        outcome.exit_code = stop.exit_code
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:  # the last place that can turn a traceback into a sentence
        outcome.add("program", "fail", f"a fault of check.py itself, please report it: {error!r}"[:500])
        outcome.exit_code = BUG


def _write_json(path: Path, outcome: Outcome) -> None:
    values = {"schema": SCHEMA, "passed": outcome.exit_code == PASSED, "exit_code": outcome.exit_code}
    machine = {"platform": platform.platform(), "python": platform.python_version(), "processor": platform.processor()}
    text = json.dumps({**values, "checks": outcome.checks, "machine": machine}, indent=1, allow_nan=False)
    try:
        if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/null: written to, never replaced
            path.write_text(text + "\n", encoding="utf-8")
            return
        part = path.with_name(f".{path.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        print(f"'{path}' cannot be written: {error.strerror or error}.", file=sys.stderr)
        outcome.exit_code = outcome.exit_code or DAMAGED


def _parse(arguments: Sequence[str] | None, program: str, default: Path | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Check that a bundle is whole and that its model does here what was promised.",
        epilog="Exit code: 0 passed, 1 a check failed, 2 wrong command line, 4 no bundle or a damaged one, or --json "
        "not written, 5 provider or package missing.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("bundle", nargs="?" if default else None, type=Path, default=default, help="its folder, or the .zip itself")
    add("--provider", metavar="NAME", help="execution provider, such as CPUExecutionProvider; by default that with "
        "which the model was verified")  # fmt: skip
    add("--threads", type=_at_least_one, metavar="N", help="threads inside one operator, at most the cores there are; "
        "by default as verified")  # fmt: skip
    add("--max-latency-ms", type=_above_zero, metavar="X", help="largest median latency; by default as promised")
    add("--repeats", type=_at_least_one, metavar="N", default=_REPEATS, help="timed calls, all sittings together "
        "(%(default)s)")  # fmt: skip
    add("--tolerance", type=_above_zero, metavar="X", help="largest difference of an output; by default as promised")
    add("--outputs", type=Path, metavar="FILE", help="judge these outputs for the samples, .npy or .npz by the names "
        "of outputs, in place of those of ONNX Runtime")  # fmt: skip
    add("--public-key", type=Path, metavar="PEM", help="the bundle must be signed with this Ed25519 key")
    add("--json", type=Path, metavar="FILE", help="write the outcome as JSON")
    options = parser.parse_args(arguments)
    timed = {"--provider": options.provider, "--threads": options.threads, "--max-latency-ms": options.max_latency_ms}
    if options.outputs is not None and (unused := [name for name, value in timed.items() if value is not None]):
        parser.error(f"--outputs and {unused[0]} exclude each other: nothing is computed or timed here")
    if options.threads is not None and options.threads > count_cores():
        parser.error(f"--threads must be at most the {_count(count_cores(), 'core')} of this machine, "
                     f"got {options.threads:,}")  # fmt: skip
    if options.json is not None:
        _require_place(parser.error, options.json, options.bundle)
    return options


def _require_place(refuse: Callable[[str], NoReturn], path: Path, bundle: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        kind = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        refuse(f"--json must be a file to write, '{path}' {kind}")
    if path.resolve() == bundle.resolve() or path.resolve().parent == bundle.resolve():
        refuse(f"--json must lie outside of the bundle, which '{path}' would change")
    if path.is_file() and path.is_symlink():
        refuse(f"--json must be a regular file, '{path}' is a symbolic link")
    if path.is_file() and not _is_outcome(path):
        refuse(f"--json replaces only the outcome of an earlier check, '{path}' is another file")


def _is_outcome(path: Path) -> bool:
    """Return whether a file is empty or was written by `--json`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8") or '{"checks": 0, "exit_code": 0}')
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"checks", "exit_code"} <= set(values)


def _at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_COUNT):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_COUNT}, got '{text}'")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{text}'")
    return value


if __name__ == "__main__":
    sys.exit(main(default=Path(__file__).parent))
