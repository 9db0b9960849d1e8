"""From an exported program to an ONNX file, and that file run by onnxruntime.

torch.onnx turns the casts of the graph into Cast nodes and folds those of weights, so that these lie in the file in
the dtype they are used in. ONNX Runtime rounds at other places than PyTorch (where it has no fp16 kernel on a CPU it
computes in fp32 between two casts): equal bits cannot be asked for, but an error no larger than formats explain can.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from ..errors import ModelError, RunError, first_line

_FP = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}

_NEWER = 23  # from 22 on, convolutions and more take bf16


def need_packages() -> None:
    """Raises RunError naming the packages that ONNX export needs, where one is missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise RunError(f"ONNX export needs {' and '.join(missing)}: pip install onnx onnxscript (and onnxruntime)")


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


def runtime_name() -> str:
    """ "onnxruntime 1.20 on the CPU"."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} on the CPU"


def write(program: ExportedProgram, path: Path, *, opset: int | None, about: dict[str, str]) -> Any:
    """Write `program` to `path` and return its ModelProto, weights included where they are below 2 GB.

    Optimised by onnxscript, unless the result is not valid ONNX; in a newer opset where it is not in torch's default
    one either, and none was asked for. about: kept in the file's metadata. Raises ModelError where torch cannot convert
    the program, or not to this opset.
    """
    problem: Exception = ModelError("")
    for optimize, version in dict.fromkeys(((True, opset), (False, opset), (False, opset or _NEWER))):
        with _quiet():
            try:
                made = torch.onnx.export(program, dynamo=True, verbose=False, optimize=optimize, opset_version=version)
            except Exception as error:  # torch.onnx raises many kinds
                problem = error
                continue
        assert made is not None
        made.model.metadata_props.update(about)
        made.save(str(path))
        if (proto := _valid(path)) is not None:
            _check_opset(proto, opset)
            return proto
    cause = problem.__cause__ or problem  # torch.onnx tells its steps in several lines, with the reason behind
    raise ModelError(
        f"torch.onnx cannot convert this model ({first_line(cause):.200}): export it to a .pt2 file instead"
    )


def _check_opset(proto: Any, wanted: int | None) -> None:
    """Raises ModelError for another opset than the one asked for: torch.onnx keeps its own where it cannot convert."""
    own = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if wanted is not None and own is not None and own != wanted:
        raise ModelError(
            f"torch.onnx cannot write this model in opset {wanted}, only in {own}: leave opset= (--opset) out, or ask "
            "for a newer one"
        )


def _valid(path: Path) -> Any:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception:  # a checker error, or one of shape inference
        return None
    return onnx.load(str(path), load_external_data=False)


def run(path: Path, arguments: Any) -> list[Tensor]:
    """What onnxruntime returns on the CPU. Raises RunError where it cannot run the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        values = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        feed = {i.name: v.detach().cpu().numpy() for i, v in zip(session.get_inputs(), values, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feed)]
    except Exception as error:  # onnxruntime has error classes of its own for each status
        raise RunError(f"{runtime_name()} cannot run it ({first_line(error):.200})") from error


def casts(proto: Any) -> dict[str, int]:
    """Cast nodes by the floating dtype they lead to."""
    import onnx

    kinds = onnx.TensorProto.DataType
    graphs = [proto.graph, *proto.functions]
    to = [a.i for g in graphs for n in g.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"]
    return dict(Counter(_FP[kinds.Name(k)] for k in to if kinds.Name(k) in _FP))


def weights(proto: Any) -> dict[str, int]:
    """Bytes of initializers by dtype."""
    import numpy as np
    import onnx

    found: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        found[_FP.get(kind, kind.lower())] += int(np.prod(tensor.dims, dtype=np.int64)) * size
    return dict(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the logs of torch.onnx and onnxscript (what they lack, what they tried) and warnings about their insides.
    What fails is told by exceptions, and by `_check_opset`."""
    loggers = {logging.getLogger("torch.onnx"): logging.ERROR, logging.getLogger("onnxscript"): logging.CRITICAL}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
