"""A plan from a list of (regex, format), as configurations of other tools have it.

    plan = from_regexes([(r"\\.attn\\.", "bf16"), (r"^head$", "fp32"), (r"mlp", "fp16")], default="bf16", model=model)

A regex is searched for anywhere in a module's name (`re.search`); anchor it with ^ and $. match="first": the first pair
whose regex is found decides, as in lists of partition rules. match="unique": two that are found are an error. As in
every plan, a module that no regex matches follows the nearest parent that one does, else the default.

Without a model the regexes become patterns of the plan, for which two matches are an error as well (match="unique"),
and regexes that no pattern can say are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import PlanError, UsageError, nearest
from ..plans import LayerPrecision, PrecisionPlan, Reason

_TOKEN = re.compile(r"\\[.\-/]|\\d|\.\*\??|\.\+\??|\.|\[[^\]^!\\][^\]\\]*\]|[^\\.\[\]{}()*+?|^$]")
"""What a pattern of a plan can say: a plain or escaped letter, \\d, "." with "*", "+" or alone, a class of letters."""


def from_regexes(
    pairs: Iterable[tuple[str, str | LayerPrecision]],
    *,
    default: str | LayerPrecision = "fp32",
    model: Any = None,
    match: str = "first",
) -> PrecisionPlan:
    """See the module. A format is a name ("fp16") or a LayerPrecision. model: an nn.Module, or its modules' names.

    Raises PlanError for what is no regex, matches no module (with the nearest names), never decides, or, under
    match="unique", matches a module that another one matches; UsageError for another `match`, and for match="first"
    without a model.
    """
    pairs = [(regex, _layer(value, regex)) for regex, value in pairs]
    compiled = [_compiled(regex) for regex, _ in pairs]
    if match not in ("first", "unique"):
        raise UsageError(f"match must be 'first' or 'unique', not {match!r}")
    repeated = {regex for regex, _ in pairs if sum(regex == other for other, _ in pairs) > 1}
    if repeated:
        raise PlanError(f"{min(repeated)!r} is there twice; keep one of the two")
    if model is None:
        if match == "first" and len(pairs) > 1:
            raise UsageError(
                "which regex is found first is looked up among the names of a model: give it (model=...), or "
                "match='unique', for which patterns will do"
            )
        return PrecisionPlan(default=_layer(default), modules={_pattern(regex): layer for regex, layer in pairs})
    names = _names(model)
    matched = [[name for name in names if regex.search(name)] for regex in compiled]
    for (regex, _), own in zip(pairs, matched, strict=True):
        if not own:
            near = nearest(re.sub(r"\\(.)|[\^$]", r"\1", regex), names)
            hint = f"; the nearest names are {near}" if near else f"; the model has {', '.join(names[1:4])}, ..."
            raise PlanError(f"the regex {regex!r} matches no module{hint}")
    deciding: dict[str, int] = {}
    for number, own in enumerate(matched):
        for name in own:
            if match == "unique" and name in deciding:
                raise PlanError(
                    f"module {name!r} matches two regexes, {pairs[deciding[name]][0]!r} and {pairs[number][0]!r}: "
                    "narrow one, or take match='first'"
                )
            deciding.setdefault(name, number)
    _refuse_idle(pairs, matched, deciding)
    return _plan(pairs, deciding, names, _layer(default))


def _refuse_idle(pairs: Sequence[tuple[str, Any]], matched: list[list[str]], deciding: dict[str, int]) -> None:
    for number in set(range(len(pairs))) - set(deciding.values()):
        first = pairs[deciding[matched[number][0]]][0]
        raise PlanError(
            f"the regex {pairs[number][0]!r} never decides: earlier ones match all that it matches, {first!r} for "
            f"{matched[number][0]!r}; put it before them, or leave it out"
        )


def _plan(
    pairs: Sequence[tuple[str, LayerPrecision]], deciding: dict[str, int], names: list[str], default: LayerPrecision
) -> PrecisionPlan:
    """Entries where a module runs otherwise than it would by what it inherits: from the nearest of its parents that is
    among the names, since a list of them may have gaps."""
    modules: dict[str, LayerPrecision] = {}
    held: dict[str, LayerPrecision] = {}
    for name in names:  # parents come before their children
        parent = name
        while parent and (parent == name or parent not in held):
            parent = parent.rpartition(".")[0]
        above = held.get(parent, default) if name else default
        held[name] = pairs[deciding[name]][1] if name in deciding else above
        if held[name].precision != above.precision:
            modules[name] = held[name]
    return PrecisionPlan(default=default, modules=modules)


def _layer(value: Any, regex: str | None = None) -> LayerPrecision:
    """A format's name as a LayerPrecision whose reason is the regex."""
    if isinstance(value, LayerPrecision):
        return value
    why = () if regex is None else (Reason(code="user", text=f"the regex {regex!r} asks for it"),)
    return LayerPrecision(value, reasons=why)


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise PlanError(
            f"{regex!r} is not a regex: {error}; put a backslash before what is meant as it stands"
        ) from None


def _names(model: Any) -> list[str]:
    """Names of modules, parents before children, the root "" first."""
    if hasattr(model, "named_modules"):
        from ..attribution import unwrap

        return [name for name, _ in unwrap(model).named_modules(remove_duplicate=False)]
    return ["", *sorted({name for name in model if name})]


def _pattern(regex: str) -> str:
    """The pattern of a plan that says the same."""
    body = regex.removeprefix("^")
    ends = body.endswith("$") and not body.endswith("\\$")
    body = body.removesuffix("$") if ends else body
    made = "" if regex.startswith("^") else "*"
    at = 0
    while at < len(body):
        token = _TOKEN.match(body, at)
        if token is None:
            raise PlanError(
                f"no pattern of a plan says {regex!r} (at {body[at:]!r}): give the model (model=...), in whose names "
                "it is then looked up"
            )
        made += _translated(token[0])
        at = token.end()
    return re.sub(r"\*+", "*", made + ("" if ends else "*"))


def _translated(token: str) -> str:
    if token.startswith((".*", ".+")):
        return "*" if token[1] == "*" else "?*"
    if token[0] == "\\":
        return "[0-9]" if token == "\\d" else token[1]
    if token == ".":
        return "?"
    return token
