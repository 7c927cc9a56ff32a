"""The passes that ship with the compiler. Importing this package registers them."""

if __name__ != "elsa_compile.passes":
    raise ImportError("import elsa_compile.passes, not the bare folder passes")

from elsa_compile.passes.align import Align
from elsa_compile.passes.allocate_budget import AllocateBudget
from elsa_compile.passes.allocate_fisher import AllocateFisher
from elsa_compile.passes.allocate_owl import AllocateOWL
from elsa_compile.passes.allocate_plan import AllocatePlan
from elsa_compile.passes.allocate_uniform import AllocateUniform
from elsa_compile.passes.drop_dead_units import DropDeadUnits
from elsa_compile.passes.finetune_masked import FinetuneMasked
from elsa_compile.passes.fold_batchnorm import FoldBatchNorm
from elsa_compile.passes.fold_constants import FoldConstants
from elsa_compile.passes.fold_norm_scale import FoldNormScale
from elsa_compile.passes.merge_parallel_linears import MergeParallelLinears
from elsa_compile.passes.prune_alps import PruneALPS
from elsa_compile.passes.prune_elsa import PruneElsa
from elsa_compile.passes.prune_magnitude import PruneMagnitude
from elsa_compile.passes.prune_sparsegpt import PruneSparseGPT
from elsa_compile.passes.prune_wanda import PruneWanda
from elsa_compile.passes.quantize_activations import QuantizeActivations
from elsa_compile.passes.quantize_weights import QuantizeWeights
from elsa_compile.passes.repair_degenerate import RepairDegenerate
from elsa_compile.passes.untie_head import UntieHead

__all__ = [
    "Align",
    "AllocateBudget",
    "AllocateFisher",
    "AllocateOWL",
    "AllocatePlan",
    "AllocateUniform",
    "DropDeadUnits",
    "FinetuneMasked",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldNormScale",
    "MergeParallelLinears",
    "PruneALPS",
    "PruneElsa",
    "PruneMagnitude",
    "PruneSparseGPT",
    "PruneWanda",
    "QuantizeActivations",
    "QuantizeWeights",
    "RepairDegenerate",
    "UntieHead",
]
