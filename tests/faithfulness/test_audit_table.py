"""A verdict is what the rows that decide amount to: one that misses its bound fails it, one not run leaves it open."""

import pytest

from sparse_interp.faithfulness.audit_table import DECIDING, INFORMING, AuditTable, frame_of, not_run
from sparse_interp.faithfulness.thresholds import FOUR


def table_of(**passed):
    """Two rows for each of the four things, of which the second is as told, and one that informs and fails."""
    rows = []
    for about in FOUR:
        for number in (1, 2):
            row = not_run(about, f"measure {number}", "circuit", DECIDING, "no reason", decides=True)
            kept = passed.get(about, True) if number == 2 else True
            note = row["note"] if kept is None else f"{about} is kept" if kept else f"{about} is missed"
            rows.append(row | {"passed": kept, "note": note})
    rows.append(rows[0] | {"split": INFORMING, "decides": False, "passed": False, "note": "elsewhere it is not"})
    return AuditTable(frame_of(rows))


def test_a_circuit_that_keeps_all_four_passes_whatever_informs():
    table = table_of()
    assert table.passed is True and table.four.frame.passed.tolist() == [True] * 4
    assert table.verdict.startswith("faithful") and "elsewhere it is not" in table.verdict


@pytest.mark.parametrize("about", FOUR)
def test_any_of_the_four_that_misses_one_bound_fails_the_verdict_and_is_named(about):
    table = table_of(**{about: False})
    assert table.passed is False and table.verdict == f"fails: {about} is missed"
    assert dict(zip(table.four.frame.about, table.four.frame.passed, strict=True)) == {
        other: other != about for other in FOUR
    }


@pytest.mark.parametrize("about", FOUR)
def test_any_of_the_four_that_was_not_run_leaves_it_incomplete(about):
    table = table_of(**{about: None})
    assert table.passed is None and table.verdict == "incomplete"
    assert table.reasons == ["measure 2 (circuit): not run: no reason"]
    (row,) = table.four.frame[table.four.frame.about == about].itertuples()
    assert row.passed is None and "measure 2" in row.why


def test_a_miss_is_said_though_something_else_was_not_run():
    table = table_of(**{FOUR[0]: None, FOUR[3]: False})
    assert table.passed is False and table.reasons == [f"{FOUR[3]} is missed"]
