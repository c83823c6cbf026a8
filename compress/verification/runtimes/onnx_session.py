"""Sessions of ONNX Runtime on the requested execution provider, and on no other.

ONNX Runtime falls back to the CPU without an error when a provider cannot start; the GPU build lists CUDA on any
machine. So `onnxruntime.py` compares the provider of the open session with the requested one.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from onnx import ModelProto

from compress.catalog import closest
from compress.errors import ArtifactError, NoSuchPlace, RuntimeUnavailable, attempt, first_line
from compress.onnx_file.io import is_half, is_quantized, model_files
from compress.storage.digest import digest_file, digest_value

CPU = "CPUExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
NVIDIA = ("CUDAExecutionProvider", _TENSORRT, "NvTensorRTRTXExecutionProvider")
_SILENT, _WARNING = 4, 2


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """Request for a session of a file on a provider.

    Attributes:
        runtime: Name of the runtime in messages.
        path: The .onnx file; external data lies beside it.
        provider: Exact ONNX Runtime name of the execution provider.
        threads: Threads inside one operator.
    """

    runtime: str
    path: Path
    provider: str
    threads: int

    def check_built_in(self) -> None:
        """Raise NoSuchPlace or RuntimeUnavailable where this build of ONNX Runtime does not have the provider."""
        import onnxruntime  # half a second; not needed by those who only name the runtime

        present, known = onnxruntime.get_available_providers(), onnxruntime.get_all_providers()
        if self.provider in present:
            return
        if self.provider not in known:
            raise NoSuchPlace(
                f"Runtime '{self.runtime}': provider must be one of {', '.join(present)}, got '{self.provider}'.",
                hint=closest(self.provider, present),
            )
        raise RuntimeUnavailable(
            f"Runtime '{self.runtime}': {self.provider} was asked for, but this build offers {', '.join(present)} only."
        )

    def provider_options(self, model: ModelProto) -> dict[str, str]:
        """Return the options of TensorRT: precision as in the file, and engines that are built once a process."""
        if self.provider != _TENSORRT:
            return {}
        # TensorRT finds engines by the names in a graph, so files with other weights must not share a folder
        folder = _engines() / digest_value([digest_file(file) for file in model_files(self.path)])
        folder.mkdir(exist_ok=True)
        return {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(folder),
            "trt_fp16_enable": str(is_half(model)),
            "trt_int8_enable": str(is_quantized(model)),
        }

    def create(self, provider_options: Mapping[str, str], profile_folder: Path | None) -> Any:
        """Return an open session; operators run one after the other.

        Args:
            provider_options: Options of the provider.
            profile_folder: Folder for the profile of single nodes; None turns profiling off.

        Raises:
            RuntimeUnavailable: The provider cannot start on this machine.
            ArtifactError: ONNX Runtime cannot open the file.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # threads that go on spinning after a run would slow down the model measured next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_folder / "nodes")
        try:
            with _quiet(onnxruntime):
                if self.provider in NVIDIA:
                    onnxruntime.preload_dlls()  # CUDA libraries that came as Python packages are not on the path
                return onnxruntime.InferenceSession(
                    str(self.path),
                    options,
                    providers=[self.provider],
                    provider_options=[dict(provider_options)],
                    enable_fallback=0,
                )
        except Exception as error:  # ONNX Runtime raises plain Exception subclasses of its own
            if self.provider != CPU and _runs_on_cpu(self.path, options):
                raise self.unavailable(first_line(error)) from error
            reason = first_line(error)
            raise ArtifactError(f"'{self.path}' must be a model that ONNX Runtime can open: {reason}") from error

    def unavailable(self, reason: str) -> RuntimeUnavailable:
        """Return the error of a provider that cannot start."""
        return RuntimeUnavailable(
            f"Runtime '{self.runtime}': {self.provider} was asked for, but it cannot start on this machine ({reason}); "
            f"{CPU} is present.",
            hint=f"{self.provider} needs an NVIDIA GPU, its driver and libraries." if self.provider in NVIDIA else None,
        )


@cache
def _engines() -> Path:
    """Return a folder for engines of TensorRT, whose build takes minutes; it is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="compress-engines-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def _quiet(onnxruntime: Any) -> Iterator[None]:
    """Suppress output, warnings and logs of ONNX Runtime while a provider fails to start; the caller reports it."""
    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def _runs_on_cpu(path: Path, options: Any) -> bool:
    import onnxruntime

    def opened() -> bool:
        onnxruntime.InferenceSession(str(path), options, providers=[CPU])
        return True

    return attempt(opened, lambda _: False)
