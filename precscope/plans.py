"""The precision plan: which format each module of a model runs in, and why. Needs no torch.

    {"schema": 1,
     "default": {"compute": "bf16"},
     "modules": {"blocks.*.attn": {"compute": "fp32", "reasons": ["attention logits reach 1.1e5"]}, "head": "fp32"}}

A plan is a value: `replace` makes another one. `plan[name]` answers for every module name: the entry of exactly this
name, else the one pattern (`*`, `?`, `[...]`, as in file names; `*` crosses dots) that matches it, else what the
nearest parent has, else `default`. Two matching patterns are an error, never a silent choice.

In the file, inf and NaN are written as the strings "Infinity", "-Infinity" and "NaN", which JSON lacks as numbers.
"""

from __future__ import annotations

import fnmatch
import html
import json
import math
import os
import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from typing_extensions import TypedDict

from .errors import FormatError, PlanError, RunDirectoryError, nearest
from .formats import get_format

SCHEMA = 1
STORED = ("fp32", "bf16", "fp16")
"""Formats parameters can be stored in."""

_Compute = Literal["fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2"]
_Stored = Literal["fp32", "bf16", "fp16"]
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


def _short_name(value: Any) -> Any:
    """ "float16" -> "fp16"; what is no format's name passes, for the field to refuse."""
    try:
        return get_format(value).name if isinstance(value, str) else value
    except FormatError:
        return value


def _plain(value: Any) -> Any:
    """`value` as JSON would give it back: numpy scalars become numbers, tuples lists, text subclasses str."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a numpy scalar
        return _plain(value.item())
    raise ValueError(f"{type(value).__name__} values cannot be written as JSON; give numbers, text, lists or dicts")


_Json = Annotated[dict[str, Any], BeforeValidator(_plain)]
_Number = Annotated[float, BeforeValidator(_plain)]


class _Value(BaseModel):
    """A frozen record whose mistakes are one-line PlanErrors."""

    model_config = _STRICT

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(_one_line(error, type(self))) from None


class Reason(_Value):
    """Why a module got its format.

    code: a short word ("overflow", "flushed", "swallowed", "cost", "default", "group", "user", ...). text: a plain
    sentence with the numbers in it. site: the tensor it speaks of. numbers: the same numbers for machines.
    """

    code: str
    text: str
    site: Annotated[str | None, BeforeValidator(lambda v: None if v is None else str(v))] = None
    numbers: Annotated[dict[str, float], BeforeValidator(_plain)] = Field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


class LayerPrecision(_Value):
    """What one module runs in.

    compute: format of its arithmetic. policy: "autocast" (PyTorch's op lists decide inside) or "cast" (everything in it
    runs in `compute`); no difference for fp32 and tf32. params: format its parameters are stored in; where not given,
    `compute` under "cast" if it can be stored, else fp32 (master weights). reasons: Reason or plain text, most
    important first. evidence: JSON for later readers.
    """

    compute: Annotated[_Compute, BeforeValidator(_short_name)] = "fp32"
    policy: Literal["autocast", "cast"] = "autocast"
    params: Annotated[_Stored, BeforeValidator(_short_name)] = "fp32"
    reasons: Annotated[tuple[Reason | str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    evidence: _Json = Field(default_factory=dict)

    def __init__(self, compute: str = "fp32", **data: Any) -> None:
        super().__init__(compute=compute, **data)

    @model_validator(mode="before")
    @classmethod
    def _default_params(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("params") is None and data.get("policy") == "cast":
            short = _short_name(data.get("compute", "fp32"))
            data = {**data, "params": short if short in STORED else "fp32"}
        return data

    @property
    def precision(self) -> tuple[str, str, str]:
        """(compute, policy, params): what makes two layers run alike. The policy of fp32 and tf32 does not count."""
        return self.compute, "autocast" if self.compute in ("fp32", "tf32") else self.policy, self.params

    def __str__(self) -> str:
        words: list[str] = [self.compute]
        if self.precision[1] == "cast":
            words.append("cast")
        if self.params != "fp32":
            words.append(f"params {self.params}")
        return " ".join(words)


def _layer(value: Any) -> Any:
    return {"compute": value} if isinstance(value, str) else value


class LossScale(TypedDict, total=False):
    """initial: the loss scale to start with. interval: [lo, hi], exponents of 2 that are safe. floor: the scale not to
    fall below. growth_interval: steps without overflow before it doubles. lo_site, hi_site: what binds the interval."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    initial: _Number
    interval: Annotated[Annotated[list[float], Field(min_length=2, max_length=2)] | None, BeforeValidator(_plain)]
    floor: _Number
    growth_interval: int
    lo_site: str | None
    hi_site: str | None


