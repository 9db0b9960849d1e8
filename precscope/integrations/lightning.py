"""Lightning: a Trainer's fit recorded, and trained with a plan, by Trainer or Fabric.

    from lightning.pytorch import Trainer
    from precscope.integrations.lightning import PlanPrecision, RecordCallback

    Trainer(callbacks=[RecordCallback("runs/a", every=10)], precision="bf16-mixed").fit(model, loader)
    Trainer(plugins=[PlanPrecision("plan.json")]).fit(model, loader)

    precision = FabricPlanPrecision("plan.json")                # a loop of your own, with Fabric
    fabric = Fabric(plugins=[precision])
    model, optimizer = fabric.setup(model, optimizer)
    with ps.record(model, "runs/b", optimizer=optimizer, scaler=precision.scaler) as rec:
        ...
        rec.step()

For `import pytorch_lightning` and `import lightning_fabric` the same classes are in
precscope.integrations.pytorch_lightning. Tested with lightning 2.6.6 on the CPU, in one process and in two (DDP).
"""

from __future__ import annotations

from .lightning_precision import FabricPlanned, Planned, TrainerPlanned
from .lightning_recording import Recording
from .missing import need

need("lightning.pytorch", "lightning", package="lightning")

from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

__all__ = ["FabricPlanPrecision", "PlanPrecision", "RecordCallback"]


class RecordCallback(Recording, Callback):
    __doc__ = Recording.__doc__


class PlanPrecision(TrainerPlanned, MixedPrecision):
    __doc__ = f"{TrainerPlanned.__doc__}\n\n{Planned.__doc__}"


class FabricPlanPrecision(FabricPlanned, FabricMixedPrecision):
    __doc__ = f"{FabricPlanned.__doc__}\n\n{Planned.__doc__}"
