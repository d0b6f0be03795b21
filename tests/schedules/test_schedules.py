"""Every schedule is complete and gets to its end; wrong counts and wrong schedules are refused with the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.errors import ConfigError
from engine.schedules.action import Action, Kind
from engine.schedules.program import Schedule
from engine.schedules.table import RECIPES, build_schedule, default_num_chunks
from engine.schedules.validate import validate

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2)]
SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8, 16) for m in (1, 2, 3, 5, 8, 17, 32)]


def program(schedule: Schedule, rank: int) -> str:
    return " ".join(map(str, schedule.programs[rank]))


@pytest.mark.parametrize(("name", "num_chunks"), SCHEDULES)
def test_every_schedule_is_complete_and_gets_to_its_end(name: str, num_chunks: int) -> None:
    for num_stages, num_microbatches in SIZES:
        validate(build_schedule(name, num_stages, num_microbatches, num_chunks))


def test_printed_programs_are_those_of_the_papers() -> None:
    assert program(build_schedule("gpipe", 2, 3), 1) == "1F0 1F1 1F2 1BW0 1BW1 1BW2"
    assert program(build_schedule("1f1b", 4, 4), 0) == "0F0 0F1 0F2 0F3 0BW0 0BW1 0BW2 0BW3"
    assert program(build_schedule("1f1b", 4, 4), 2) == "2F0 2F1 2BW0 2F2 2BW1 2F3 2BW2 2BW3"
    assert program(build_schedule("zb-h1", 3, 3), 2) == "2F0 2B0 2F1 2B1 2F2 2B2 2W0 2W1 2W2"
    assert program(build_schedule("zb-h2", 2, 4), 0) == "0F0 0F1 0F2 0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3"
    assert program(build_schedule("zb-v", 2, 3, 2), 1) == ("1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 "
                                                        "1B1 2B2 1B2 1W1 2W2 1W2")


def test_interleaved_runs_groups_of_p_microbatches_through_the_chunks() -> None:
    """Megatron-LM's order: warm-up of 2(P-r-1) + (V-1)P forwards, and one more in the first turn."""
    schedule = build_schedule("interleaved", 2, 4, 2)
    assert schedule.placement == (0, 1, 0, 1)
    assert program(schedule, 0) == "0F0 0F1 2F0 2F1 0F2 2BW0 0F3 2BW1 2F2 0BW0 2F3 0BW1 2BW2 2BW3 0BW2 0BW3"
    assert program(schedule, 1) == "1F0 1F1 3F0 3BW0 3F1 3BW1 1F2 1BW0 1F3 1BW1 3F2 3BW2 3F3 3BW3 1BW2 1BW3"


def test_one_stage_is_gradient_accumulation() -> None:
    for name in ("1f1b", "gpipe"):
        kinds = [action.kind for action in build_schedule(name, 1, 3).programs[0]]
        assert sorted(kinds) == sorted([Kind.F, Kind.BW] * 3)
    assert program(build_schedule("1f1b", 1, 3), 0) == "0F0 0BW0 0F1 0BW1 0F2 0BW2"
    assert program(build_schedule("zb-h1", 1, 2), 0) == "0F0 0B0 0W0 0F1 0B1 0W1"
    assert program(build_schedule("zb-v", 1, 2, 2), 0) == "0F0 1F0 1B0 1W0 0F1 0B0 0W0 1F1 1B1 1W1 0B1 0W1"


def test_zb_v_turns_on_the_last_rank() -> None:
    schedule = build_schedule("zb-v", 4, 8, 2)
    assert schedule.placement == (0, 1, 2, 3, 3, 2, 1, 0)
    assert [schedule.crosses(chunk) for chunk in range(8)] == [False, True, True, True, False, True, True, True]


def test_gradients_are_summed_in_the_order_of_the_microbatches() -> None:
    """So that a schedule does not change the rounding of the accumulated gradient."""
    for name, num_chunks in SCHEDULES:
        for actions in build_schedule(name, 4, 9, num_chunks).programs:
            for chunk in {action.chunk for action in actions}:
                order = [a.microbatch for a in actions if a.chunk == chunk and a.kind.makes_weight_gradient]
                assert order == list(range(9))


def test_actions_print_as_chunk_kind_microbatch() -> None:
    assert str(Action(Kind.F, 0, 2)) == "2F0"
    assert str(Action(Kind.SEND_F, 0, 2)) == "2SEND_F0"
    assert str(Action(Kind.REDUCE_GRAD, 0, 2)) == "2REDUCE_GRAD"
    assert Action(Kind.SEND_B, 3, 2).partner == Action(Kind.RECV_B, 3, 1)
    assert Action(Kind.RECV_F, 3, 2).partner == Action(Kind.SEND_F, 3, 1)


