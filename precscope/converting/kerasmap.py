"""Plans as Keras has them, keras.dtype_policies.DTypePolicyMap, and back.

    policies = to_policy_map(plan, names=model)      # keys are layer paths, such as "net/encoder/dense"
    keras.config.set_dtype_policy(policies)          # layers that are made from now on look themselves up
    plan = from_policy_map(policies, names=model)    # equal again

    Keras policy       of the plan: compute, params
    float32            fp32 fp32
    mixed_bfloat16     bf16 fp32
    mixed_float16      fp16 fp32
    bfloat16           bf16 bf16
    float16            fp16 fp16

A Keras layer computes everything in its compute dtype: what a plan calls policy "cast". A plan of policy "autocast",
where PyTorch's lists keep softmax, norms and losses in fp32, has no other translation; that is said by `left_out`.
A map cannot say fp8 or tf32 (Keras has float8 policies, which its torch backend cannot run), nor storage below a wider
compute format; and it does not reach layers without a path (Dropout, Activation, pooling), which take its default.

Loss scales are no part of a map, either, and Keras adds its LossScaleOptimizer for the policy "mixed_float16" alone,
not for a map with fp16 in it. For that, and for models that are built, see kerasapply.py.

Tested with keras 3.15.1.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, UsageError
from ..integrations.keras_layers import KerasLayers
from ..integrations.missing import need
from ..plans import LayerPrecision, PrecisionPlan
from ..plans.lookup import is_pattern
from .result import Converted

if TYPE_CHECKING:
    from ..profiles import Profile

    Names = Any | Profile | Mapping[str, str | None] | Iterable[str] | None

POLICIES = {
    ("fp32", "fp32"): "float32",
    ("bf16", "fp32"): "mixed_bfloat16",
    ("fp16", "fp32"): "mixed_float16",
    ("bf16", "bf16"): "bfloat16",
    ("fp16", "fp16"): "float16",
}
"""(compute, params) of a plan -> name of the Keras policy."""

_PLAIN = re.compile(r"[\w/ -]*")  # paths that mean themselves as a regular expression


def to_policy_map(plan: PrecisionPlan, *, names: Names = None) -> Any:
    """The plan as a DTypePolicyMap; `left_out` tells what it does not carry.

    names: the Keras model; or a Profile of it; or layer names of the plan -> Keras paths; or paths alone (of
    "net/a", the plan's name is "net.a"). None: the plan's own entries, by their names with "/" for ".".

    Raises PlanError for what no map can say (fp8, tf32, storage in another format than compute and fp32, phases), for
    a plan that does not fit the names, and without names for patterns and for layers below one with an entry.
    """
    entries, default, refused, _ = _translated(plan, names)
    if refused:
        raise PlanError(f"a Keras policy map cannot say {'; '.join(refused)}: choose a precision of {_allowed()}")
    return _map(entries, default)


def from_policy_map(policies: Any, *, names: Names = None, policy: str = "cast") -> PrecisionPlan:
    """The plan that a DTypePolicyMap says, or one DTypePolicy, the name of one, or the JSON of either.

    names: as for `to_policy_map`; each path is then looked up as Keras does it, regular expressions included. None: the
    map's keys, of which "a/.*" alone may be no plain path. policy: of low layers; "cast" is what Keras does.

    Raises PlanError for policies that a plan has no word for (float64, int8, float8), for a path that matches two
    keys of the map, and without names for other regular expressions.
    """
    keras = keras_module()
    if isinstance(policies, str) and policies.lstrip().startswith("{"):
        policies = json.loads(policies)
    if policies is None or not isinstance(policies, str | Mapping | keras.DTypePolicy):
        raise UsageError(f"expected a keras.dtype_policies.DTypePolicyMap, not {type(policies).__name__}")
    policies = keras.dtype_policies.get(policies)
    if not isinstance(policies, keras.dtype_policies.DTypePolicyMap):
        return PrecisionPlan(default=_layer(policies.name, "the policy", policy))
    default = _layer(policies.default_policy.name, "the default", policy)
    if names is None:
        found = {_name_of(key): _layer(p.name, key, policy) for key, p in policies.items()}
    else:
        known = [(name, path) for name, path in paths_of(names).items() if path is not None]
        found = {name: _layer(looked_up(policies, path).name, path, policy) for name, path in known}
    return PrecisionPlan(default=default, modules=_needed(found, default, names))


def left_out(plan: PrecisionPlan, *, names: Names = None) -> list[str]:
    """What the plan says and its DTypePolicyMap does not, a sentence each."""
    _, _, refused, lost = _translated(plan, names)
    return [*(f"no Keras policy says {text}: the nearest one is taken" for text in refused), *lost]


def to_keras(plan: PrecisionPlan, model: Any) -> Converted:
    """For `ps.convert(plan, "keras", model=model)`: the map, its JSON, and what was lost. What `to_policy_map`
    refuses becomes the nearest policy here: bf16 for fp8, fp32 for tf32, fp32 storage."""
    keras = keras_module()
    entries, default, _, _ = _translated(plan, model)
    value = _map(entries, default)
    text = json.dumps(keras.dtype_policies.serialize(value), indent=2) + "\n"
    return Converted("keras", value, text, tuple(left_out(plan, names=model)))


def from_policies(policies: Any, *, model: Any = None) -> PrecisionPlan:
    """For `from_keras`: see `from_policy_map`."""
    return from_policy_map(policies, names=model)


# what becomes of a plan


def _translated(plan: PrecisionPlan, names: Names) -> tuple[dict[str, str], str, list[str], list[str]]:
    """(path -> policy, the default policy, what no map can say, what else is lost)."""
    if plan.phases:
        raise PlanError(
            f"a Keras policy map holds for a whole run, and the plan has {len(plan.phases)} phases: "
            "convert plan.at_step(STEP)"
        )
    paths = _own_entries(plan) if names is None else paths_of(names)
    if names is not None:
        plan.check([name for name in paths if name])
    layers = plan.resolve(paths)
    default, mistake = nearest_policy(plan.default)
    policies = {name: nearest_policy(layer) for name, layer in layers.items()}
    mistakes: dict[str, list[str]] = {mistake: ["the default"]} if mistake else {}
    for name, (_, wrong) in policies.items():
        if wrong:
            mistakes.setdefault(wrong, []).append(repr(paths[name] or name))
    entries = {path: policies[name][0] for name, path in paths.items() if path is not None}
    pathless = [name for name, path in paths.items() if path is None and policies[name][0] != default]
    refused = [f"{wrong} ({_some(of)})" for wrong, of in mistakes.items()]
    return entries, default, refused, _lost(plan, layers, pathless, default)


def nearest_policy(layer: LayerPrecision) -> tuple[str, str]:
    """(name of the nearest Keras policy, what it cannot say: "" where it says all)."""
    compute = {"e4m3": "bf16", "e5m2": "bf16", "tf32": "fp32"}.get(layer.compute, layer.compute)
    if compute != layer.compute:
        return POLICIES[compute, "fp32"], f"compute {layer.compute}"
    if (compute, layer.params) not in POLICIES:
        return POLICIES[compute, "fp32"], f"parameters stored in {layer.params} under {compute}"
    return POLICIES[compute, layer.params], ""


def _lost(plan: PrecisionPlan, layers: Mapping[str, LayerPrecision], pathless: list[str], default: str) -> list[str]:
    lost = []
    auto = [name for name, layer in layers.items() if layer.compute in ("fp16", "bf16") and layer.policy == "autocast"]
    if auto:
        lost.append(
            f"policy 'autocast' of {_some(list(map(repr, auto)))}: Keras runs all of a layer in its compute dtype, "
            "where autocast keeps softmax, norms and losses in fp32"
        )
    if any(layer.params == "bf16" for layer in [*layers.values(), plan.default]):
        lost.append(
            "that bf16 variables still have to learn: on torch, Keras's Adam takes its bias correction in the dtype of "
            "the first variable, where beta_2=0.999 is 1 and every step 0; see with_fp32_variables(plan)"
        )
    if pathless:
        lost.append(
            f"{_some(list(map(repr, pathless)))} without a path, which the map does not reach: they take its default, "
            f"{default}; give them dtype= where they are made, or use apply_policies(model, plan)"
        )
    if plan.loss_scale:
        floor = plan.loss_scale.get("floor", 0.0)
        lost.append(
            "the loss scale: wrap the optimizer with loss_scaled(optimizer, plan)"
            + (f"; its floor of {floor:g} is lost even so, Keras's LossScaleOptimizer has none" if floor > 0 else "")
        )
    if plan.optimizer:
        lost.append("the advice for the optimizer")
    return lost


def _map(entries: Mapping[str, str], default: str) -> Any:
    """The shortest map that gives each path its policy: Keras takes every key for a regular expression, too."""
    keras = keras_module()
    wanted = {path: policy for path, policy in entries.items() if policy != default}
    keys = {path: path if _PLAIN.fullmatch(path) else re.escape(path) for path in wanted}
    return keras.dtype_policies.DTypePolicyMap(
        keras.DTypePolicy(default), {keys[path]: keras.DTypePolicy(policy) for path, policy in wanted.items()}
    )


def _own_entries(plan: PrecisionPlan) -> dict[str, str | None]:
    """Name -> path of the plan's own entries, for want of a model."""
    patterns = [key for key in plan.modules if is_pattern(key)]
    if patterns:
        raise PlanError(f"the plan has the pattern {patterns[0]!r}: which layers it stands for needs names=model")
    return {name: name.replace(".", "/") or None for name in plan.modules}


# what becomes of a map


def _layer(name: str, where: str, policy: str) -> LayerPrecision:
    for (compute, params), known in POLICIES.items():
        if name == known:
            return LayerPrecision(compute, policy="autocast" if compute == "fp32" else policy, params=params)
    words = ", ".join(POLICIES.values())
    raise PlanError(f"a plan has no word for the Keras policy {name!r} of {where!r}; it has one for {words}")


def _name_of(key: str) -> str:
    """A key as an entry of a plan; what it matches below it is what the entry decides, too."""
    if _PLAIN.fullmatch(key):
        return key.replace("/", ".")
    if key.endswith("/.*") and _PLAIN.fullmatch(key[:-3]):
        return key[:-3].replace("/", ".") + ".*"
    plain = re.sub(r"\\(.)", r"\1", key)
    if re.escape(plain) == key and not is_pattern(plain):
        return plain.replace("/", ".")
    raise PlanError(f"which layers the regular expression {key!r} stands for needs names=model")


def looked_up(policies: Any, path: str | None) -> Any:
    """The policy of a path, as Keras finds it."""
    keras = keras_module()
    if not isinstance(policies, keras.dtype_policies.DTypePolicyMap):
        return policies
    if path is None:
        return policies.default_policy
    try:
        return policies[path]
    except ValueError as error:
        raise PlanError(f"the policy map is ambiguous: {error}") from error
    except re.error as error:
        raise PlanError(f"a key of the policy map is no regular expression: {error}") from error


def _needed(found: Mapping[str, LayerPrecision], default: LayerPrecision, names: Names) -> dict[str, LayerPrecision]:
    """The entries that a plan needs for each name to have what was found: in a plan, unlike in a map, what has no entry
    takes its parent's. Layers without a path have the default."""
    if names is None:
        return dict(found)
    wanted = {name: found.get(name, default) for name in paths_of(names)}
    kept: dict[str, LayerPrecision] = {}
    for name in sorted(wanted, key=lambda name: (name.count(".") + bool(name), name)):
        parent, inherited = name, default
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in kept:
                inherited = kept[parent]
                break
        if wanted[name].precision != inherited.precision:
            kept[name] = wanted[name]
    return kept


# names and words


def paths_of(names: Names) -> dict[str, str | None]:
    """Name in a plan -> Keras path, None where the layer has none."""
    if hasattr(names, "dtype_policy"):
        if not getattr(names, "built", False):
            raise UsageError("the Keras model is not built, so that its layers have no paths yet: call it on a batch")
        return KerasLayers.of(names).paths
    run = getattr(names, "run", None)
    if isinstance(run, Mapping):
        if "paths" not in run.get("keras", {}):
            raise UsageError(
                f"{names.path} is no run of a Keras model: record it with RecordCallback, or give the model"
            )
        return dict(run["keras"]["paths"])
    if isinstance(names, Mapping):
        return dict(names)
    if hasattr(names, "named_modules"):
        raise UsageError(
            f"a policy map is for a Keras model, and this is a torch module ({type(names).__name__}): give the Keras "
            "model, a Profile of it, or the paths of its layers"
        )
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UsageError(
            f"names must be a Keras model, a Profile, a dict or a list of paths, not {type(names).__name__}"
        )
    return {name.replace("/", "."): name if "/" in name else name.replace(".", "/") for name in names}


def _allowed() -> str:
    return ", ".join(f"{compute} with params {params}" for compute, params in POLICIES)


def _some(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def keras_module() -> Any:
    """The module keras. Where nobody has chosen a backend, torch: policies are the same under each."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    return need("keras", "keras")
