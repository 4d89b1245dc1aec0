"""Names and sizes of number formats, without torch.

A *stored* dtype is what a checkpoint's bytes are, named as safetensors does (`F32`). A *compute* dtype is what
`--dtype` asks for (`fp32`), unless it asks for a *packed* one (`int8`), which only matrices are kept in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from switchrun.errors import UsageError

#: Bytes of one element, by safetensors' name of the format.
STORED_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

#: What a matrix is stored in that QMoE compressed: codes, where each row's begin, and each row's extremes.
QMOE = "QMOE"

#: What people call what is stored.
STORED_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8", QMOE: "qmoe"}

#: The formats that a weight of a model may be stored in, and torch's names of them.
WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Dtype(StrEnum):
    """What the model computes in."""

    FP32 = "fp32"
    BF16 = "bf16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is Dtype.FP32 else 2

    @property
    def stored(self) -> str:
        """The safetensors name of the same format."""
        return "F32" if self is Dtype.FP32 else "BF16"

    @property
    def torch_name(self) -> str:
        """The name of the attribute of `torch`."""
        return WEIGHT_DTYPES[self.stored]


class PackedDtype(StrEnum):
    """What experts can be kept in to take few bytes; they are unpacked as they are multiplied with."""

    INT8 = "int8"
    NF4 = "nf4"


@dataclass(frozen=True, slots=True)
class Precision:
    """What `--dtype` comes to for one checkpoint.

    Attributes:
        compute: What everything is computed in, and what is not packed kept in.
        packed: What experts are kept in; None is the compute dtype. With either packed dtype, linear layers outside
            the experts are kept in int8.
        qmoe: Whether experts are kept as a QMoE checkpoint has them; then nothing is packed.
    """

    compute: Dtype
    packed: PackedDtype | None = None
    qmoe: bool = False

    @property
    def few_bits(self) -> bool:
        """Whether experts are kept in fewer bits than they are computed in."""
        return self.qmoe or self.packed is not None

    @property
    def name(self) -> str:
        """What the user calls it: `bf16`, `int8`, `qmoe`."""
        return QMOE.lower() if self.qmoe else (self.packed or self.compute).value


class DtypeChoice(StrEnum):
    """What `--dtype` takes."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    NF4 = "nf4"


def resolve_dtype(choice: str, stored: str, plain: str | None = None) -> Precision:
    """Decide what to compute in, and what experts are kept in.

    `auto` is `plain`, safetensors' name of what a checkpoint is computed in by its own account (`plain_dtype`), or
    `stored`, what its experts are stored in, which is `I8` for a model in 8 bit. fp16 is never computed in (T5's
    activations overflow it): `auto` takes fp32, which keeps every stored bit. With packed experts, everything else is
    as `auto`. Experts that are stored as `QMOE` stay so, whatever is computed in.

    Raises:
        UsageError: An unknown name, or another precision for a model in 8 bit or compressed by QMoE.
    """
    as_stored = Dtype.BF16 if (plain or stored) in ("BF16", QMOE) else Dtype.FP32
    try:
        wanted = DtypeChoice(choice)
    except ValueError:
        *names, last = DtypeChoice
        raise UsageError(f"'{choice}' is not a dtype", f"use {', '.join(names)} or {last}") from None
    if stored == "I8":
        if wanted not in (DtypeChoice.AUTO, DtypeChoice.INT8):
            raise UsageError(
                f"this model is stored in int8, so it cannot be had in {wanted.value}: what was rounded off is lost",
                "leave out --dtype, or give the original checkpoint",
            )
        return Precision(as_stored, PackedDtype.INT8)
    if stored == QMOE and wanted in (DtypeChoice.INT8, DtypeChoice.NF4):
        raise UsageError(
            f"this model's experts are compressed by QMoE to less than a bit a weight: {wanted.value} would only "
            "make them larger",
            "leave out --dtype, or use bf16 or fp32 for what is computed",
        )
    if stored == QMOE:
        return Precision(as_stored if wanted is DtypeChoice.AUTO else Dtype(wanted.value), qmoe=True)
    if wanted is DtypeChoice.AUTO:
        return Precision(as_stored)
    if wanted in (DtypeChoice.INT8, DtypeChoice.NF4):
        return Precision(as_stored, PackedDtype(wanted.value))
    return Precision(Dtype(wanted.value))
