"""Groups: how many members run at once and in what chunks, by the model, as measured, and in words."""

import functools
import json
import os
from dataclasses import replace

import pytest
import torch

import rnnfast
from rnnfast.choice import gpu, kernel_plan, pipeline, tuned, tuning_file
from rnnfast.choice.pipeline import Grouping, Sizes, best, run
from rnnfast.choice.tuning_file import Entry, Shape, Unusable
from rnnfast.commands import canary, tune
from rnnfast.kernels.families import OF_TORCH
from rnnfast.kernels.hardware import LAUNCH, LAUNCH_HOST_US, PRODUCT, gigahertz
from rnnfast.kernels.persistent.plan import GPUS, persistent_plans

pytestmark = pytest.mark.same_everywhere

H100 = GPUS["H100"]
KERNELBENCH = Sizes(4, 10, 256, 4, "tf32", False)
cpu = torch.device("cpu")


def pick(T=512, B=10, H=256, members=6, layers=True, backward=False, dtype=torch.float16, marked=False):
    return kernel_plan.pick("lstm", T, B, H, dtype, "half", backward, True, cpu, marked, members, layers)


# The model


@pytest.mark.parametrize(
    ("layers", "directions", "by_layer", "group"),
    [
        (1, 1, False, (1, False, 1)),
        (1, 2, False, (2, False, 1)),
        (6, 1, False, (6, True, 1)),
        (6, 1, True, (1, False, 6)),
        (6, 2, False, (2, False, 6)),
        (6, 2, True, (2, False, 6)),
    ],
)
def test_what_is_grouped(layers, directions, by_layer, group):
    """A stack of one direction is a pipeline, unless its layers are calls of their own. Else the directions are a group."""
    assert pipeline.grouping(layers, directions, by_layer) == Grouping(*group)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("family", "H"), [("persistent", 256), ("step", 256), ("one_program", 64)])
