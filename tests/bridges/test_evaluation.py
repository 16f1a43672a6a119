"""What a bridge is worth: everything on a rotated twin, where controls are worth little; and what is missing, named."""

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig
from sparse_interp.bridges.evaluation import BridgeTable, CausalCase, evaluate
from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.bridges.steering import transfer
from sparse_interp.errors import BridgeError
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Node, stream_hook
from sparse_interp.tasks.task import TaskBatch, logit_difference

NODES = (Node(0, "neuron", 3), Node(0, "v", 2), Node(1, "q", 5), Node(1, "mlp_write", 7), Node(2, "final_read", 4))


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def pairs_of(n, generator):
    """Pairs of random tokens that differ in one, with a random answer and foil, from four templates."""
    clean = torch.randint(1, 64, (n, 8), generator=generator)
    corrupt = torch.where(torch.arange(8) == 3, torch.randint(1, 64, (n, 8), generator=generator), clean)
    answer, foil = torch.randint(1, 64, (2, n), generator=generator)
    return TaskBatch(clean, corrupt, answer, foil, torch.full((n,), 8), torch.arange(n) % 4)


@pytest.fixture(scope="module")
def sparse():
    return rotatable_model(generator=seeded())


@pytest.fixture(scope="module")
def text():
    return torch.randint(64, (24, 16), generator=seeded(1))


def case_of(sparse, text, name="made up", seed=2):
    means = mean_activations(sparse, text)
    return CausalCase(name, NODES, means, pairs_of(12, seeded(seed)), pairs_of(12, seeded(seed + 1)))


def judged(twin, sparse, text, **given):
    return evaluate(
        twin.bridge, sparse, twin.dense, text[:8], fit_blocks=text[8:], generator=seeded(), progress=False, **given
    )


@pytest.fixture(scope="module")
def perfect(sparse, text):
    cases = [case_of(sparse, text), case_of(sparse, text, "another", 5)]
    return judged(rotated_twin(sparse, generator=seeded()), sparse, text, cases=cases, n_paths=4)


def test_the_known_bridge_of_a_rotated_twin_passes_everything(perfect):
    for where in ("made up", "another", "all tasks"):
        assert perfect.value("agreement", where) > 0.9999
        assert perfect.value("sign_frac", where) == 1
        assert perfect.value("size_ratio", where) == pytest.approx(1, abs=1e-3)
        assert perfect.value("correlation", where) > 0.9999
    rows = perfect.frame[perfect.frame.bridge == "bridge"].set_index("measure").value
    assert max(rows["nmse encode"].max(), rows["nmse decode"].max()) < 1e-8
    assert min(rows["explained encode"].min(), rows["explained decode"].min()) > 0.99999
    assert rows["kl, nats"].abs().max() < 1e-6 and rows["loss, nats"].std() < 1e-5
    assert perfect.missing == []


def test_controls_that_know_nothing_of_the_features_fail_and_a_map_that_was_fitted_does_not(perfect):
    agreement = perfect.frame[perfect.frame.measure == "agreement"].set_index(["where", "bridge"]).value["all tasks"]
    for control in ("random direction", "difference of means", "untrained sparse model"):
        assert agreement[control] < 0.5, control
    assert agreement["ridge map"] > 0.9
    both = perfect.frame[(perfect.frame.measure == "nmse decode") & (perfect.frame["where"] == "4-4")]
    assert both.set_index("bridge").value["untrained sparse model"] > 0.05


def test_paths_cross_once_at_every_pair_from_both_models_and_some_several_times(perfect):
    frame = perfect.frame[(perfect.frame.part == "hybrid") & (perfect.frame.bridge == "bridge")]
    once = {f"{start} @{site}-{site}" for start in ("dense", "sparse") for site in range(5)}
    paths = set(frame["where"])
    assert once | {"dense", "sparse"} <= paths and any(path.count("@") > 1 for path in paths)
    assert frame[frame["where"] == "dense"].set_index("measure").value["kl, nats"] == 0
    assert ((frame.low <= frame.value) & (frame.value <= frame.high)).all()