@pytest.mark.parametrize(("arguments", "words"), [
    (("zb_h1", 2, 2, 1), "did you mean zb-h1?"),
    (("1f1b", 0, 2, 1), "stages = 0"),
    (("1f1b", 2, 0, 1), "microbatches = 0"),
    (("interleaved", 2, 4, 0), "chunks per stage = 0"),
    (("interleaved", 2, 4, 1), "needs chunks per stage ≥ 2 (it is 1); with 1 there is gpipe, 1f1b"),
    (("zb-v", 2, 4, 3), "the zb-v schedule needs chunks per stage = 2 (it is 3); with 3 there is interleaved"),
    (("1f1b", 2, 4, 2), "the 1f1b schedule needs chunks per stage = 1 (it is 2); with 2 there is interleaved, zb-v"),
])
def test_wrong_counts_are_refused(arguments: tuple[str, int, int, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule(*arguments)
    assert words in str(caught.value)


def test_default_chunks_are_allowed() -> None:
    assert {name: default_num_chunks(name) for name in RECIPES} == {
        "gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-h2": 1, "zb-v": 2}
    for name in RECIPES:
        build_schedule(name, 2, 2, default_num_chunks(name))


def edited(schedule: Schedule, rank: int, actions: str) -> Schedule:
    """The schedule with another program on `rank`, written as it prints."""
    by_name = {str(action): action for program in schedule.programs for action in program}
    programs = list(schedule.programs)
    programs[rank] = tuple(by_name[name] for name in actions.split())
    return replace(schedule, programs=tuple(programs))


@pytest.mark.parametrize(("rank", "actions", "problem", "cell"), [
    (1, "1F0 1F1 1BW0", "1B1 is missing", "[end]"),
    (1, "1F0 1BW0 1F1 1BW1 1F0", "1F0 is done twice", "[1F0]"),
    (1, "1F0 1BW0 1F1 0F1 1BW1", "0F1 is on rank 1, but chunk 0 lives on rank 0", "[0F1]"),
    (1, "1BW0 1F0 1F1 1BW1", "1BW0 comes before 1F0", "[1BW0]"),
    (0, "0F0 0BW0 0F1 0BW1", None, None),
    (1, "1F1 1BW1 1F0 1BW0", "deadlock", "[0BW0]"),
])
def test_a_wrong_schedule_is_shown_with_the_cell_marked(rank: int, actions: str, problem: str | None,
                                                        cell: str | None) -> None:
    schedule = edited(edited(build_schedule("1f1b", 2, 2), 0, "0F0 0BW0 0F1 0BW1"), rank, actions)
    if problem is None or cell is None:
        validate(schedule)
        return
    with pytest.raises(ConfigError) as caught:
        validate(schedule)
    first, *waits, header, row_0, row_1 = str(caught.value).splitlines()
    assert first == f"schedule 1f1b (2 stages × 1 chunk(s), 2 microbatches) cannot run: {problem}"
    assert "position" in header and (row_0 + row_1).count("<-- here") == 1
    assert cell in (row_0 if "<-- here" in row_0 else row_1)
    circle = ["  rank 0 waits at 0BW0 for 1B0", "  rank 1 waits at 1F1 for 0F1"]
    assert waits == (circle if problem == "deadlock" else [])


def test_the_grid_of_a_long_schedule_is_cut_around_the_error() -> None:
    """A rank that runs a forward ten microbatches too early makes all ranks wait; the one to blame is marked."""
    schedule = build_schedule("1f1b", 4, 64)
    actions = list(schedule.programs[2])
    early = actions.index(Action(Kind.F, 45, 2))
    actions.insert(early - 20, actions.pop(early))
    with pytest.raises(ConfigError) as caught:
        validate(replace(schedule, programs=(*schedule.programs[:2], tuple(actions), schedule.programs[3])))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("deadlock") and "  rank 2 waits at 2F45 for 1F45" in lines[1:5]
    assert lines[5].startswith("  position") and len(lines) == 10 and max(map(len, lines)) <= 120
    assert "[2F45]" in lines[8] and lines[8].endswith("<-- here")


def test_a_microbatch_that_does_not_exist_is_refused() -> None:
    schedule = build_schedule("1f1b", 1, 1)
    extra = (*schedule.programs[0], Action(Kind.F, 1, 0))
    with pytest.raises(ConfigError, match="0F1 does not exist: chunks are 0 … 0, microbatches 0 … 0"):
        validate(replace(schedule, programs=(extra,)))
