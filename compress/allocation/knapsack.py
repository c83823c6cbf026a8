"""Multiple-choice knapsack with coupled costs: the least damage within every budget.

    minimise   sum over decisions of   damage(option)
    so that    cost(choice) <= limit   for every budget

Small problems are solved exactly (`compress.allocation.program`). Where the coupling needs too many variables, the
costs are made linear around the present choice, solved, and made linear again around the answer. Either way every
answer is priced on the true tables, improved one decision at a time, and compared with the greedy ones; the best that
keeps the budgets wins. Limits on the search are counts and never seconds: the same problem has the same answer on
every machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.allocation.problem import Budget, Choice, Decision, Factor, TableCost
from compress.allocation.program import Program
from compress.errors import BudgetUnreachable, InternalError

EXACT_VARIABLES = 6000
_ROUNDS = 12
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Allocation:
    """An answer.

    Attributes:
        choice: Decision -> option.
        damage: Summed over the decisions.
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
        decisions: In any order; the answer does not depend on it.
        budgets: At least one, each with a limit above 0; all are kept.
        limits_text: What limits the options, for the message when a budget cannot be kept.

    Raises:
        BudgetUnreachable: One budget, or all of them together, cannot be kept.
    """
    if not budgets or any(budget.limit <= 0 for budget in budgets):
        raise InternalError("An allocation must have at least one budget, each above 0.")
    search = _Search(sorted(decisions, key=lambda decision: decision.name), tuple(budgets))
    harmless = search.least_damage()
    if search.allows(harmless):
        return search.allocation(search.polished(harmless), is_optimal=True)
    search.check_reachable(limits_text)
    found, is_optimal = search.greedy(), False
    if search.program.size <= EXACT_VARIABLES:
        exact, is_optimal = search.exact(found)
        found += exact
    else:
        found += search.relinearised(min(found, key=search.rank) if found else search.cheapest(search.budgets))
    if not found:
        raise search.unreachable_together()
    return search.allocation(min(map(search.polished, found), key=search.rank), is_optimal)


def allocate_evenly(
    decisions: Sequence[Decision], budgets: Sequence[Budget], choices: Iterable[Choice], limits_text: str = ""
) -> Allocation:
    """Take the first choice of a given row that keeps the budgets, then use up what it leaves.

    Args:
        decisions: In any order.
        budgets: At least one.
        choices: From the mildest to the harshest.
        limits_text: As in `allocate`.

    Raises:
        BudgetUnreachable: A budget cannot be kept.
    """
    search = _Search(sorted(decisions, key=lambda decision: decision.name), tuple(budgets))
    search.check_reachable(limits_text)
    for choice in choices:
        if search.allows(choice):
            return search.allocation(search.polished(choice), is_optimal=False)
    cheapest = search.cheapest(budgets)
    if not search.allows(cheapest):
        raise search.unreachable_together()
    return search.allocation(search.polished(cheapest), is_optimal=False)


class _Options:
    """The options of all decisions, one after the other in one row.

    Args:
        damages: Decision -> what each of its options does.
    """

    def __init__(self, damages: Mapping[str, np.ndarray]) -> None:
        self.damages = np.concatenate(list(damages.values())) if damages else np.zeros(0)
        self._names, self._sizes = list(damages), [len(values) for values in damages.values()]
        self._owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self._starts = np.cumsum([0, *self._sizes])[:-1]

    def places(self, choice: Mapping[str, int]) -> np.ndarray:
        """Return for each option the place in the row of the one that its decision has chosen."""
        chosen = self._starts + np.asarray([choice[name] for name in self._names], np.int64)
        found: np.ndarray = chosen[self._owners]
        return found

    def joined(self, each: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return values of each decision's options, or one for all of them, as one row."""
        rows = (each[name] for name in self._names)
        return np.concatenate(
            [row if len(row) == size else np.full(size, row[0]) for row, size in zip(rows, self._sizes, strict=True)]
        )

    def taken(self, choice: Choice, place: int) -> Choice:
        """Return the choice with the option at a place of the row in the place of its decision's own."""
        owner = int(self._owners[place])
        return {**choice, self._names[owner]: int(place - self._starts[owner])}


