"""Facts of plane policies follow from their rule of writing."""

from hypothesis import given
from hypothesis import strategies as st

from loopwise.loops.planes import PlanePolicy, parse_policy

NAMES = ["per_loop", "last_exited", "collapse", "decode_shared"]
SHARED = ["single", "average", "first_then_shared", "modulo:1", "modulo:2", "modulo:3"]
policies = st.sampled_from([*NAMES, *SHARED, *(f"{name}:per_position" for name in SHARED)]).map(parse_policy)


@given(policies, st.integers(1, 9), st.booleans())
def test_readers_are_those_of_the_same_plane(policy: PlanePolicy, loops: int, generated: bool) -> None:
    stores = [policy.store(loop, loops, generated=generated) for loop in range(1, loops + 1)]
    assert policy.stored(loops, generated=generated) == sorted(set(stores))
    assert all(1 <= store <= loops for store in stores)
    for loop in range(1, loops + 1):
        readers = policy.readers(loop, loops, generated=generated)
        assert loop in readers
        assert all((stores[other - 1] == stores[loop - 1]) == (other in readers) for other in range(1, loops + 1))
    assert policy.kept(loops, generated=generated) <= len(set(stores))


@given(policies)
def test_drafts_need_planes_that_later_loops_leave_alone(policy: PlanePolicy) -> None:
    last_written = [max(policy.readers(loop, 8, generated=True)) for loop in range(1, 9)]
    assert policy.speculates == (last_written == list(range(1, 9)))


@given(policies)
def test_prompts_depend_on_their_depth_where_loops_overwrite_each_other(policy: PlanePolicy) -> None:
    overwritten = len(policy.stored(8, generated=False)) < 8
    assert policy.knows_depth == overwritten
    # Where nothing is overwritten, a prompt may be cut anywhere; elsewhere only into single positions.
    assert policy.chunk_invariant == (not overwritten or policy.prefill == "per_position")


def test_pages_of_answers_serve_prompts_only_if_both_write_alike() -> None:
    for name in [*NAMES, "single:per_position", "modulo:2:per_position"]:
        policy = parse_policy(name)
        alike = all(
            policy.store(loop, 4, generated=True) == policy.store(loop, 4, generated=False) for loop in range(1, 5)
        )
        assert policy.shares_generated == alike
