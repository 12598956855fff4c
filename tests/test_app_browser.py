"""The page of msrl demo in headless Chromium: from loading it to a NIfTI file on the disk, and which way up a volume is."""

import gzip
import importlib.util
import shutil
from collections import Counter
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
from demo_server import VERB, running_demo
from matplotlib.image import imread
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from tiny import tiny_pipeline

from msrl_diffusers.app.comparison import Comparison


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

# A demo whose volume is a file, whatever is asked for.
KNOWN = f"""
from pathlib import Path
from msrl_diffusers.app import comparison
known = Path(r"{{path}}")
comparison.Comparison.generate = lambda *_, **__: [comparison.MadeVolume("known", "known.nii.gz", known.read_bytes())]
{VERB}
"""
# Mean brightness of the four quarters of a picture, of its upper row first, without the letters and the cursor.
QUARTERS = """canvas => {
  const {width, height} = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const sums = [0, 0, 0, 0];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const at = 4 * (x + width * y);
      const gray = pixels[at] === pixels[at + 1] && pixels[at] === pixels[at + 2];
      if (gray) sums[(y < height / 2 ? 0 : 2) + (x < width / 2 ? 0 : 1)] += pixels[at];
    }
  return sums.map(sum => sum / (width * height / 4));
}"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with running_demo(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A demo, and the file that it shows."""
    folder = tmp_path_factory.mktemp("known")
    with running_demo(folder, KNOWN.format(path=folder / "known.nii.gz")) as demo:
        yield demo, folder / "known.nii.gz"


@pytest.fixture
def tab(browser):
    """A page that fails the test where its script fails, and remembers which hosts it asked."""
    page = browser.new_page(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page.set_default_timeout(300_000)
    page.errors, page.hosts = [], Counter()
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
    page.on("request", lambda request: page.hosts.update([urlsplit(request.url).netloc]))
    yield page
    assert not page.errors
    page.close()


def generate(tab, url: str, figures: int) -> None:
    tab.goto(url)
    tab.get_by_role("button", name="Generate").click()
    tab.locator("#viewer figure output").nth(figures - 1).wait_for()
    tab.wait_for_function(
        "count => [...document.querySelectorAll('#viewer output')].filter(o => o.textContent).length === count",
        arg=figures,
    )


def quarters(tab, plane: str, title: str = "known") -> list[float]:
    return tab.locator(f'canvas[aria-label="{title}, {plane} slice"]').evaluate(QUARTERS)


def test_from_the_page_to_a_file(tab, demo, tmp_path):
    from playwright.sync_api import expect

    tab.goto(demo.url)
    expect(tab.get_by_text("Not for clinical use.")).to_be_visible()
    expect(tab.get_by_text("No volume yet.")).to_be_visible()
    tab.get_by_label("Class").click()
    tab.get_by_role("option", name="LGG").click()
    tab.get_by_label("number input for Steps").fill("2")
    tab.get_by_label("Seed", exact=True).fill("11")
    tab.get_by_role("button", name="Generate").click()
    tab.locator("#viewer figure").nth(1).wait_for()
    assert tab.locator("#viewer figcaption").all_text_contents() == ["standard", "RL-tuned"]
    for title in ("standard", "RL-tuned"):
        for plane in ("axial", "coronal", "sagittal"):
            assert max(quarters(tab, plane, title)) > 1, "the picture is not black"
    with tab.expect_download() as expected:
        tab.get_by_role("link", name="Download NIfTI").nth(1).click()
    assert expected.value.suggested_filename == "LGG-11-RL-tuned.nii.gz"
    expected.value.save_as(tmp_path / "downloaded.nii.gz")
    tab.screenshot(path=tmp_path / "page.png")
    tab.get_by_role("button", name="New seed").click()
    expect(tab.get_by_label("Seed", exact=True)).not_to_have_value("11")
    assert set(tab.hosts) <= {demo.address, ""}, "nothing is asked of anybody else"
    image = nib.load(tmp_path / "downloaded.nii.gz")
    made = Comparison({"standard": tiny_pipeline(), "RL-tuned": tiny_pipeline(seed=1)}).generate("LGG", 2, seed=11)[1]
    expected = nib.Nifti1Image.from_bytes(gzip.decompress(made.content))
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.affine, expected.affine)
    assert np.allclose(image.get_fdata(), expected.get_fdata(), atol=1e-5)
    picture = imread(tmp_path / "page.png")
    assert picture.shape[:2] == (900, 1400)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def test_a_bad_value_is_told_and_the_page_goes_on(tab, demo):
    tab.goto(demo.url)
    tab.get_by_label("number input for Steps").fill("1")
    tab.get_by_label("Seed", exact=True).fill("-5")
    tab.get_by_role("button", name="Generate").click()
    tab.get_by_test_id("toast-body").wait_for()
    assert tab.locator("#viewer figure").count() == 0
    tab.get_by_label("Seed", exact=True).fill("5")
    tab.get_by_role("button", name="Generate").click()
    tab.locator("#viewer figure").nth(1).wait_for()
    tab.errors.clear()  # the browser logs the refusal, too


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR"])
def test_left_and_right_front_and_back_top_and_bottom(codes, tab, known):
    """A bright block at right, front and top, stored in several orders of axes, with unequal edges, as integers."""
    data = np.zeros((24, 20, 12), dtype=np.int16)
    data[16:20, 14:18, 8:11] = 1000
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-20, -30, -10)
    image = nib.Nifti1Image(data, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    demo, path = known
    image.to_filename(path)
    generate(tab, demo.url, 1)
    for axis, (index, count) in enumerate(zip((17, 15, 9), data.shape, strict=True)):
        tab.locator(f'#viewer input[name="{axis}"]').fill(str(index / (count - 1)))
    assert tab.locator("#viewer output").text_content() == "14.0, 15.0, 26.0 mm: 1000.000"
    for plane in ("axial", "coronal", "sagittal"):  # right, front and front; front, top and top
        upper_left, upper_right, *lower = quarters(tab, plane)
        assert upper_right > 5
        assert max(upper_left, *lower) == 0
    widths = tab.locator("#viewer canvas").evaluate_all("all => all.map(one => one.width / one.height)")
    assert np.allclose(widths, [48 / 60, 48 / 48, 60 / 48], atol=0.01)

    tab.get_by_label("Patient's right on the left of the picture").check()
    assert quarters(tab, "axial")[0] > 5
    assert quarters(tab, "axial")[1] == 0
    assert quarters(tab, "coronal")[0] > 5
    assert quarters(tab, "sagittal")[1] > 5, "it has no left and right"
    tab.locator("#viewer canvas").first.click(position={"x": 2, "y": 2})
    assert tab.locator("#viewer output").text_content().startswith("26.0, 27.0, ")  # the corner at right and front
    box = tab.locator("#viewer canvas").first.bounding_box()
    tab.mouse.move(box["x"] + 5, box["y"] + 5)
    tab.mouse.wheel(0, 100)
    assert tab.locator("#viewer output").text_content() == "26.0, 27.0, 22.0 mm: 0.000"

    tab.locator('#viewer input[name="level"]').fill("0")
    assert min(quarters(tab, "axial")) > 80, "the background is gray"
