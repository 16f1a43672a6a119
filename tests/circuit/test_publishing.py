"""Circuits of ours in the released form: read back to the same scores, by our reader and by the reference."""

import json
import math

import numpy as np
import pytest
import torch
from published_numpy import outside
from released_numpy import Run

from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.payload import read_means, read_payload
from sparse_interp.circuit.publishing import MEANS, PAYLOAD, publish_circuit
from sparse_interp.circuit.released import RELEASED_SITES, answers_of_classes, released_circuit, replay
from sparse_interp.errors import CheckpointError, CircuitError, ConfigError
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.pruning import PruneConfig
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.publishing import publish_model
from sparse_interp.model.sites import NODE_SITES, Node, NodeValues, Place, places, width
from sparse_interp.model.transformer import HookedSparseTransformer, load
from sparse_interp.tasks.task import TaskBatch

STYLES = {
    "AbsTopK everywhere, sink, concatenated positions": {"positions": "concat", "d_pos_emb": 2},
    "no positions, no bias, no bigram": {"positions": "none", "bias": False, "bigram": False, "norm_bias": False},
    "layer norm, tied, cut stream": {"norm": "layer", "tie_unembed": True, "afrac_sites": ("resid_mid", "resid_post")},
    "dense": {"afrac": None, "sink": False, "act_fn": "relu", "residual_act": "relu"},
}


@pytest.fixture
def pairs():
    """Five pairs of prompts of 3 to 7 tokens that differ in one; answers 8 and 3, on either side."""
    noise = torch.Generator().manual_seed(5)
    clean = torch.randint(1, 50, (5, 7), generator=noise)
    corrupt = clean.clone()
    corrupt[:, 1] = torch.randint(1, 50, (5,), generator=noise)
    answer = torch.tensor([8, 3, 3, 8, 3])
    return TaskBatch(clean, corrupt, answer, 11 - answer, torch.tensor([7, 3, 5, 4, 6]), torch.arange(5))


def circuit_of(model, some_nodes, tokens, share=0.5):
    nodes = [n for n in some_nodes(model, share) if n.site != "final_read"]
    nodes += [Node(1, "final_resid", channel) for channel in range(1, model.cfg.d_model - 1)]
    return Circuit.of_nodes(model, nodes, mean_activations(model, tokens, sites=RELEASED_SITES), sites=RELEASED_SITES)


SMALLER = {"d_model": 6, "n_heads": 2, "d_head": 2, "d_mlp": 7}

_exported = {}


@pytest.fixture(params=STYLES, ids=str)
def exported(request, make_model, some_nodes, tokens, pairs, tmp_path_factory):
    """Model, circuit, and the folder with everything in the released form; made once for each style."""
    if request.param not in _exported:
        model = make_model(**SMALLER, **STYLES[request.param])
        circuit = circuit_of(model, some_nodes, tokens)
        folder = publish_model(model, tmp_path_factory.mktemp("out"))
        _exported[request.param] = model, circuit, publish_circuit(circuit, model, pairs, folder, progress=False)
    return _exported[request.param]


def test_a_published_circuit_is_read_back_to_the_same_scores(exported, pairs):
    model, circuit, folder = exported
    back = load(folder)
    payload, means = read_payload(folder / PAYLOAD), read_means(folder / MEANS)
    assert payload.notes == means.notes == ()
    again = released_circuit(back, payload, means)
    assert again.node_set == circuit.node_set
    table = replay(back, again, payload, answers=answers_of_classes(payload.samples, 3, 8), progress=False)
    assert table.largest("nats") < 1e-6 and table.largest("activation") < 1e-5
    assert len(table) == 2 + payload.n_nodes + 4 + 17 + 2 * sum(map(bool, payload.retained.values()))
    with torch.no_grad():
        with circuit.running(model):
            expected = model(pairs.clean)
        with again.running(back):
            assert torch.allclose(back(pairs.clean), expected, atol=1e-5)
    weights = [edges[edges.kind == "weight"] for edges in (circuit.edges, again.edges)]
    assert weights[1].pair_value.tolist() == pytest.approx(weights[0].weight.tolist())


