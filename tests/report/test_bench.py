"""What the lines of `tessella bench` conclude from the rates."""

from tessella.engine.bench import Rates
from tessella.report.bench import bench_lines

RATES = Rates(
    images=400,
    mean_bytes=110_000.0,
    resident=False,
    device="cpu",
    workers=2,
    read=5000.0,
    decode=800.0,
    views=350.0,
    loader=700.0,
    step=970.0,
    step_batch=64,
    packed_share=0.39,
    packed_views=800.0,
)


def text(**changed):
    return "\n".join(bench_lines(RATES._replace(**changed), "swav_imagenet_200ep_bs256", "resnet50"))


def test_the_slower_side_limits_and_the_threads_that_the_step_needs_are_named():
    assert "The images limit: the step would take them 1.4 times as fast" in text()
    assert "fed by 3 threads with a core each; this process has 2 threads" in text()  # 970 / 350
    assert "Training limits: the images come 7.0 times as fast" in text(step=100.0)
    assert "fed by 1 thread with" in text(step=100.0)


def test_a_pack_is_advised_only_where_it_brings_something():
    assert "39% of the bytes and gives 800 images/s per core, 2.3 times as many." in text()
    assert "would free cores but not shorten the run" in text(step=100.0)
    assert "not worth it for speed" in text(packed_views=360.0)
    assert "pack" not in text(packed_share=None, packed_views=None)


def test_images_that_live_on_the_device_have_neither_threads_nor_packs():
    shown = text(resident=True, loader=5000.0, packed_share=None, packed_views=None)
    assert "all images live there" in shown and "decode" not in shown
    assert shown.endswith("5.2 times as fast as the step takes them.")


def test_small_rates_keep_a_decimal():
    assert "0.15 images/s" in text(step=0.151)
