"""The patterns that come with genie: one concept a file."""
from __future__ import annotations

from genie_dynamo.passes.semantics.pattern import Pattern
from genie_dynamo.passes.semantics.patterns.attention import ATTENTION
from genie_dynamo.passes.semantics.patterns.embedding import EMBEDDING
from genie_dynamo.passes.semantics.patterns.head import LOGITS_HEAD
from genie_dynamo.passes.semantics.patterns.kernel_attention import KERNEL_ATTENTION
from genie_dynamo.passes.semantics.patterns.kv_cache import KV_CACHE
from genie_dynamo.passes.semantics.patterns.loss import LOSS
from genie_dynamo.passes.semantics.patterns.mlp import MLP
from genie_dynamo.passes.semantics.patterns.moe import EXPERTS, ROUTER
from genie_dynamo.passes.semantics.patterns.norm import NORM
from genie_dynamo.passes.semantics.patterns.optimizer import OPTIMIZER
from genie_dynamo.passes.semantics.patterns.recurrence import RECURRENT
from genie_dynamo.passes.semantics.patterns.rotary import (
    ANGLES,
    CONVOLVED_POSITIONS,
    LEARNED_POSITIONS,
    ROTARY,
)
from genie_dynamo.passes.semantics.patterns.sequence import STATE_SPACE
from genie_dynamo.passes.semantics.patterns.vision import PATCH_EMBEDDING, POOLING

BUILT_IN: tuple[Pattern, ...] = (
    ATTENTION, KERNEL_ATTENTION, KV_CACHE, MLP, ROUTER, EXPERTS, EMBEDDING, NORM, ROTARY, ANGLES, LEARNED_POSITIONS,
    CONVOLVED_POSITIONS, LOGITS_HEAD, PATCH_EMBEDDING, POOLING, STATE_SPACE, RECURRENT, LOSS, OPTIMIZER)