class Phase(_Value):
    """From optimizer step `from_step` on, train with `plan`, or with `precision` ("plan": the plan that holds this
    phase; else one format for the whole model, by autocast)."""

    from_step: Annotated[int, Field(ge=0)]
    precision: Annotated[Literal["plan"] | _Compute | None, BeforeValidator(_short_name)] = None
    plan: PrecisionPlan | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Phase:
        if (self.precision is None) == (self.plan is None):
            raise ValueError("precision: a phase has either precision or plan, not both, not neither")
        return self


class Difference(_Value):
    """One difference between two plans: where, and what each has there."""

    where: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.where or '(root)'}: {self.before} -> {self.after}"


class PlanDiff(tuple[Difference, ...]):
    """The differences between two plans; prints one per line, and is empty (false) where they run alike."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no difference"


class PrecisionPlan(_Value):
    """The precision of every module of a model, and what training with it needs. See the module's docstring.

    loss_scale: LossScale, empty where no fp16 gradient needs one. optimizer: state dtype, eps, warnings. phases: plans
    over time, first step first. confirmed: what a measured confirmation found, None where the plan is only predicted.
    made_from: run, limits, versions. Raises PlanError, one line that names the field and what is allowed.
    """

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    default: Annotated[LayerPrecision, BeforeValidator(_layer)] = LayerPrecision()
    modules: Annotated[
        dict[str, LayerPrecision],
        BeforeValidator(lambda v: {k: _layer(p) for k, p in v.items()} if isinstance(v, dict) else v),
    ] = Field(default_factory=dict)
    loss_scale: LossScale = Field(default_factory=LossScale)
    optimizer: _Json = Field(default_factory=dict)
    phases: Annotated[tuple[Phase, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    confirmed: Annotated[dict[str, Any] | None, BeforeValidator(_plain)] = None
    made_from: _Json = Field(default_factory=dict)

    _patterns: tuple[tuple[str, re.Pattern[str]], ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _phases_in_order(self) -> PrecisionPlan:
        steps = [p.from_step for p in self.phases]
        if steps != sorted(set(steps)):
            raise ValueError(f"phases: from_step must rise from phase to phase, got {steps}")
        return self

    def model_post_init(self, context: Any) -> None:
        keys = [k for k in self.modules if any(c in k for c in "*?[")]
        self._patterns = tuple((k, re.compile(fnmatch.translate(k))) for k in keys)

    @classmethod
    def uniform(cls, compute: str, *, policy: str = "autocast", params: str | None = None) -> PrecisionPlan:
        """One precision for the whole model. params: as for LayerPrecision."""
        return cls(default=LayerPrecision(compute, policy=policy, **({"params": params} if params else {})))

    def replace(self, **changes: Any) -> PrecisionPlan:
        """A plan like this one but for `changes` (fields by name), checked like a new one."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    # Look-up

    def __getitem__(self, name: str) -> LayerPrecision:
        return self._of(self.source(name))

    def source(self, name: str) -> str | None:
        """The key of `modules` that decides for module `name`, None where `default` does."""
        return self._source(name, {})

    def sources(self, names: Iterable[str]) -> dict[str, str | None]:
        """`source` of each name; quick for many."""
        known: dict[str, str | None] = {}
        return {name: self._source(name, known) for name in names}

    def resolve(self, names: Iterable[str]) -> dict[str, LayerPrecision]:
        """The precision of each name. Raises PlanError where two patterns match."""
        return {name: self._of(key) for name, key in self.sources(names).items()}

    def _of(self, key: str | None) -> LayerPrecision:
        return self.default if key is None else self.modules[key]

    def _source(self, name: str, known: dict[str, str | None]) -> str | None:
        if name not in known:
            key = self._matching(name)
            if key is None and name:
                key = self._source(name.rpartition(".")[0], known)
            known[name] = key
        return known[name]

    def _matching(self, name: str) -> str | None:
        if name in self.modules:
            return name
        keys = [key for key, pattern in self._patterns if pattern.match(name)]
        if len(keys) > 1:
            raise PlanError(
                f"module {name or '(root)'!r} matches two patterns of the plan, {keys[0]!r} and {keys[1]!r}; "
                f"name it exactly, narrow one pattern, or use 'default' for what is meant for the rest"
            )
        return keys[0] if keys else None

    def check(self, names: Iterable[str]) -> None:
        """Whether the plan fits a model with modules `names`. Raises PlanError: a key that the model lacks (with the
        nearest names), a pattern that matches nothing, a module that two patterns match."""
        names = list(names)
        known, patterns = {"", *names}, dict(self._patterns)
        wrong = [
            key
            for key in self.modules
            if key not in known and not (key in patterns and any(patterns[key].match(name) for name in names))
        ]
        if wrong:
            said = []
            for key in wrong[:3]:
                near = "" if key in patterns else nearest(key, names)
                hint = f" (did you mean {near}?)" if near else ""
                said.append(f"pattern {key!r} matches no module" if key in patterns else f"no module {key!r}{hint}")
            if len(wrong) > 3:
                said.append(f"and {len(wrong) - 3} more")
            raise PlanError(f"the plan was made for another model: {'; '.join(said)}; correct these names in the plan")
        self.sources(names)

    def at_step(self, step: int) -> PrecisionPlan:
        """The plan in force at optimizer step `step`, by `phases`; it has no phases itself."""
        now = next((p for p in reversed(self.phases) if p.from_step <= step), None)
        if now is None or now.precision == "plan":
            return self.replace(phases=())
        if now.plan is not None:
            return now.plan.at_step(step)
        assert now.precision is not None
        return self.replace(default=LayerPrecision(now.precision), modules={}, phases=(), confirmed=None)

    # Comparing, saving, showing

    @property
    def status(self) -> str:
        """ "confirmed" where a measurement confirmed the plan, else "predicted"."""
        return "confirmed" if self.confirmed and self.confirmed.get("passed", True) else "predicted"

    def diff(self, other: PrecisionPlan, *, names: Iterable[str] | None = None) -> PlanDiff:
        """What changes from this plan to `other`: per module of `names` where given, else per key that either has;
        then the loss scale, the optimizer and the phases. Reasons and evidence do not count."""
        pairs: list[tuple[str, LayerPrecision | None, LayerPrecision | None]]
        if names is not None:
            pairs = [(n, self[n], other[n]) for n in names]
        else:
            keys = dict.fromkeys([*self.modules, *other.modules])
            pairs = [(k, self._at_key(k), other._at_key(k)) for k in keys]
        pairs.insert(0, ("default", self.default, other.default))
        found = [
            Difference(where=w, before=str(a) if a else "no entry", after=str(b) if b else "no entry")
            for w, a, b in pairs
            if (a and a.precision) != (b and b.precision)
        ]
        for field in ("loss_scale", "optimizer", "phases"):
            a, b = getattr(self, field), getattr(other, field)
            if a != b:
                found.append(Difference(where=field, before=_compact(a), after=_compact(b)))
        return PlanDiff(found)

    def _at_key(self, key: str) -> LayerPrecision | None:
        """What holds at a key of another plan: None for a pattern this plan does not have word for word."""
        is_pattern = any(c in key for c in "*?[")
        return self.modules.get(key) if is_pattern else self[key]

    def to_json(self) -> str:
        """The text of plan.json."""
        return json.dumps(_encode(self.model_dump(by_alias=True)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan; the file is complete or absent. Raises RunDirectoryError where it cannot be written."""
        path = Path(path)
        text, temporary = self.to_json(), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            reason = error.strerror or str(error)
            raise RunDirectoryError(f"cannot write the plan to {path}: {reason}; give another path") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecisionPlan:
        """Read a plan. Raises PlanError where the file is missing, is no JSON, or holds no plan of this schema."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanError(f"{path}: no such file; `precscope recommend RUN` writes a plan") from None
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}; give the path of a plan.json") from None
        except UnicodeDecodeError:
            raise PlanError(f"{path}: not a plan: the file is not text; give the path of a plan.json") from None
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        """The plan that `text` holds. Raises PlanError."""
        try:
            data = _decode(json.loads(text, object_pairs_hook=_without_repeats))
        except json.JSONDecodeError as error:
            raise PlanError(
                f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}; "
                f"correct it there, or write the plan again with `precscope recommend`"
            ) from None
        if not isinstance(data, dict) or "schema" not in data:
            raise PlanError(f'not a plan: a plan is a JSON object with "schema": {SCHEMA}, "default" and "modules"')
        number = data["schema"]
        if type(number) is not int:
            raise PlanError(f"schema: got {number!r}; allowed: {SCHEMA}")
        if number > SCHEMA:
            raise PlanError(f"schema {number} is newer than this precscope reads ({SCHEMA}): upgrade precscope")
        return cls(**data)

    def counts(self, names: Iterable[str] | None = None) -> Counter[str]:
        """How many modules of `names` (of the plan's own entries where not given) compute in each format."""
        layers = self.modules.values() if names is None else self.resolve(names).values()
        return Counter(layer.compute for layer in layers)

    def __str__(self) -> str:
        counts = ", ".join(f"{fmt} {n}" for fmt, n in self.counts().most_common())
        lines = [f"precision plan ({self.status}); default: {self.default}; entries: {counts or 'none'}"]
        if self.loss_scale:
            lines.append("loss scale: " + ", ".join(f"{k} {_short(v)}" for k, v in self.loss_scale.items()))
        for phase in self.phases:
            lines.append(f"from step {phase.from_step}: {phase.precision or (phase.plan and phase.plan.default)}")
        lines = [line for long in lines for line in textwrap.wrap(long, 80, subsequent_indent="  ")]
        return "\n".join([*lines, *_table(self._rows())])

    def _rows(self) -> list[tuple[str, str, str]]:
        """(modules, precision, first reason), siblings that differ only in one number in one row."""
        return [
            (name, str(layers[0]), _first_reason(layers)) for name, layers in _group_siblings(self.modules)
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        cells = [("default", str(self.default), _first_reason([self.default])), *self._rows()]
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells)
        head = "<tr><th>modules</th><th>precision</th><th>why</th></tr>"
        return f"<table><caption>precision plan ({self.status})</caption>{head}{rows}</table>"


