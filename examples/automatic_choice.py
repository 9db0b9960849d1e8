"""Automatic choice of format, loss scale and gradient accumulation from a short profile.

One call profiles some steps, lets the plan be confirmed on the model, times whole training steps in fp32, plain
autocast and the plan, adds up the gradients of as many micro-batches as a step takes, and says what to do and why. What
it says depends on the machine: on CPUs without low-precision units the honest answer is "stay with fp32".

    python examples/automatic_choice.py        # or: precscope tune gpt --effective-batch 64 --memory 4GiB
"""

import functools

import precscope as ps
from precscope.training.tasks.gpt import gpt

make = functools.partial(gpt, "tiny")  # 2 layers, 32 wide, batches of 4 sequences; gpt() is the real one

if __name__ == "__main__":
    tuning = ps.tune(make, steps=16, effective_batch=16, memory="100MB", train_steps=60, rounds=1, trial_steps=8)
    print(tuning)
    print(f"\naccumulate {tuning.accumulate} x {tuning.examples} sequences; as a command: {tuning.command}")
    result = ps.train(make, **tuning.settings)
    print(f"trained {result.steps} steps in {result.precision}: held-out loss {result.eval_loss:.3f}")
