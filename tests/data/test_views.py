"""The plan of views: torchvision's distributions, and a pure function of (seed, epoch, image id, view)."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec, draw
from tessella.errors import UserError
from tessella.ops.montage import tile_boxes

N = 4000
PHOTOMETRY = ColorAugmentation(
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.6,
    saturation=1.2,
    hue=0.1,
    gray=0.2,
    blur=0.5,
    solarize=0.1,
)
SPEC = ViewSpec((CropGroup(2, 64, (0.14, 1.0), colors=PHOTOMETRY), CropGroup(3, 32, (0.05, 0.14))))
LEVEL = 1e-3  # of each statistical test: the draws are fixed, so a test that passes goes on passing


def plan_of(spec=SPEC, n=N, seed=5, epoch=0, size=(200, 150)):
    return draw(spec, seed, epoch, np.arange(n), np.tile(size, (n, 1)))


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14), (0.9, 1.0)])
@pytest.mark.parametrize(("width", "height"), [(200, 150), (90, 240), (32, 32), (400, 40)])
def test_crops_are_distributed_as_torchvisions(scale, width, height):
    plan = plan_of(ViewSpec((CropGroup(1, 32, scale),)), size=(width, height))
    ours = plan.box[:, 0]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(N)])[:, [1, 0, 3, 2]]
    quantities = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 2] / box[:, 3],
        "centre x": lambda box: box[:, 0] + box[:, 2] / 2,
        "centre y": lambda box: box[:, 1] + box[:, 3] / 2,
        "left": lambda box: box[:, 0],
        "top": lambda box: box[:, 1],
    }
    for name, quantity in quantities.items():
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > LEVEL, name


def test_crops_lie_inside_the_image_whatever_its_size():
    rng = np.random.default_rng(0)
    sizes = np.concatenate((rng.integers(1, 500, (500, 2)), [[1, 1], [1, 900], [900, 1], [2, 2]]))
    box = draw(SPEC, 0, 0, np.arange(len(sizes)), sizes).box
    assert (box[..., :2] >= 0).all() and (box[..., 2:] >= 1).all()
    assert (box[..., :2] + box[..., 2:] <= sizes[:, None]).all()


def test_an_image_too_narrow_for_any_crop_gets_torchvisions_centre_crop():
    spec = ViewSpec((CropGroup(1, 32, (0.9, 1.0)),))
    for width, height in [(400, 40), (40, 400), (401, 31), (31, 402)]:
        top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), (0.9, 1.0), (3 / 4, 4 / 3))
        assert (plan_of(spec, 50, size=(width, height)).box[:, 0] == (left, top, w, h)).all()


def test_a_tiled_group_crops_view_q_from_tile_q_with_torchvisions_distribution_inside_it():
    spec = ViewSpec((CropGroup(4, 32, (0.2, 1.0), tiles=2, overlap=0.3),))
    boxes = plan_of(spec, size=(200, 150)).box
    torch.manual_seed(0)
    for q, (left, top, right, bottom) in enumerate(tile_boxes([200], [150], 2, 0.3)[0]):
        x, y, w, h = boxes[:, q].T
        assert (x >= left).all() and (y >= top).all() and (x + w <= right).all() and (y + h <= bottom).all()
        image = torch.empty(3, bottom - top, right - left)
        theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1), (3 / 4, 4 / 3)) for _ in range(N)])
        for ours, reference in (
            (y - top, theirs[:, 0]),
            (x - left, theirs[:, 1]),
            (w * h, theirs[:, 2] * theirs[:, 3]),
        ):
            assert stats.ks_2samp(ours, reference).pvalue > LEVEL


def tiled(ratio=(1.0, 1.0), **overlap):
    """Crops that fill tiles of that ratio, so that a plan's boxes are the tiles."""
    return ViewSpec((CropGroup(4, 32, (1.0, 1.0), ratio=ratio, tiles=2, **overlap),))


def overlaps_of(plan, side):
    """(B, 2) along x and y, read off the width and height of the first tile."""
    return plan.box[:, 0, 2:] / side - 0.5


RANDOM = {"overlap": 0.15, "overlap_max": 0.45}


def test_a_random_overlap_is_uniform_and_shared_by_the_axes_and_tiles_of_an_image():
    plan = plan_of(tiled(**RANDOM), size=(10_000, 10_000))
    overlap = overlaps_of(plan, 10_000)
    assert overlap.min() >= 0.15 and overlap.max() <= 0.45
    assert stats.kstest(overlap[:, 0], stats.uniform(0.15, 0.3).cdf).pvalue > LEVEL
    assert abs(overlap[:2000].mean() - 0.3) < 0.01
    sides = plan.box[..., 2:].reshape(N, -1)
    assert (sides == sides[:, :1]).all()


def test_tiles_of_a_random_overlap_are_those_of_the_same_fixed_one():
    plan = plan_of(tiled(**RANDOM), n=50, size=(10_000, 10_000))
    for boxes, (overlap, _) in zip(plan.box, overlaps_of(plan, 10_000), strict=True):
        left, top, right, bottom = tile_boxes([10_000], [10_000], 2, overlap)[0].T
        np.testing.assert_array_equal(boxes, np.stack((left, top, right - left, bottom - top), axis=-1))


