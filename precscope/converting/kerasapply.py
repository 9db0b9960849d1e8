"""Keras policies on a model that is built, and the loss scale that goes with them.

    plan = with_fp32_variables(plan)
    with apply_policies(model, plan):                # or a DTypePolicyMap; or handle = ...; handle.remove()
        model.compile(loss_scaled(keras.optimizers.Adam(), plan), loss=...)
        model.fit(...)

Tested with keras 3.15.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..integrations.keras_layers import KerasLayers
from ..plans import LayerPrecision, PrecisionPlan
from .kerasmap import keras_module, looked_up, nearest_policy, paths_of, to_policy_map

if TYPE_CHECKING:
    from .kerasmap import Names


class AppliedPolicies:
    """Policies on a model. Ends with `remove()` or with its `with` block; changed: layers whose policy is another."""

    def __init__(self, before: list[tuple[Any, Any]]) -> None:
        self._before = before
        self.changed = len(before)

    def remove(self) -> None:
        """Give each layer the policy that it had. Again: nothing."""
        for layer, policy in self._before:
            layer._dtype_policy = policy
        self._before = []

    def __enter__(self) -> AppliedPolicies:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply_policies(model: Any, policies: Any) -> AppliedPolicies:
    """Let the layers of a built Keras model compute as a DTypePolicyMap, a policy or a plan says, from now on.

    The model trains bit for bit as one that was built under these policies. Compile it afterwards where it has fp16
    layers (see `loss_scaled`), and again where it was compiled with jit_compile. policies: a plan also reaches layers
    that have no path. Variables stay as they are stored.

    Raises UsageError for a model that is not built, and where the storage of a layer would change: it is fixed when a
    layer is built, so that such a model is to be made anew under keras.config.set_dtype_policy(policies). Raises
    PlanError as `to_policy_map` does, and where the plan does not fit the model.
    """
    keras = keras_module()
    layers = KerasLayers.of(model)
    if not getattr(model, "built", False):
        raise UsageError("the model has no layers to look up yet: build it, or call it on a batch, first")
    if isinstance(policies, PrecisionPlan):
        to_policy_map(policies, names=model)  # refuses what Keras cannot say
        chosen = {name: keras.DTypePolicy(nearest_policy(policies[name])[0]) for name in layers.paths}
    else:
        policies = keras.dtype_policies.get(policies)
        chosen = {name: looked_up(policies, path) for name, path in layers.paths.items()}
    before = []
    for layer, name in {**layers.names, **layers.skipped}.items():
        if not hasattr(layer, "dtype_policy") or not keras.backend.is_float_dtype(layer.compute_dtype):
            continue  # a torch module inside a layer; layers of words and categories
        policy = chosen[name]
        _check_storage(layer, layers.paths[name] or name, policy)
        if (layer.compute_dtype, layer.variable_dtype) != (policy.compute_dtype, policy.variable_dtype):
            before.append((layer, layer._dtype_policy))
    for layer, _ in before:  # the setter would write into a map that other layers share
        layer._dtype_policy = chosen[layers.names.get(layer, layers.skipped.get(layer, ""))]
    return AppliedPolicies(before)


def with_fp32_variables(plan: PrecisionPlan) -> PrecisionPlan:
    """The same plan with all parameters stored in fp32: Keras's mixed policies, in place of "bfloat16" and "float16",
    and the only ones that a built fp32 model can take."""

    def stored(layer: LayerPrecision) -> LayerPrecision:
        return layer.model_copy(update={"params": "fp32"})

    return plan.replace(default=stored(plan.default), modules={k: stored(v) for k, v in plan.modules.items()})


def loss_scaled(optimizer: Any, plan: PrecisionPlan, *, names: Names = None) -> Any:
    """`optimizer` in a keras LossScaleOptimizer with the plan's initial scale and growth interval, where the plan
    computes in fp16 anywhere; else `optimizer` itself. The plan's floor is lost: Keras halves a scale without one."""
    keras = keras_module()
    layers = list(plan.resolve(paths_of(names)).values()) if names is not None else list(plan.modules.values())
    if not any(layer.compute == "fp16" for layer in [*layers, plan.default]):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(
        optimizer,
        initial_scale=plan.loss_scale.get("initial", 2.0**15),
        dynamic_growth_steps=plan.loss_scale.get("growth_interval", 2000),
    )


def _check_storage(layer: Any, where: str, policy: Any) -> None:
    """Raise where `policy` asks for more than another compute dtype."""
    if policy.quantization_mode is not None:
        raise UsageError(f"{where} would be quantised by {policy.name!r}, which is no precision to train in")
    stored = {v.dtype for v in [*layer._trainable_variables, *layer._non_trainable_variables]}
    if layer.variable_dtype in stored and policy.variable_dtype != layer.variable_dtype:
        raise UsageError(
            f"{where} stores its variables in {layer.variable_dtype} and would have to in {policy.variable_dtype}: "
            "that is fixed when a layer is built; make the model anew under keras.config.set_dtype_policy(policies)"
        )
