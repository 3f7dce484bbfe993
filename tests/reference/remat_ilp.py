"""The least recomputation of a chain within some memory, as an integer programme."""

from collections import defaultdict

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


class Programme:
    """A linear programme that grows term by term; an expression is {variable: factor}."""

    def __init__(self):
        self.cost, self.whole = [], []
        self.rows, self.columns, self.factors, self.low, self.high = [], [], [], [], []

    def variable(self, cost=0.0, whole=True):
        self.cost.append(cost)
        self.whole.append(int(whole))
        return len(self.cost) - 1

    def bound(self, terms, low=-np.inf, high=np.inf):
        for variable, factor in terms.items():
            self.rows.append(len(self.low))
            self.columns.append(variable)
            self.factors.append(factor)
        self.low.append(low)
        self.high.append(high)

    def solve(self, seconds):
        shape = (len(self.low), len(self.cost))
        matrix = coo_array((self.factors, (self.rows, self.columns)), shape).tocsr()
        return milp(
            np.array(self.cost),
            integrality=self.whole,
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, self.low, self.high),
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )


def least_extra(stages, carries, memory, seconds=60.0, defers=True):
    """Operations run twice by the best schedule; inf where none fits, nan where time runs out.

    What an option saves waits for the backward pass between the input and the output of its stage,
    which are in memory as long. An option that saves nothing needs neither; without `defers` it does.

    Phase t ends with the backward pass of stage t; phase n-1 begins with the forward pass of all.
    The variables, all 0 or 1:
      S[t, i]: the carry that stage i computes is in memory when phase t begins;
      R[t, i]: stage i runs forward in phase t, and only its carry stays;
      K[t, i, o]: it does, and what option o saves stays until the backward pass of i.
    """
    n, last = len(stages), len(stages) - 1
    p, one = Programme(), {}
    S, R, K = {}, {}, {}
    for t in range(n):
        for i in range(t + 1):
            forward = stages[i].forward
            again = 0.0 if t == last else forward
            R[t, i] = p.variable(again)
            for o, option in enumerate(stages[i].options):
                K[t, i, o] = p.variable(again + option.extra)
            if i < t:
                S[t, i] = p.variable()

    def runs(t, i):
        return {R[t, i]: 1.0} | {K[t, i, o]: 1.0 for o in range(len(stages[i].options))}

    def minus(terms):
        return {v: -f for v, f in terms.items()}

    for t in range(n):
        for i in range(t + 1):
            # In the first phase there is nothing yet, and everything runs.
            p.bound(runs(t, i), low=1.0 if t == last else 0.0, high=1.0)
            if i:  # its input is there
                p.bound({S[t, i - 1]: 1.0} | runs(t, i - 1) | minus(runs(t, i)), low=0.0)
            if i < t and t == last:
                p.bound({S[t, i]: 1.0}, high=0.0)
            elif i < t:
                p.bound({S[t + 1, i]: 1.0, S[t, i]: -1.0} | runs(t + 1, i), low=0.0)
        if t:  # the backward pass reads the input too
            p.bound({S[t, t - 1]: 1.0} | runs(t, t - 1), low=1.0)
    for i, stage in enumerate(stages):
        kept = {K[t, i, o]: 1.0 for t in range(i, n) for o in range(len(stage.options))}
        p.bound(kept, low=1.0, high=1.0)
        for o, option in enumerate(stage.options):
            saves = option.saved != () or option.residual_bytes > 0
            if defers and not saves:
                continue
            for t in range(i, last):
                held = {K[s, i, o]: -1.0 for s in range(t + 1, n)}
                if i:
                    p.bound({S[t, i - 1]: 1.0} | held, low=0.0)
                if t > i:
                    p.bound({S[t, i]: 1.0} | held, low=0.0)

    classes = values(carries)
    for t in range(n):
        held = {
            K[s, j, o]: option.residual_bytes
            for j in range(t + 1)
            for o, option in enumerate(stages[j].options)
            for s in range(t + 1, n)
        }
        for i in range(t + 1):
            terms = defaultdict(float, held)
            for j in range(i):
                for o, option in enumerate(stages[j].options):
                    terms[K[t, j, o]] += option.residual_bytes
            # Carries before the input stay if the next phase begins with them.
            alive = {j: {S[t - 1, j]: 1.0} for j in range(i - 1)}
            if i:
                alive[i - 1] = runs(t, i)
                if i < t:
                    alive[i - 1, "kept"] = {S[t - 1, i - 1]: 1.0}
            alive |= {j: {S[t, j]: 1.0} for j in range(i, t)}
            _charge(p, terms, alive, classes)
            for variable in runs(t, i):
                terms[variable] += stages[i].forward_bytes
            p.bound(_divided(terms, memory), high=1.0)
        # The backward pass of stage t.
        terms = defaultdict(float, held)
        for j in range(t + 1):
            for o, option in enumerate(stages[j].options):
                terms[K[t, j, o]] += option.residual_bytes
        for o, option in enumerate(stages[t].options):
            for s in range(t, n):
                terms[K[s, t, o]] += option.backward_bytes
        alive = {j: {S[t - 1, j]: 1.0} for j in range(t - 1)}
        if t:
            alive[t - 1] = one
        always = _charge(p, terms, alive, classes)
        p.bound(_divided(terms, memory), high=1.0 - always / memory)
    found = p.solve(seconds)
    if found.status == 2:
        return np.inf
    return found.fun if found.status == 0 else np.nan


def values(carries):
    """{(stage that computes it, last stage that reads it): bytes}, of `_stages.carries`."""
    added = carries - np.vstack([carries[1:], np.zeros(len(carries))])
    found = {}
    for first, row in enumerate(added):
        for end in range(first + 1, len(row)):
            nbytes = row[end - 1] - row[end]
            if nbytes > 0:
                found[first, end] = nbytes
    return found


def _divided(terms, by):
    return {variable: factor / by for variable, factor in terms.items()}


def _charge(p, terms, alive, classes):
    """Add the bytes of the carries that are alive; those that always are, as the result.

    A value that passes through several stages belongs to the carry of each, and counts once.
    """
    always = 0.0
    for (first, end), nbytes in classes.items():
        indicators = [
            terms_of
            for key, terms_of in alive.items()
            if first <= (key[0] if isinstance(key, tuple) else key) < end
        ]
        if any(not indicator for indicator in indicators):
            always += nbytes
        elif len(indicators) == 1:
            for variable, factor in indicators[0].items():
                terms[variable] += factor * nbytes
        elif indicators:
            # As large as the largest of them.
            any_alive = p.variable(whole=False)
            terms[any_alive] += nbytes
            for indicator in indicators:
                p.bound({any_alive: 1.0} | {v: -f for v, f in indicator.items()}, low=0.0)
    return always
