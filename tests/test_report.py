import json
import re

import pytest
import torch
from torch import nn

from grkan import GroupRational
from grkan.inspection import record_inputs
from grkan.report import make_report

from .browser import opened, overflowing

EPOCHS = [
    {"epoch": e, "step": 9 * e, "train_loss": 2 / e, "train_top1": 60 + e, "loss": 3 / e, "top1": 50 + e}
    for e in (1, 2, 3)
]


def _model():
    torch.manual_seed(0)
    model = nn.Sequential(
        GroupRational(4, "swish"), nn.Linear(8, 8), GroupRational(2, "gelu", order=(7, 6), form="sum_of_abs")
    )
    with torch.no_grad():
        for parameter in (*model[0].parameters(), *model[2].parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model = _model()
    inputs = record_inputs(model, [3 * torch.randn(200, 8)])
    text = make_report(
        model,
        title="a </script> & a model",
        inputs=inputs,
        metrics=[{"step": 1, "train_loss": 3.0}, *EPOCHS],
        classes=["<b>cat</b>", "dog"],
        confusion=[[5, 1], [0, 4]],
        notes=["a note"],
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path.as_uri()


def _names(page):
    cards = page.locator("#cards button").all()
    return [tuple(card.locator("span").nth(0).inner_text().split() + re.findall(r"group (\d+)", card.inner_text())) for
            card in cards]  # fmt: skip


ALL = [("0", str(g)) for g in range(4)] + [("2", str(g)) for g in range(2)]


def test_every_function_is_shown(page):
    with opened(page) as shown:
        assert shown.title() == "a </script> & a model"
        assert _names(shown) == ALL
        for card in shown.locator("#cards svg").all():
            assert {"now", "start", "inputs"} <= {e.get_attribute("class") for e in card.locator("path").all()}
        assert shown.locator(".curves svg").count() == 2
        assert "9 of 10 images are right" in shown.locator("#confusion").inner_text()
        assert "<b>cat</b>" in shown.locator("#confusion").inner_text()
        assert "best accuracy 53.00 % in epoch 3" in shown.locator("#facts").inner_text()
        assert shown.locator("#notes").inner_text() == "a note"
        assert shown.problems == []


def test_the_page_computes_the_functions_and_their_slopes(page):
    model = _model()
    x = torch.tensor([-30.0, -2.5, -0.0, 0.0, 0.7, 40.0], dtype=torch.float64)
    with opened(page) as shown:
        script = "xs => data.functions.map(f => xs.map(x => [...now(f, x), ...start(f, x)]))"
        found = torch.tensor(shown.evaluate(script, x.tolist()), dtype=torch.float64)
    for (layer, group), values in zip(ALL, found, strict=True):
        module = model[int(layer)]
        fresh = GroupRational(
            module.num_groups, module.initial_coefficients(), module.order, module.form, dtype=torch.float64
        )
        for which, columns in ((module.double(), values[:, :2]), (fresh, values[:, 2:])):
            z = x.clone().requires_grad_()
            y = which(z[:, None].expand(-1, module.num_groups))[:, int(group)]
            (slope,) = torch.autograd.grad(y.sum(), z)
            torch.testing.assert_close(torch.stack([y, slope], dim=1), columns, rtol=1e-6, atol=1e-9)


def test_sorted_and_filtered(page):
    with opened(page) as shown:
        order = {f: i for i, f in enumerate(ALL)}
        for choice, key, sign in (("moved", "moved", -1), ("still", "moved", 1), ("steep", "slope", -1)):
            shown.select_option("#order", choice)
            exact = shown.evaluate(f"data.functions.map(f => f.{key})")
            assert _names(shown) == sorted(ALL, key=lambda f: sign * exact[order[f]])
        shown.select_option("#order", "model")
        shown.fill("#search", "2")
        assert _names(shown) == ALL[4:]
        shown.select_option("#group", "1")
        assert _names(shown) == ALL[5:]
        assert shown.locator("#count").inner_text() == "1 of 6 shown"
        shown.fill("#search", "")
        shown.select_option("#group", "")
        shown.fill("#least", "1e9")
        assert _names(shown) == []
        assert shown.problems == []


def test_one_function_by_the_keyboard(page):
    with opened(page) as shown:
        shown.locator("#cards button").nth(4).focus()
        shown.keyboard.press("Enter")
        assert shown.locator("#detail-name").inner_text() == "2 · group 0"
        shown.keyboard.press("ArrowRight")
        assert shown.locator("#detail-name").inner_text() == "2 · group 1"
        shown.keyboard.press("ArrowRight")  # round to the first
        assert shown.locator("#detail-name").inner_text() == "0 · group 0"
        assert shown.locator("dialog svg").count() == 2
        shown.locator("dialog svg").first.hover()
        assert re.fullmatch(r"x \S+ · F \S+ · at the start \S+ · slope \S+", shown.locator("output").inner_text())
        shown.keyboard.press("Escape")
        assert not shown.locator("dialog").is_visible()
        assert shown.evaluate("document.activeElement === cards[0]")
        assert shown.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_wide_light_and_dark(page, scheme):
    colors = {}
    for width in (320, 1400):
        with opened(page, viewport={"width": width, "height": 700}, color_scheme=scheme) as shown:
            assert overflowing(shown) == []
            shown.locator("#cards button").first.click()
            assert shown.evaluate("find('dialog').scrollWidth <= find('dialog').clientWidth")
            colors[width] = shown.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            shown.keyboard.press("Escape")
            shown.locator("#theme").click()
            assert shown.evaluate("getComputedStyle(document.documentElement).backgroundColor") != colors[width]
    assert (min(map(int, re.findall(r"\d+", colors[320]))) > 128) == (scheme == "light")


def test_what_is_not_known_is_left_out(tmp_path):
    model = GroupRational(2)
    with torch.no_grad():
        model.numerator[0] = float("nan")
    path = tmp_path / "report.html"
    path.write_text(make_report(model, title="bare"), encoding="utf-8")
    with opened(path.as_uri()) as shown:
        assert _names(shown) == [("the", "model", "0"), ("the", "model", "1")]
        assert "moved not finite" in shown.locator("#cards").inner_text()
        assert shown.locator("path.inputs").count() == 0
        assert not shown.locator("#training").is_visible()
        assert not shown.locator("#confusion").is_visible()
        assert shown.problems == []


def test_the_page_is_whole_and_its_data_cannot_leave_their_element():
    text = make_report(GroupRational(1), title="</script><script>")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(content[1])["title"] == "</script><script>"


@pytest.mark.parametrize("confusion", [[[1, 2]], [[1], [2]], [[1, 2, 3]] * 3])
def test_a_confusion_matrix_of_other_classes(confusion):
    with pytest.raises(ValueError, match="confusion must be 2 x 2, with a row for each class"):
        make_report(GroupRational(1), title="", classes="ab", confusion=confusion)
