"""Every pass by its name."""

from __future__ import annotations

from collections.abc import Mapping

from ..graph.errors import InputError
from . import options
from .base import Pass
from .bilinear_ffn import BilinearFFN
from .canonicalize_ffn import CanonicalizeFFN
from .clean_up import CleanUp
from .dedupe_weights import DedupeWeights
from .distill_ffn import DistillFFN
from .drop_neurons import DropNeurons
from .factorize_ffn import FactorizeFFN
from .fold_bias import FoldBias
from .fold_norm import FoldNorm
from .fuse_attention import FuseAttention
from .fuse_matmul import FuseMatMul
from .linearize_ffn import LinearizeFFN
from .merge_linears import MergeLinears
from .prune_bias import PruneBias
from .prune_skip import PruneSkip
from .quantize_ffn import QuantizeFFN
from .remove_attention import RemoveAttention
from .remove_ffn import RemoveFFN
from .remove_layer import RemoveLayer
from .separate_resize import SeparateResize
from .share_ffn import ShareFFN
from .skip_padding import SkipPadding
from .slim_ffn import SlimFFN
from .sparsify_ffn import SparsifyFFN
from .split_ffn import SplitFFN
from .to_half import ToHalf

PASSES: dict[str, type[Pass]] = {kind.name: kind for kind in (
    BilinearFFN, CanonicalizeFFN, CleanUp, DedupeWeights, DistillFFN, DropNeurons, FactorizeFFN, FoldBias, FoldNorm,
    FuseAttention, FuseMatMul, LinearizeFFN, MergeLinears, PruneBias, PruneSkip, QuantizeFFN, RemoveAttention, RemoveFFN,
    RemoveLayer, SeparateResize, ShareFFN, SkipPadding, SlimFFN, SparsifyFFN, SplitFFN, ToHalf)}


def make_pass(name: str, given: Mapping[str, object]) -> Pass:
    """The pass called ``name`` with the options ``given``.

    Raises:
        InputError: no such pass, or no such option.
    """
    if name not in PASSES:
        raise InputError(f"there is no pass '{name}': the passes are {', '.join(sorted(PASSES))}")
    return options.make(PASSES[name], given)
