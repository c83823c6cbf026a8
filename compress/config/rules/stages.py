"""Rules for the order of stages and for the deployment they are measured on."""

from collections.abc import Iterator, Sequence

from compress.catalog import NOTHING, STAGES, VERDICT
from compress.config.defaults import with_deployment
from compress.config.document import Document
from compress.config.problems import KeyPath, Problem
from compress.config.schema.device_command import unused_settings
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.pipeline import ExportConfig, QuantizeConfig
from compress.config.schema.prune import CutConfig
from compress.config.schema.targets import RankTargetConfig
from compress.config.schema.training import FinetuneConfig
from compress.config.schema.verify import GatesConfig, VerifyConfig
from compress.config.sections import Sections

TIMED_RUNTIMES = ("onnxruntime", "openvino", "ncnn", "litert")  # the first one times single nodes
NO_HALF = ("CPUExecutionProvider",)  # casts float16 to float32 and back around every operator
NO_INTEGER = ("CUDAExecutionProvider",)  # computes in float between the roundings
_LATENCY = ("latency", "latency_ms")
_OF_THIS_MACHINE = ("max_cold_start_ms", "max_memory_mb", "min_images_per_second")
_RATIOS_OF_THIS_MACHINE = ("cold_start", "memory", "energy")
_ARTICLES = {"TorchModel": "a TorchModel", "OnnxModel": "an OnnxModel", VERDICT: "a Verdict"}


def check_order(sections: Sections) -> Iterator[Problem]:
    """Each stage must consume what the stage before it produces, and the last one must be `verify`."""
    names, document = sections.names, sections.document
    for index, name in enumerate(names):
        if name is not None and (fault := _misplaced(index, name, names)) is not None:
            text, hint = fault
            yield Problem(document.origin(("stages", index)), f"stages[{index}] '{name}' {text}", hint, "order")
    if names and names[-1] is not None and STAGES[names[-1]].produces != VERDICT:
        last = len(names) - 1
        text = f"stages must end with 'verify', but stages[{last}] '{names[-1]}' is the last one."
        hint = "without verify nothing is checked, and nothing passes by checking nothing."
        yield Problem(document.origin(("stages", last)), text, hint, "order")


def _misplaced(index: int, name: str, names: Sequence[str | None]) -> tuple[str, str | None] | None:
    """Return the fault of a stage's position and a hint; None if the position is allowed."""
    wanted = STAGES[name].consumes
    if index == 0:
        return None if wanted == NOTHING else (f"needs {_ARTICLES[wanted]}, but nothing comes before it.", _BEGIN)
    before = names[index - 1]
    if wanted == NOTHING:
        label = f"stages[{index - 1}]" + (f" '{before}'" if before else "")
        return f"must be the first stage, but {label} comes before it.", None
    if name == "quantize" and name in names[:index]:
        return f"needs a float file, but stages[{names.index(name)}] 'quantize' quantises it.", None
    if before is None or STAGES[before].produces == wanted:
        return None
    text = f"needs {_ARTICLES[wanted]}, but stages[{index - 1}] '{before}' yields {_ARTICLES[STAGES[before].produces]}."
    return text, f"put export before {name}." if name in ("quantize", "verify") else None


_BEGIN = "begin with load."


def check_latency_targets(sections: Sections) -> Iterator[Problem]:
    """A latency target needs a deployment, in a runtime that networks are shipped with."""
    document, deploy = sections.document, sections.deploy
    paths = [(*path, key) for path, target in _targets(sections) for key in target.given() if key in _LATENCY]
    if deploy is None and document.is_valid(("deploy",)):
        for path in paths:
            yield document.problem(
                path,
                "needs a deploy section, which says on which runtime, provider and threads the milliseconds are "
                "measured.",
                "add at the top level: deploy: {provider: CPUExecutionProvider, threads: 1}",
            )
    if deploy is not None and deploy.command is None and paths and deploy.runtime not in TIMED_RUNTIMES:
        text = f"must be one of {', '.join(TIMED_RUNTIMES)} for a latency target, got {deploy.runtime}."
        yield document.problem(("deploy", "runtime"), text)


