import io
import sys
from functools import partial

import pytest
import torch
from _models import cnn_pair, images

from vid_loss import Distiller, KDLoss, Pair, VIDLoss
from vid_loss.diagnostics import PairDiagnostics, log_likelihood
from vid_loss.plots import plot_diagnostics, plot_log_likelihood, plot_variances

PAIRS = [Pair("stage1", "stage1"), Pair("fc:input", "fc"), Pair("fc", "fc", loss=KDLoss())]
HISTORY = {
    step: {"a": PairDiagnostics(step / 40, -0.5, -8.0, 4, 16), "b": PairDiagnostics(0, 0, 0, 0, 8)}
    for step in (0, 20)
}


@pytest.fixture(autouse=True)
def _matplotlib():
    pytest.importorskip("matplotlib")


@pytest.fixture
def distiller():
    return Distiller(*cnn_pair(), PAIRS, example=images())


def drawn(figure):
    """A figure that can be saved."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=20)
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_curves_have_a_line_a_pair_and_a_unit_an_axis():
    figure = plot_diagnostics(HISTORY)
    drawn(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "explained variance\n(share)",
        "information\n(nats per element)",
        "channels on the floor\n(%)",
    ]
    lines = [axes.get_lines()[0] for axes in figure.axes]
    assert [list(line.get_ydata()) for line in lines] == [[0, 0.5], [-0.5, -0.5], [25, 25]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_pair_that_came_later_is_drawn_from_then_on():
    later = {0: {}, 20: {"a": HISTORY[20]["a"]}}
    assert list(plot_diagnostics(later).axes[0].get_lines()[0].get_xdata()) == [20]


def test_variances_have_a_bar_a_channel_and_a_line_at_the_teachers(distiller):
    for _ in range(2):
        figure = plot_variances(distiller)
        drawn(figure)
        assert [len(axes.patches) for axes in figure.axes] == [8, 3]
        assert all(list(axes.get_lines()[0].get_ydata()) == [1, 1] for axes in figure.axes)
        distiller.student(images())
        distiller(images())
    assert [axes.get_title() for axes in figure.axes] == ["stage1->stage1", "fc:input->fc"]


def test_variances_are_shares_of_the_teachers_in_increasing_order():
    raw = Pair("stage1", "stage1", loss=partial(VIDLoss, standardize=False))
    distiller = Distiller(*cnn_pair(), [raw], example=images())
    distiller.student(images())
    distiller(images())
    loss = distiller.losses["stage1->stage1"]
    shares = loss.variance() / loss.scale.var
    bars = plot_variances(distiller).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(sorted(shares.tolist()), rel=1e-4)


def test_the_floor_is_drawn_where_a_variance_is_near_it(distiller):
    def labels():
        return [text.get_text() for text in plot_variances(distiller).legends[0].get_texts()]

    assert "floor" not in labels()
    distiller.losses["fc:input->fc"].running_var.var[0] = 0.0
    assert "floor" in labels()


def test_names_of_any_length_stay_inside_the_figure_and_off_each_other():
    names = [f"distilbert.transformer.layer.{i}->bert.encoder.layer.{2 * i}" for i in range(5)]
    report = dict.fromkeys(names, HISTORY[0]["a"])
    figure = plot_diagnostics({0: report, 20: report})
    drawn(figure)
    legend, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0
    assert legend.x1 <= page.x1
    for axes in figure.axes:
        label = axes.yaxis.label.get_window_extent()
        assert label.y0 >= 0
        assert label.y1 <= legend.y0


def test_the_background_is_opaque():
    from matplotlib.image import imread

    buffer = io.BytesIO()
    plot_diagnostics(HISTORY).savefig(buffer, format="png", dpi=20)
    buffer.seek(0)
    assert (imread(buffer)[..., 3] == 1).all()


def test_variances_need_a_vid_pair():
    distiller = Distiller(*cnn_pair(), PAIRS[2:], example=images())
    with pytest.raises(ValueError, match="expected a pair with VIDLoss; got none"):
        plot_variances(distiller)


def test_heat_maps_have_a_row_a_layer_and_one_scale_a_row(distiller):
    figure = plot_log_likelihood(images()[:3], log_likelihood(distiller, images()[:3]))
    drawn(figure)
    names = [axes.texts[0].get_text() for axes in figure.axes[::3][:2]]
    assert names == ["image", "log q(t|s), stage1->stage1"]
    assert len({axes.images[0].get_clim() for axes in figure.axes[3:6]}) == 1
    assert figure.axes[6].get_ylabel() == "nats per\nelement"


def test_heat_maps_need_a_map():
    with pytest.raises(ValueError, match=r"expected a map \(N, H, W\); got none"):
        plot_log_likelihood(images(), {"fc:input->fc": torch.zeros(8)})


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "vid-loss\[plot\]"'):
        plot_diagnostics(HISTORY)
