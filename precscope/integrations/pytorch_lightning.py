"""The classes of precscope.integrations.lightning for `import pytorch_lightning` and `import lightning_fabric`.

The two distributions hold the same code under two names, and neither takes the other's classes.
Tested with pytorch-lightning 2.6.6 on the CPU.
"""

from __future__ import annotations

from .lightning_precision import FabricPlanned, Planned, TrainerPlanned
from .lightning_recording import Recording
from .missing import need

need("pytorch_lightning", "lightning", package="pytorch-lightning")

from lightning_fabric.plugins import MixedPrecision as FabricMixedPrecision  # noqa: E402
from pytorch_lightning import Callback  # noqa: E402
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

__all__ = ["FabricPlanPrecision", "PlanPrecision", "RecordCallback"]


class RecordCallback(Recording, Callback):
    __doc__ = Recording.__doc__


class PlanPrecision(TrainerPlanned, MixedPrecision):
    __doc__ = f"{TrainerPlanned.__doc__}\n\n{Planned.__doc__}"


class FabricPlanPrecision(FabricPlanned, FabricMixedPrecision):
    __doc__ = f"{FabricPlanned.__doc__}\n\n{Planned.__doc__}"