Phase.model_rebuild()


@dataclass(frozen=True)
class Cast:
    """A tensor that changes its format on the way from `producer` to `consumer`."""

    producer: str
    consumer: str
    before: str
    after: str


def casts(plan: PrecisionPlan, edges: Iterable[tuple[str, str]]) -> list[Cast]:
    """The edges (producer, consumer: module names) whose ends compute in different formats; `len` counts them.
    tf32 counts as fp32: its tensors are fp32."""
    edges = list(edges)
    compute = {n: p.compute.replace("tf32", "fp32") for n, p in plan.resolve({n for e in edges for n in e}).items()}
    return [Cast(a, b, compute[a], compute[b]) for a, b in edges if compute[a] != compute[b]]


# Errors


def _one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first mistake as "field: what was given, what is allowed", and how many more there are."""
    problems = error.errors(include_url=False)
    others = len({p["loc"][:1] for p in problems}) - 1  # by field: a union reports each of its branches
    return _problem(problems[0], cls) + (f" (and {others} more)" if others else "")


def _problem(problem: Any, cls: type[BaseModel]) -> str:
    where, kind, given = _where(problem["loc"]), problem["type"], _short(problem["input"])
    if kind == "value_error":
        inner = str(problem["ctx"]["error"])
        return f"{where}.{inner}" if isinstance(problem["ctx"]["error"], PlanError) and where else _joined(where, inner)
    if kind == "extra_forbidden":
        fields = _fields(cls, problem["loc"])
        near = nearest(str(problem["loc"][-1]), fields, count=1)
        hint = f" (did you mean {near}?)" if near else ""
        return f"{where}: unknown field{hint}; known fields: {', '.join(fields)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "literal_error":
        return f"{where}: got {given}; allowed: {problem['ctx']['expected']}"
    return f"{where}: got {given}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _joined(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text


def _fields(cls: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    if loc[0] == "loss_scale":
        return list(LossScale.__annotations__)
    return [f.alias or name for name, f in cls.model_fields.items()]


def _where(loc: Sequence[Any]) -> str:
    """("modules", "blocks.3", "compute") -> modules['blocks.3'].compute"""
    text = ""
    for i, part in enumerate(loc):
        if isinstance(part, int) or (i == 1 and loc[0] == "modules"):
            text += f"[{part!r}]"
        elif not part.startswith(("str", "Reason", "function-", "literal", "list", "none")):  # a branch of a union
            text += f".{part}" if text else part
    return text


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself keeps the last of two equal keys and says nothing."""
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, n in counts.items() if n > 1]
    if twice:
        raise PlanError(f"{twice[0]!r} is there twice in one object; keep one of the two")
    return dict(pairs)


