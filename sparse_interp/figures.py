"""One function per published figure: the tidy table that it shows, and the axes that it is drawn on."""

import pandas as pd

from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.audit_table import AuditTable
from sparse_interp.faithfulness.board import BoardTable
from sparse_interp.interventions.pruning import SearchHistory
from sparse_interp.results import PAPER, Axes


def audit_figure(audit: AuditTable) -> tuple[pd.DataFrame, Axes]:
    """Accuracy of the model, its circuit, the model without it, and random circuits of its size, on both splits."""
    return audit.frame, audit.plot()


def search_figure(circuit: Circuit) -> tuple[pd.DataFrame, Axes]:
    """The objective and the share of open gates, step by step of the search."""
    history = SearchHistory(circuit.history)
    return history.series(), history.plot()


def board_figure(board: BoardTable) -> tuple[pd.DataFrame, Axes]:
    """How surely each method tells the true nodes and edges from the rest, and how often it finds exactly them."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 1.6 + 0.6 * board.frame.method.nunique()), layout="constrained")
    figure.set_facecolor(PAPER)
    for ax, value in zip(grid.flat, BOARD_PANELS, strict=True):
        board.plot(ax, value=value)
        ax.set(xlabel=BOARD_PANELS[value], xlim=(0, 1))
    for ax in grid[:, 1]:
        ax.set_yticklabels([])
    return board.summary().frame, grid[0, 0]


BOARD_PANELS = {
    "node_auc": "ROC-AUC of nodes, mean over cases (0.5 is chance)",
    "edge_auc": "ROC-AUC of edges, mean over cases (0.5 is chance)",
    "nodes_exact": "share of cases whose nodes are found exactly",
    "edges_exact": "share of cases whose edges are found exactly",
}
