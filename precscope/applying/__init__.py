"""Put a precision plan on a model, and take it off again.

    with ps.apply(plan, model):              # or: handle = ps.apply(plan, model); ...; handle.remove()
        loss(model(x)).backward()

How. Every module that has a forward gets an instance attribute `forward`, bound to the module (so that deepcopy binds
the copy's to the copy). Classes, parameters and state_dict keys stay. Modules of equal precision that lie within each
other form a *region*; the outermost one that is called sets the autocast state, those inside leave it alone. So a
module's own `with torch.autocast(enabled=False)` keeps its meaning, and a module called past its parent's forward still
runs as planned. Outputs stay in the format they have: whoever takes them casts on entry, so that neighbours of equal
precision exchange tensors without a cast. But what a low module returns into the code of an fp32 one is cast up, and
so is what it returns into code under autocast of the other 16-bit dtype: neither can mix them. A parametrization's
weight is cast to what the module around it computes in under "cast".

    compute        within the region
    fp32, tf32     autocast off; low inputs cast up to fp32 (fp64 stays); tf32 sets the CUDA switch for the forward
    autocast       torch.autocast of the dtype; 16-bit inputs of another dtype cast up to fp32
    cast           autocast off; floating inputs, parameters and buffers in the dtype, without a copy where stored in it
    e4m3, e5m2     bf16, with the operands and output gradients of linear and convolution modules rounded; e4m3 products
                   of linear modules run in 8 bits where the device has them (`scaled`), else they are emulated

Parameters are *stored* as the plan says: converted in place (`p.data`), the unrounded values kept aside. Where storage
and compute differ, the forward sees cast tensors in place of the stored ones; autograd leads gradients back to those.
BatchNorm in fp32 storage stays fp32 inside low regions: its kernels take low inputs, and running statistics need it.
Of an embedding under "cast" with fp32 storage the rows are cast, not the table (`lookups`). There, on CPUs, attention
of up to 512 keys is computed in bf16 by its definition, softmax included, not by PyTorch's fused kernel (`attention`).
No cast is kept from one forward to the next: edits of parameters by any means are seen.

Two threads must not run the forward of one planned model at once.
"""

from __future__ import annotations

from ..plans import casts
from .handle import PlanHandle, apply, remove
from .layout import RegionRun

__all__ = ["PlanHandle", "RegionRun", "apply", "casts", "remove"]
