"""Who is running an op: which module, in which call, forward or backward, and on which line of the user's code.

    with Attribution(model, lines=True) as who, SomeDispatchMode(who):     # which asks who.where() at each op
        loss(model, batch).backward()

Forward: hooks on every module keep a stack of the calls that run. Backward: autograd numbers its nodes in the order in
which they are made, so that the sequence number of the node that runs says between which two module boundaries of the
forward pass it was made. Nothing is kept per op but, where asked for, its line; the hooks only read.

What runs inside backward and yet is forward, the recomputation of activation checkpointing, is attributed to the module
that is recomputed, phase "forward", with `recompute` set. Code outside every module, mostly the loss function, has the
module "" like the root, and `inside` False.
"""

from .attributor import Attribution, Where, unwrap

__all__ = ["Attribution", "Where", "unwrap"]