def test_a_run_adds_up(family, H, backward):
    """A pipeline runs T + (k - 1) N steps in T / N + k - 1 rounds; each part of a group takes as long as the first."""
    sizes = KERNELBENCH._replace(H=H, backward=backward, itemsize=2)
    us = pipeline.step_us(family, sizes, 3, H100)
    one, two = (run(family, sizes, 512, 3, parts, True, H100) for parts in (1, 2))
    assert one.rounds == -(-512 // one.chunk) + 2
    assert one.steps == pytest.approx((512 + 2 * one.chunk) * us)
    ahead = 0 if backward else -(-(one.rounds - 2) // max(1, pipeline.CHUNK_ROWS // (one.chunk * sizes.B)))
    product = (PRODUCT + LAUNCH) / gigahertz("H100") / 1000
    assert one.products == pytest.approx((one.rounds - 1 + ahead) * product)
    assert two.us == pytest.approx(2 * one.us) and two.chunk == one.chunk
    assert (one.clears > 0) == OF_TORCH[family].waits and (one.starts > 0) == OF_TORCH[family].many_steps
    both = run(family, sizes, 512, 2, 1, False, H100)
    assert both.steps == pytest.approx(512 * pipeline.step_us(family, sizes, 2, H100))
    assert both.products == pytest.approx(0 if backward else 2 * both.rounds * product)


@pytest.mark.parametrize("family", ["persistent", "step"])
@pytest.mark.parametrize("members", [2, 3, 6])
@pytest.mark.parametrize("T", [8, 64, 512, 4096])
def test_the_chunk_is_the_best(T, members, family, monkeypatch):
    """No other chunk is more than a fiftieth faster."""
    for backward in (False, True):
        sizes = KERNELBENCH._replace(backward=backward)
        found = run(family, sizes, T, members, 1, True, H100)
        with monkeypatch.context() as here:
            here.setattr(pipeline, "_lengths", lambda T, *rest: range(1, T + 1))
            least = run(family, sizes, T, members, 1, True, H100)
        assert least.us <= found.us <= 1.02 * least.us


@pytest.mark.parametrize("B", [1, 10, 100, 5000])
@pytest.mark.parametrize("T", [1, 2, 7, 100, 1 << 20])
def test_the_chunk_keeps_to_its_limits(T, B):
    """At least a step, no more than the plan's, no more than there are; and the buffer of a round stays small."""
    for family, sizes in (("persistent", KERNELBENCH), ("one_program", KERNELBENCH._replace(H=64))):
        found = best(family, sizes._replace(B=B), T, 4, True, H100)
        if found is None:
            continue
        plan = OF_TORCH[family].plan(4, B, sizes.H, 4, "tf32", False, H100, False, found.members)
        assert 1 <= found.chunk <= min(T, plan.steps)
        assert found.chunk == 1 or found.members * found.chunk * B <= pipeline.ROWS
        assert -(-T // found.chunk) * found.chunk - T < -(-T // found.chunk)  # the last chunk is short by less than a step each


@pytest.mark.parametrize("T", [1, 5, 27, 28, 512, 513])
def test_even_chunks(T):
    for chunk in range(1, T + 1):
        found = pipeline.even(T, chunk)
        assert found <= chunk and -(-T // found) == -(-T // chunk)


def test_the_host_bounds_a_pipeline_of_step_kernels():
    """A launch of it runs all layers, so that their number hardly matters."""
    found = best("step", KERNELBENCH, 512, 6, True, H100)
    assert found.members == 6 and found.host > 0
    launches = 512 + 5 * found.chunk
    assert launches * LAUNCH_HOST_US < found.us < 1.3 * launches * LAUNCH_HOST_US < 512 * 6 * LAUNCH_HOST_US / 3


def test_two_directions_cost_little_more_than_one():
    both, alone = (best("persistent", KERNELBENCH, 512, members, False, H100) for members in (2, 1))
    assert both.members == 2 and both.us < 1.15 * alone.us


def test_a_group_that_does_not_fit_runs_in_parts():
    """Six layers of 512 units are 192 programs of 16 units; the fewest parts win among equals."""
    sizes = Sizes(4, 16, 512, 2, "half", False)
    assert best("persistent", sizes, 512, 6, True, H100).members == 3
    assert best("persistent", sizes, 512, 6, True, H100).parts == 2
    assert best("persistent", sizes._replace(H=1024, itemsize=4, precision="tf32"), 512, 2, False, H100).members == 1
    assert best("persistent", sizes._replace(H=8192), 512, 2, False, H100) is None


def test_the_prediction_that_the_design_rests_on():
    """Six layers of problem 35 of KernelBench's level 3 in less than half the time."""
    grouped, alone = best("persistent", KERNELBENCH, 512, 6, True, H100), best("persistent", KERNELBENCH, 512, 1, False, H100)
    assert (grouped.members, grouped.chunk, grouped.rounds) == (6, 27, 24)
    assert grouped.us < 6 * alone.us / 2.5
    assert grouped.us == sum(grouped.terms.values())


# What is picked


def test_pick_follows_the_model():
    with gpu.pretend_gpu(H100):
        stack, both = pick(), pick(members=2, layers=False)
        assert (stack.family, stack.members) == ("persistent", 6) and 16 <= stack.chunk <= 64
        assert (both.members, both.chunk) == (2, 0) and pick(members=1, layers=False).chunk == 0
        assert stack.plan != both.plan and stack.plan.programs >= 6 * stack.plan.H_PAD // stack.plan.BLOCK_H
        one_after_another = pick(H=512, B=64, members=2)
        assert one_after_another.members == 1 and one_after_another.chunk >= 64


@pytest.mark.parametrize("T", [1, 7, 100, 512, 600, 1000, 1023])
def test_pick_makes_even_chunks_of_any_length(T):
    """Though the choice is made for a power of two."""
    with gpu.pretend_gpu(H100):
        chunk = pick(T=T).chunk
        assert 1 <= chunk <= T and chunk == pipeline.even(T, chunk)
        gpu.known.clear()
        assert pick(T=1023).plan == pick(T=512).plan


@pytest.mark.parametrize("family", list(OF_TORCH))
def test_a_family_by_name_takes_its_best_group(family, monkeypatch):
    monkeypatch.setenv("RNNFAST_KERNELS", family)
    H = 64 if family == "one_program" else 256
    with gpu.pretend_gpu(H100):
        choice, expected = pick(H=H), best(family, Sizes(4, 10, H, 2, "half", False), 512, 6, True, H100)
        assert (choice.family, choice.members, choice.chunk) == (family, expected.members, expected.chunk)
        large = pick(H=8192)
        assert large.family == "step" and large.members in (1, 2, 3, 6) and large.chunk >= 1


def test_a_cpu_runs_groups_as_an_h100_does():
    """In the interpreter, so that tests meet groups and chunks."""
    choice, expected = pick(), best("step", Sizes(4, 10, 256, 2, "half", False), 512, 6, True, H100)
    assert (choice.family, choice.members, choice.chunk) == ("step", expected.members, expected.chunk)
    assert pick(members=2, layers=False).members == 2


def test_a_refused_launch_keeps_the_group(monkeypatch):
    """The step kernels go on with the same members and chunk, from where the others were refused."""
    with gpu.pretend_gpu(H100):
        before = pick()
        monkeypatch.setattr(kernel_plan, "_refused", {(cpu, before.plan): "refused"})
        after = pick()
    assert (after.family, after.members, after.chunk) == ("step", before.members, before.chunk)


def test_without_cooperative_launch():
    with gpu.pretend_gpu(H100, cooperative=False):
        choice = pick()
        assert (choice.family, choice.members) == ("step", 6) and not choice.reason


# What was measured

SHAPE = Shape("lstm", "float16", "half", 512, 16, 256, 256, 1, 1, training=False)
plans = functools.partial(persistent_plans, 4, H=256, itemsize=2, precision="half", backward=False, limits=H100, most=1000)


def entry(at_once, **changes):
    """Of a stack or of directions, with plans for so many members at once."""
    return Entry(replace(SHAPE, **changes), "triton", plans(B=16, members=at_once)[0], members=(at_once, 1))


def kernels(group, B=16):
    return tuned.kernels(H100, "lstm", 512, B, 256, "float16", "half", False, *group)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("RNNFAST_TUNING_FILE", os.fspath(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def test_an_entry_serves_groups_like_its_own(path):
    """Of as many directions, whatever the layers; or of as many layers. Its plans are for so many members at once, or none."""
    both, stack = entry(2, layers=3, directions=2), entry(6, layers=6)
    tuning_file.store([both, stack], path, H100)
    assert tuning_file.read(path, H100) == [both, stack]
    with tuned.override_tuning(H100, [both, stack]):
        assert kernels((1, False)) is kernels((2, True)) is kernels((3, True)) is None
        assert kernels((2, False)) == both and kernels((6, True)) == stack
        for B in range(8, 33):
            for group, at_once in (((2, False), 2), ((6, True), 6)):
                found = kernels(group, B)
                assert found is None or found.forward in plans(B=B, members=at_once)


@pytest.mark.parametrize("members", [None, 2, [2], [5, 1], [0, 1], [True, 1], [2.0, 1], ["2", 1]])
def test_wrong_members(path, members):
    """At least one at once, and no more than the group has."""
    tuning_file.store([entry(2, layers=4)], path, H100)
    data = json.loads(path.read_text())
    data["entries"][0]["members"] = members
    path.write_text(json.dumps(data))
    with pytest.raises(Unusable, match="members is "):
        tuning_file.read(path, H100)


def test_a_plan_for_fewer_members_is_none_for_more(path):
    """A file cannot make a launch that does not fit the GPU."""
    wide = replace(SHAPE, H=768, layers=4)
    plan = persistent_plans(4, 16, 768, 2, "half", False, H100)[0]
    tuning_file.store([Entry(wide, "triton", plan)], path, H100)
    data = json.loads(path.read_text())
    data["entries"][0]["members"] = [4, 1]
    path.write_text(json.dumps(data))
    with pytest.raises(Unusable, match="is no plan"):
        tuning_file.read(path, H100)


def test_a_measured_group_runs_as_it_was_measured():
    """With so many members at once, though the model would take more. The chunk is the model's for so many."""
    with gpu.pretend_gpu(H100):
        assert pick(B=16).members == 6
        with tuned.override_tuning(H100, [entry(3, layers=6, training=True)]):
            measured = pick(B=16)
            assert pick(B=16, members=4).members == 4  # another stack, which was not measured
            assert pick(B=16, marked=True).members == 6  # what was measured had no marks
    expected = run("persistent", Sizes(4, 16, 256, 2, "half", False), 512, 3, 2, True, H100)
    assert (measured.plan, measured.members, measured.chunk) == (plans(B=16, members=3)[0], 3, expected.chunk)


def test_candidates_of_a_group():
    """Plans for the members that the model takes at once, and each family's best for one at a time. Their names differ."""
    stack = replace(SHAPE, layers=6, H=96, I=96)
    found = tune.candidates(stack, H100)
    at_once = [each.members[0] for each in found if each.forward]
    assert set(at_once) == {1, 6} and at_once.count(1) == sum(1 for family in OF_TORCH.values() if family.plans)
    assert len({tune.name(each) for each in found}) == len(found)
    assert any("6 of 6 at once" in tune.name(each) for each in found)
    trained = tune.candidates(replace(stack, training=True), H100, found[2])
    assert {each.members[0] for each in trained[2:]} == {6} and trained[2].forward == found[2].forward
    assert tuning_file.decode(json.loads(json.dumps(tuning_file.encode(found[2]))), H100) == found[2]


# The canary


@pytest.mark.parametrize("name", list(GPUS))
def test_the_canary_runs_groups_of_two(name, monkeypatch):
    """A layer of two directions and a stack, on each family that has plans for them; both kinds on those of every size."""
    kinds = {}
    with gpu.pretend_gpu(GPUS[name]):
        for family in OF_TORCH:
            monkeypatch.setenv("RNNFAST_KERNELS", family)
            for case in canary.CASES:
                group = pipeline.grouping(case.layers, 1 + case.bidirectional)
                if canary._runs(family, case, "cpu"):
                    choices = canary._choices(case, "cpu")
                    assert all(choice.members == group.members for choice in choices)
                    assert not group.layers or all(choice.chunk < case.T for choice in choices)
                    kinds.setdefault(family, set()).add(group)
    three = {Grouping(1, False, 1), Grouping(2, False, 1), Grouping(2, True, 1)}
    assert kinds == dict.fromkeys(OF_TORCH, three)


# In words


def explained(cell=rnnfast.LSTM, H=256, layers=6, B=10, T=512, **options):
    layer = cell(128, H, layers, dtype=torch.float16, **options)
    return str(rnnfast.explain(layer, torch.zeros(T, B, 128, dtype=torch.float16)))


def test_explain_says_how_a_group_runs():
    with gpu.pretend_gpu(H100):
        text, choice = explained(), pick()
        assert f"6 layers x 1 directions x 512 steps, 6 layers at once in chunks of {choice.chunk} time steps; " in text
        assert f"one launch for {choice.chunk} time steps" in text
        assert "6 layers x 2 directions x 512 steps, both directions at once; " in explained(bidirectional=True)
        assert "at once" not in explained(layers=1)


def test_explain_says_why_fewer_run_at_once():
    with gpu.pretend_gpu(H100):
        text = explained(H=512)
        assert ", 3 layers at once in chunks of " in text and " time steps, twice: 6 do not fit: no tiles fit: " in text
        assert "where there are 132 SMs" in text
        text = explained(H=512, B=64, layers=2)
        assert ", one layer after another: " in text
        with tuned.override_tuning(H100, [entry(3, layers=6, training=True)]):
            assert "twice: so it was measured as the fastest" in explained(B=16)


def test_explain_runs_a_projection_layer_by_layer():
    with gpu.pretend_gpu(H100):
        text = explained(proj_size=64)
        assert "at once" not in text and "after another" not in text


def test_explain_says_the_precision_of_both_products():
    """One setting is that of the input side and of the recurrence."""
    layer, x = rnnfast.LSTM(3, 4, backend="triton"), torch.zeros(2, 3, 3)
    for precision in ("tf32", "ieee"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        with gpu.pretend_gpu(H100):
            assert f"products in {precision}, of the input side and of the recurrence" in str(rnnfast.explain(layer, x))
