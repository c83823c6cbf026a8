"""Is the file good enough? Every check, on the file itself, in the runtime that ships it."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.splits import Split
from compress.errors import ArtifactError, ConfigValueError, DataError, ModelError, NonFinite
from compress.model.artifacts import CheckResult, Figures, Signature, Verdict
from compress.onnx_file.counting import OnnxCounts, count_onnx
from compress.onnx_file.io import at_sizes, load_onnx, read_signature, read_sizes
from compress.progress import Progress, SilentProgress
from compress.tasks.classification import Classification
from compress.tasks.outputs import each
from compress.verification.batching import check_batch, quality_batch
from compress.verification.checks import (
    REPEATABLE,
    check_baseline,
    check_baseline_preprocessing,
    check_denormals,
    check_edges,
    check_evaluation,
    check_macs,
    check_parity,
    check_preprocessing,
    check_provider,
    check_repeatable,
    check_structure,
    check_weights,
    list_fell_back,
)
from compress.verification.gates import Gates, skipped
from compress.verification.latency import LatencyRatio, LatencySample
from compress.verification.measurement import (
    Conditions,
    check_batch_size,
    evaluation_batch,
    existing_bytes,
    latency_inputs,
    time_files,
    torch_params,
)
from compress.verification.metrics import Estimate
from compress.verification.other_runtimes import check_also, check_evaluator
from compress.verification.parity import edge_parity, parity
from compress.verification.quality import (
    Found,
    batch_size_of,
    check_image_shape,
    check_labels,
    check_not_empty,
    check_task,
    classifier_width,
    first_images,
    image_input,
    named,
    predict,
    respond,
)
from compress.verification.quantization_loss import AGREEMENT, check_agreement, drop_shares, of_float
from compress.verification.remedies import with_remedies
from compress.verification.resources import Resources, measure_resources
from compress.verification.robustness import Standing, fitting, standings, stated, summarize
from compress.verification.runtimes.base import Runtime
from compress.verification.scope import Scope
from compress.verification.summary import estimate, summarize_quality, values_of

if TYPE_CHECKING:  # a file alone is verified without torch
    from torch import nn


_PARITY = ("parity", "parity_edges")


def verify_onnx(
    path: Path,
    *,
    evaluation: Split,
    conditions: Conditions,
    gates: Gates,
    scope: Scope | None = None,
    signature: Signature | None = None,
    opset: int | None = None,
    reference: nn.Module | None = None,
    baseline_onnx: Path | None = None,
    baseline_figures: Figures | None = None,
    float_onnx: Path | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check a file and hold it to its gates.

    A file that cannot be run, or that gives NaN, is a failed check and not an error. A gate that cannot be measured
    is skipped and, being required, fails the verdict.

    Args:
        path: The .onnx file.
        evaluation: The whole of it is used for top-1, or whatever decides in its task.
        conditions: Where and how the file is run.
        gates: The limits.
        scope: How much is looked at; the defaults by default.
        signature: Inputs and outputs the file must have; None takes what it has.
        opset: Operator set the file must have; None takes what it has.
        reference: The torch network that the file must equal; without one, parity and the comparison of MACs are
            skipped and not required.
        baseline_onnx: The baseline's export; it runs on the same images, and its latency is measured side by side with
            the file's.
        baseline_figures: The untouched network's size and MACs; counted in `baseline_onnx` when None.
        float_onnx: The float file that a quantised one was made from: it must equal `reference` in the quantised one's
            place, and the two are compared.
        progress: Told about each part.

    Raises:
        ArtifactError: The file or the baseline is missing or no ONNX model.
        RuntimeUnavailable: The provider is not there.
        DataError: The evaluation split is empty, or its targets do not fit.
        ConfigValueError: The batch size is not the file's fixed one, or there are no labels and no baseline either.
    """
    scope = scope or Scope()
    if not evaluation.task.needs_targets and baseline_onnx is None:
        raise ConfigValueError(
            f"Images without labels ({evaluation.task.name}) must be compared with the untouched network, its file is "
            "not given.",
            hint="--against takes it.",
        )
    run = _Verification(path, evaluation, conditions, gates, scope, progress or SilentProgress(), float_onnx)
    run.check_file(signature, opset, reference)
    can_run = run.check_session(baseline_onnx)
    if baseline_onnx is not None:
        run.measure_baseline(baseline_onnx)
        baseline_figures = baseline_figures or run.count_baseline(baseline_onnx)
    if can_run:
        run.check_outputs(reference, signature, baseline_onnx)
        run.measure_robustness(baseline_onnx)
        run.measure(baseline_onnx)
        run.measure_resources(baseline_onnx)
        run.ask_others()
    else:
        quantized = (AGREEMENT,) if float_onnx is not None else ()
        compared = _PARITY if reference is not None else ()
        names = (*compared, "evaluation", REPEATABLE, *quantized, *scope.opinions)
        run.checks += [skipped(name, "the file cannot be run on these images") for name in names]
    return run.verdict(reference, baseline_figures)


