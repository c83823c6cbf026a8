"""Every registered runtime keeps the runtime contract on each of the tiny networks."""

from contextlib import AbstractContextManager
from importlib.util import find_spec

import nets
import pytest
from exported import SIGNATURE, exported

from compress.catalog import RUNTIMES
from compress.testing import RuntimeCase, RuntimeContract
from compress.verification.runtimes.base import Runtime
from compress.verification.runtimes.litert import LiteRt
from compress.verification.runtimes.ncnn import Ncnn
from compress.verification.runtimes.onnx_reference import OnnxReference
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.runtimes.openvino import OpenVino
from compress.verification.runtimes.torch_eager import TorchEager


@pytest.fixture(params=nets.NAMES, scope="module")
def case(request):
    return RuntimeCase(request.param, nets.build(request.param), SIGNATURE, exported(request.param))


class TestOnnxRuntime(RuntimeContract):
    runtime_class = OnnxRuntime


class TestOnnxReference(RuntimeContract):
    runtime_class = OnnxReference
    provider = "CPU"
    unavailable_provider = "CUDA"


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
class TestOpenVino(RuntimeContract):
    runtime_class = OpenVino
    provider = "CPU"
    unavailable_provider = "NoSuchDevice"


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("ai_edge_litert", "litert_torch")), reason="litert-torch is not installed"
)
class TestLiteRt(RuntimeContract):
    runtime_class = LiteRt
    provider = "CPU"
    unavailable_provider = "GPU"


@pytest.mark.skipif(any(find_spec(name) is None for name in ("ncnn", "pnnx")), reason="ncnn is not installed")
class TestNcnn(RuntimeContract):
    runtime_class = Ncnn
    provider = "CPU"
    unavailable_provider = "NoSuchDevice"


class TestTorchEager(RuntimeContract):
    runtime_class = TorchEager
    provider = "CPU"
    unavailable_provider = "CUDA"

    def open(self, case: RuntimeCase, provider: str | None = None) -> AbstractContextManager[Runtime]:
        return TorchEager(case.module, case.signature, provider or self.provider)


def test_every_registered_runtime_has_a_contract_class():
    suites = (TestLiteRt, TestNcnn, TestOnnxReference, TestOnnxRuntime, TestOpenVino, TestTorchEager)
    covered = {suite.runtime_class for suite in suites}
    assert {RUNTIMES.get(name) for name in RUNTIMES} == covered
    assert len(covered) >= 3


def test_the_contract_has_its_size():
    promises = [name for name in dir(RuntimeContract) if name.startswith("test_")]
    assert len(promises) >= 12
    assert len(nets.NAMES) == 6
