"""The bench of growth in a small form: exponents of the paper and of a fit; no times."""

import pytest

from singd_ext.bench import scaling
from singd_ext.bench.results import TIME, measured
from singd_ext.bench.scaling import (
    EXPONENT,
    PAPER,
    PAPER_EXPONENT,
    STATISTIC,
    STEP,
    UPDATE,
    Point,
    ScalingOptions,
    formula,
)


def test_every_sweep_of_every_structure_has_exponents_and_times() -> None:
    structures = ("diagonal", "block_diagonal:8", "triu_toeplitz")
    rows = scaling.run(ScalingOptions(structures, rounds=2, small=True))
    exponents = [row for row in rows if row.group == scaling.EXPONENTS]
    found = {(r.name, r.labels["against"], r.labels["structure"]) for r in exponents}
    expected = {(op, "d", s) for op in scaling.ALL for s in structures}
    expected |= {(op, "k", "block_diagonal") for op in scaling.ALL}
    expected |= {(STATISTIC, "m", s) for s in structures}
    expected |= {(op, "layers", s) for op in (UPDATE, STEP) for s in structures}
    assert found == expected and len(exponents) == len(expected)
    times = [row for row in rows if row.group != scaling.EXPONENTS]
    assert len(times) == 3 * len(expected)
    assert all(row.figures[TIME].value > 0 and row.spread[TIME] >= 0 for row in times)
    assert len({row.key for row in rows}) == len(rows)


def test_a_fit_finds_the_exponent_of_the_larger_points() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    growth = [measured(5.0 if x < 8 else 5 * (x / 8) ** 1.5, "s") for x in values]
    assert scaling.slope(values, growth) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("variable", "operator", "structure", "exponent"),
    [
        ("d", STATISTIC, "diagonal", 1), ("d", STEP, "diagonal", 2),
        ("d", STATISTIC, "block_diagonal:32", 1), ("d", UPDATE, "block_diagonal:32", 1),
        ("d", STEP, "hierarchical:16,16", 2), ("d", UPDATE, "dense", 3), ("d", STEP, "dense", 3),
        ("k", STATISTIC, "hierarchical", 1), ("k", UPDATE, "rank_triu", 2),
        ("k", STEP, "block_diagonal", 1), ("m", STATISTIC, "triu_toeplitz", 1),
        ("layers", UPDATE, "rank_triu:1", 1), ("layers", STEP, "triu_toeplitz", 1),
    ],
)  # fmt: skip
def test_the_exponents_of_table_2(
    variable: str, operator: str, structure: str, exponent: float
) -> None:
    (sweep,) = (s for s in scaling.SWEEPS if s.variable == variable)
    figures = [
        measured(formula(operator, scaling.spec_at(structure, p.k), p), "")
        for p in sweep.points()
    ]  # fmt: skip
    assert scaling.slope(sweep.values, figures) == pytest.approx(exponent)


def test_lower_terms_and_logarithms_of_table_2_count() -> None:
    short, long = Point(512, 0, 10, 1), Point(512, 0, 10**6, 1)
    assert formula(STATISTIC, "dense", short) == 10 * 512**2 + 512**3
    assert formula(STATISTIC, "dense", long) == 10**6 * 512**2 + 512**3
    assert formula(STATISTIC, "triu_toeplitz", long) == 10**6 * 512 * 9


def test_a_size_is_put_into_the_families_that_have_one() -> None:
    specs = ("block_diagonal", "rank_triu", "hierarchical", "diagonal", "rank_triu:1", "dense")
    assert [scaling.spec_at(spec, 9) for spec in specs] == [
        "block_diagonal:9", "rank_triu:9", "hierarchical:4,5", "diagonal", "rank_triu:1", "dense",
    ]  # fmt: skip


def test_the_exponents_stand_beside_the_papers() -> None:
    rows = scaling.run(ScalingOptions(("diagonal",), rounds=2, small=True))
    (row,) = (r for r in rows if (r.name, r.labels.get("against")) == (STEP, "d"))
    assert row.labels[PAPER] == "d_i d_o"
    assert row.figures[PAPER_EXPONENT].value == pytest.approx(2)
    assert row.figures[PAPER_EXPONENT].kind == "given" and row.figures[EXPONENT].kind == "implied"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 1}, "rounds is 1"),
        ({"dtypes": ("autocast",)}, "not 'autocast'"),
        ({"structures": ("round",)}, "round"),
    ],
)
def test_a_bad_option_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalingOptions(**change)
