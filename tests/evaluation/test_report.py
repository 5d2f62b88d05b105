"""The page of a report on made-up results; real ones are in test_evaluate."""

import base64
import html.parser
import json

import numpy as np
import pytest

from gfa_jax.evaluation import diagnostics, judgement, report

VOID = {"meta", "img", "source", "wbr", "line", "br"}
NAME = "<b>bold</b> & $x_1$"
LONG = "_runs/" + "very_long_name_" * 12


def make_run(
    name="run", *, attacks=("fgsm", "pgd:num_steps=3"), layers=("normalize", "block"), **changes
):
    counts = {"num_forwards": 7, "num_backwards": 5, "num_zero_gradients": 0}
    verified = {"num_successes": 4, "not_misled": 1, "outside": 0, "other_distance": 0}
    shares = dict.fromkeys(attacks, 0.7)
    lengths = [-1.0, 0.0, 1.0]
    return {
        "name": name,
        "clean_accuracy": 0.9,
        "robust_accuracy": {**dict.fromkeys(attacks, 0.5), "worst_case": 0.4},
        "intervals": {"clean": [0.8, 0.95], "worst_case": [0.3, 0.5]},
        "first_broken_by": dict.fromkeys(attacks, 2),
        "members": {},
        "minimum_norm": {
            "deepfool": {
                "cdf": [[0.1, 0.5], [0.3, 1.0]],
                "num_examples": 9,
                "success_rate": 1.0,
                "median": 0.1,
                "mean_of_successes": 0.2,
            }
        },
        "curves": [
            {
                "attack": attack,
                "num_examples": 10,
                "points": [{"epsilon": 0.0, "accuracy": 0.9}, {"epsilon": 1.0, "accuracy": 0.0}],
            }
            for attack in attacks
        ],
        "layers": {
            layer: {
                "alignment_mean": 0.25,
                "radial_degree_median": None,
                "tangential_share_mean": 0.6,
                "tangential_shares": shares,
            }
            for layer in layers
        },
        "directions": {
            "layer": layers[0],
            "lengths": lengths,
            "median_log_odds": {
                direction: [-2.0, None, 1.0]
                for direction in ("radial", "random_tangential", "worst_tangential")
            },
        },
        "loss_surface": {
            "lengths": lengths,
            "unit": "epsilon",
            "axes": [f"along {attacks[0]}", "random direction"],
            "median_log_odds": [[-1.0, 0.5, 1.0]] * 3,
        },
        "geometry": {"num_examples": 10, "attack": attacks[0]},
        "diagnostics": [
            judgement.judge(identifier, 0.0, 0.1, 10, f"Meaning of {identifier}.")
            if identifier != "D6"
            else judgement.missing(identifier, "no such attack.")
            for identifier in judgement.NAMES
        ],
        "verification": dict.fromkeys(attacks, verified),
        "counts": dict.fromkeys(attacks, counts),
        "threat": {"norm": "linf", "epsilon": 0.1, "bounds": [0.0, 1.0]},
        "data": {"name": "toy", "split": "test"},
        "num_examples": 10,
        "versions": {"jax": "1"},
        "mode": "standalone",
        "weights_hash": "0123456789abcdef0123",
        "precision": "float32",
        "seconds": 2.0,
    } | changes


def with_status(identifier, status):
    run = make_run()
    entries = [
        {**entry, "status": status} if entry["id"] == identifier else entry
        for entry in run["diagnostics"]
    ]
    return {**run, "diagnostics": entries}


def make_examples(channels=1):
    clean = np.linspace(0, 1, 2 * 4 * 5 * channels, dtype=np.float32).reshape(2, 4, 5, channels)
    return {
        "clean": clean,
        "adversarial": np.clip(clean + 0.05, 0, 1),
        "success": np.array([True, False]),
        "predictions": np.array([8, 4]),
        "clean_predictions": np.array([3, 4]),
        "labels": np.array([3, 4]),
    }


