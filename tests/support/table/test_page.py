"""The table of docs/support.md is that of the cells, and has a row for every family."""

from knnmoe_hf.models.families import FAMILIES as SUPPORTED
from knnmoe_hf.models.gates import find_gates
from tests.support.families import FAMILIES, family_model
from tests.support.table.cells import CELLS, MAIN, REASONS
from tests.support.table.page import PAGE, page_with, table


def test_the_page_shows_the_table_that_the_tests_check():
    text = PAGE.read_text()
    assert page_with(text, table()) == text, "run python -m tests.support.table.page"


def test_every_supported_family_is_a_row_of_the_table():
    assert {find_gates(family_model(family))[0].family for family in FAMILIES} == set(SUPPORTED)


def test_the_main_families_work_in_every_way():
    assert not [cell for cell, reason in CELLS.items() if cell[0] in MAIN and reason is not None]


def test_every_reason_is_that_of_a_cell():
    assert {text for text, _, _ in REASONS} == {reason for reason in CELLS.values() if reason is not None}
