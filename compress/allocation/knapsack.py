"""Multiple-choice knapsack with coupled costs: the least damage within every budget.

    minimise   sum over decisions of   damage(option)
    so that    cost(choice) <= limit   for every budget

Small problems are solved exactly (`compress.allocation.program`). If the coupling needs too many variables, the costs
are linearised around the present choice, the problem is solved, and the costs are linearised around the answer. Either
way every answer is priced on the true tables, improved one decision at a time, and compared with the greedy answers.
The best that keeps the budgets wins. Limits on the search are counts and never seconds: the same problem has the same
answer on every machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.allocation.local_search import LocalSearch, PricedProblem
from compress.allocation.problem import Budget, Choice, Decision, Factor, TableCost
from compress.allocation.program import Program
from compress.errors import BudgetUnreachable, InternalError

EXACT_VARIABLES = 6000
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Allocation:
    """Options chosen within the budgets.

    Attributes:
        choice: Decision name -> position of the chosen option.
        damage: Damage of the choice, summed over the decisions.
        costs: Budget name -> cost.
        is_optimal: Whether it is proved that no choice within the budgets does less damage.
    """

    choice: Choice
    damage: float
    costs: dict[str, float]
    is_optimal: bool


def allocate(decisions: Sequence[Decision], budgets: Sequence[Budget], limits_text: str = "") -> Allocation:
    """Choose an option for every decision.

    Args:
        decisions: Decisions in any order; the answer does not depend on it.
        budgets: Budgets, at least one, each with a limit above 0; all are kept.
        limits_text: Limits on the options in words, for the message when a budget cannot be kept.

    Raises:
        BudgetUnreachable: One budget, or all of them together, cannot be kept.
    """
    if not budgets or any(budget.limit <= 0 for budget in budgets):
        raise InternalError("An allocation must have at least one budget, each above 0.")
    problem = PricedProblem(_by_name(decisions), budgets)
    harmless, search = problem.least_damage(), LocalSearch(problem)
    if problem.allows(harmless):
        return _allocation(problem, search.polished(harmless), is_optimal=True)
    _check_reachable(problem, search, limits_text)
    program = Program(problem.decisions, problem.budgets)
    found, is_optimal = search.greedy(), False
    if program.size <= EXACT_VARIABLES:
        exact, is_optimal = _exact(problem, program, found)
        found += exact
    else:
        around = min(found, key=problem.rank) if found else search.cheapest(problem.budgets)
        found += _relinearised(problem, search, around)
    if not found:
        raise _unreachable_together(problem, search)
    return _allocation(problem, min(map(search.polished, found), key=problem.rank), is_optimal)


def allocate_evenly(
    decisions: Sequence[Decision], budgets: Sequence[Budget], choices: Iterable[Choice], limits_text: str = ""
) -> Allocation:
    """Take the first of the given choices that keeps the budgets, then spend the rest of the budgets.

    Args:
        decisions: Decisions in any order.
        budgets: Budgets, at least one.
        choices: Choices from the mildest to the harshest.
        limits_text: As in `allocate`.

    Raises:
        BudgetUnreachable: A budget cannot be kept.
    """
    problem = PricedProblem(_by_name(decisions), budgets)
    search = LocalSearch(problem)
    _check_reachable(problem, search, limits_text)
    for choice in choices:
        if problem.allows(choice):
            return _allocation(problem, search.polished(choice), is_optimal=False)
    cheapest = search.cheapest(problem.budgets)
    if not problem.allows(cheapest):
        raise _unreachable_together(problem, search)
    return _allocation(problem, search.polished(cheapest), is_optimal=False)


def _by_name(decisions: Sequence[Decision]) -> list[Decision]:
    return sorted(decisions, key=lambda decision: decision.name)


def _allocation(problem: PricedProblem, choice: Choice, is_optimal: bool) -> Allocation:
    costs = {budget.name: budget.cost.at(choice) for budget in problem.budgets}
    if not problem.allows(choice):
        raise InternalError(f"An allocation exceeds its budgets: {costs}.")
    return Allocation(choice, problem.damage(choice), costs, is_optimal)


def _check_reachable(problem: PricedProblem, search: LocalSearch, limits_text: str) -> None:
    """Raise BudgetUnreachable when a budget cannot be kept even alone."""
    for budget in problem.budgets:
        best = budget.cost.at(search.cheapest([budget]))
        if budget.within(best):
            continue
        program = Program(problem.decisions, [budget])
        exact = program.least_cost(budget) if program.size <= EXACT_VARIABLES else None
        best = min(best, budget.cost.at(exact)) if exact is not None else best
        if not budget.within(best):
            asked, reached = budget.show(budget.limit), budget.show(best)
            raise BudgetUnreachable(f"Target {asked} cannot be reached; the best is {reached}{limits_text}.", best=best)


def _unreachable_together(problem: PricedProblem, search: LocalSearch) -> BudgetUnreachable:
    nearest = search.cheapest(problem.budgets)
    wanted = ", ".join(budget.show(budget.limit) for budget in problem.budgets)
    got = ", ".join(budget.show(budget.cost.at(nearest)) for budget in problem.budgets)
    return BudgetUnreachable(f"Targets {wanted} cannot be reached together; the nearest found is {got}.")


def _exact(problem: PricedProblem, program: Program, known: Sequence[Choice]) -> tuple[list[Choice], bool]:
    """Return the best choice found by branch and bound, and whether it is proved to be the best.

    Args:
        problem: Damages and costs.
        program: The same problem as an integer program.
        known: Choices within the budgets.
    """
    worst = sum(float(values.max()) for values in problem.damages.values())
    scale = min((problem.damage(choice) for choice in known), default=worst)
    lowered = np.zeros(len(problem.budgets))
    for _ in range(4):
        choice, is_proved = program.least_damage(scale or 1.0, list(lowered))
        if choice is None:
            break
        if problem.allows(choice):
            return [choice], is_proved and not lowered.any()
        # the solver keeps a constraint to a tolerance only; lower the limit by more than the excess
        lowered += np.maximum(problem.costs(choice) / problem.limits - 1, 0) * 1.5
    return [], False


def _relinearised(problem: PricedProblem, search: LocalSearch, around: Choice) -> list[Choice]:
    """Return choices within the budgets: solve with costs linearised around a choice, move to the answer, repeat.

    If a linear answer breaks a true budget, the limit is lowered by the excess in the next round.
    """
    found: list[Choice] = []
    seen: set[tuple[int, ...]] = set()
    lowered = np.zeros(len(problem.budgets))
    for _ in range(_ROUNDS):
        linear = Program(problem.decisions, [_linear(budget, around, problem.damages) for budget in problem.budgets])
        answer, _ = linear.least_damage(problem.damage(around) or 1.0, list(lowered))
        if answer is None or tuple(answer.values()) in seen:
            break
        seen.add(tuple(answer.values()))
        over = np.maximum(problem.costs(answer) / problem.limits - 1, 0)
        lowered = lowered + over if over.any() else lowered / 2
        around = search.narrowed(answer) or around
        if problem.allows(around):
            found.append(around)
    return found


def _linear(budget: Budget, around: Choice, damages: Mapping[str, np.ndarray]) -> Budget:
    """Return a budget whose cost changes with each decision as if the others kept their options."""
    here = budget.cost.at(around)
    each = budget.cost.of_each(around, damages, here)
    changes = {name: np.broadcast_to(each[name], values.shape) - here for name, values in damages.items()}
    return Budget(budget.name, TableCost(here, tuple(Factor((n,), c) for n, c in changes.items())), budget.limit)
