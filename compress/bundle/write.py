"""Deployment bundle of a finished run: one zip file that checks itself on the target device.

run folder -> read_run (digests) -> samples, model.json, README.md, check.py -> manifest [-> signature] -> model.zip
"""

from pathlib import Path

from compress.bundle import check, infer
from compress.bundle.describe import describe_model, to_text
from compress.bundle.finished_run import MODEL_FILE, FinishedRun, read_run
from compress.bundle.readme import DECODER, render_readme
from compress.bundle.samples import make_samples, pack_arrays
from compress.bundle.signing import sign
from compress.data import pixels, preprocessing
from compress.data.from_config import Splits
from compress.errors import ArtifactError, ConfigError, InternalError
from compress.onnx_file.io import load_onnx
from compress.storage.files import require_output, write_atomic
from compress.tasks import decoders
from compress.tasks.classification import CLASSIFICATION
from compress.tasks.regression import Regression

DEFAULT_SAMPLES = 16
_PROGRAMS = {"infer.py": infer, "preprocessing.py": preprocessing, "pixels.py": pixels}


def write_bundle(
    folder: Path,
    out: Path | None = None,
    *,
    samples: int = DEFAULT_SAMPLES,
    key_file: Path | None = None,
    allows_failed: bool = False,
    licence: str | None = None,
    force: bool = False,
) -> Path:
    """Write the bundle of a run as a complete file or not at all, with the same bytes for the same run.

    Args:
        folder: The run folder.
        out: Path of the .zip; by default NAME.zip in the current folder.
        samples: Number of sample images.
        key_file: Ed25519 key that signs the manifest; None for no signature.
        allows_failed: Whether a run that did not pass its verification may be bundled.
        licence: Licence of the model, in place of the licence in the card beside its factory.
        force: Whether an existing file is replaced.

    Returns:
        Path of the bundle.

    Raises:
        ConfigError: The output cannot be written to `out`, the run did not pass, or there are too many samples.
        ArtifactError: The folder is no finished run, or a file in it differs from the verified one.
        ModelError, NonFinite, DataError: The model fails on the samples.
        RuntimeUnavailable: The package for signatures is missing.
    """
    if out is not None:
        _require_place(out, force)
    if key_file is not None:
        sign(b"", key_file)  # before any work: the package and the key
    run = read_run(folder)
    if out is None:
        out = Path(f"{Path(run.name).name}.zip")
        _require_place(out, force)
    _require_outside(out, folder)
    if not run.has_passed and not allows_failed:
        word = "failed" if run.failed or not run.inconclusive else "did not pass"
        raise ConfigError(
            f"A run must have passed its verification to be handed over, '{run.name}' {word}: {run.unmet}.",
            hint="--allow-failed bundles it all the same, and model.json records that.",
        )
    content = build_content(run, samples, licence)
    if key_file is not None:
        content[check.SIGNATURE] = check.build_signature(sign(content[check.MANIFEST], key_file))
    _require_size(content)
    archive = check.build_archive(content)
    _prove(archive)
    try:
        write_atomic(out, archive)
    except OSError as error:
        raise ArtifactError(f"'{out}' cannot be written: {error.strerror or error}.") from error
    return out


def build_content(run: FinishedRun, samples: int, licence: str | None) -> dict[str, bytes]:
    """Return name -> content of every file of a bundle, the manifest included.

    Args:
        run: Run to bundle.
        samples: Number of sample images.
        licence: Licence of the model; None for the licence in the report of the run.

    Raises:
        As in `write_bundle`.
    """
    path = run.model_files[MODEL_FILE]
    task = Regression() if run.task == Regression.name else CLASSIFICATION  # how labels are read; images are the same
    evaluation = Splits(run.data, task).evaluation
    arrays = make_samples(path, evaluation, samples, run.is_classifier)
    proto = load_onnx(path)
    model = describe_model(run, proto, arrays["expected"], licence)
    if model["preprocessing"] != evaluation.preprocessing.to_dict():
        raise ArtifactError(f"'{path}' and the pipeline must state the same preprocessing, they do not.")
    content = {name: file.read_bytes() for name, file in run.model_files.items()}
    _require_own_weights(content)
    content |= {file.name: file.read_bytes() for files in run.format_files.values() for file in files}
    content |= {
        check.DESCRIPTION: to_text(model),
        check.SAMPLES: pack_arrays(arrays),
        "README.md": render_readme(run, model, sorted(run.model_files)).encode("utf-8", "replace"),
        "check.py": Path(check.__file__).read_bytes(),
        **{name: Path(str(module.__file__)).read_bytes() for name, module in _PROGRAMS.items()},
        **({DECODER: Path(decoders.__file__).read_bytes()} if run.decoder else {}),
    }
    return {**content, check.MANIFEST: check.build_manifest(content)}


def _require_own_weights(content: dict[str, bytes]) -> None:
    """Refuse a model that reads files outside of the bundle."""
    others = sorted(check.external_names(content[MODEL_FILE]) - set(content))
    if others:
        raise ArtifactError(
            f"'{MODEL_FILE}' must keep its weights beside it, it reads {', '.join(map(ascii, others))}."
        )


def _require_place(out: Path, force: bool) -> None:
    if not out.is_dir() and out.suffix.lower() != ".zip":
        raise ConfigError(f"-o must be a file to write whose name ends in .zip, got '{out}'.")
    if out.is_file() and not force:
        raise ConfigError(f"{out} exists already and must not be overwritten.", hint="--force replaces it.")
    require_output("-o", out, "bundle")


def _require_outside(out: Path, folder: Path) -> None:
    """Refuse to write among the files of a run, also through a link."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"-o must lie outside of the run folder, '{out}' is inside of '{folder}'.",
            hint="Its files are those that the run verified; name another folder.",
        )


def _require_size(content: dict[str, bytes]) -> None:
    total = sum(map(len, content.values()))
    if total > check.MAX_BYTES - 2**20:  # the overhead of the archive is smaller
        raise ArtifactError(f"A bundle must have less than {check.MAX_BYTES:,} bytes, this one has {total:,}.")


def _prove(archive: bytes) -> None:
    """Check an archive before it is written, so that the check inside a bundle never refuses it."""
    try:
        content = check.read_archive(archive, "the bundle")
        check.check_integrity(content)
        promises = check.Promises(content[check.DESCRIPTION])
        check.read_samples(content[check.SAMPLES], len(promises.outputs))
    except check.Stop as stop:
        raise InternalError(f"The bundle is not as its own check wants it: {stop.detail}.") from stop