class Page(html.parser.HTMLParser):
    """A parsed page: elements with their attributes, and the text of paragraphs and rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.blocks = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes, tuple(self.open)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "p"):
            self.blocks.append((tag, attributes.get("class"), []))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif {"h1", "h2", "p"} & set(self.open):
            self.blocks[-1][2].append(data)

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def table(self, first):
        """Returns the rows from the one that starts with ``first`` on."""
        start = next(i for i, row in enumerate(self.rows) if row[: len(first)] == list(first))
        return self.rows[start:]


def write(path, *runs, channels=1):
    report.write_report([(run, make_examples(channels)) for run in runs], path)
    return path.read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A page of two runs that share neither all attacks nor all layers."""
    other = make_run(
        LONG,
        attacks=("pgd:num_steps=3", "square"),
        layers=("normalize", "later", "encoder/block_$1/out"),
    )
    return write(tmp_path_factory.mktemp("page") / "report.html", make_run(NAME), other)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_one_html_document(text, page):
    assert text.lstrip().startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert page.all("script") == []


def test_images_are_described_and_sized(page):
    images = page.all("img")
    for image in images:
        assert image["alt"]
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0
    # Of two runs: three shared figures, two panels each, and three images of two examples each.
    assert len(page.all("picture")) == 3 + 2 * 2
    assert len(images) == 3 + 2 * 2 + 2 * 2 * 3


def test_figures_have_a_twin_for_dark_pages(page):
    sources = page.all("source")
    pairs = [attributes for tag, attributes, above in page.elements if "picture" in above]
    assert len(sources) == len(page.all("picture"))
    for source, image in zip(pairs[::2], pairs[1::2], strict=True):
        assert source["media"] == "(prefers-color-scheme: dark)"
        assert source["srcset"].startswith("data:image/svg+xml;base64,")
        assert source["srcset"] != image["src"]


def test_nothing_outside_the_page_is_linked(text, page):
    for tag, attributes, _ in page.elements:
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert "url(" not in text
    assert "@import" not in text
    for picture in page.all("source"):
        drawn = base64.b64decode(picture["srcset"].partition(",")[2]).decode()
        links = [part.partition('"')[0] for part in drawn.split('href="')[1:]]
        assert all(link.startswith(("#", "data:")) for link in links)


def test_verdicts_come_first(page):
    first = [(tag, kind, "".join(parts)) for tag, kind, parts in page.blocks[:4]]
    assert [tag for tag, _, _ in first] == ["h1", "p", "p", "h2"]
    assert first[0][2] == f"Robustness report: {NAME}, {LONG}"
    assert first[1][1:] == (
        "verdict",
        f"{NAME}: 90.0% of 10 test images are right, and 40.0% stay right under the worst of fgsm, "
        "pgd:num_steps=3 at linf 0.1.",
    )
    assert first[2][2].startswith(f"{LONG}: ")


@pytest.mark.parametrize("status", ["FAIL", "WARN"])
@pytest.mark.parametrize("identifier", judgement.NAMES)
def test_a_verdict_warns_of_masking(identifier, status):
    warns = "gradient masking suspected" in report.verdict(with_status(identifier, status))
    assert warns == (status == "FAIL" and identifier in diagnostics.INVALIDATING)


@pytest.mark.parametrize(("status", "kind"), [("FAIL", "verdict suspected"), ("WARN", "verdict")])
def test_the_page_warns_of_masking(tmp_path, status, kind):
    page = Page(write(tmp_path / "report.html", with_status("D4", status)))
    _, found, parts = page.blocks[1]
    assert found == kind
    assert ("masking suspected" in "".join(parts)) == (status == "FAIL")
    assert next(row for row in page.rows if row[0] == "D4")[1] == status


def test_accuracies_of_different_attacks_share_a_table(page):
    assert page.table(["run", "clean"])[:3] == [
        ["run", "clean", "fgsm", "pgd:num_steps=3", "square", "worst case"],
        [NAME, "90.0 (80.0-95.0)", "50.0", "50.0", "-", "40.0 (30.0-50.0)"],
        [LONG, "90.0 (80.0-95.0)", "-", "50.0", "50.0", "40.0 (30.0-50.0)"],
    ]