def _targets(sections: Sections) -> Iterator[tuple[KeyPath, RankTargetConfig]]:
    for path, cut in sections.of(CutConfig):
        yield (*path, "target"), cut.target
    for path, low_rank in sections.of(LowRankConfig):
        if low_rank.target is not None:
            yield (*path, "target"), low_rank.target


def check_layer_times(sections: Sections) -> Iterator[Problem]:
    """A latency target of `low_rank` needs times of single layers."""
    deploy, document = sections.deploy, sections.document
    if deploy is None or (deploy.command is None and deploy.runtime not in TIMED_RUNTIMES[1:]):
        return
    given = "deploy.command" if deploy.command is not None else deploy.runtime
    for path, low_rank in sections.of(LowRankConfig):
        for key in () if low_rank.target is None else low_rank.target.given():
            if key in _LATENCY:
                text = f"needs times of single layers, which {given} cannot give."
                yield document.problem((*path, "target", key), text, "use a target of macs or params in low_rank")


def check_device_command(sections: Sections) -> Iterator[Problem]:
    """A command times calls of complete files: neither start nor memory."""
    deploy, document = sections.deploy, sections.document
    if deploy is None or deploy.command is None:
        return
    for path, verify in sections.of(VerifyConfig):
        if verify.resources is not None and "resources" in verify.model_fields_set:
            text = f"would be measured on this machine, not on the device '{deploy.device}'."
            yield document.problem((*path, "resources"), text, "leave it out, or set resources: null")
        yield from _of_this_machine(document, (*path, "gates"), verify.gates, f"the device '{deploy.device}'")
        for name in unused_settings(deploy.command, verify.model_fields_set & {"threads", "batch_size"}):
            if getattr(verify, name) != getattr(deploy, name):
                text = f"must be left out, or stand in deploy.command as {{{name}}}, got {getattr(verify, name)}."
                yield document.problem((*path, name), text)


def _of_this_machine(document: Document, path: KeyPath, gates: GatesConfig, device: str) -> Iterator[Problem]:
    """Yield a problem for each limit that a command cannot measure."""
    found: list[KeyPath] = [(*path, name) for name in _OF_THIS_MACHINE if getattr(gates, name) is not None]
    found += [(*path, "max_ratio", name) for name in _RATIOS_OF_THIS_MACHINE if name in gates.max_ratio]
    for place in found:
        yield document.problem(place, f"is measured on this machine only, but the file is for {device}.")


def check_half_precision(sections: Sections) -> Iterator[Problem]:
    """Files in half precision need a provider that computes in it."""
    deploy, document = sections.deploy, sections.document
    if deploy is None or not document.is_valid(("deploy", "provider")):
        return
    if deploy.precision == "fp16" and deploy.command is None and deploy.provider in NO_HALF:
        text = f"fp16 must be on a provider that computes in it, got {deploy.provider}."
        hint = "fp32 is faster there; CUDAExecutionProvider and TensorrtExecutionProvider have fp16"
        yield document.problem(("deploy", "precision"), text, hint)


def check_quantized_precision(sections: Sections) -> Iterator[Problem]:
    """Quantization starts from a file in single precision."""
    for path, _ in sections.of(QuantizeConfig):
        if sections.deploy is not None and sections.deploy.precision == "fp16":
            text = "'quantize' needs files in fp32, but deploy.precision is fp16."
            yield sections.document.problem(path, text, "leave one of the two out")


