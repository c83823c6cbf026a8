"""Rules between settings of different sections: one function each, from typed sections to problems."""

from collections.abc import Callable, Iterator

from compress.config.problems import Problem
from compress.config.rules.gates import check_gates
from compress.config.rules.stages import (
    check_calibration_images,
    check_device_command,
    check_formats,
    check_half_precision,
    check_int8_deployment,
    check_latency_targets,
    check_layer_times,
    check_order,
    check_other_runtimes,
    check_quantization_aware,
    check_quantized_format,
    check_quantized_precision,
)
from compress.config.rules.weights import (
    check_feature_distillation,
    check_narrow_weights,
    check_rewinding,
    check_untrained_gates,
    check_untrained_teacher,
    check_weights,
)
from compress.config.sections import Sections

RULES: tuple[Callable[[Sections], Iterator[Problem]], ...] = (
    check_order,
    check_latency_targets,
    check_layer_times,
    check_device_command,
    check_half_precision,
    check_formats,
    check_quantized_format,
    check_quantized_precision,
    check_int8_deployment,
    check_quantization_aware,
    check_calibration_images,
    check_other_runtimes,
    check_weights,
    check_narrow_weights,
    check_feature_distillation,
    check_rewinding,
    check_untrained_teacher,
    check_untrained_gates,
    check_gates,
)


def check_rules(sections: Sections) -> Iterator[Problem]:
    """Yield the problems of all rules."""
    for rule in RULES:
        yield from rule(sections)