def test_the_reference_finds_the_stored_losses_in_a_published_circuit(exported):
    """Read from the raw files by a reader and a model that share nothing with the library."""
    _, _, folder = exported
    config = json.loads((folder / "beeg_config.json").read_text())
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    payload = torch.load(folder / PAYLOAD, weights_only=True)
    means = {loc: value.numpy() for loc, value in torch.load(folder / MEANS, weights_only=True).items()}
    retained = {loc: channels.tolist() for loc, channels in payload["circuit_data"].items()}
    importances = payload["importances"]
    tokens = importances["task_samples"][0].numpy()
    prompts = [row[: np.flatnonzero(row)[-1] + 1] for row in tokens]

    def loss(held):
        total = 0.0
        for i, prompt in enumerate(prompts):
            right, wrong = (3, 8) if i < 5 else (8, 3)
            out = Run(config, weights, prompt[None], held=held).logits[0, -1]
            total += math.log1p(math.exp(out[wrong] - out[right]))
        return total / 5

    assert importances["loss"] == pytest.approx(loss({}), abs=1e-4)
    assert importances["interv_loss"] == pytest.approx(loss(outside(retained, means)), abs=1e-4)
    for loc in ("0.attn.v", "1.mlp.post_act", "final_resid"):
        node = (loc, retained[loc][-1])
        stored = importances["ch_interv_losses"][loc][-1]
        assert stored == pytest.approx(loss(outside(retained, means, [node])), abs=1e-4)
        assert abs(stored - importances["interv_loss"]) > 1e-4 or loc != "final_resid"


# -- a circuit whose losses are known by hand --------------------------------------------------------------------------

SIGN, SUM, ONE = 0, 1, 3
"""Channels of the stream: which of two tokens was read, what the neurons made of it, and a constant."""

C, W, U = 2.0, 3.0, 0.5


def by_hand():
    """Tokens 1 and 2 put +1 and -1 into a channel; a neuron each copies that; tokens 3 and 4 read the copy."""
    shape = {"n_layers": 1, "d_model": 4, "n_heads": 1, "d_head": 1, "d_mlp": 2, "d_vocab": 6, "n_ctx": 4}
    cfg = ModelConfig(**shape, positions="none", act_fn="relu", sink=False, bigram=False)
    model = HookedSparseTransformer(cfg).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if not name.endswith(".w"):
            p.zero_()
    model.embed.W_E[:, ONE] = C
    model.embed.W_E[1, SIGN], model.embed.W_E[2, SIGN] = 1, -1
    model.layers[0].mlp.W_in[SIGN] = torch.tensor([1.0, -1.0])
    model.layers[0].mlp.W_out[:, SUM] = torch.tensor([W, -W])
    model.unembed.W_U[SUM, 3], model.unembed.W_U[SUM, 4] = U, -U
    nodes = [Node(0, "mlp_read", SIGN), Node(0, "neuron", 0), Node(0, "neuron", 1), Node(0, "mlp_write", SUM)]
    nodes.append(Node(0, "final_resid", SUM))
    baseline = {place: torch.zeros(width(cfg, place.site)) for place in places(cfg, RELEASED_SITES)}
    baseline[Place(0, "final_resid")][ONE] = C
    circuit = Circuit.of_nodes(model, nodes, NodeValues(baseline, "by hand"), sites=RELEASED_SITES)
    clean, corrupt = torch.tensor([[5, 1], [5, 2]]), torch.tensor([[5, 2], [5, 1]])
    answer = torch.tensor([3, 4])
    batch = TaskBatch(clean, corrupt, answer, 7 - answer, torch.tensor([2, 2]), torch.arange(2))
    return model, circuit, batch


def test_the_losses_of_a_planted_circuit_are_those_worked_out_by_hand(tmp_path):
    model, circuit, batch = by_hand()
    publish_circuit(circuit, model, batch, tmp_path, progress=False)
    payload = read_payload(tmp_path / PAYLOAD)
    copy = W / math.sqrt((1 + C**2) / 4)  # what a neuron writes: the read is normalised
    coin = math.log(2)

    def loss(written, others):
        """Of one prompt: the last stream is (sign, written, 0, C) or, with the sign held at its mean, (0, ...)."""
        return math.log1p(math.exp(-2 * U * written / math.sqrt((written**2 + others + C**2) / 4)))

    whole, alone = loss(copy, 1), loss(copy, 0)
    assert payload.loss == pytest.approx(2 * whole, abs=1e-6)
    assert payload.interv_loss == pytest.approx(2 * alone, abs=1e-6)
    one_neuron_less, nothing = alone + coin, 2 * coin
    assert payload.ch_interv_losses["0.mlp.post_act"] == pytest.approx((one_neuron_less, one_neuron_less), abs=1e-6)
    for loc in ("0.mlp.act_in", "0.mlp.resid_delta", "final_resid"):
        assert payload.ch_interv_losses[loc] == pytest.approx((nothing,), abs=1e-6)
    assert payload.layer_interv_losses == pytest.approx({"0.attn": 2 * alone, "0.mlp": nothing}, abs=1e-6)
    assert payload.loc_interv_losses["0.attn.v"] == pytest.approx(2 * alone, abs=1e-6)
    publish_model(model, tmp_path)
    back = load(tmp_path)
    again = released_circuit(back, payload, read_means(tmp_path / MEANS))
    table = replay(back, again, payload, progress=False)
    assert table.largest("nats") < 1e-6, "and the answers are the model's own"
    cost = again.nodes.set_index("site").importance_nats
    assert cost["final_resid"] == pytest.approx(coin - alone, abs=1e-6), "the paper's scale: per prompt"


