"""What differs from family to family, as data: how checkpoints name what transformers names otherwise.

Facts from transformers' conversion_mapping (5.23): it loads `block_sparse_moe` as `mlp`, and fuses one linear per
expert into 3-D parameters. qtool keeps one linear per expert, under the name that the checkpoint gives it.
"""

from __future__ import annotations

# model type -> names of the gate, up and down projection of one expert in a checkpoint
EXPERT_LINEARS = {
    "mixtral": ("w1", "w3", "w2"),
    "minimax": ("w1", "w3", "w2"),
    "minimax_m2": ("w1", "w3", "w2"),
    "phimoe": ("w1", "w3", "w2"),
    "lfm2_moe": ("w1", "w3", "w2"),
}
USUAL_EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")

# model type -> (part of a parameter's name in the model, the same part in a checkpoint)
RENAMES = {
    "mixtral": ((".mlp.", ".block_sparse_moe."),),
    "minimax": ((".mlp.", ".block_sparse_moe."),),
    "minimax_m2": ((".mlp.", ".block_sparse_moe."),),
    "phimoe": ((".mlp.", ".block_sparse_moe."), (".router.weight", ".gate.weight")),
    "gpt_neox": (("lm_head.", "embed_out."),),
    "ernie4_5_moe": ((".mlp.gate.moe_statics.", ".mlp.moe_statics."),),
    "exaone_moe": ((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),),
}

# Tensors that old checkpoints carry and no model reads: rotary frequencies, causal masks.
HARMLESS_EXTRAS = r"(^|\.)(rotary_emb\.inv_freq|inv_freq|masked_bias|attn\.bias|attention\.bias)$"


def expert_linears(model_type: str) -> tuple[str, str, str]:
    """Names of the gate, up and down projection of an expert."""
    return EXPERT_LINEARS.get(model_type, USUAL_EXPERT_LINEARS)


def checkpoint_name(model_type: str, parameter: str) -> str:
    """The name under which a checkpoint of this model type keeps a parameter of the (split) model."""
    for ours, theirs in RENAMES.get(model_type, ()):
        parameter = parameter.replace(ours, theirs)
    return parameter