@dataclass
class _Verification:
    """One verification under way."""

    path: Path
    evaluation: Split
    conditions: Conditions
    gates: Gates
    scope: Scope
    progress: Progress
    float_path: Path | None = None
    checks: list[CheckResult] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    before: Found | None = None
    after: Found | None = None
    whole: Found | None = None
    samples: dict[str, LatencySample] = field(default_factory=dict)
    ratio: LatencyRatio | None = None
    standings: list[Standing] = field(default_factory=list)
    resources: Resources | None = None
    counts: OnnxCounts | None = None
    fell_back: list[str] | None = None

    def check_file(self, signature: Signature | None, opset: int | None, reference: nn.Module | None) -> None:
        """Check what can be seen without running the file."""
        check_not_empty(self.evaluation)
        model = load_onnx(self.path)
        self.checks.append(check_structure(model, self.path, signature, opset))
        self.counts, failure = _count(self.path)
        self.checks.append(check_preprocessing(model, self.evaluation))
        is_valid = self.checks[0].status == "pass"
        self.checks.append(check_denormals(self.path) if is_valid else skipped("denormals", "the file is not valid"))
        if reference is None:
            why = failure or "no torch network to compare with"
            self.checks += [skipped("macs_agree", why), skipped("weights_agree", why)]
        else:
            counts, wanted = self.counts, at_sizes(signature or read_signature(model), read_sizes(model))
            if self.float_path is not None:
                counts, failure = _count(self.float_path)
            macs = check_macs(counts.macs if counts else failure, reference, wanted)
            weights = check_weights(counts.layer_weights if counts else failure, reference, wanted)
            self.checks += [macs, weights] if self.float_path is None else [of_float(macs), of_float(weights)]

    def measure_baseline(self, path: Path) -> None:
        """Let the baseline predict what the file predicts."""
        with self._open_baseline(path, all_cores=True) as session:
            batch = quality_batch(session, path, self.evaluation, self.conditions)
            self.before = predict(session, self.evaluation, batch, self.progress)

    def count_baseline(self, path: Path) -> Figures:
        """Return size and MACs of a baseline that comes as a file only; 0 where they cannot be counted."""
        try:
            counts = count_onnx(path)
        except ModelError as error:
            self.progress.warn(f"MACs of '{path}' are not counted. {error.message}")
            return Figures(0, 0, existing_bytes(path), {}, {})
        return Figures(counts.macs, counts.params, existing_bytes(path), {}, {})

    def _open_baseline(self, path: Path, *, all_cores: bool = False) -> Runtime:
        """Return the baseline's runtime, to be opened by `with`; what goes wrong in it is said to be the baseline's."""
        runtime = self.conditions.open(path, all_cores=all_cores)
        runtime.owner = f"Baseline '{path}'"
        return runtime

    @property
    def fitness(self) -> str:
        """Name of the check that the file is for the task at all."""
        return "classifier" if isinstance(self.evaluation.task, Classification) else "task"

    def check_session(self, baseline_onnx: Path | None) -> bool:
        """Open every file once, before any long work; returns whether the file can be run."""
        width = None
        if baseline_onnx is not None:
            self.checks += check_baseline_preprocessing(load_onnx(baseline_onnx), self.evaluation)
            with self._open_baseline(baseline_onnx) as baseline, named(baseline):
                width = self._check_fitness(baseline)
        try:
            with self.conditions.open(self.path) as session:
                try:
                    own = self._check_fitness(session)
                except (ModelError, NonFinite) as error:
                    failed = CheckResult(self.fitness, "fail", None, None, "", _with_hint(error))
                    self.checks += [check_provider(session), failed]
                    return False
                session.check_work(len(self.evaluation) + self.conditions.timed_images)
                self._check_provider(session)
                images = f"images of {' x '.join(map(str, image_input(session).shape[1:]))}"
                detail = f"{self.evaluation.task.name}, {images}" if own is None else f"{own} classes, {images}"
                self.checks.append(CheckResult(self.fitness, "pass", None, None, "", detail))
        except ArtifactError as error:
            remedy = "give a file that the runtime opens; the detail says what it did not take"
            self.checks.append(CheckResult("provider", "fail", None, None, "", error.message, remedy=remedy))
            self.checks.append(skipped(self.fitness, "the file cannot be opened"))
            return False
        if width is not None and own != width:
            raise DataError(
                f"File and baseline must tell apart the same classes, got {own} and {width}.",
                hint="--against takes a file with the classes of the one that is verified.",
            )
        return True

    def _check_fitness(self, session: Runtime) -> int | None:
        """Check that an open file is for the task and takes the images; return the number of a classifier's classes."""
        if not isinstance(self.evaluation.task, Classification):
            check_batch_size(session, self.conditions)
            check_task(session, self.evaluation)
            return None
        width = classifier_width(session)
        check_image_shape(session, self.evaluation)
        check_labels(self.evaluation, width)
        check_batch_size(session, self.conditions)
        return width

    def check_outputs(
        self, reference: nn.Module | None, signature: Signature | None, baseline_onnx: Path | None
    ) -> None:
        """Check parity, and top-1 or whatever decides, on all cores."""
        with self.conditions.open(self.path, all_cores=True) as session:
            if reference is None:
                self.checks += [skipped(name, "no torch network to compare with") for name in _PARITY]
            elif self.float_path is None:
                self.checks += self._check_parity(session, reference, signature or session.signature)
            else:
                with self.conditions.open(self.float_path, all_cores=True) as whole:
                    found = self._check_parity(whole, reference, signature or whole.signature)
                self.checks += [of_float(check) for check in found]
            try:
                self.after = self._predict(session, self.path, baseline_onnx)
            except (ModelError, NonFinite) as error:
                self.checks.append(CheckResult("evaluation", "fail", None, None, "images", error.message))
            else:
                self.details["evaluation"] = {"images": len(self.evaluation)}
                self.checks.append(check_evaluation(len(self.after), self.after.value, self.after.metric))
            self.checks.append(self._check_repeatable(session))
            self.checks.append(self._check_batch(session))
        if self.float_path is not None:
            self._compare_with_float(self.float_path, baseline_onnx)

    def _predict(self, session: Runtime, path: Path, baseline_onnx: Path | None) -> Found:
        """Measure an open file on the evaluation split; without labels, by what the baseline returns."""
        batch = quality_batch(session, path, self.evaluation, self.conditions)
        with ExitStack() as stack:
            original = None
            if not self.evaluation.task.needs_targets and baseline_onnx is not None:
                original = stack.enter_context(self._open_baseline(baseline_onnx, all_cores=True))
            return predict(session, self.evaluation, batch, self.progress, original=original)

    def _check_repeatable(self, session: Runtime) -> CheckResult:
        """Compute the first images twice: what draws at random gives a different verdict each time."""
        size = batch_size_of(session, evaluation_batch(image_input(session)))
        images = first_images(self.evaluation, size)
        try:
            return check_repeatable(_flat(session, images), _flat(session, images), self.gates.parity)
        except (ModelError, NonFinite) as error:
            return skipped(REPEATABLE, error.message, self.gates.parity)

    def _check_batch(self, session: Runtime) -> CheckResult:
        check = check_batch(session, self.path, self.evaluation, self.conditions)
        if check.value is not None and check.limit is not None and check.value > check.limit:
            self.progress.warn(f"Outputs for an image depend on the other images of its batch: {check.detail}.")
        return check

    def _compare_with_float(self, path: Path, baseline_onnx: Path | None) -> None:
        """Let the float file predict what the quantised one predicts."""
        if self.after is None:
            self.checks.append(skipped(AGREEMENT, "quality of the file could not be measured"))
            return
        try:
            with self.conditions.open(path, all_cores=True) as whole:
                self.whole = self._predict(whole, path, baseline_onnx)
        except (ModelError, NonFinite) as error:
            self.checks.append(CheckResult(AGREEMENT, "fail", None, None, "share", error.message))
            return
        self.checks.append(check_agreement(self.whole, self.after))

    def measure_robustness(self, baseline_onnx: Path | None) -> None:
        """Look at noise, corruptions and data sets from elsewhere, if they are wanted, on all cores."""
        wanted, shifted = self.scope.robustness, self.scope.shifted
        if self.after is None or wanted is None:
            return
        with ExitStack() as stack:
            session = stack.enter_context(self.conditions.open(self.path, all_cores=True))
            baseline = None
            if baseline_onnx is not None:
                baseline = stack.enter_context(self._open_baseline(baseline_onnx, all_cores=True))
            batch = quality_batch(session, self.path, self.evaluation, self.conditions)
            if baseline is not None and baseline_onnx is not None:
                batch = min(batch, quality_batch(baseline, baseline_onnx, self.evaluation, self.conditions))
            try:
                self.standings = standings(session, baseline, self.evaluation, wanted, batch, self.progress, shifted)
            except (ModelError, NonFinite) as error:
                self.checks.append(CheckResult("robustness", "fail", None, None, "", error.message))
                return
        looked_at = fitting(wanted, self.evaluation)
        self.details["robustness"] = {"wanted": asdict(looked_at), "distributions": stated(self.standings)}

    def measure(self, baseline_onnx: Path | None) -> None:
        """Measure latency of the file side by side with the baseline, and the baseline against itself."""
        files, wanted = self._files(baseline_onnx), self.conditions
        close = self.gates.is_close_to_speed
        try:
            found = time_files(files, self.evaluation, wanted, self.progress, has_control=True, is_close=close)
        except ModelError as error:
            self.checks.append(CheckResult("latency", "fail", None, None, "ms", error.message))
            return
        self.ratio, self.samples = found.ratio, found.samples
        if self.ratio is not None and self.ratio.control is not None:
            itself = self.ratio.control
            self.progress.note(f"latency / baseline's: {self.ratio}; the baseline against itself: {itself}")
        series = {f"{label}_ms": list(sample.milliseconds) for label, sample in self.samples.items()}
        stated = {key: value for key, value in asdict(wanted).items() if key != "repeats"}
        ratio = None if self.ratio is None else asdict(self.ratio)
        binding = wanted.open(self.path).io_binding
        self.details["latency"] = {"baseline_ms": [], **series, "ratio": ratio, **stated, "io_binding": binding}

    def measure_resources(self, baseline_onnx: Path | None) -> None:
        """Measure start, memory and throughput of the file and of the baseline, if they are wanted."""
        files, batch_sizes = self._files(baseline_onnx), self.scope.batch_sizes
        if not batch_sizes:
            return
        try:
            self.resources = measure_resources(files, self.evaluation, self.conditions, batch_sizes, self.progress)
        except ModelError as error:
            self.checks.append(CheckResult("resources", "fail", None, None, "", error.message))
            return
        self.details["runtime"] = asdict(self.resources)

    def _files(self, baseline_onnx: Path | None) -> dict[str, Path]:
        return {"slim": self.path} if baseline_onnx is None else {"slim": self.path, "baseline": baseline_onnx}

    def ask_others(self) -> None:
        """Ask the reference evaluator, and open the file wherever else it is wanted."""
        limit = self.gates.parity
        with self.conditions.open(self.path, all_cores=True) as session:
            self.checks.append(check_evaluator(session, self.path, self.evaluation, limit, self.progress))
        stated = []
        for one in self.scope.also:
            check, values = check_also(one, self.path, self.evaluation, self.conditions, limit, self.progress)
            self.checks.append(check)
            stated.append(values)
        if stated:
            self.details["also"] = stated

    def verdict(self, reference: nn.Module | None, baseline_figures: Figures | None) -> Verdict:
        """Apply the gates and put everything together."""
        quality = summarize_quality(self.before, self.after, self.evaluation)
        self.details["quality"] = quality.details
        own, changes = quality.own, quality.changes
        if self.standings:
            harder, lost = summarize(self.standings)
            own, changes = {**(own or {}), **harder}, {**(changes or {}), **lost}
        slim = self._figures(reference, own)
        baseline = self._baseline(baseline_figures)
        metric = self.evaluation.task.main
        recorded = None if baseline_figures is None else baseline_figures.quality.get(metric.name)
        if recorded is not None and self.before is not None:
            self.checks.append(check_baseline(recorded, self.before.value, len(self.before), metric))
        self.checks += self.gates.check_quality(own, changes, metric)
        self.checks += self.gates.check_speed(self.samples.get("slim"), self.ratio, str(self.conditions))
        self.checks += self.gates.check_size(slim)
        self.checks += self.gates.check_ratios(slim, baseline, self.resources, self.ratio)
        self.checks += self.gates.check_resources(self.resources, "slim")
        self.checks += self.gates.check_fallback(self.fell_back)
        always = ("structure", "denormals", "provider", self.fitness, "evaluation", REPEATABLE)
        compared = ("macs_agree", "weights_agree", *_PARITY) if reference is not None else ()
        quantized = (AGREEMENT,) if self.float_path is not None else ()
        self.details["shares"] = drop_shares(self.before, self.whole, self.after)
        required = (*always, *compared, *quantized, *self.scope.required, *self.gates.asked)
        return Verdict(
            with_remedies(self.checks, required),
            required,
            slim,
            baseline,
            self.details,
            metric,
        )

    def _check_provider(self, session: Runtime) -> None:
        """Check the provider in use, and find out which nodes it left to others."""
        placements = None
        with suppress(ModelError):  # a file that fails on its input is reported by the checks of its outputs
            placements = session.placements(latency_inputs(session, self.evaluation, self.conditions.batch_size))
        self.checks.append(check_provider(session, placements))
        if placements is None:
            return
        self.fell_back = list_fell_back(session.provider, placements)
        self.details["providers"] = {
            "asked": session.provider,
            "nodes": {provider: len(nodes) for provider, nodes in placements.items()},
            "fell_back": self.fell_back,
        }

    def _check_parity(self, session: Runtime, reference: nn.Module, signature: Signature) -> list[CheckResult]:
        from compress.verification.runtimes.torch_eager import TorchEager  # torch, only where there is a reference

        limit, samples = self.gates.parity, self.scope.parity_samples
        try:
            with TorchEager(reference, signature) as torch_runtime:
                result = parity(session, torch_runtime, self.evaluation, samples, progress=self.progress)
                edges = edge_parity(session, torch_runtime, self.evaluation, _largest(session))
        except (ModelError, NonFinite) as error:
            return [CheckResult(name, "fail", None, limit, "", error.message) for name in _PARITY]
        agreement = None if math.isnan(result.top1_agreement) else result.top1_agreement
        self.details["parity"] = {**asdict(result), "top1_agreement": agreement}
        return [check_parity(result, samples, limit), check_edges(edges, limit)]

    def _figures(self, reference: nn.Module | None, own: dict[str, Estimate] | None) -> Figures:
        macs = self.counts.macs if self.counts is not None else 0
        params = self.counts.params if self.counts is not None else 0
        if reference is not None:
            params = torch_params(reference)
        latency = self.samples["slim"].to_figures() if "slim" in self.samples else {}
        return Figures(macs, params, existing_bytes(self.path), values_of(own), latency)

    def _baseline(self, given: Figures | None) -> Figures | None:
        """Return the baseline with the latency of this run; without one, no latency is taken from elsewhere."""
        if given is None:
            return None
        latency = self.samples["baseline"].to_figures() if "baseline" in self.samples else {}
        quality = values_of(estimate(self.before)) if self.before is not None else {}
        return Figures(given.macs, given.params, given.size_bytes, quality, latency)


def _flat(session: Runtime, images: np.ndarray) -> np.ndarray:
    """Return (N, M) all outputs of each image in one row."""
    rows = [np.asarray(one, np.float64).reshape(len(images), -1) for one in each(respond(session, images))]
    return np.concatenate(rows, axis=1)


def _with_hint(error: ModelError | NonFinite) -> str:
    return error.message if error.hint is None else f"{error.message} Hint: {error.hint}."


def _count(path: Path) -> tuple[OnnxCounts | None, str]:
    """Return the counts of a graph, or None and why it cannot be counted."""
    try:
        return count_onnx(path), ""
    except (ArtifactError, ModelError) as error:  # weights that are missing fail the check of the structure
        return None, error.message


def _largest(session: Runtime) -> int:
    return evaluation_batch(image_input(session))