def test_layers_of_all_runs_are_shown(page):
    layers = ["normalize", "block", "later", "encoder/block_$1/out"]
    here, nothing = ["0.250", "-", "60.0"], ["-"] * 3
    assert page.table(["layer"])[:6] == [
        ["layer", NAME, LONG],
        ["alignment", "radial degree", "tangential share"] * 2,
        ["normalize", *here, *here],
        ["block", *here, *nothing],
        ["later", *nothing, *here],
        ["encoder/block_$1/out", *nothing, *here],
    ]
    assert page.table(["run", "tangential share by attack"])[:5] == [
        ["run", "tangential share by attack", *layers],
        [NAME, "fgsm", "70.0", "70.0", "-", "-"],
        ["pgd:num_steps=3", "70.0", "70.0", "-", "-"],
        [LONG, "pgd:num_steps=3", "70.0", "-", "70.0", "70.0"],
        ["square", "70.0", "-", "70.0", "70.0"],
    ]


def test_every_diagnostic_and_attack_has_its_row(page):
    found = [row for row in page.rows if row[0] in judgement.NAMES]
    assert sorted(row[0] for row in found) == sorted([*judgement.NAMES] * 2)
    row = next(row for row in found if row[0] == "D1")
    assert row[1:5] == ["PASS", "0.0000", "0.1000", "10"]
    assert row[5] == f"{judgement.NAMES['D1']}. Meaning of D1."
    row = next(row for row in found if row[0] == "D6")
    assert row[1:5] == ["NA", "-", "-", "-"]
    counted = [row for row in page.rows if row[1:] == ["7", "5", "0", "3 of 4"]]
    assert [row[0] for row in counted] == ["fgsm", "pgd:num_steps=3", "pgd:num_steps=3", "square"]
    assert [row[:2] for row in page.table(["run", "attack"])[1:3]] == [
        [NAME, "deepfool"],
        [LONG, "deepfool"],
    ]


def test_each_run_names_the_attack_of_its_close_up(text):
    escaped = "&lt;b&gt;bold&lt;/b&gt; &amp; $x_1$"
    assert f"under fgsm ({escaped}), pgd:num_steps=3 ({LONG})." in text


def test_names_are_escaped(text):
    assert "<b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; $x_1$" in text


def test_images_say_what_the_model_said(text):
    said = '3: said <span>3</span>, then <span class="wrong">8</span>'
    assert text.count(said) == 2
    assert "4: said <span>4</span>, then <span>4</span>" in text
    assert "their perturbations 10.0 times as large" in text


def test_coloured_images_and_missing_parts(tmp_path):
    run = make_run(minimum_norm={})
    del run["loss_surface"]
    text = write(tmp_path / "report.html", run, channels=3)
    page = Page(text)
    assert "Measured on the first 10 images, under fgsm." in text
    headings = ["".join(parts) for tag, _, parts in page.blocks if tag == "h2"]
    assert "Alignment by layer" in headings
    assert "Smallest perturbations" not in headings
    assert "Loss around an image" not in headings
    assert len(page.all("picture")) == 3


def _without(run, path):
    """Returns the run without a field that lies within dicts and lists."""
    copy = json.loads(json.dumps(run))
    *groups, field = path
    place = copy
    for group in groups:
        place = place[group]
    del place[field]
    return copy


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (["intervals"], "intervals"),
        (["members"], "members"),
        (["weights_hash"], "weights_hash"),
        (["name"], "name"),
        (["layers", "block", "tangential_shares"], "layers.tangential_shares"),
        (["counts", "fgsm", "num_zero_gradients"], "counts.num_zero_gradients"),
        (["verification", "fgsm", "outside"], "verification.outside"),
        (["diagnostics", 0, "name"], "diagnostics.name"),
    ],
)
def test_older_results_are_refused(tmp_path, path, named):
    older = _without(make_run(), path)
    with pytest.raises(ValueError, match=rf"older version and lack {named}: evaluate again"):
        write(tmp_path / "report.html", make_run(), older)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["results.json", "examples.npz"])
def test_a_folder_without_results_says_how_to_make_them(tmp_path, missing):
    (tmp_path / "results.json").write_text(json.dumps(make_run()))
    report.save_examples(tmp_path / "examples.npz", make_examples())
    results, examples = report.load_evaluation(tmp_path)
    assert results == make_run()
    np.testing.assert_array_equal(examples["clean"], make_examples()["clean"])
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no {missing}: run eval.py first"):
        report.load_evaluation(tmp_path)


def test_the_same_results_give_the_same_bytes(tmp_path):
    one, other = (write(tmp_path / name, make_run()) for name in ("a.html", "b.html"))
    assert one == other