def test_a_fixed_overlap_and_a_range_of_one_value_give_the_same_boxes():
    fixed, degenerate = plan_of(tiled(overlap=0.3)), plan_of(tiled(overlap=0.3, overlap_max=0.3))
    for one, other in zip(fixed, degenerate, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_random_overlap_changes_no_other_decision():
    fixed, random = plan_of(tiled(overlap=0.3)), plan_of(tiled(**RANDOM))
    for name in ("flip", "jitter", "factors", "order", "gray", "sigma", "solarize"):
        np.testing.assert_array_equal(getattr(fixed, name), getattr(random, name))


def test_a_random_overlap_is_independent_of_the_crops():
    overlap = overlaps_of(plan_of(tiled(**RANDOM), size=(10_000, 10_000)), 10_000)[:, 0]
    crops = plan_of(ViewSpec((CropGroup(4, 32, (0.2, 1.0), tiles=2, overlap=0.5),)), size=(10_000, 10_000)).box
    for quantity in (crops[:, 0, 2] * 1.0 * crops[:, 0, 3], crops[:, 0, 2] / crops[:, 0, 3], crops[:, 0, 0]):
        assert abs(np.corrcoef(overlap, quantity)[0, 1]) < 4.5 / np.sqrt(N)


def test_per_axis_draws_x_and_y_independently():
    any_ratio = tiled((0.01, 100.0), **RANDOM, overlap_per="axis")  # no such crop fits, so the whole tile is taken
    x, y = overlaps_of(plan_of(any_ratio, size=(10_000, 10_000)), 10_000).T
    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(N)
    for along in (x, y):
        assert stats.kstest(along, stats.uniform(0.15, 0.3).cdf).pvalue > LEVEL


def test_per_batch_draws_once_for_each_step_whoever_asks():
    spec, sizes = tiled(**RANDOM, overlap_per="batch"), np.full((3, 2), 10_000)
    drawn = []
    for epoch in range(20):
        for step in range(20):
            one = overlaps_of(draw(spec, 5, epoch, [1, 2, 3], sizes, step), 10_000)
            other = overlaps_of(draw(spec, 5, epoch, [7, 8, 9], sizes, step), 10_000)
            assert len(np.unique(np.concatenate((one, other)))) == 1
            drawn.append(one[0, 0])
    assert len(np.unique(drawn)) > 350  # 400 draws, seen to one part in 3000
    assert stats.kstest(drawn, stats.uniform(0.15, 0.3).cdf).pvalue > LEVEL


@pytest.mark.parametrize("name", ["flip", "jitter", "gray", "solarize"])
def test_switches_have_their_chance_in_every_view(name):
    chance = getattr(PHOTOMETRY, name)
    for view in range(2):
        hits = int(getattr(plan_of(), name)[:, view].sum())
        assert stats.binomtest(hits, N, chance).pvalue > LEVEL


def test_factors_are_uniform_in_their_ranges_and_never_negative():
    factors = plan_of().factors[:, :2].reshape(-1, 4)
    for operation, (low, high) in enumerate([(0.6, 1.4), (0.4, 1.6), (0.0, 2.2), (-0.1, 0.1)]):
        assert stats.kstest(factors[:, operation], stats.uniform(low, high - low).cdf).pvalue > LEVEL


def test_all_24_orders_of_the_jitter_are_equally_likely():
    order = plan_of().order[:, :2].reshape(-1, 4)
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    codes, counts = np.unique(order @ [64, 16, 4, 1], return_counts=True)
    assert len(codes) == 24
    assert stats.chisquare(counts).pvalue > LEVEL


def test_blur_has_its_chance_and_its_sigma_is_uniform():
    sigma = plan_of().sigma[:, 0]
    blurred = sigma[sigma > 0]
    assert stats.binomtest(len(blurred), N, 0.5).pvalue > LEVEL
    assert stats.kstest(blurred, stats.uniform(0.1, 1.9).cdf).pvalue > LEVEL


def test_decisions_are_independent_of_each_other_and_between_views():
    plan = plan_of()
    columns = [
        plan.flip,
        plan.jitter,
        plan.gray,
        plan.sigma > 0,
        plan.box[..., 0] / (200 - plan.box[..., 2] + 1),
    ]
    table = np.concatenate([np.asarray(column[:, :2], dtype=np.float64) for column in columns], axis=1)
    correlation = np.corrcoef(table.T) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 4.5 / np.sqrt(N)


def test_a_groups_views_follow_its_own_settings():
    plan = plan_of()
    share = plan.box[..., 2] * plan.box[..., 3] / (200 * 150)
    assert share[:, :2].min() > 0.13 and share[:, :2].max() > 0.9
    assert share[:, 2:].min() > 0.04 and share[:, 2:].max() < 0.15
    assert not plan.solarize[:, 2:].any()


def test_an_images_plan_does_not_depend_on_its_batch_or_the_order_in_it():
    ids, sizes = np.arange(60) * 2**33 + 5, np.random.default_rng(1).integers(20, 300, (60, 2))
    whole = draw(SPEC, 9, 4, ids, sizes)
    some = np.array([41, 3, 17])
    for expected, array in zip(whole.select(some), draw(SPEC, 9, 4, ids[some], sizes[some]), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 1}])
def test_another_seed_or_epoch_draws_anew(change):
    same = (plan_of(**change).box == plan_of().box).all(axis=-1)
    assert same.mean() < 0.01


def test_select_takes_images_and_a_run_of_views():
    plan = plan_of(n=10)
    part = plan.select([3, 5], slice(2, 5))
    assert part.box.shape == (2, 3, 4) and part.flip.shape == (2, 3)
    np.testing.assert_array_equal(part.box, plan.box[[3, 5], 2:5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"views": 3, "tiles": 2}, "2 x 2 tiles has 4 views, not 3"),
        ({"scale": (1.0, 0.2)}, "lower bound first"),
        ({"overlap": 0.4, "overlap_max": 0.2}, "lower bound first"),
        ({"ratio": (2.0, 0.5)}, "lower bound first"),
    ],
)
def test_refuses_impossible_groups(wrong, message):
    with pytest.raises(UserError, match=message):
        CropGroup(**{"views": 4, "size": 32, "scale": (0.2, 1.0)} | wrong)
