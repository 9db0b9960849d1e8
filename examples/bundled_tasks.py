"""What real models would lose in fp16: the bundled tasks that are installed, a short recorded run of each.

    python examples/bundled_tasks.py                            # tiny sizes: seconds
    python examples/bundled_tasks.py text smollm2 --size small --steps 20

For each: the largest activation as a share of fp16's largest number, 65,504, and how much of the activations' gradients
fp16 would flush to zero, without a loss scale and with 65,536. Nothing of that needs a run in fp16: it is asked of the
ranges that a run in bf16 left behind.
"""

from __future__ import annotations

import argparse
import tempfile

import precscope as ps
from precscope.bundled import TASKS
from precscope.tasks import sized

LIGHT = ("gpt", "resnet", "moe", "diffusion", "towers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(LIGHT), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    print(f"{'task':10} {'loss':>14}  {'largest activation':>24}  {'flushed':>8} {'scaled':>8}")
    for name in arguments.tasks:
        missing = TASKS[name].missing()
        if missing:
            print(f"{name:10} needs {'; '.join(missing)}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            profile = ps.profile(
                sized(name, arguments.size), out=folder, steps=arguments.steps, precision="bf16", every=4,
                shadow_every=None, costs=False, progress=None,
            )  # fmt: skip
            losses = profile.train.loss
            print(f"{name:10} {losses.iloc[0]:6.2f} to {losses.iloc[-1]:4.2f}  {describe(profile)}")


def describe(profile: ps.Profile) -> str:
    """Largest activation and shares of gradients flushed (each site counted by its elements), in columns."""
    fp16 = ps.get_format("fp16")
    activations = profile.ask(fp16, roles=["output"])
    worst = activations.loc[activations.amax.idxmax()]
    shares = []
    for exponent in (0, 16):  # times 2^0 and 2^16
        gradients = profile.ask(fp16, scale_exponent=exponent, roles=["grad_output"])
        shares.append((gradients.flushed * gradients["count"]).sum() / gradients["count"].sum())
    place = f"{worst.module or 'the model'} {worst.amax:.3g}"
    return f"{place[-18:]:>18} {worst.amax / fp16.max:5.1%}  {shares[0]:8.2%} {shares[1]:8.2%}"


if __name__ == "__main__":
    main()
