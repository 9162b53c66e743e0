"""``eval(...)`` in recipes: numbers, variables, and operations whose results stay small."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

LARGEST_NUMBER = 1e18
LONGEST = 1_000
"""Characters of an expression."""


class UnknownVariableError(ValueError):
    """An expression names a variable that has no number (yet)."""


def _bounded(calculate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operation whose result has to be small: a few products of products would fill any memory."""

    def bounded(a: Any, b: Any) -> Any:
        result = calculate(a, b)
        if abs(result) > LARGEST_NUMBER:
            raise ValueError(f"a result is larger than {LARGEST_NUMBER:g}")
        return result

    return bounded


def _power(a: Any, b: Any) -> Any:
    if abs(a) > 1 and b > 0 and b * math.log(abs(a)) > math.log(LARGEST_NUMBER):
        raise ValueError(
            "** is not calculated here where its result is larger than "
            f"{LARGEST_NUMBER:g}, since it can be too large for any machine; write the number"
        )
    result = a**b
    if isinstance(result, complex):
        raise ValueError(f"{a} ** {b} is no real number")
    return result


OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: _bounded(operator.add),
    ast.Sub: _bounded(operator.sub),
    ast.Mult: _bounded(operator.mul),
    ast.Div: _bounded(operator.truediv),
    ast.FloorDiv: _bounded(operator.floordiv),
    ast.Mod: _bounded(operator.mod),
    ast.Pow: _bounded(_power),
}
"""What is calculated in ``eval(...)``, by whoever reads the recipe and however it spells it."""
_SIGNS: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "min": min,
    "max": max,
    "round": round,
}


def calculate(expression: str, variables: Mapping[str, float]) -> int | float:
    """The number that an expression stands for.

    Raises:
        UnknownVariableError: it names something other than a variable.
        ValueError: not arithmetic, or a result that is not finite or too large.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"eval(...) has more than {LONGEST:,} characters")
    try:
        result = _value(ast.parse(expression.strip(), mode="eval").body, variables)
        finite = math.isfinite(result)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"eval({expression}) is no arithmetic") from None
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"eval({expression}): {error}") from None
    if not finite:
        raise ValueError(f"eval({expression}) is {result}, no finite number")
    return result


def _value(node: ast.expr, variables: Mapping[str, float]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            if name not in variables:
                raise UnknownVariableError(f"there is no variable {name} with a number")
            return variables[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](_value(left, variables), _value(right, variables))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_value(operand, variables))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(argument, variables) for argument in args))
    raise ValueError(
        f"eval(...) takes numbers, variables, + - * / // % **, and {', '.join(_FUNCTIONS)}; not {ast.unparse(node)[:60]}"
    )
