"""Contract suites for criteria, methods, runtimes and tasks, built-in ones and plug-ins.

A suite is a class whose methods are tests. Subclass it in a test file, name the class under test, and pytest runs it:

    @pytest.fixture(params=..., scope="module")
    def case(request) -> RuntimeCase: ...

    class TestMyRuntime(RuntimeContract):
        runtime_class = MyRuntime

    @pytest.fixture(params=..., scope="module")
    def criterion_case(request) -> CriterionCase: ...

    class TestMyCriterion(CriterionContract):
        criterion_class = MyCriterion

    @pytest.fixture(params=..., scope="module")
    def method_case(request) -> MethodCase: ...

    class TestMyMethod(MethodContract):
        method_class = MyMethod

    @pytest.fixture(params=..., scope="module")
    def task_case(request) -> TaskCase: ...

    class TestMyTask(TaskContract): ...
"""

from compress.testing.criteria import CriterionCase, CriterionContract
from compress.testing.methods import MethodCase, MethodContract
from compress.testing.runtimes import RuntimeCase, RuntimeContract
from compress.testing.tasks import TaskCase, TaskContract

__all__ = [
    "CriterionCase",
    "CriterionContract",
    "MethodCase",
    "MethodContract",
    "RuntimeCase",
    "RuntimeContract",
    "TaskCase",
    "TaskContract",
]
