"""Second names of hook points: those of TransformerLens' bridge, and of its HookedTransformer where they differ.

    blocks.0.hook_out        bridge              blocks.0.hook_resid_post
    blocks.0.hook_q_input    HookedTransformer   blocks.0.attn.hook_q_input

A name that is right on one of them is right here, for hooks and for caches. Hooks and caches themselves speak of the
first name, and functions that choose among names are asked about first names only.

Not here, though the bridge has them, are names of what AbsTopK or the norm's gain still has to act on in a sparse model
(`ln1.hook_out`, `attn.o.hook_out`, `mlp.out.hook_out`), and of one branch's own view of a tensor that others read too
(`ln1.hook_in`, `attn.q.hook_in`): there an edit would do something else than in TransformerLens.
"""

_OF_MODEL = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "ln_final.hook_out": "unembed.hook_in",
    "hook_unembed": "unembed.hook_out",
}

_OF_BLOCK = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "hook_attn_in": "attn.hook_attn_in",
    "hook_q_input": "attn.hook_q_input",
    "hook_k_input": "attn.hook_k_input",
    "hook_v_input": "attn.hook_v_input",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.hook_out": "hook_attn_out",
    "ln2.hook_in": "hook_resid_mid",
    "mlp.in.hook_in": "mlp.hook_in",
    "mlp.in.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.hook_out": "hook_mlp_out",
}

_BY_QUERY = ("hook_attn_scores", "hook_pattern", "hook_sink", "hook_sink_logits")


def first_name(name: str) -> str:
    """The name under which hooks and caches know a hook point; a name that is no second name is its own.

    The gradient that a cache keeps of it, `<name>_grad`, goes by the same names.
    """
    if name.endswith("_grad"):
        return first_name(name.removesuffix("_grad")) + "_grad"
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks":
        return ".".join((*parts[:2], _OF_BLOCK.get(parts[2], parts[2])))
    return _OF_MODEL.get(name, name)


def second_names(n_layers: int) -> dict[str, str]:
    """Every second name in a model of so many layers, with the first name that it stands for."""
    of_blocks = {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(n_layers) for a, b in _OF_BLOCK.items()}
    return _OF_MODEL | of_blocks


def position_axis(name: str) -> int:
    """The axis of what flows at a hook point, batch first, that counts positions; of two, the one that attends."""
    return 2 if name.rpartition(".")[2] in _BY_QUERY else 1