# JSON without inf and NaN

_NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    return [_encode(v) for v in value] if isinstance(value, (list, tuple)) else value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _decode(v) for k, v in value.items()}
    return [_decode(v) for v in value] if isinstance(value, list) else value


# Text


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


def _compact(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"from {p.from_step}: {p.precision or 'another plan'}" for p in value) or "none"
    return ", ".join(f"{k} {_short(v)}" for k, v in value.items()) or "none"


def _first_reason(layers: Sequence[LayerPrecision]) -> str:
    return next((str(layer.reasons[0]) for layer in layers if layer.reasons), "")


def _group_siblings(modules: dict[str, LayerPrecision]) -> list[tuple[str, list[LayerPrecision]]]:
    """Entries of equal precision whose names differ in one number share a row: blocks.0.fc, blocks.1.fc, blocks.4.fc
    become blocks.{0-1,4}.fc. The first number is the one that varies; order is that of the first of each group."""
    groups: dict[Any, list[tuple[int, LayerPrecision]]] = {}
    for name, layer in modules.items():
        match = re.fullmatch(r"(|.*?\.)(\d+)((?:\..*)?)", name)
        code = layer.reasons[0].code if layer.reasons and isinstance(layer.reasons[0], Reason) else ""
        key = (match[1], match[3], layer.precision, code) if match else name
        groups.setdefault(key, []).append((int(match[2]) if match else -1, layer))
    named = []
    for key, members in groups.items():
        name = key if isinstance(key, str) else f"{key[0]}{_ranges([i for i, _ in members])}{key[1]}"
        named.append((name, [layer for _, layer in members]))
    return named


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; a single number stays bare."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) + "}"


def _table(rows: list[tuple[str, str, str]], *, width: int = 80) -> list[str]:
    """Three columns in `width` characters; reasons wrap to two lines, long names lose their middle."""
    if not rows:
        return []
    rows = [(name or "(root)", precision, why) for name, precision, why in rows]
    second = max(len("precision"), *(len(p) for _, p, _ in rows))
    first = min(max(len("modules"), *(len(n) for n, _, _ in rows)), 34)
    rest = width - first - second - 4
    lines = ["", f"{'modules':<{first}}  {'precision':<{second}}  why".rstrip(), "-" * width]
    for name, precision, why in rows:
        if len(name) > first:
            name = name[: first // 2 - 1] + "..." + name[len(name) - first + first // 2 + 2 :]
        said = textwrap.wrap(why, rest, max_lines=2, placeholder=" ...") or [""]
        lines.append(f"{name:<{first}}  {precision:<{second}}  {said[0]}".rstrip())
        lines += [" " * (first + second + 4) + more for more in said[1:]]
    return lines
