"""The stages of ZeRO: their steps are those of one plain torch loop, whatever the model, the ranks and the options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from drivetrain.contracts.partitioner import ParameterFacts
from drivetrain.plugins.optimizer.adamw import AdamW
from drivetrain.training.ledger import formats_of
from support.partition_cases import (
    DTYPES,
    POLICIES,
    Case,
    Outcome,
    Work,
    make_stack,
    partitioner_of,
    run_ranks,
    train_plainly,
)

WORLDS = (1, 2, 4)
STAGES = ("none", "zero1", "zero2", "zero3")
RELATIVE, ABSOLUTE = 2e-4, 2e-5
"""How far parameters may be from those of the plain loop in float32: sums over ranks are made in another order."""

FSDP = {"engine": "fsdp2"}

WHOLE_TABLE = [Case(stage, checkpoint=checkpoint) for stage in STAGES for checkpoint in POLICIES]
"""Each stage under each policy: whether parameters are there when a layer is computed again does not hang on how many
ranks hold them."""
NARROW = [Case(stage, precision="bf16") for stage in STAGES]
PARITY = {
    1: [*WHOLE_TABLE, *NARROW],
    2: [
        *WHOLE_TABLE,
        *NARROW,
        *(Case("zero2", precision="bf16", checkpoint=checkpoint) for checkpoint in ("full", "kinds", "layers")),
        *(Case("zero3", precision="bf16", checkpoint=checkpoint) for checkpoint in ("costs", "offload")),
    ],
    4: [*(Case(stage, checkpoint=checkpoint) for stage in STAGES for checkpoint in ("none", "full")), *NARROW],
}
"""World size -> cases of the parity table: each stage with each policy, each precision and each world size, and each
policy with each precision."""
CUT = [
    *(Case(stage, {"transport": "collective"}) for stage in STAGES[1:]),
    *(Case(stage, {"bucket_bytes": 100}) for stage in STAGES[1:]),
    Case("zero3", FSDP),
]
"""Options of which the number of ranks decides where anything is cut, and by which way it goes."""
OPTIONS = [
    *CUT,
    *(Case(stage, {"accumulate": "whole"}, precision) for stage in STAGES[2:] for precision in ("fp32", "bf16")),
    *(Case(stage, {"offload": "disk"}) for stage in STAGES[1:]),
    Case("zero3", {"offload": "disk", "offload_what": ("optimizer", "parameters")}, "bf16"),
    Case("zero2", {"offload": "cpu"}),
    Case("zero3", {**FSDP, "accumulate": "whole"}, "bf16"),
]
ODD = [Case(stage, model="odd") for stage in STAGES]
OTHER = {
    1: [*(Case(stage, overflow=True) for stage in STAGES), *(Case(stage, micro_batches=1) for stage in STAGES)],
    2: [*(Case(stage, scale=1024.0) for stage in STAGES), *(Case(stage, micro_batches=1) for stage in STAGES)],
    4: [Case(stage, overflow=True) for stage in STAGES],
}
HYBRID = [Case(stage, {"shard": 2}) for stage in STAGES[1:]] + [
    Case("zero3", {"shard": 1}),
    Case("zero3", {**FSDP, "shard": 2}),
]
REFUSED = {
    "can't be put together in groups of 3": Case("zero3", {"shard": 3}),
    "lie in no memory that processes share": Case(
        "zero3", {"transport": "shared", "offload": "disk", "offload_what": ("parameters",)}
    ),
}
SAVED = Case("zero3", model="used")
LOADED = [Case(stage, model="used") for stage in STAGES]
MEASURED = [Case("none"), *(Case(stage, {"transport": "collective"}) for stage in STAGES[1:])]
MEASURED_NARROW = [Case(**{**vars(case), "precision": "bf16"}) for case in MEASURED]


def options_of(world: int) -> list[Case]:
    return CUT if world == 4 else OPTIONS


def measured_of(world: int) -> list[Case]:
    return [*MEASURED, *MEASURED_NARROW] if world == 2 else MEASURED


def in_worlds(cases_of: Callable[[int], list[Case]], worlds: Sequence[int] = WORLDS) -> pytest.MarkDecorator:
    """World size and case of each of these."""
    pairs = [pytest.param(world, case, id=f"{case.name}-{world}") for world in worlds for case in cases_of(world)]
    return pytest.mark.parametrize(("world", "case"), pairs)


def with_folder(case: Case, folder: Path) -> Case:
    """Scratch files go where the test says."""
    if case.options.get("offload") != "disk":
        return case
    return Case(**{**vars(case), "options": {**case.options, "offload_folder": str(folder)}})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[int, list[dict[str, Outcome | str]]]:
    """World size -> rank -> name of a case -> outcome. The state that four ranks save is loaded by two and by one."""
    torch.set_num_threads(1)
    found = {}
    for world in reversed(WORLDS):
        chosen = (*PARITY[world], *options_of(world), *ODD, *OTHER[world])
        cases = [with_folder(case, folder / "off") for case in chosen]
        hybrid = [*HYBRID, *REFUSED.values()] if world == 4 else []
        state = str(folder / "state")
        work = Work(
            [*cases, *hybrid],
            save=(SAVED, state) if world == 4 else None,
            load=(LOADED, state) if world < 4 else None,
            measure=measured_of(world),
        )
        found[world] = run_ranks(work, world, folder / str(world))
    return found


def of_ranks(runs: list[dict[str, Outcome | str]], case: Case, folder: Path | None = None) -> list[Outcome]:
    name = (case if folder is None else with_folder(case, folder / "off")).name
    found = [run[name] for run in runs]
    assert all(isinstance(outcome, Outcome) for outcome in found), found
    return [outcome for outcome in found if isinstance(outcome, Outcome)]


def expect_plain(found: list[Outcome], case: Case, relative: float = RELATIVE) -> None:
    wanted = train_plainly(case, len(found))
    losses = [sum(values) / len(found) for values in zip(*(outcome.losses for outcome in found), strict=True)]
    assert losses == pytest.approx(wanted.losses, rel=relative)
    for outcome in found:
        assert outcome.norms == pytest.approx(wanted.norms, rel=10 * relative)
        for name, tensor in wanted.state.items():
            have = outcome.state[name]
            assert have.shape == tensor.shape
            torch.testing.assert_close(
                have.float(), tensor.float(), rtol=relative, atol=ABSOLUTE if relative == RELATIVE else 0.05, msg=name
            )


@pytest.mark.slow
@in_worlds(PARITY.__getitem__)
def test_steps_are_those_of_one_plain_loop(outcomes, world: int, case: Case) -> None:
    """The parity table: losses, norms and parameters after three steps of two micro-batches, with clipping."""
    expect_plain(of_ranks(outcomes[world], case), case, RELATIVE if case.precision == "fp32" else 0.03)


@pytest.mark.slow
@in_worlds(options_of)
def test_no_option_changes_the_step(outcomes, folder: Path, world: int, case: Case) -> None:
    relative = RELATIVE if case.precision == "fp32" else 0.03
    expect_plain(of_ranks(outcomes[world], case, folder), case, relative)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_awkward_parameters_train_as_without_ranks(outcomes, world: int, case: Case) -> None:
    """Shared, frozen, without dims, without elements, unused, used by one rank, of several dtypes, of uneven rows."""
    found = of_ranks(outcomes[world], case)
    expect_plain(found, case)
    assert torch.equal(found[0].state["model.spare"], torch.ones(5))
    assert "optimizer.layers.1.up.weight.exp_avg" not in found[0].state


@pytest.mark.slow
@pytest.mark.parametrize("case", HYBRID, ids=lambda case: case.name)
def test_some_ranks_share_out_a_copy_and_others_hold_another(outcomes, case: Case) -> None:
    expect_plain(of_ranks(outcomes[4], case), case)


@pytest.mark.slow
@pytest.mark.parametrize("message", REFUSED)
def test_what_can_not_be_is_told(outcomes, message: str) -> None:
    assert message in str(outcomes[4][0][REFUSED[message].name])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_scale_is_taken_out_alike(outcomes, world: int, stage: str) -> None:
    """A scale of a power of two changes no bit of a float32 step."""
    plain = of_ranks(outcomes[world], Case(stage))[0]
    scaled = of_ranks(outcomes[world], Case(stage, scale=1024.0))[0]
    assert scaled.norms == pytest.approx(plain.norms, rel=1e-6)
    for name, tensor in plain.state.items():
        torch.testing.assert_close(scaled.state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_of_one_rank_is_seen_by_all(outcomes, world: int, stage: str) -> None:
    for outcome in of_ranks(outcomes[world], Case(stage, overflow=True)):
        assert not any(math.isfinite(norm) for norm in outcome.norms)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_two_micro_batches_make_the_step_of_one(outcomes, world: int, stage: str) -> None:
    one = of_ranks(outcomes[world], Case(stage, micro_batches=1))[0]
    two = of_ranks(outcomes[world], Case(stage))[0]
    assert two.norms == pytest.approx(one.norms, rel=1e-5)
    for name, tensor in one.state.items():
        torch.testing.assert_close(two.state[name], tensor, rtol=RELATIVE, atol=ABSOLUTE, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_agree_in_every_bit(outcomes, world: int, stage: str) -> None:
    first, *others = of_ranks(outcomes[world], Case(stage))
    for other in others:
        assert other.norms == first.norms
        assert all(torch.equal(other.state[name], tensor) for name, tensor in first.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_alone_a_stage_is_none_bit_for_bit(outcomes, stage: str) -> None:
    """One rank has nothing to cut."""
    for checkpoint in POLICIES:
        plain = of_ranks(outcomes[1], Case("none", checkpoint=checkpoint))[0]
        found = of_ranks(outcomes[1], Case(stage, checkpoint=checkpoint))[0]
        assert found.losses == plain.losses
        assert found.norms == plain.norms
        assert all(torch.equal(found.state[name], tensor) for name, tensor in plain.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.name)
def test_what_four_ranks_saved_others_load_and_go_on(outcomes, world: int, case: Case) -> None:
    """A state of zero3 on four ranks: the same names, shapes and bits under every partitioner, on two ranks and on one;
    and the next step is the one that the four would have made."""
    saved, went_on = outcomes[4][0]["saved"], outcomes[4][0]["went on"]
    for run in outcomes[world]:
        loaded, then = run[f"loaded {case.name}"], run[f"loaded, went on {case.name}"]
        assert set(loaded.state) - {"partitioner.rounds"} == set(saved.state) - {"partitioner.rounds"}
        for name in loaded.state:
            if name.startswith(("model.", "optimizer.")):
                assert torch.equal(loaded.state[name], saved.state[name]), name
    for name in then.state:
        if name.startswith("model."):
            torch.testing.assert_close(then.state[name], went_on.state[name], rtol=RELATIVE, atol=5e-4, msg=name)


@pytest.mark.slow
def test_scratch_files_have_no_names(outcomes, folder: Path) -> None:
    """What is offloaded is gone with the process, however it ends."""
    assert list((folder / "off").iterdir()) == []


@pytest.mark.slow
@in_worlds(measured_of)
def test_a_footprint_is_what_is_held(outcomes, world: int, case: Case) -> None:
    """Bytes of all tensors between two micro-batches, against what the partitioner says beforehand, within 5%."""
    facts = [ParameterFacts(name, tuple(p.shape), int(name[0])) for name, p in make_stack().named_parameters()]
    formats = formats_of(DTYPES[case.precision], AdamW(AdamW.Config()))
    footprint = partitioner_of(case).footprint(facts, formats, world)
    # Stage 1 has its rows of the sums beside whole gradients, as long as there are ranks to sum over.
    sums = footprint.buffers if case.partitioner == "zero1" and world == 1 else 0
    if case.partitioner == "zero1" and world > 1:
        sums = footprint.gradients // world
    measured = int(str(outcomes[world][0][f"measured {case.name}"]))
    assert measured == pytest.approx(footprint.state + sums, rel=0.05)
