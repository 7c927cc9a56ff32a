"""The traced graph is cut where little is alive: memory must stay that of one block."""

import pytest
import torch

from elsa_compile import data, frontend
from elsa_compile.calibration import SegmentedRun


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "neox"])
def test_every_block_is_cut_apart(make_family, family):
    program = frontend.from_module(make_family(family))
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 300, (1, 16), generator=generator)} for _ in range(3)]
    inputs = [data.graph_inputs(program, row) for row in rows]
    run = SegmentedRun(program, list(program.prunable), inputs, torch.device("cpu"))
    segments = run.segments()
    body = [w for w in program.prunable.values() if not w.is_head]
    largest = max(len(segment.weights) for segment in segments)
    assert sum(len(segment.products) for segment in segments) == len(run.products)
    assert len(segments) >= 2  # one a block at the least, of two blocks
    assert largest <= len(body) // 2 + 1
