"""What TransformerLens' tools and notebooks ask of a model."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_interp.errors import ConfigError, WrongToolWarning
from sparse_interp.training.sparsity import project_

SCRIPT = Path(__file__).parent / "tl_battery.py"


def load_battery():
    spec = importlib.util.spec_from_file_location("tl_battery", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


battery = load_battery()
CALLS = [one for one in battery.CALLS.values() if one.exists]
SILENT = [item for item in battery.SILENT.values() if item.exists]

# -- TransformerLens' tools, by the script that also runs by itself on other versions ---------------------------------


@pytest.fixture(scope="module")
def cases():
    return {name: battery.Case(name) for name in battery.CONFIGURATIONS}


@pytest.mark.parametrize("configuration", battery.CONFIGURATIONS)
@pytest.mark.parametrize("one", CALLS, ids=lambda one: one.name)
def test_a_tool_gives_the_number_that_is_known_otherwise(one, configuration, cases):
    """Or refuses, where that is expected of it on any model that is no TransformerBridge."""
    came = battery.outcome(one, cases[configuration])
    assert came.good, came.said


@pytest.mark.parametrize("item", SILENT, ids=lambda item: item.name)
def test_a_number_that_would_be_wrong_without_a_word_is_guarded(item):
    """`measure` fails unless the guard speaks up; without the naive number's error there would be nothing to guard."""
    naive, ours = item.measure()
    assert naive > 1e-2
    assert ours <= battery.BOUND


TYPED = (
    *("patching", "ActivationCache", "HookedRootModule", "FactoredMatrix", "SVDInterpreter", "evals", "head_detector"),
    *("model_protocol", "tools", "utilities", "cache", "config"),
)
"""Modules of TransformerLens whose annotations are checked. `hook_points` makes a function anew in every call, which
would take minutes."""


