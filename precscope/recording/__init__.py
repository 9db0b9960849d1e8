"""Recording: hooks on modules, tensors and optimizers that reduce every tensor they see to statistics.

`record` is the entry; recorder.py owns the life cycle, watcher.py the hooks on modules and tensors, updates.py those
on optimizers, observations.py the rows of statistics until they are written, graph.py what is known of the model.
"""

from .recorder import Recorder, record

__all__ = ["Recorder", "record"]
