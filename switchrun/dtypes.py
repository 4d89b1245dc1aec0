"""Names and sizes of number formats, without torch.

A *stored* dtype is what a checkpoint's bytes are, named as safetensors does (`F32`). A *compute* dtype is what
`--dtype` asks for (`fp32`).
"""

from __future__ import annotations

from enum import StrEnum

from switchrun.errors import UsageError

#: Bytes of one element, by safetensors' name of the format.
STORED_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

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


class DtypeChoice(StrEnum):
    """What `--dtype` takes."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


def resolve_dtype(choice: str, stored: str) -> Dtype:
    """Decide what to compute in.

    Args:
        choice: `auto` (as stored), `fp32` or `bf16`.
        stored: The safetensors name of the format that the experts are stored in.

    Returns:
        The compute dtype. fp16 is never computed in (T5's activations overflow it): `auto` takes fp32, which keeps
        every stored bit.

    Raises:
        UsageError: `int8`, which is not there yet, or an unknown name.
    """
    if choice == DtypeChoice.INT8:
        raise UsageError("--dtype int8 is not supported yet", "use bf16 or fp32")
    if choice == DtypeChoice.AUTO:
        return Dtype.BF16 if stored == "BF16" else Dtype.FP32
    try:
        return Dtype(choice)
    except ValueError:
        raise UsageError(f"'{choice}' is not a dtype", "use auto, fp32 or bf16") from None
