"""The bench's comparison with the speed goals, in a small form: what is compared; no times."""

import pytest
import torch

from singd_ext.bench import goals, rivals
from singd_ext.bench.goals import GOAL, GOALS, MET, GoalOptions
from singd_ext.bench.results import MEASURED, PEAK_MEMORY, STATE

QUICK = {"small": True, "width": (16,), "dtypes": ("fp32",), "rounds": 2, "steps": 1}


def run(**changes) -> tuple[list, list[str]]:
    notes: list[str] = []
    return goals.run(GoalOptions(**(QUICK | changes)), note=notes.append), notes


def goal_rows(rows: list) -> list:
    return [row for row in rows if row.group.startswith(goals.GROUP)]


def test_every_goal_is_compared_with_what_was_measured() -> None:
    rows, notes = run()
    found: dict[str, list] = {}
    for row in goal_rows(rows):
        found.setdefault(row.labels["structure"], []).append(row)
    assert list(found) == list(GOALS)
    met = []
    for structure, criteria in GOALS.items():
        assert len(found[structure]) == len(criteria)
        for row, (criterion, goal) in zip(found[structure], criteria.items(), strict=True):
            assert row.name.startswith(criterion)
            assert (goal is None) == (MET not in row.figures) == (GOAL not in row.figures)
            if goal is None:
                continue
            assert row.figures[GOAL].value == goal
            ratio, over_ours = row.figures[MEASURED].value, criterion.endswith("over ours")
            assert row.name.endswith("at least" if over_ours else "at most")
            assert row.figures[MET].value == (ratio >= goal if over_ours else ratio <= goal)
            met.append(row.figures[MET].value)
    assert f"{int(sum(met))} of {len(met)} goals are met on this machine" in notes
    assert len({row.key for row in rows}) == len(rows)


def test_ratios_are_of_the_times_and_bytes_that_are_shown() -> None:
    rows, _ = run(structures=("block_diagonal:30",))

    def figure(group: str, name: str, figure: str, T: str | None) -> float:
        (row,) = (r for r in rows if (r.group, r.name, r.labels.get("T")) == (group, name, T))
        return row.figures[figure].value

    def seconds(group: str, name: str, T: str | None) -> float:
        return figure(group, name, "time", T)

    ratios = [row.figures[MEASURED].value for row in goal_rows(rows)]
    step, training, memory = "optimizer step", "training step", "memory: width 16, fp32"
    assert ratios == pytest.approx(
        [
            seconds(step, rivals.OURS, "10") / seconds(step, rivals.ADAMW, None),
            seconds(training, rivals.OURS, "1") / seconds(training, rivals.ADAMW, None),
            figure(memory, rivals.OURS, PEAK_MEMORY, None)
            / figure(memory, rivals.ADAMW, PEAK_MEMORY, None),
            seconds(step, rivals.PYPI, "1") / seconds(step, rivals.OURS, "1"),
            seconds(training, rivals.PYPI, "1") / seconds(training, rivals.OURS, "1"),
        ]
    )
    assert figure(memory, rivals.OURS, STATE, None) > 0


def test_without_pypi_its_goals_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    rows, notes = run(structures=("diagonal",))
    assert not [row for row in goal_rows(rows) if "PyPI" in row.name]
    assert any("not installed" in note for note in notes)


def test_a_peer_that_takes_too_long_is_absent_with_a_reason() -> None:
    rows, notes = run(structures=("diagonal",), seconds=1e-9)
    assert not [row for row in goal_rows(rows) if "PyPI" in row.name]
    assert any("a training step takes" in note for note in notes)
    (step, *_) = goal_rows(rows)
    assert step.figures[MEASURED].kind == "implied"  # not all ten steps of a period were timed


def test_a_parameter_that_stays_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_one(structures):
        return lambda model, parameters, _: rivals.Steps(torch.optim.SGD(parameters[1:], lr=0.1))

    monkeypatch.setattr(rivals, "_ours", forgets_one)
    with pytest.raises(AssertionError, match=r"'blocks\.0\.qkv\.weight'\] did not move"):
        run(structures=("diagonal",))


def test_the_network_is_that_of_the_goals() -> None:
    task = GoalOptions().task(256)
    shapes = {tuple(m.weight.shape) for m in task.trained}
    assert shapes == {(768, 256), (256, 256), (1024, 256), (256, 1024)}
    assert len(task.trained) == 4 * 4
    inputs, _ = task.batch()
    assert inputs.shape == (8, 64)
    assert task.model.tokens.num_embeddings == 256
    assert {block.heads for block in task.model.blocks} == {4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": (30,)}, "width is 30"),
        ({"structures": ("rank_tril:1",)}, "'rank_tril:1' has no goals"),
        ({"dtypes": ("fp8",)}, "dtype is 'fp8'"),
        ({"rounds": 1}, "rounds is 1"),
    ],
)
def test_a_bad_option_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**change)
