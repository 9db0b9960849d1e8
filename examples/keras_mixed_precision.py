"""Keras 3 on torch: record `fit`, recommend, train with the plan's policy map beside Keras's own mixed_bfloat16.

    python examples/keras_mixed_precision.py              # --steps 200 --seeds 3 --all-bf16

The classifier of the introductions, on scikit-learn's 8x8 digits. Needs keras and scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
from keras import layers
from sklearn.datasets import load_digits

import precscope as ps
from precscope.converting.kerasapply import with_fp32_variables
from precscope.converting.kerasmap import from_policy_map, left_out, to_policy_map
from precscope.integrations.keras import RecordCallback

TRAIN, BATCH = 1400, 64


def make(policy, seed: int):
    """The model, whose layers take their precision from the global policy: a name, or a policy map."""
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, padding="same", name="conv"),
        layers.BatchNormalization(momentum=0.9, name="norm"),
        layers.Activation("relu", name="relu"),
        layers.MaxPooling2D(name="pool"),
        layers.Flatten(name="flat"),
        layers.Dense(64, activation="relu", name="hidden"),
        layers.Dense(10, name="logits"),
    ], name="net")  # fmt: skip
    keras.config.set_dtype_policy("float32")
    return model


def train(policy, seed: int, epochs: int, callbacks=()):
    """(model, held-out accuracy) after `epochs`."""
    digits = load_digits()
    x, y = (digits.images / 16).astype("float32")[..., None], digits.target
    model = make(policy, seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss=loss, metrics=["accuracy"])
    model.fit(x[:TRAIN], y[:TRAIN], batch_size=BATCH, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model, float(model.evaluate(x[TRAIN:], y[TRAIN:], verbose=0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--all-bf16", action="store_true", help="also with bf16 variables, and why that fails")
    settings = parser.parse_args()
    epochs, seeds = max(1, settings.steps * BATCH // TRAIN), range(settings.seeds)

    with tempfile.TemporaryDirectory() as folder:
        model, _ = train("float32", 0, epochs, [RecordCallback(f"{folder}/fp32", every=10)])
        plan = ps.recommend(ps.Profile.load(f"{folder}/fp32"), formats=("bf16", "fp32"), policy="cast")
        plan = with_fp32_variables(plan)
        logits = ps.LayerPrecision(
            "fp32", reasons=("the loss is to see fp32 logits",)
        )  # one's own wish, as Keras advises
        plan = plan.replace(modules={**plan.modules, "logits": logits})
        print(plan)

        policies = to_policy_map(plan, names=model)
        again = from_policy_map(policies, names=model)
        assert all(again[name].precision == plan[name].precision for name in ("", "conv", "norm", "hidden", "logits"))
        print(f"\n{policies.default_policy.name}, but {', '.join(f'{k}: {v.name}' for k, v in policies.items())}")
        for sentence in left_out(plan, names=model):
            print(f"the map does not carry {sentence}")

        print()
        for name, policy in {
            "float32": "float32",
            "mixed_bfloat16": "mixed_bfloat16",
            "the plan's map": policies,
        }.items():
            found = [train(policy, seed, epochs)[1] for seed in seeds]
            print(f"{name:<16} held-out accuracy {statistics.mean(found):.1%}")

        if settings.all_bf16:
            _, found = train("bfloat16", 0, epochs, [RecordCallback(f"{folder}/bf16", every=10)])
            rows = ps.Profile.load(f"{folder}/bf16").ask("bf16")
            updates = rows[(rows.role == "update") & rows.module.isin(["conv", "hidden", "logits"])]
            print(f"{'bfloat16':<16} held-out accuracy {found:.1%}; largest update of Adam {updates.amax.max():g}")


if __name__ == "__main__":
    main()