@pytest.mark.skipif(not battery.NEW, reason="3.9 annotates its tools with its own model classes")
def test_every_tool_takes_our_models_when_transformer_lens_checks_its_own_annotations():
    source = f"""
        import runpy
        from jaxtyping import install_import_hook
        with install_import_hook(["transformer_lens." + name for name in {TYPED}], "beartype.beartype"):
            runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    """
    run = subprocess.run([sys.executable, "-c", "if True:" + source], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    expected = len([one for one in CALLS if not one.refused])
    for name in battery.CONFIGURATIONS:
        assert f"{name}: {expected} of {len(CALLS)} calls pass" in run.stdout


# -- what no guard can see --------------------------------------------------------------------------------------------


def test_faithfulness_leaves_the_bigram_table_to_the_clean_prompt(cases):
    """The table stands beside the graph: where last tokens differ, an empty circuit recovers the table's share."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    if not hasattr(analysis, "faithfulness"):
        pytest.skip("this TransformerLens measures no faithfulness")
    case = cases["sparse"]
    clean, corrupt = case.clean[:1], case.corrupt[:1].clone()
    corrupt[0, -1] = 77
    found = analysis.faithfulness(case.model, clean, corrupt, case.metric, []).recovered
    rows = case.model.bigram_table[torch.stack([clean[0, -1], corrupt[0, -1]])]
    share = (rows[0] - rows[1])[[battery.ANSWER, battery.FOIL]] @ torch.tensor([1.0, -1.0])
    gap = case.metric(case.model(clean)) - case.metric(case.model(corrupt))
    assert found == pytest.approx(float(share / gap), abs=1e-4) and abs(found) > 1e-2


def test_logits_read_off_the_stream_by_hand_lack_the_table(cases):
    logits, cache = cases["sparse"].model.run_with_cache(cases["sparse"].clean)
    by_hand = cases["sparse"].model.unembed(cases["sparse"].model.ln_final(cache["resid_post", -1]))
    torch.testing.assert_close(by_hand + cache["hook_bigram"], logits)
    assert not torch.allclose(by_hand, logits, atol=0.1)


def test_transformer_lens_training_loop_fills_in_zeros_and_projection_puts_them_back(cases):
    model = copy.deepcopy(cases["sparse"].model)
    zeros = int((model.W_in == 0).sum())
    model(cases["sparse"].clean, return_type="loss").backward()
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    assert int((model.W_in == 0).sum()) < 0.8 * zeros
    project_(model, model.cfg.density)
    assert int((model.W_in == 0).sum()) == zeros


# -- where they are wrong ---------------------------------------------------------------------------------------------


def test_direct_paths_warn_where_they_are_wrong_and_only_there(make_model, tokens):
    """The hook is known by its maker; another hook at the same point, or an uncut write, is no reason to warn."""

    def _make_direct_path_hook():
        return lambda fork, hook: fork

    hooks = [("blocks.1.attn.hook_q_input", _make_direct_path_hook())]
    theirs = hooks[0][1]
    theirs.__qualname__ = "_make_direct_path_hook.<locals>.hook_fn"
    sparse, uncut = make_model(), make_model(afrac_sites=("q", "neuron"))
    for model in (sparse, uncut):
        model.set_use_split_qkv_input(True)
    with pytest.warns(
        WrongToolWarning, match="ignores that AbsTopK cuts what heads write.*patch_direct_paths is exact"
    ):
        sparse.run_with_hooks(tokens, fwd_hooks=hooks)
    uncut.run_with_hooks(tokens, fwd_hooks=hooks)
    sparse.run_with_hooks(tokens, fwd_hooks=[(hooks[0][0], lambda fork, hook: fork)])
    with pytest.warns(WrongToolWarning, match="holds the norm's scale fixed"):
        uncut.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_q", theirs)])


# -- hook points that cannot fire -------------------------------------------------------------------------------------

SWITCHED = {
    "blocks.0.attn.hook_result": "use_attn_result",
    "blocks.0.attn.hook_q_input": "use_split_qkv_input",
    "blocks.0.attn.hook_attn_in": "use_attn_in",
    "blocks.0.hook_mlp_in": "use_hook_mlp_in",
}


@pytest.mark.parametrize(("name", "switch"), SWITCHED.items())
def test_a_hook_behind_a_flag_is_refused_until_the_flag_is_on(name, switch, plain_model, tokens):
    hook = lambda tensor, hook: tensor * 0
    message = f"a hook on {name} would never fire: {switch} is off, and model.set_{switch}"
    for attempt in (
        lambda: plain_model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]),
        lambda: plain_model.run_with_cache(tokens, names_filter=name),
        lambda: plain_model.run_with_cache(tokens, names_filter=["hook_embed", name]),
        lambda: plain_model.add_hook(name, hook),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt()
    assert name not in plain_model.run_with_cache(tokens)[1]
    getattr(plain_model, f"set_{switch}")(True)
    assert not torch.equal(plain_model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]), plain_model(tokens))
    assert name in plain_model.run_with_cache(tokens)[1]


def test_a_plain_cache_holds_every_point_that_can_fire(any_model, tokens):
    _, cache = any_model.run_with_cache(tokens)
    assert set(cache) == {name for name in any_model.hook_dict if any_model.why_silent(name) is None}


def test_hooks_of_a_mechanism_that_the_model_lacks_are_refused(make_model, tokens):
    hook = ("blocks.0.attn.hook_sink", lambda tensor, hook: None)
    with pytest.raises(ConfigError, match="the model was built with sink=False"):
        make_model(sink=False).run_with_hooks(tokens, fwd_hooks=[hook])
    with pytest.raises(ConfigError, match="the model was built with norm='none'"):
        make_model(norm="none").run_with_cache(tokens, names_filter="ln_final.hook_scale")


def test_an_unknown_hook_name_is_a_key_error_with_the_nearest_name(plain_model, tokens):
    message = "blocks.0.atn.hook_q is no hook point of this model. Did you mean blocks.0.attn.hook_q?"
    with pytest.raises(KeyError, match=message):
        plain_model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.atn.hook_q", lambda t, hook: t)])
    with pytest.raises(KeyError):
        plain_model.run_with_cache(tokens, names_filter="hook_embd")


def test_a_hook_on_a_module_that_is_no_hook_point_is_a_type_error(plain_model, tokens):
    with pytest.raises(TypeError):
        plain_model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn", lambda t, hook: t)])


def test_hooks_are_gone_after_a_run_even_one_that_failed(plain_model, tokens):
    def fail(tensor, hook):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        plain_model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", fail)])
    plain_model(tokens)


# -- caches -----------------------------------------------------------------------------------------------------------


def test_a_cache_takes_a_name_a_list_or_a_function(plain_model, tokens):
    for names in ("hook_embed", ["hook_embed"], lambda name: name == "hook_embed"):
        assert list(plain_model.run_with_cache(tokens, names_filter=names)[1]) == ["hook_embed"]
    assert type(plain_model.run_with_cache(tokens, return_cache_object=False)[1]) is dict


def test_the_batch_is_removed_from_a_batch_of_one_only(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert cache["resid_post", -1].shape == (7, 12)
    with pytest.raises(ConfigError, match="remove_batch_dim takes a batch of one; got 3"):
        plain_model.run_with_cache(tokens, remove_batch_dim=True)


def test_gradients_are_cached_on_the_way_back(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert cache["blocks.0.mlp.hook_post_grad"].shape == (3, 7, 20)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_stacked_under_their_transformer_lens_names(plain_model):
    shapes = {
        "W_E": (50, 12), "W_pos": (16, 12), "W_U": (12, 50), "b_U": (50,), "W_E_pos": (66, 12),
        "W_Q": (2, 3, 12, 5), "W_K": (2, 3, 12, 5), "W_V": (2, 3, 12, 5), "W_O": (2, 3, 5, 12),
        "W_in": (2, 12, 20), "W_out": (2, 20, 12), "b_Q": (2, 3, 5), "b_O": (2, 12), "b_in": (2, 20), "b_out": (2, 12),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert getattr(plain_model, name).shape == shape, name
    assert torch.equal(plain_model.W_O[1], plain_model.blocks[1].attn.W_O)
    torch.testing.assert_close(plain_model.OV.AB, plain_model.W_V @ plain_model.W_O)
    torch.testing.assert_close(plain_model.QK.AB, plain_model.W_Q @ plain_model.W_K.mT)


def test_vectors_of_positions_that_are_not_added_are_not_stacked_with_the_tokens(make_model):
    with pytest.raises(ConfigError, match="positions='concat' adds none"):
        _ = make_model(positions="concat", d_pos_emb=3).W_E_pos


def test_labels_and_blocks_are_listed_by_layer(plain_model):
    assert plain_model.all_head_labels == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert [layer for layer, _ in plain_model.blocks_with("attn")] == [0, 1]
    assert plain_model.blocks_with("mamba") == []


def test_a_tied_unembedding_is_among_the_named_weights(make_model):
    model = make_model(tie_unembed=True)
    weights = model.tl_parameters()
    assert torch.equal(weights["unembed.W_U"], model.W_E.T)
    assert {"blocks.0.attn.W_V", "blocks.1.ln2.w", "embed.W_E"} <= weights.keys()
    assert model.n_params_total == sum(p.numel() for p in model.parameters())


def test_the_direction_of_a_token_is_what_its_logit_reads(plain_model, tokens):
    w = plain_model.ln_final.w
    one = plain_model.tokens_to_residual_directions(5)
    assert torch.equal(one, plain_model.W_U[:, 5] * w)
    assert torch.equal(plain_model.tokens_to_residual_directions(torch.tensor([[5]])), one)
    assert plain_model.tokens_to_residual_directions(tokens).shape == (3, 7, 12)
    _, cache = plain_model.run_with_cache(tokens)
    got = cache["ln_final.hook_normalized"] @ one + plain_model.b_U[5]
    bare = plain_model.unembed(plain_model.ln_final(cache["resid_post", 1]))
    torch.testing.assert_close(got, bare[..., 5])


def test_biases_accumulate_up_to_a_layer(plain_model):
    b_O, b_out = plain_model.b_O, plain_model.b_out
    assert not plain_model.accumulated_bias(0).any()
    torch.testing.assert_close(plain_model.accumulated_bias(1), b_O[0] + b_out[0])
    torch.testing.assert_close(plain_model.accumulated_bias(1, mlp_input=True), b_O[0] + b_out[0] + b_O[1])
    torch.testing.assert_close(plain_model.accumulated_bias(2, include_mlp_biases=False), b_O.sum(0))
    with pytest.raises(ConfigError, match=r"layer=2 is not in \[0, 1\]"):
        plain_model.accumulated_bias(2, mlp_input=True)


# -- the random-init control ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_unembed": True}, {"positions": "concat", "d_pos_emb": 3}], ids=str)
def test_a_reinitialised_sparse_model_keeps_its_zeros_and_nothing_else(changes, make_model, tokens):
    interchange = pytest.importorskip("transformer_lens.tools.analysis.interchange")
    model = make_model(bigram_learnable=True, **changes)
    project_(model, 0.3)
    before = copy.deepcopy(model.state_dict())
    fresh = interchange.reinitialized(model, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    for name, new in fresh.state_dict().items():
        if ".W_" in name:
            assert torch.equal(new == 0, before[name] == 0), name
            assert not torch.equal(new, before[name]), name
    assert not torch.equal(fresh(tokens), model(tokens))
    again = interchange.reinitialized(model, seed=0)
    assert torch.equal(again(tokens), fresh(tokens))


def test_svd_interpreter_reads_a_tied_sparse_model(make_model):
    from transformer_lens import SVDInterpreter

    model = make_model(tie_unembed=True)
    assert SVDInterpreter(model).get_singular_vectors("OV", num_vectors=2, layer_index=0, head_index=0).shape[-1] == 2


def test_a_new_model_has_no_zero_weight(make_model):
    model = make_model()
    assert all((p != 0).all() for name, p in model.named_parameters() if ".W_" in name)