def check_int8_deployment(sections: Sections) -> Iterator[Problem]:
    """Latencies of INT8 files need the settings of the quantisation, and kernels for integers."""
    deploy, document = sections.deploy, sections.document
    if deploy is None or deploy.precision != "int8" or not document.is_valid(("deploy", "precision")):
        return
    if next(iter(sections.of(QuantizeConfig)), None) is None and document.is_valid(("stages",)):
        text = "int8 needs a quantize stage, which makes the INT8 file; the pipeline has none."
        yield document.problem(("deploy", "precision"), text, "add after export: - {stage: quantize}")
    if deploy.provider in NO_INTEGER and document.is_valid(("deploy", "provider")):
        text = f"int8 must be on a provider with integer kernels, got {deploy.provider}, which computes in float."
        yield document.problem(("deploy", "precision"), text, f"set deploy.precision: fp32 for {deploy.provider}")


def check_quantized_format(sections: Sections) -> Iterator[Problem]:
    """QOperator graphs have operators of ONNX Runtime, with kernels in its CPU provider."""
    deploy, document = sections.deploy, sections.document
    has_kernels = deploy is None or (deploy.runtime, deploy.provider) == ("onnxruntime", "CPUExecutionProvider")
    runs_there = has_kernels and (deploy is None or deploy.command is None)
    for path, stage in sections.of(QuantizeConfig):
        if stage.format != "qdq" and not runs_there and document.is_valid((*path, "format")):
            place = "" if deploy is None else deploy.device or f"{deploy.runtime} with {deploy.provider}"
            text = f"must be qdq for {place}, got {stage.format}: only ONNX Runtime on the CPU has QOperator kernels."
            yield document.problem((*path, "format"), text, "leave format out")


def check_formats(sections: Sections) -> Iterator[Problem]:
    """Formats are converted from the float file, which is not the one that a pipeline with `quantize` ships."""
    if next(iter(sections.of(QuantizeConfig)), None) is None:
        return
    for path, export in sections.of(ExportConfig):
        if export.also:
            text = (
                f"must be left out with a quantize stage, got {', '.join(export.also)}: formats are of the float file."
            )
            yield sections.document.problem((*path, "also"), text)


def check_quantization_aware(sections: Sections) -> Iterator[Problem]:
    """Training for a rounding needs the stage that rounds."""
    document = sections.document
    if next(iter(sections.of(QuantizeConfig)), None) is not None or not document.is_valid(("stages",)):
        return
    for path, finetune in sections.of(FinetuneConfig):
        if finetune.quantization_aware and document.is_valid((*path, "quantization_aware")):
            text = f"{finetune.quantization_aware:g} needs a quantize stage, whose rounding it trains for; got none."
            yield document.problem((*path, "quantization_aware"), text, "add after export: - {stage: quantize}")


def check_calibration_images(sections: Sections) -> Iterator[Problem]:
    """Quantization cannot use more calibration images than there are."""
    document, data = sections.document, sections.data
    if data is None or not document.is_valid(("data", "calibration")):
        return
    for path, stage in sections.of(QuantizeConfig):
        place = (*path, "images")
        if stage.images > data.calibration and document.is_valid(place):
            text = f"must be at most data.calibration ({data.calibration}), got {stage.images}."
            yield document.problem(place, text, f"set data.calibration: {stage.images}, or images: {data.calibration}")


def check_other_runtimes(sections: Sections) -> Iterator[Problem]:
    """The runtimes that a file is compared on must differ from the one it is deployed on."""
    for path, verify in sections.of(VerifyConfig):
        yield from compared_with_itself(sections.document, path, with_deployment(verify, sections.deploy))


def compared_with_itself(document: Document, path: KeyPath, verify: VerifyConfig) -> Iterator[Problem]:
    """Yield a problem if `also` names the runtime, provider and threads that the file is deployed on."""
    deployed = (verify.runtime, verify.provider, verify.threads)
    for one in verify.also:
        if (one.runtime, one.provider, one.threads or verify.threads) == deployed:
            text = f"must name other runtimes than the deployed one; {one.label} is the deployed one, got a list."
            yield document.problem((*path, "also"), text)
            return
