"""The page of a run: well-formed, with escaped names, and a chart that can be read back."""
import math
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tinyanl.page import loss_chart, page, status, tick_size

LOG = [{"step": 50, "training": 0.12, "held_out": 0.13},
       {"step": 100, "training": 0.10, "held_out": 0.11},
       {"step": 200, "training": 0.08, "held_out": 0.10}]
VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Reads a page, and fails where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in VOID:
            self.open.append(tag)
        assert tag != "script"

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_well_formed_and_shows_names_as_they_are():
    name = "<b>&\"roses\"</b>"
    text = page(name, 100, 200, 90.0, "samples/step_000100.png", LOG, {"data": name},
                {"Go on:": f"train --data '{name}'"})
    reader = Balanced()
    reader.feed(text)
    reader.close()
    assert not reader.open
    assert reader.texts.count(name) == 3 and f"train --data '{name}'" in reader.texts
    assert reader.images == ["filmstrip.png?100", "samples/step_000100.png"]
    assert 'http-equiv="refresh"' in text
    assert "://" not in text  # nothing is loaded from elsewhere


def test_a_finished_page_is_not_looked_at_again():
    text = page("flowers", 200, 200, None, "grid.png", LOG, {}, {})
    assert "refresh" not in text and "All 200 steps are done." in text


@pytest.mark.parametrize("seconds, words", [(10, "about 1 minute left"),
                                            (330, "about 6 minutes left"), (None, "Step 5 of 9.")])
def test_the_time_left_in_words(seconds, words):
    assert words in status(5, 9, seconds)


def test_the_chart_is_drawn_to_its_axes():
    """The ticks of the vertical axis say which height is which loss: read the curves back by it."""
    svg = ElementTree.fromstring(loss_chart(LOG))
    ticks = [(float(node.get("y")) - 4, float(node.text)) for node in svg.iter("text")
             if node.get("text-anchor") == "end"]
    (y0, loss0), (y1, loss1) = ticks[0], ticks[-1]
    for name, curve in zip(("training", "held_out"), svg.iter("polyline"), strict=True):
        points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
        for row, (_, y) in zip(LOG, points, strict=True):
            loss = loss0 + (y - y0) * (loss1 - loss0) / (y1 - y0)
            assert loss == pytest.approx(row[name], abs=1e-3)
        (x0, _), (x1, _), (x2, _) = points
        assert (x2 - x0) / (x1 - x0) == pytest.approx(3, abs=0.01)  # 150 steps against 50


def test_a_chart_of_one_point_and_of_none():
    assert "polyline" in loss_chart(LOG[:1])
    assert "no loss yet" in loss_chart([])


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.013, 0.08, 0.5, 3.0, 7e4])
def test_ticks_are_round_and_few(spread):
    size = tick_size(spread)
    leading = size / 10 ** math.floor(math.log10(size) + 1e-9)
    assert min(abs(leading - round_one) for round_one in (1, 2, 5)) < 1e-6
    assert spread <= 8 * size