# -- what is written ---------------------------------------------------------------------------------------------------


def test_classes_are_sorted_by_answer_and_padding_is_zero(exported, pairs):
    *_, folder = exported
    samples = read_payload(folder / PAYLOAD).samples
    first = torch.where(pairs.answer[:, None] == 3, pairs.clean, pairs.corrupt)
    for row, (whole, length) in enumerate(zip(first, pairs.lengths.tolist(), strict=True)):
        assert samples.tokens[row, :length].equal(whole[:length]) and not samples.tokens[row, length:].any()
    assert samples.lengths.tolist() == pairs.lengths.tolist() * 2
    twin = samples.tokens[5:] != samples.tokens[:5]
    assert twin.sum() == (pairs.clean != pairs.corrupt).sum() and not twin[:, 2:].any()


def test_sites_that_the_search_left_alone_are_retained_whole(make_model, tokens, pairs, tmp_path):
    model = make_model(**SMALLER)
    config = PruneConfig(sites=("neuron", "mlp_write"), share_qk=False)
    nodes = [Node(0, "neuron", 3), Node(1, "mlp_write", 2)]
    means = mean_activations(model, tokens)
    circuit = Circuit.of_nodes(model, nodes, means, prune=config)
    last = mean_activations(model, tokens, sites=["final_resid"])
    publish_circuit(circuit, model, pairs, tmp_path, means=last, progress=False)
    payload = read_payload(tmp_path / PAYLOAD)
    assert payload.retained["0.mlp.post_act"] == (3,) and payload.retained["0.mlp.resid_delta"] == ()
    assert payload.retained["1.attn.q"] == tuple(range(4)) and payload.retained["final_resid"] == tuple(range(6))
    assert payload.prune_config["objective"] == "agreement" and payload.prune_config["sites"] == ["neuron", "mlp_write"]
    again = released_circuit(model, payload, read_means(tmp_path / MEANS))
    with torch.no_grad():
        with circuit.running(model):
            expected = model(tokens)
        with again.running(model):
            assert torch.equal(model(tokens), expected)


def test_what_the_released_form_cannot_say_of_a_circuit_is_refused(
    plain_model, make_model, some_nodes, tokens, pairs, tmp_path
):
    means = mean_activations(plain_model, tokens)
    after = Circuit.of_nodes(plain_model, some_nodes(plain_model), means)
    with pytest.raises(CircuitError, match="channels of final_read, after the last norm"):
        publish_circuit(after, plain_model, pairs, tmp_path, progress=False)
    before = Circuit.of_nodes(plain_model, [], means, sites=NODE_SITES[:-1])
    with pytest.raises(CircuitError, match=r"no means for final_resid; pass means=.*\['final_resid'\]"):
        publish_circuit(before, plain_model, pairs, tmp_path, progress=False)
    circuit = circuit_of(plain_model, some_nodes, tokens)
    pairs.clean[2, 4] = pairs.corrupt[2, 4] = 0
    with pytest.raises(CircuitError, match="ends in token 0"):
        publish_circuit(circuit, plain_model, pairs, tmp_path, progress=False)
    other = make_model(norm="none")
    with pytest.raises(ConfigError, match="norm='none'"):
        publish_circuit(circuit.transplanted(other), other, pairs, tmp_path, progress=False)
    with pytest.raises(CircuitError, match="Load the model it belongs to"):
        publish_circuit(circuit, other, pairs, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_and_left(plain_model, some_nodes, tokens, pairs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    circuit = circuit_of(plain_model, some_nodes, tokens, 0.02)
    with pytest.raises(CheckpointError, match="cannot be written"):
        publish_circuit(circuit, plain_model, pairs, tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "in the way"