class _Search:
    """The searches over one problem.

    Args:
        decisions: In the order of their names.
        budgets: What must be kept.
    """

    def __init__(self, decisions: Sequence[Decision], budgets: tuple[Budget, ...]) -> None:
        self.decisions = decisions
        self.budgets = budgets
        self.damages = {decision.name: decision.damages for decision in decisions}
        self._options = _Options(self.damages)
        self.program = Program(decisions, budgets)
        self._limits = np.asarray([budget.limit for budget in budgets])

    def allows(self, choice: Mapping[str, int]) -> bool:
        return all(budget.allows(choice) for budget in self.budgets)

    def damage(self, choice: Mapping[str, int]) -> float:
        return float(sum(values[choice[name]] for name, values in self.damages.items()))

    def rank(self, choice: Mapping[str, int]) -> tuple[float, int, float]:
        """Return what choices are compared by, least first: damage, then the later options, then cost."""
        return self.damage(choice), -sum(choice.values()), _share(choice, self.budgets)

    def allocation(self, choice: Choice, is_optimal: bool) -> Allocation:
        costs = {budget.name: budget.cost.at(choice) for budget in self.budgets}
        if not self.allows(choice):
            raise InternalError(f"An allocation exceeds its budgets: {costs}.")
        return Allocation(choice, self.damage(choice), costs, is_optimal)

    def least_damage(self) -> Choice:
        """Return the choice that harms nothing; the last option among equals."""
        return {name: int(len(values) - 1 - np.argmin(values[::-1])) for name, values in self.damages.items()}

    def cheapest(self, budgets: Sequence[Budget]) -> Choice:
        """Return a choice whose cost, in shares of the limits, no change of one decision lowers."""
        starts = [dict.fromkeys(self.damages, 0), self.least_damage()]
        return min((self._descend(start, budgets) for start in starts), key=lambda choice: _share(choice, budgets))

    def check_reachable(self, limits_text: str) -> None:
        """Raise BudgetUnreachable when a budget cannot be kept even alone."""
        for budget in self.budgets:
            best = budget.cost.at(self.cheapest([budget]))
            if budget.within(best):
                continue
            program = Program(self.decisions, [budget])
            exact = program.least_cost(budget) if program.size <= EXACT_VARIABLES else None
            best = min(best, budget.cost.at(exact)) if exact is not None else best
            if not budget.within(best):
                asked, reached = budget.show(budget.limit), budget.show(best)
                raise BudgetUnreachable(
                    f"Target {asked} cannot be reached; the best is {reached}{limits_text}.", best=best
                )

    def unreachable_together(self) -> BudgetUnreachable:
        nearest = self.cheapest(self.budgets)
        wanted = ", ".join(budget.show(budget.limit) for budget in self.budgets)
        got = ", ".join(budget.show(budget.cost.at(nearest)) for budget in self.budgets)
        return BudgetUnreachable(f"Targets {wanted} cannot be reached together; the nearest found is {got}.")

    def greedy(self) -> list[Choice]:
        """Return choices within the budgets, from above and from below."""
        found = [self._narrowed(self.least_damage()), self.cheapest(self.budgets)]
        return [self.polished(choice) for choice in found if choice is not None and self.allows(choice)]

    def polished(self, choice: Choice) -> Choice:
        """Return a choice that no change of one decision betters; `choice` must be within the budgets.

        Each step takes the change that avoids most damage for its cost. Of options that are equally harmless the later
        one is better, so that a budget is used and not only kept. Damage falls, or stays while options rise: the steps
        come to an end.
        """
        while True:
            shares, here = self._shares_of_all(choice, self._costs(choice)), self._options.places(choice)
            avoided = self._options.damages[here] - self._options.damages
            price = (shares - shares[:, here]).sum(axis=0)
            is_later = np.arange(len(here)) > here
            is_better = (shares <= 1 + 1e-9).all(axis=0) & ((avoided > 0) | ((avoided == 0) & is_later))
            if not is_better.any():
                return choice
            value = np.full(len(here), np.inf)
            np.divide(avoided, price, out=value, where=price > 0)
            choice = self._options.taken(choice, int(np.where(is_better, value, -np.inf).argmax()))

    def exact(self, known: Sequence[Choice]) -> tuple[list[Choice], bool]:
        """Return the best choice that branch and bound finds, and whether it is proved to be the best.

        Args:
            known: Choices within the budgets.
        """
        worst = sum(float(values.max()) for values in self.damages.values())
        scale = min((self.damage(choice) for choice in known), default=worst)
        lowered = np.zeros(len(self.budgets))
        for _ in range(4):
            choice, is_proved = self.program.least_damage(scale or 1.0, list(lowered))
            if choice is None:
                break
            if self.allows(choice):
                return [choice], is_proved and not lowered.any()
            # the solver keeps a constraint to a tolerance only; ask for as much more as it took
            lowered += np.maximum(self._costs(choice) / self._limits - 1, 0) * 1.5
        return [], False

    def relinearised(self, around: Choice) -> list[Choice]:
        """Return choices within the budgets: solve with costs linear around a choice, go there, repeat.

        A linear answer that breaks a true budget is asked for again with that limit lowered by as much.
        """
        found: list[Choice] = []
        seen: set[tuple[int, ...]] = set()
        lowered = np.zeros(len(self.budgets))
        for _ in range(_ROUNDS):
            linear = Program(self.decisions, [self._linear(budget, around) for budget in self.budgets])
            answer, _ = linear.least_damage(self.damage(around) or 1.0, list(lowered))
            if answer is None or tuple(answer.values()) in seen:
                break
            seen.add(tuple(answer.values()))
            over = np.maximum(self._costs(answer) / self._limits - 1, 0)
            lowered = lowered + over if over.any() else lowered / 2
            around = self._narrowed(answer) or around
            if self.allows(around):
                found.append(around)
        return found

    def _narrowed(self, choice: Choice) -> Choice | None:
        """Take the change that costs least damage for what it saves, until the budgets are kept; None when stuck."""
        while not self.allows(choice):
            here = self._costs(choice)
            over = float(np.maximum(here / self._limits - 1, 0).sum())
            shares, places = self._shares_of_all(choice, here), self._options.places(choice)
            saved = over - np.maximum(shares - 1, 0).sum(axis=0)
            if not (saved > _ROUNDING).any():
                return None
            price = np.full(len(places), np.inf)
            lost = self._options.damages - self._options.damages[places]
            np.divide(lost, saved, out=price, where=saved > _ROUNDING)
            choice = self._options.taken(choice, int(price.argmin()))
        return choice

    def _descend(self, choice: Choice, budgets: Sequence[Budget]) -> Choice:
        choice, has_changed = dict(choice), True
        while has_changed:
            has_changed = False
            for name in self.damages:
                shares = self._shares(choice, name, budgets).sum(axis=0)
                best = int(np.argmin(shares))
                if shares[best] < shares[choice[name]] - _ROUNDING:
                    choice[name], has_changed = best, True
        return choice

    def _shares(self, choice: Choice, name: str, budgets: Sequence[Budget]) -> np.ndarray:
        """Return (budgets, options) costs over limits, when one decision takes each of its options."""
        shape = self.damages[name].shape
        rows = [np.broadcast_to(budget.cost.of_options(choice, name), shape) / budget.limit for budget in budgets]
        return np.stack(rows)

    def _shares_of_all(self, choice: Choice, here: np.ndarray) -> np.ndarray:
        """Return (budgets, options of all decisions) costs over limits when one takes it, the others where they are."""
        rows = []
        for budget, cost in zip(self.budgets, here, strict=True):
            each = budget.cost.of_each(choice, self.damages, float(cost))
            rows.append(self._options.joined(each) / budget.limit)
        return np.stack(rows)

    def _costs(self, choice: Choice) -> np.ndarray:
        return np.asarray([budget.cost.at(choice) for budget in self.budgets])

    def _linear(self, budget: Budget, around: Choice) -> Budget:
        """Return a budget whose cost changes with each decision as if the others stayed where they are."""
        here = budget.cost.at(around)
        each = budget.cost.of_each(around, self.damages, here)
        changes = {name: np.broadcast_to(each[name], values.shape) - here for name, values in self.damages.items()}
        return Budget(budget.name, TableCost(here, tuple(Factor((n,), c) for n, c in changes.items())), budget.limit)


def _share(choice: Mapping[str, int], budgets: Sequence[Budget]) -> float:
    return float(sum(budget.cost.at(choice) / budget.limit for budget in budgets))