def test_features_that_the_dense_model_lacks_are_named(sparse, text):
    twin = rotated_twin(sparse, missing_frac=0.1, generator=seeded(3))
    table = judged(twin, sparse, text, n_paths=0)
    assert table.missing == list(twin.missing) and len(twin.missing) == 3
    assert table.value("nmse encode", "0-0") > 0.01


def test_agreement_is_that_of_transferred_ablations(sparse, text):
    """The same numbers, by running both models whole, for a bridge that is neither right nor useless."""
    twin = rotated_twin(sparse, generator=seeded())
    bridge = Bridge.between(sparse, twin.dense, BridgeConfig(afrac=0.5))
    bridge.load_state_dict(twin.bridge.state_dict())
    case = case_of(sparse, text)
    found = evaluate(
        bridge, sparse, twin.dense, text[:8], fit_blocks=text[8:], cases=[case], generator=seeded(), progress=False
    )
    batch = case.pairs.both_sides()
    changes = []
    for node in NODES:
        ablating = lambda model, node=node: ablate(model, [node], case.baseline)
        with torch.no_grad():
            s, d = (-logit_difference(model(batch.clean), batch) for model in (sparse, twin.dense))
            with ablating(sparse):
                s += logit_difference(sparse(batch.clean), batch)
            with transfer(bridge, sparse, twin.dense, ablating):
                d += logit_difference(twin.dense(batch.clean), batch)
        changes.append(torch.stack([s, d]).double())
    s, d = torch.cat(changes, 1)
    assert found.value("agreement") == pytest.approx(float(2 * (s * d).sum() / (s @ s + d @ d)), rel=1e-3)
    assert found.value("size_ratio") == pytest.approx(float(s @ d / (s @ s)), rel=1e-3)
    assert found.value("correlation") == pytest.approx(float(torch.corrcoef(torch.stack([s, d]))[0, 1]), rel=1e-3)
    felt = s.abs() > 1e-3
    assert found.value("sign_frac") == pytest.approx(float((s.sign() == d.sign())[felt].double().mean()), rel=1e-3)
    assert 0.1 < found.value("agreement") < 0.999


def test_another_site_s_maps_are_worth_less_where_sites_differ(make_model, text):
    sparse, dense = make_model(afrac=None, d_vocab=64), make_model(afrac=None, d_vocab=64, d_model=10, seed=3)
    bridge = Bridge.between(sparse, dense, BridgeConfig(afrac=1.0))
    with torch.no_grad():
        _, ours = sparse.run_with_cache(text)
        _, theirs = dense.run_with_cache(text)
    for pair in bridge.pairs:
        bridge.fit_(pair, ours[stream_hook(pair.sparse)], theirs[stream_hook(pair.dense)])
    table = evaluate(
        bridge, sparse, dense, text[:8], fit_blocks=text[8:], n_paths=0, generator=seeded(), progress=False
    )
    for pair in map(str, bridge.pairs):
        assert table.value("nmse decode", pair, "wrong site") > table.value("nmse decode", pair) + 0.1


def test_a_node_that_no_tied_sites_enclose_is_refused_before_anything_runs(sparse, text):
    twin = rotated_twin(sparse, generator=seeded())
    bridge = Bridge.between(sparse, twin.dense, BridgeConfig(sites=((1, 1), (3, 3))))
    with pytest.raises(BridgeError, match="v of layer 0 does is carried .* the bridge ties 1-1, 3-3"):
        evaluate(bridge, sparse, twin.dense, text, fit_blocks=text, cases=[case_of(sparse, text)], generator=seeded())


def test_a_table_draws_itself_and_says_which_rows_it_lacks(perfect):
    assert len(perfect.plot().patches) >= 15
    with pytest.raises(BridgeError, match="0 rows have measure='agreement', where='nowhere'"):
        perfect.value("agreement", "nowhere")
    assert isinstance(perfect, BridgeTable)
