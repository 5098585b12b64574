"""Sources with a share of what training sees: exact mixing, the order of a run, and what is refused."""

import json
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, override, read_config, to_dict
from data import DataConfig, Source, StepBatches, build_dataset
from formats.mixture import Mixture, gather_groups
from scene.frames import UserError
from world.street import build_world


def keys_of(shares, lengths, batch, steps, seed=0):
    """[[(epoch, index)] of each step] and the ends of the sources."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    order = StepBatches(ends[-1], batch, 0, 1, seed, 0, steps, Mixture(shares, ends, seed))
    return list(order), ends


def source_of(index, ends):
    return sum(index >= end for end in ends)


def test_every_batch_holds_its_share():
    batches, ends = keys_of((0.5, 0.25, 0.25), (7, 1600, 3), 8, 50)
    for batch in batches:
        assert Counter(source_of(index, ends) for _, index in batch) == {0: 4, 1: 2, 2: 2}


@given(
    shares=st.lists(st.integers(1, 997), min_size=1, max_size=4),
    rest=st.integers(0, 500),
    lengths=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    seed=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_each_stretch_holds_every_share_and_each_source_its_epochs(shares, rest, lengths, seed):
    total = sum(shares) + rest
    asked = [share / total for share in shares] + [0.0] * 2 * bool(rest)
    lengths = lengths[: len(asked)]
    batches, ends = keys_of(asked, lengths, 1, 400, seed)
    stream = [key for batch in batches for key in batch]
    assert len(set(stream)) == len(stream)  # never the same augmentation twice
    groups = [[source] for source in range(len(shares))] + [[len(shares), len(shares) + 1]] * bool(rest)
    for number, group in enumerate(groups):
        own = [key for key in stream if source_of(key[1], ends) in group]
        share = rest / total if number == len(shares) else asked[number]
        seen = 0
        for position, key in enumerate(stream, 1):
            seen += source_of(key[1], ends) in group
            assert abs(seen - position * share) < 1 + number
        count = sum(lengths[source] for source in group)
        for epoch in range(len(own) // count):
            turn = own[epoch * count : (epoch + 1) * count]
            assert {e for e, _ in turn} == {epoch}
            assert len({index for _, index in turn}) == count


@pytest.mark.parametrize("world", [2, 3])
def test_the_order_does_not_depend_on_processes_nor_on_where_it_starts(world):
    ends, steps = [5, 30, 33], 40
    mix = Mixture((0.3, 0, 0), ends, 3)
    whole = list(StepBatches(33, 6, 0, 1, 3, 0, steps, mix))
    ranks = [
        list(StepBatches(33, 6, rank, world, 3, 11, steps, Mixture((0.3, 0, 0), ends, 3))) for rank in range(world)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True), 11):
        assert [key for part in parts for key in part] == whole[step]
    assert [StepBatches(33, 6, 0, 1, 3, 0, 9, mix).at(step) for step in (7, 2)] == [whole[7], whole[2]]
    assert whole != list(StepBatches(33, 6, 0, 1, 4, 0, steps, Mixture((0.3, 0, 0), ends, 4)))


def test_one_group_alone_is_the_order_without_shares():
    assert list(StepBatches(20, 5, 0, 1, 2, 0, 12, Mixture((1,), [20], 2))) == list(StepBatches(20, 5, 0, 1, 2, 0, 12))


def test_shares_of_a_tenth_sum_to_one_and_what_is_left_goes_by_frames():
    gather_groups((0.1, 0.2, 0.7), (1, 2, 3))
    batches, ends = keys_of((0, 0.2, 0), (10, 5, 30), 10, 40)
    assert Counter(source_of(i, ends) for batch in batches for _, i in batch) == {0: 80, 1: 80, 2: 240}


@pytest.mark.parametrize(
    ("shares", "ends", "words"),
    [
        ((0.5, 0.3), (4, 8), r"the shares of data\.train sum to 0\.8, expected 1$"),
        ((0.7, 0.7), (4, 8), r"the shares of data\.train sum to 1\.4, expected 1$"),
        ((0, 1.0, 0), (4, 8, 9), r"sum to 1, expected less than 1, as others have none"),
        ((0.8, 0.8, 0), (4, 8, 9), r"sum to 1\.6, expected less than 1, as others have none"),
        ((0.5, 0.5), (4, 4), r"a share of 0\.5 of data\.train falls to sources without frames"),
        ((0.25, 0, 0), (4, 4, 4), r"a share of 0\.75 of data\.train falls to sources without frames"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares, ends, words):
    with pytest.raises(UserError, match=words):
        gather_groups(shares, ends)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return build_world(folder, "train", 4, size=(320, 96)), build_world(folder, "val", 3, size=(320, 96))


def config_of(world, *shares):
    names = [{"root": str(root), "split": [split], "share": share} for root, split, share in zip(
        world, ("train", "val"), shares, strict=True)]  # fmt: skip
    return override(Config(), [f"data.train={json.dumps(names)}", f"data.val={json.dumps(names)}"])


def test_a_config_with_shares_mixes_and_goes_into_its_json(world, tmp_path):
    config = config_of(world, 0.5, 0)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path / "config.json") == config
    dataset = build_dataset(config, training=True)
    assert len(dataset) == 7
    order = StepBatches(len(dataset), 4, 0, 1, 0, 0, 6, dataset.find)
    for batch in order:
        assert Counter(dataset.frames[index].id[0] for _, index in batch) == {"0": 2, "1": 2}
    sent = pickle.loads(pickle.dumps(dataset))  # as to workers that are no forks
    assert [sent.find(i) for i in range(50)] == [dataset.find(i) for i in range(50)]
    assert build_dataset(config_of(world, 0, 0), training=True).find is None


@pytest.mark.parametrize(
    ("shares", "training", "words"),
    [
        ((-0.1, 0), True, r"share -0\.1, expected >= 1, >= 0 and 0 to 1"),
        ((1.5, 0), True, r"share 1\.5, expected"),
        ((float("nan"), 0), True, r"expected a finite|share"),
        ((0.5, 0.4), True, r"the shares of data\.train sum to 0\.9, expected 1"),
        ((0.5, 0.5), False, r"data\.val has a repeat or a share, expected neither"),
    ],
)
def test_a_wrong_share_is_one_sentence(world, shares, training, words):
    with pytest.raises(UserError, match=words):
        build_dataset(config_of(world, *shares), training)


def test_rendered_frames_are_not_judged_beside_others(world, tmp_path):
    sources = (Source(root=str(world[0])), Source(kind="synthetic", root=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.val lists rendered frames \(kind=synthetic\) beside others"):
        build_dataset(Config(data=DataConfig(val=sources)), training=False)
