"""Puts nodes of the packed form into a graph: one for each reader of a packed weight."""

from typing import Any

import numpy as np

from elsa_compile.runtime.pack_plan import Plan, Reader
from elsa_compile.runtime.unpack_function import DOMAIN, VERSION, Variant, function

_LEAST_IR = 8  # has functions


class Unpacking:
    """The nodes and functions that a model gets; `finish` puts them in.

    Plans of the same graph must live until then: nodes are told apart by identity.
    """

    def __init__(self, model: Any) -> None:
        """For a ModelProto."""
        self.model = model
        self.graph = model.graph
        self.nodes: list[Any] = []
        self._absorbed: set[int] = set()
        self._variants: set[Variant] = set()
        self._taken = {name for node in self.graph.node for name in (*node.input, *node.output)}

    def fresh(self, name: str) -> str:
        """A name like this that nothing has."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def add(
        self, plan: Plan, parts: tuple[str, str], shape: tuple[int, ...], int4: bool
    ) -> list[Any]:
        """The nodes of one weight; its readers read them from now on.

        Args:
            plan: of the weight.
            parts: names of mask and values.
            shape: of the weight in the graph.
            int4: whether its values are int4.
        """
        from onnx import helper

        packed_shape = [int(n) for n in (shape[::-1] if plan.rows_last else shape)]
        cut = bool(np.prod(shape, dtype=np.int64) % 8)
        made = []
        for reader, output in self._outputs(plan):
            variant = Variant(int4, cut, reader.turned)
            self._variants.add(variant)
            made.append(
                helper.make_node(
                    variant.name,
                    parts,
                    [output],
                    name=f"{output}.unpack",
                    domain=DOMAIN,
                    shape=packed_shape,
                )
            )
        self.nodes += made
        return made

    def _outputs(self, plan: Plan) -> list[tuple[Reader, str]]:
        """A name for each reader, which reads it from now on; a Transpose's name goes on."""
        found = []
        free = plan.name
        # Subgraphs read the weight's own name.
        for reader in sorted(plan.readers, key=lambda each: each.node is not None):
            if reader.absorbed is not None:
                self._absorbed.add(id(reader.absorbed))
            if reader.absorbed is reader.node and reader.node is not None:
                found.append((reader, reader.node.output[0]))
                continue
            name, free = free or self.fresh(f"{plan.name}.unpacked"), ""
            if reader.node is not None:
                reader.node.input[reader.slot] = name
            if reader.absorbed is not None:  # behind a Cast, which gives its values now
                reader.node.output[0] = reader.absorbed.output[0]
            found.append((reader, name))
        return found

    def finish(self) -> None:
        """Put nodes, functions and the operator set into the model."""
        rest = [node for node in self.graph.node if id(node) not in self._absorbed]
        kept = [*self.nodes, *rest]
        copies = [type(node).FromString(node.SerializeToString()) for node in kept]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        opset = next(e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx"))
        there = {each.name for each in self.model.functions if each.domain == DOMAIN}
        for variant in sorted(self._variants, key=lambda each: each.name):
            if variant.name not in there:
                self.model.functions.append(function(variant, opset))
        if self._variants and not any(e.domain == DOMAIN for e in self.model.opset_import):
            self.model.opset_import.add(domain=DOMAIN, version=VERSION)
        self.model.ir_version = max(self.model.ir_version, _LEAST_IR)
