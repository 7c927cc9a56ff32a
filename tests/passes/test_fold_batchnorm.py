"""fold-batchnorm: the same function without the BatchNorm, in graph, module and file."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from elsa_compile import apply, export, facts, frontend, verify_export
from elsa_compile.passes import AllocateUniform, FoldBatchNorm, PruneMagnitude, RepairDegenerate
from elsa_compile.passes.fold_batchnorm import Statistics, fold


class Blocks(nn.Module):
    """Convolutions with and without a bias, a depthwise one, a linear layer; BatchNorm each."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False))
        self.line, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.last = nn.BatchNorm1d(6)

    def forward(self, image):
        x = torch.relu(self.two(self.one(image))).mean(dim=(2, 3))
        return self.last(torch.relu(self.norm(self.line(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Blocks()
    for _ in range(5):
        model(torch.randn(8, 3, 9, 9) * 2 + 1)
    with torch.no_grad():
        for layer in (model.one[1], model.norm):
            layer.weight.uniform_(-2, 2)
            layer.bias.normal_()
    return model.eval()


def test_a_channel_folds_as_the_formula_says():
    norm = Statistics(*(torch.tensor([v]) for v in (3.0, 0.5, 2.0, 4.0)), epsilon=0.0)
    weight, bias = fold(torch.tensor([[2.0, 0.0]]), torch.tensor([4.0]), norm)
    assert weight.tolist() == [[3.0, 0.0]]  # 3 / sqrt(4)
    assert bias.tolist() == [3.5]  # (4 - 2) * 1.5 + 0.5


def test_every_view_computes_the_same_without_batch_norm(model, tmp_path):
    image = torch.randn(5, 3, 9, 9)
    program = frontend.from_module(model, (torch.randn(2, 3, 9, 9),))
    apply(program, AllocateUniform(sparsity=0.5), PruneMagnitude())
    wanted = model(image)
    zeros = {name: weight.parameter == 0 for name, weight in program.prunable.items()}
    before = program.parameters()
    apply(program, FoldBatchNorm())
    stats = program.history[-1].stats
    assert stats.counts == {"folded": 3, "refused": 1}
    assert "no convolution or linear layer stands directly before it" in stats.notes[0]
    assert torch.allclose(model(image), wanted, atol=1e-5)
    assert torch.allclose(program.run(image), wanted, atol=1e-5)
    assert isinstance(model.one[1], nn.Identity)
    assert isinstance(model.last, nn.BatchNorm1d)
    assert model.one[0].bias is program.weights["one.0.bias"].parameter
    # Scale and shift of two layers go, one bias comes.
    assert before - program.parameters() == 2 * 8 + 2 * 6 - 8
    for name, zero in zeros.items():
        assert not program.weights[name].parameter[zero].any()
    for fact in program.facts:
        facts.check(program, fact)
    export.export(program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    assert sum(node.op_type == "BatchNormalization" for node in nodes) == 1
    text = program.to_text()
    apply(program, FoldBatchNorm())
    assert program.history[-1].stats.changed == 0
    assert program.to_text() == text


def test_what_is_read_elsewhere_stays():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.line(x)
            return self.norm(y) + y

    program = frontend.from_module(Forked().eval(), (torch.randn(2, 4),))
    apply(program, FoldBatchNorm())
    assert program.history[-1].stats.notes == [
        "left 1 BatchNorms: what it normalises is read elsewhere too"
    ]


class Shared(nn.Module):
    """One BatchNorm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, image):
        return self.norm(self.two(torch.relu(self.norm(self.one(image)))))


def test_a_batch_norm_of_two_layers_stays():
    torch.manual_seed(0)
    model = Shared()
    model(torch.randn(8, 3, 5, 5))
    program = frontend.from_module(model.eval(), (torch.randn(2, 3, 5, 5),))
    apply(program, FoldBatchNorm())
    assert program.history[-1].stats.counts == {"folded": 0, "refused": 2}
    assert "it serves several layers" in program.history[-1].stats.notes[0]


def test_a_row_that_comes_back_after_folding_is_folded_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    model(torch.randn(32, 8) * 3)
    model.eval()
    with torch.no_grad():
        model[0].weight[2] *= 1e-3
        model[1].weight.fill_(2.0)
    row = model[0].weight[2].detach()
    best = float(row[row.abs().argmax()])
    factor = 2.0 / float((model[1].running_var[2] + model[1].eps).sqrt())
    program = frontend.from_module(model, (torch.randn(2, 8),))
    apply(program, AllocateUniform(sparsity=0.7), PruneMagnitude())
    assert not model[0].weight[2].any()
    apply(program, FoldBatchNorm(), RepairDegenerate(restore=True))
    assert float(model[0].weight[2].abs().max()) == pytest.approx(abs(best * factor), rel=1e-5)
