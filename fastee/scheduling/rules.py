"""Rules and policies of your own: `@rule` and `@policy` compile a Python function with numba to a C function that the core calls.

The same function runs uncompiled (`my_rule(stats, task, node)`, and in the twin) and is its own oracle. The records that it reads
are csrc/sched/records.h, field by field; times are seconds, NaN and -1 stand for "not given".
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import re
import textwrap
from collections import namedtuple
from collections.abc import Callable

import numpy as np

from fastee.errors import BackendUnavailable, CannotCompile, did_you_mean

_D, _I = np.float64, np.int64
RECORDS = {
    # of the exit just evaluated; exit is -1 on arrival and out of the waiting room
    "stats": {**dict.fromkeys(("confidence", "threshold", "max_prob", "margin", "entropy", "lse", "gate", "delta"), _D), "label": _I, "exit": _I},
    # slack until its deadline (+inf without one), weight of its class; next segment, K, deepest exit that has answered (-1: none)
    "task": {"slack": _D, "weight": _D, **dict.fromkeys(("segment", "exits", "best", "pool", "tenant"), _I)},
    # next: until the next answer would be at home with the hit rate (+inf: impossible); end: expected end of the task, if it goes
    # there; wait: its queue; here, fits, idle: 0 or 1; action: what a policy returns to send the task there
    "node": {"next": _D, "end": _D, "wait": _D, **dict.fromkeys(("index", "here", "fits", "queue", "idle", "action"), _I)},
}
Stats, TaskView, NodeView = (namedtuple(name, RECORDS[key]) for name, key in (("Stats", "stats"), ("Task", "task"), ("Node", "node")))
EXIT, WAIT, REJECT = 0, 3, 4  # what a policy may return beside nodes[p].action
RUN = 8  # nodes[p].action == RUN + p


class Compiled:
    """A user's function and, once a native scheduler asks for it, its C function."""

    def __init__(self, function: Callable, names: tuple[str, str, str], kind: str):
        if not inspect.isfunction(function):
            raise TypeError(f"{kind}: expected a Python function of ({', '.join(names)}), got {type(function).__name__}")
        given = inspect.signature(function).parameters.values()
        if len(given) != 3 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given):
            raise TypeError(f"{kind}: {function.__name__} must take ({', '.join(names)}), got {inspect.signature(function)}")
        self.function, self.kind, self._c = function, kind, None
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, stats, task, node):
        return self.function(stats, task, node)

    def __repr__(self) -> str:
        return f"<fastee.{self.kind} {self.__name__}>"

    @property
    def address(self) -> int:
        """The C function's address; compiles on first use (about a second). Raises CannotCompile naming the construct and its line."""
        if self._c is None:
            self._c = self._compile()
        return self._c.address

    def _compile(self):
        try:
            import numba
            from numba import carray, cfunc, njit, types
        except ImportError as error:
            raise BackendUnavailable(f"{self.kind}: numba is needed to compile {self.__name__} ({error}); `native=False` runs it in Python") from None
        self._check_fields()
        pointers = [types.CPointer(numba.from_dtype(np.dtype(list(fields.items())))) for fields in RECORDS.values()]
        body = njit(self.function)
        if self.kind == "rule":

            def call(stats, task, node):
                return types.int8(bool(body(carray(stats, 1)[0], carray(task, 1)[0], carray(node, 1)[0])))

            result = types.int8
        else:

            def call(stats, task, nodes):
                t = carray(task, 1)[0]
                return types.int64(body(carray(stats, 1)[0], t, carray(nodes, 1024)))

            result = types.int64
        try:
            return cfunc(result(*pointers))(call)
        except Exception as error:  # numba raises a dozen kinds, some of them outside its own hierarchy
            raise CannotCompile(self._explain(error)) from None

    def _tree(self) -> ast.FunctionDef | None:
        """The function's syntax, its line numbers those of the file; None where there is no source (typed at a prompt, a lambda)."""
        try:
            lines, first = inspect.getsourcelines(self.function)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError):
            return None
        ast.increment_lineno(tree, first - 1)
        return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None

    def _check_fields(self) -> None:
        """Refuse fields that the records do not have, which numba reports as a bare KeyError."""
        tree = self._tree()
        known = dict(zip(inspect.signature(self.function).parameters, RECORDS.items(), strict=True))
        for node in ast.walk(tree) if tree else ():
            if not isinstance(node, ast.Attribute):
                continue
            base = node.value.value if isinstance(node.value, ast.Subscript) else node.value
            if isinstance(base, ast.Name) and base.id in known and node.attr not in known[base.id][1]:
                fields = known[base.id][1]
                raise CannotCompile(f"{self.kind}: {self.__name__}, line {node.lineno}: `{base.id}` has no field {node.attr!r}; it has "
                                    f"{list(fields)}{did_you_mean(node.attr, fields)}")  # fmt: skip

    def _explain(self, error) -> str:
        """numba's message, cut down to what and where."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        own = inspect.getsourcefile(self.function) or "<string>"
        lines = [int(n) for path, n in re.findall(r'File "([^"]+)", line (\d+)', text) if own.endswith(path.lstrip("."))]
        lines += [int(n) for n in re.findall(r"Raised from \S+ \((\d+)\)", text)]
        first = self.function.__code__.co_firstlineno
        if not lines and (tree := self._tree()):  # numba gave no place: the first statement of a kind that it never takes
            lines = [n.lineno for n in ast.walk(tree) if isinstance(n, (ast.With, ast.Import, ast.ImportFrom, ast.Await, ast.Yield, ast.ClassDef))][:1]
        line = next((n for n in reversed(lines) if n > first), lines[-1] if lines else first)
        why = [part.strip() for part in text.splitlines() if part.strip()]
        skip = ("Failed in nopython", "During:", "File ", "No implementation of", "There are", "- Of which", "- With", "<source", "Overload")
        reason = next((part for part in why if not part.startswith(skip)), why[0] if why else "numba gave no reason")
        if any(part.startswith("No implementation of") for part in why):
            reason = next(part for part in why if part.startswith("No implementation of"))
        code = linecache.getline(own, line).strip()
        return f"{self.kind}: numba cannot compile {self.__name__}, line {line} of {own}: `{code}`: {reason[:300]}"


class Rule(Compiled):
    """Made by `@rule`."""

    @property
    def reads_node(self) -> bool:
        """Whether its bytecode loads the third argument at all; where it does not, the core leaves that record blank."""
        code = self.function.__code__
        name = code.co_varnames[2]
        loads = (i.argval for i in dis.get_instructions(code) if "LOAD_FAST" in i.opname)
        return name in code.co_cellvars or any(name in v if isinstance(v, tuple) else name == v for v in loads)


class CustomPolicy(Compiled):
    """Made by `@policy`."""


def rule(function: Callable) -> Rule:
    """Make an exit rule of `function(stats, task, node) -> bool`; give it to `Scheduler(..., rule=...)`.

    It is asked at every exit whose threshold is not +inf and whose score is not NaN; true ends the task there. `node` is the node
    that decides. The core calls the compiled function without Python and without the GIL.

    >>> @rule
    ... def sure(stats, task, node): return stats.margin > 0.3 and task.slack > 0.001
    >>> sure
    <fastee.rule sure>
    """
    return Rule(function, ("stats", "task", "node"), "rule")


def policy(function: Callable) -> CustomPolicy:
    """Make a policy of `function(stats, task, nodes) -> action`; give it to `Scheduler(..., policy=...)`.

    `nodes` holds one record per node (`task.node` is not needed: the own one has `here` = 1); the action is `nodes[p].action`, or
    `rules.EXIT` (answer with the best head reached), `rules.WAIT`, `rules.REJECT` (before the first head). It is asked
    where the exit rule did not accept and some place still makes the deadline; a choice that is not possible or
    would be late is counted as `invalid` and replaced by what policy "threshold" does. Only the first N records exist.

    >>> @policy
    ... def here(stats, task, nodes): return nodes[0].action
    >>> here
    <fastee.policy here>
    """
    return CustomPolicy(function, ("stats", "task", "nodes"), "policy")
