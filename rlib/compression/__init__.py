"""Codecs: what travels is really packed, and its bytes are its cost."""

from rlib.compression.bits import (
    count_true,
    pack_bits,
    pack_codes,
    packed_shape,
    unpack_bits,
    unpack_codes,
)
from rlib.compression.codec import (
    Codec,
    Dense,
    Identity,
    decode_tree,
    encode_tree,
    payload_bytes,
)
from rlib.compression.lowrank import LowRank, LowRankPayload
from rlib.compression.quantize import (
    NaturalCompression,
    NaturalPayload,
    QuantizedPayload,
    StochasticQuantization,
)
from rlib.compression.sign import ScaledSign, SignPayload
from rlib.compression.sparse import RandK, SeededPayload, SparsePayload, TopK

__all__ = [
    "Codec",
    "Dense",
    "Identity",
    "LowRank",
    "LowRankPayload",
    "NaturalCompression",
    "NaturalPayload",
    "QuantizedPayload",
    "RandK",
    "ScaledSign",
    "SeededPayload",
    "SignPayload",
    "SparsePayload",
    "StochasticQuantization",
    "TopK",
    "count_true",
    "decode_tree",
    "encode_tree",
    "pack_bits",
    "pack_codes",
    "packed_shape",
    "payload_bytes",
    "unpack_bits",
    "unpack_codes",
]
