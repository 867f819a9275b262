"""The packed weights of com.microsoft MatMulNBits (ONNX Runtime, ContribOperators.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The unsigned numbers in ``packed [..., bytes]``, lowest bits first: ``[..., bytes · 8 / bits]``."""
    if bits == 8:
        return packed
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    spread: npt.NDArray[np.uint8] = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(*packed.shape[:-1], -1)


def pack_nbits(codes: npt.NDArray[np.int8], bits: int, block: int) -> npt.NDArray[np.uint8]:
    """The codes of a matrix as MatMulNBits stores them where it has no zero points.

    Args:
        codes: ``[d_in, d_out]``, between −2^(bits−1) and 2^(bits−1) − 1.

    Returns:
        ``[d_out, blocks, block · bits / 8]``; inputs that fill the last block up have the code 0.
    """
    d_in, d_out = codes.shape
    columns = np.zeros((d_out, -(-d_in // block) * block), np.int16)
    columns[:, :d_in] = codes.T
    numbers: npt.NDArray[np.uint8] = (columns + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        numbers = (numbers[:, ::2] | (numbers[:, 1::2] << 4)).astype(np.uint8)
    return numbers.reshape(d_out, -1, block * bits // 8)


def dequantize_nbits(packed: npt.NDArray[Any], scales: npt.NDArray[Any], zeros: npt.NDArray[Any] | None,
                     d_in: int, d_out: int, bits: int, block: int) -> npt.NDArray[Any]:
    """The matrix a MatMulNBits multiplies by.

    Args:
        packed: ``[d_out, blocks, block · bits / 8]`` uint8.
        scales: ``[d_out · blocks]`` in the type of the result.
        zeros: packed uint8 ``[d_out, ceil(blocks · bits / 8)]``, or in the type of ``scales``, or None (2^(bits−1)).

    Returns:
        ``[d_in, d_out]``.
    """
    blocks = -(-d_in // block)
    numbers = unpack(packed.view(np.uint8).reshape(d_out, blocks, -1), bits).astype(np.float32)
    if zeros is None:
        shift: npt.NDArray[Any] = np.full((d_out, blocks), 1 << (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        shift = unpack(zeros.reshape(d_out, -1), bits)[:, :blocks].astype(np.float32)
    else:
        shift = zeros.reshape(d_out, blocks).astype(np.float32)
    values = (numbers - shift[..., None]) * scales.reshape(d_out, blocks, 1).astype(np.float32)
    return values.reshape(d_out, -1)[:, :d_in].T.astype(scales.dtype)
