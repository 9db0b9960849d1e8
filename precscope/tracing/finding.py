"""What the tracer found: one op, its inputs and outputs, and why, as plain values that hold no tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["overflow", "invalid", "exception", "held"]


@dataclass(frozen=True)
class TensorRange:
    """The values of one tensor. dtype: short format name ("fp16"). amax, amin_nonzero, low, high: over the finite
    values (amax and amin_nonzero of magnitudes; 0.0 where there are none). zeros, nan, pos_inf, neg_inf: counts."""

    shape: tuple[int, ...]
    dtype: str
    count: int
    amax: float
    amin_nonzero: float
    low: float
    high: float
    zeros: int
    nan: int
    pos_inf: int
    neg_inf: int

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return not (self.nan or self.pos_inf or self.neg_inf)

    @property
    def share_inf(self) -> float:
        """Share of the elements that are +inf or -inf."""
        return (self.pos_inf + self.neg_inf) / max(1, self.count)

    @property
    def share_nan(self) -> float:
        """Share of the elements that are NaN."""
        return self.nan / max(1, self.count)

    @property
    def losses(self) -> str:
        """How many of the elements are not finite, in words: "3 NaN, 8 inf"."""
        counts = ((self.nan, "NaN"), (self.pos_inf, "inf"), (self.neg_inf, "-inf"))
        return ", ".join(f"{n} {word}" for n, word in counts if n)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        parts = [f"{self.dtype} {shape}", f"amax {self.amax:.4g}", f"smallest {self.amin_nonzero:.3g}"]
        return ", ".join([*parts, *([self.losses] if self.losses else [])])


@dataclass(frozen=True)
class Finding:
    """The op that made non-finite values out of finite ones (or raised), and the likely cause.

    kind: "overflow" (the result is beyond the format, or infinite in any format), "invalid" (NaN), "exception" (the op
    raised: its values are not representable), "held" (no op: a parameter, a buffer or the batch held it beforehand).
    op: such as "aten.pow.Tensor_Scalar", "" for kind "held". module, call, phase, node, inside, recompute: see
    `attribution.Where`. line: of the user's code; in backward of the forward op. inputs, outputs: floating tensors.
    format, limit: of the output that is not finite, and its largest finite value. wide_amax: the largest magnitude of
    the result in fp32 (fp64 for fp32), None where it could not be had. loss_scale: in backward, where one is known.
    cause: the likely cause, in words and numbers. error: the message of the exception.
    """

    module: str
    call: int
    op: str
    phase: Literal["forward", "backward"]
    kind: Kind
    cause: str
    line: str | None = None
    node: str = ""
    inside: bool = True
    recompute: bool = False
    inputs: tuple[TensorRange, ...] = ()
    outputs: tuple[TensorRange, ...] = ()
    format: str = ""
    limit: float = float("nan")
    wide_amax: float | None = None
    loss_scale: float | None = None
    error: str = ""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs."""
        return tuple(i.shape for i in self.inputs)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Formats of the inputs."""
        return tuple(i.dtype for i in self.inputs)

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        """What two findings that are the same one share: module, call, op, phase, autograd node."""
        return self.module, self.call, self.op, self.phase, self.node

    @property
    def place(self) -> str:
        """Where, in words: "blocks.1.norm, forward"."""
        name = self.module or ("(root)" if self.inside else "(outside every module)")
        call = f", call {self.call}" if self.call else ""
        again = ", recomputed" if self.recompute else ""
        node = f" in {self.node}" if self.node else ""
        return f"{name}{call}, {self.phase}{again}{node}"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON and saved steps."""
        return {
            **asdict(self),
            "inputs": [asdict(i) for i in self.inputs],
            "outputs": [asdict(o) for o in self.outputs],
        }

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.op}" if self.op else self.place, f"  cause   {self.cause}"]
        if self.line:
            lines.append(f"  line    {self.line}")
        lines += [f"  input   {i}" for i in self.inputs]
        lines += [f"  output  {o}" for o in self.outputs]
        if self.error:
            lines.append(f"  error   {self.error}")
        return "\n".join(lines)
