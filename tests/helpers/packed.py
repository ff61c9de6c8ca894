"""Packed matrices as tests look at them, whether they travel (a dict) or not."""

from fedspallm_appfl.wire.packed import Packed


def as_packed(packed):
    """What travels under the name of a matrix, nothing compressed, as an object."""
    if isinstance(packed, Packed):
        return packed
    return Packed(tuple(packed["shape"]), packed.get("mask"), packed.get("values"))


def unpack(packed):
    """(weight (O, I), zero where pruned; mask (O, I) bool)."""
    return as_packed(packed).unpack_weight(), as_packed(packed).unpack_mask()


def unpack_mask(packed):
    return as_packed(packed).unpack_mask()


def parts(packed):
    """Names of what is there."""
    return set(packed.to_dict())


def matrices(update):
    """All (block, name, what travels) of an update."""
    return [
        (int(block), name, packed) for block, linears in update["blocks"].items() for name, packed in linears.items()
    ]
