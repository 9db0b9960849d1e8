"""What type checkers and editors see of precscope: the names that __init__.py loads when they are first used."""

from . import plotting
from .applying import apply as apply
from .comparison import compare as compare
from .comparison import verify as verify
from .confirmation import recommend as recommend
from .converting import convert as convert
from .emulation import emulate as emulate
from .errors import PrecscopeError as PrecscopeError
from .errors import RunError as RunError
from .errors import UsageError as UsageError
from .events import read_events as read_events
from .exporting import export as export
from .formats import FloatFormat as FloatFormat
from .formats import get_format as get_format
from .inference import infer as infer
from .kernels import summarize as summarize
from .plans import LayerPrecision as LayerPrecision
from .plans import PrecisionPlan as PrecisionPlan
from .plans import Reason as Reason
from .profiles import Profile as Profile
from .profiling import profile as profile
from .recording import Recorder as Recorder
from .recording import record as record
from .replaying import trace_step as trace_step
from .reporting import report as report
from .rounding import quantize as quantize
from .sites import Role as Role
from .sites import Site as Site
from .stats import TensorStats as TensorStats
from .tasks import Task as Task
from .tracing import trace as trace
from .training import TrainConfig as TrainConfig
from .training import TrainResult as TrainResult
from .training import train as train
from .training.guard import GuardConfig as GuardConfig
from .tuning import tune as tune

plot = plotting

__version__: str
__all__: list[str]
