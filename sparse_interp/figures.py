"""One function per published figure: the tidy table that it shows, and the axes that it is drawn on."""

import pandas as pd

from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.audit import AuditTable
from sparse_interp.interventions.pruning import SearchHistory
from sparse_interp.results import Axes


def audit_figure(audit: AuditTable) -> tuple[pd.DataFrame, Axes]:
    """Accuracy of the model, its circuit, the model without it, and random circuits of its size, on both splits."""
    return audit.frame, audit.plot()


def search_figure(circuit: Circuit) -> tuple[pd.DataFrame, Axes]:
    """The objective and the share of open gates, step by step of the search."""
    history = SearchHistory(circuit.history)
    return history.series(), history.plot()
