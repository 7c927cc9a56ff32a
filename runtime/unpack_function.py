"""The functions of the packed form: standard operators that make a packed weight dense again.

A file that holds packed weights brings these functions along, so any onnxruntime runs it: it puts
the body in place of each node and computes it while loading. A runtime that knows the functions by
name need not. Domain `elsa`, version 1; their text is in docs/packed-format.md.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

DOMAIN = "elsa"
VERSION = 1
LEAST_OPSET = 13  # of the bodies
LEAST_OPSET_INT4 = 21  # which has int4
_UNSET = -(1 << 31)  # with every position added it stays below 0


@dataclass(frozen=True)
class Variant:
    """Which of the functions: what differs in a weight.

    Attributes:
        int4: values are int4, two to a byte.
        cut: the number of entries is no multiple of 8.
        transposed: the node gives the transpose of the matrix that was packed.
    """

    int4: bool = False
    cut: bool = False
    transposed: bool = False

    @property
    def name(self) -> str:
        """UnpackTransposed, for one."""
        parts = (("Int4", self.int4), ("Cut", self.cut), ("Transposed", self.transposed))
        return "Unpack" + "".join(part for part, there in parts if there)


VARIANTS = {
    each.name: each
    for each in (Variant(*map(bool, (number & 4, number & 2, number & 1))) for number in range(8))
}


def function(variant: Variant, opset: int) -> Any:
    """The FunctionProto of a variant, for a model of this version of the standard operators."""
    from onnx import helper

    made = [
        *_constants(variant),
        helper.make_node("Cast", ["mask"], ["bytes"], to=6),
        helper.make_node("Gather", ["counts", "bytes"], ["count"]),
        helper.make_node("CumSum", ["count", "zero"], ["before"], exclusive=1),
        helper.make_node("Reshape", ["before", "column"], ["base"]),
        helper.make_node("Gather", ["places", "bytes"], ["place"]),
        helper.make_node("Add", ["place", "base"], ["shifted"]),
        helper.make_node("Max", ["shifted", "zero"], ["position"]),
    ]
    values = "values"
    if variant.int4:
        made += [
            helper.make_node("Cast", ["values"], ["pairs"], to=6),
            helper.make_node("Gather", ["nibbles", "pairs"], ["halves"]),
            helper.make_node("Reshape", ["halves", "flat"], ["whole"]),
        ]
        values = "whole"
    made.append(helper.make_node("Gather", [values, "position"], ["eights"]))
    last = "eights"
    if variant.cut:
        made += [
            helper.make_node("Reshape", ["eights", "flat"], ["line"]),
            helper.make_node("ReduceProd", ["shape"], ["entries"], keepdims=1),
            helper.make_node("Slice", ["line", "first", "entries"], ["kept"]),
        ]
        last = "kept"
    steps: list[tuple[str, list[str], dict[str, Any]]] = [("Reshape", [last, "shape"], {})]
    if variant.transposed:
        steps.append(("Transpose", [], {"perm": [1, 0]}))
    if variant.int4:
        steps.append(("Cast", [], {"to": 22}))
    for number, (op, reads, attributes) in enumerate(steps):
        end = number == len(steps) - 1
        output = "weight" if end else f"step{number}"
        made.append(helper.make_node(op, reads or [last], [output], **attributes))
        last = output
    return helper.make_function(
        DOMAIN,
        variant.name,
        ["mask", "values"],
        ["weight"],
        made,
        [helper.make_opsetid("", opset)],
        ["shape"],
    )


def _constants(variant: Variant) -> list[Any]:
    """The tables and numbers that the body reads."""
    from onnx import AttributeProto, helper, numpy_helper

    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    places = np.where(bits, bits.cumsum(axis=1), _UNSET).astype(np.int32)
    held = {
        "places": places,
        "counts": bits.sum(axis=1).astype(np.int32),
        "zero": np.array(0, np.int32),
        "column": np.array([-1, 1], np.int64),
    }
    if variant.int4 or variant.cut:
        held["flat"] = np.array([-1], np.int64)
    if variant.cut:
        held["first"] = np.array([0], np.int64)
    if variant.int4:
        halves = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)
        held["nibbles"] = ((halves ^ 8) - 8).astype(np.int8)
    made = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
        for name, array in held.items()
    ]
    shape = helper.make_node("Constant", [], ["shape"])
    reference = shape.attribute.add()
    reference.name, reference.type, reference.ref_attr_name = (
        "value_ints",
        AttributeProto.INTS,
        "shape",
    )
    return [*made, shape]


def is_ours(found: Any, opset: int) -> bool:
    """Whether a FunctionProto under one of our names computes exactly what ours does.

    Names of nodes, comments and types that other tools add are of no account.
    """
    return _bare(found) == _bare(function(VARIANTS[found.name], opset))


def _bare(found: Any) -> list[Any]:
    """What a function computes, for comparing."""
    head = [found.name, found.domain, *found.input, "->", *found.output, *found.attribute]
    head += [(entry.domain, entry.version) for entry in found.opset_import]
    head += [attribute.name for attribute in found.attribute_proto]
    nodes = [
        (
            node.op_type,
            node.domain,
            tuple(node.input),
            tuple(node.output),
            tuple(sorted(_bare_attribute(each) for each in node.attribute)),
        )
        for node in found.node
    ]
    return [*head, *nodes]


def _bare_attribute(attribute: Any) -> bytes:
    kept = type(attribute)()
    kept.CopyFrom(attribute)
    for part in (kept, kept.t):
        part.doc_string = ""
    kept.t.name = ""
    if not attribute.HasField("t"):
        kept.ClearField("t")
    return bytes(kept.SerializeToString(deterministic=True))
