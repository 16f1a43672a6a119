"""Released circuits written down as tables: read, drawn and written again without their model."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.released import RELEASED_SITES, loc_of
from sparse_interp.circuit.tables import read_tables, write_tables
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.sites import Node, Place

PUBLISHED = Path(__file__).parents[3] / "shared" / "fixtures" / "openai" / "circuits"
QUOTE = "csp_yolo1_single_double_quote_k64"

published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published tables are not in {PUBLISHED}")


def csp_yolo1():
    shape = {"n_layers": 12, "n_heads": 128, "d_head": 8, "d_model": 1024, "d_mlp": 4096, "d_vocab": 2048}
    return ModelConfig(model_name="csp_yolo1", n_ctx=1024, sink=False, **shape)


def quote_circuit():
    files = [PUBLISHED / f"{QUOTE}_{name}.csv" for name in ("nodes", "edges")]
    return files, read_tables(*files, csp_yolo1(), task_name="single_double_quote", interv_loss=0.006825)


@published
def test_the_published_quote_circuit_is_read_as_it_is_described(tmp_path):
    _, circuit = quote_circuit()
    assert (circuit.n_nodes, circuit.n_edges) == (64, 46)
    assert circuit.nodes.site.value_counts()["final_resid"] == 4
    query = circuit.nodes[circuit.nodes.site == "q"].iloc[0]
    assert (query.layer, query.channel, query["head"]) == (10, 657, 82), "heads have 8 channels"
    assert query.importance_nats == pytest.approx((2.7045116812683814 - 0.006825) / 2)
    steering = circuit.edges[circuit.edges.kind == "attention"]
    assert set(steering.source) == {"L10.q.657", "L10.k.657"} and set(steering.target) == {"L10.attn_write.83"}
    written = circuit.edges[(circuit.edges.kind == "residual") & (circuit.edges.source == "L0.mlp_write.460")]
    assert "L10.attn_read.460" in set(written.target)
    assert circuit.edges.weight[circuit.edges.kind == "weight"].isna().all(), "no weight was published"


@published
def test_the_published_tables_come_out_byte_for_byte(tmp_path):
    files, circuit = quote_circuit()
    for before, after in zip(files, write_tables(circuit, tmp_path), strict=True):
        assert after.read_bytes() == before.read_bytes()


@published
def test_the_published_circuit_is_drawn_by_the_numbers_that_were_published(tmp_path):
    _, circuit = quote_circuit()
    ax = circuit.plot()
    (points,) = ax.collections
    assert len(points.get_offsets()) == 64 and "wires by pair value" in ax.get_title()
    widths = {line.get_linewidth() for line in ax.lines}
    assert len(widths) > 30, "every wire has the width of its number"
    page = circuit.bare_page()
    assert page.edge_value == "pair value"
    drawn = [edge.weight for edge in page.edges if edge.kind == "weight"]
    assert drawn == list(circuit.edges.pair_value[circuit.edges.kind == "weight"])
    assert "64" in circuit.to_html(tmp_path / "quote.html").read_text()


# -- tables of any circuit ---------------------------------------------------------------------------------------------


@pytest.fixture
def circuit(make_model, some_nodes, tokens):
    """A circuit as `released_circuit` makes it, of a model with every kind of channel."""
    model = make_model(positions="concat", d_pos_emb=3)
    nodes = [n for n in some_nodes(model, 0.4) if n.site != "final_read"] + [Node(1, "final_resid", c) for c in (0, 7)]
    means = mean_activations(model, tokens, sites=RELEASED_SITES)
    found = Circuit.of_nodes(model, nodes, means, sites=RELEASED_SITES)
    noise = torch.Generator().manual_seed(0)
    found.nodes["stored_loss"] = torch.rand(len(found.nodes), generator=noise).double().numpy() / 3
    values = torch.randn(len(found.edges), generator=noise).double().numpy()
    found.edges["pair_value"] = pd.Series(values).where(found.edges.kind == "weight")
    return found


def test_a_circuit_comes_back_from_its_tables_but_for_weights_and_means(circuit, tmp_path):
    back = read_tables(*write_tables(circuit, tmp_path), circuit.cfg, interv_loss=0.1)
    assert list(back.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None)) == list(
        circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None)
    )
    assert back.nodes["head"].equals(circuit.nodes["head"])
    same = ["source", "target", "kind", "weight_name", "pair_value"]
    assert back.edges[same].equals(circuit.edges[same]), "wires follow from the tables as they do from the model"
    assert back.nodes.importance_nats.tolist() == pytest.approx(((circuit.nodes.stored_loss - 0.1) / 2).tolist())


def test_without_the_circuits_own_loss_importances_are_unknown(circuit, tmp_path):
    back = read_tables(*write_tables(circuit, tmp_path), circuit.cfg)
    assert back.nodes.importance_nats.isna().all() and back.nodes.stored_loss.notna().all()
    back.plot()


def test_a_circuit_of_tables_does_not_run_until_it_is_put_into_its_model(circuit, make_model, tokens, tmp_path):
    model = make_model(positions="concat", d_pos_emb=3)
    back = read_tables(*write_tables(circuit, tmp_path), circuit.cfg)
    with pytest.raises(CircuitError, match="written down without its model"), back.running(model):
        pass
    with pytest.raises(CircuitError, match="has no baseline to save"):
        back.save(tmp_path / "circuit.json")
    moved = back.transplanted(model, circuit.baseline)
    assert moved.edges.weight.equals(circuit.edges.weight)
    with torch.no_grad():
        with circuit.running(model):
            expected = model(tokens)
        with moved.running(model):
            assert torch.equal(model(tokens), expected)


def test_tables_are_written_of_released_circuits_only(plain_model, some_nodes, zero, tmp_path):
    with pytest.raises(CircuitError, match="save_tables"):
        write_tables(Circuit.of_nodes(plain_model, some_nodes(plain_model), zero(plain_model)), tmp_path)


def changed(table, column, row, value):
    frame = pd.read_csv(table, dtype=str)
    frame.loc[row, column] = value
    frame.to_csv(table, index=False)


@pytest.mark.parametrize(
    ("table", "column", "value", "words"),
    [
        ("nodes", "node", "0.attn.y:1", "'0.attn.y' is no loc"),
        ("nodes", "node", "neuron 3", "'neuron 3' is no node"),
        ("nodes", "node", "7.mlp.act_in:1", "mlp_read exists in layers 0 to 1, not in 7"),
        ("nodes", "node", "0.attn.q:15", "q has channels 0 to 14, not 15"),
        ("nodes", "importance", "much", "could not convert string to float: 'much'; importance is a column of numbers"),
        ("nodes", "importance", "inf", "has rows in which importance is no number"),
        ("edges", "source", "1.mlp.post_act:19", "does not list both|which no weight does"),
        ("edges", "target", "0.attn.act_in:0", "which no weight does|does not list both"),
        ("edges", "pair_importance", "", "rows in which pair_importance is no number"),
    ],
)
def test_a_table_that_describes_no_circuit_is_refused(circuit, tmp_path, table, column, value, words):
    files = write_tables(circuit, tmp_path)
    changed(tmp_path / f"{table}.csv", column, 1, value)
    with pytest.raises(CircuitError, match=words):
        read_tables(*files, circuit.cfg)


def test_a_file_that_is_no_such_table_is_refused(circuit, tmp_path):
    nodes, edges = write_tables(circuit, tmp_path)
    with pytest.raises(
        CircuitError, match="has the columns source, target, pair_importance; expected node, importance"
    ):
        read_tables(edges, edges, circuit.cfg)
    with pytest.raises(CircuitError, match="cannot be read as a table"):
        read_tables(tmp_path / "none.csv", edges, circuit.cfg)
    lines = nodes.read_text().splitlines()
    nodes.write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(CircuitError, match="lists a row twice"):
        read_tables(nodes, edges, circuit.cfg)


def test_a_node_is_named_by_its_loc_and_channel(circuit, tmp_path):
    nodes, _ = write_tables(circuit, tmp_path)
    listed = pd.read_csv(nodes).node.tolist()
    first = circuit.nodes.iloc[0]
    assert listed[0] == f"{loc_of(Place(int(first.layer), first.site))}:{first.channel}"
    assert listed[-2:] == ["final_resid:0", "final_resid:7"]
