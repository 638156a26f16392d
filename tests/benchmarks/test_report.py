"""The report of results files: that it says what they say, losses as plainly as wins, and that its page stands alone."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import itertools
import re

import pytest
from support import made_up_results

from benchmarks.report import charts, facts, page
from benchmarks.report.__main__ import main
from benchmarks.report.facts import Facts, Spread
from benchmarks.timing import results, run
from benchmarks.timing.cases import Case
from benchmarks.timing.providers import named_provider
from benchmarks.timing.results import new_row

pytestmark = pytest.mark.same_everywhere

VOID = {"meta", "br", "link", "img", "input"}


class Page(html.parser.HTMLParser):
    """Reads a page: its text, its tables, and whether its tags match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.heading = ""
        self.text = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        assert not {name for name in named if name.startswith("on")}, named
        assert tag not in ("script", "link", "img", "iframe"), tag
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[name] for name in ("href", "src") if name in named]
        if tag in ("h2", "h3"):
            self.heading = ""
        if tag == "table":
            self.tables.setdefault(self.heading, [])
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] in (["h2"], ["h3"]):
            self.heading += data
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[self.heading][-1][-1] += data


@pytest.fixture(scope="module")
def gpu() -> dict:
    return made_up_results.gpu()


@pytest.fixture(scope="module")
def told(gpu, tmp_path_factory) -> tuple[Page, str, str]:
    """What `report` gives for these results, made once."""
    return report(tmp_path_factory.mktemp("told"), gpu)


def report(tmp_path, *files: dict) -> tuple[Page, str, str]:
    """The page, its source and the Markdown."""
    paths = []
    for number, content in enumerate(files):
        paths.append(str(tmp_path / f"{number}.json"))
        results.save(content, paths[-1])
    assert main([*paths, "--out", str(tmp_path / "report")]) == 0
    source = (tmp_path / "report/report.html").read_text()
    return Page(source), source, (tmp_path / "report/report.md").read_text()


def test_page_stands_alone(told):
    read, source, _ = told
    assert len(read.ids) == len(set(read.ids))
    assert read.links and all(link.startswith("#") and link[1:] in read.ids for link in read.links)
    assert not re.search(r"https?://|@import|url\(", source)
    assert source.count('<svg class="chart"') == source.count('role="img"') > 10
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source


def test_every_row_is_told(gpu, told):
    """Each comparison stands in the table of its kind, losses worst first; each failure with its reason."""
    read, _, markdown = told
    base = {results.key(row)[0]: row for row in gpu["rows"] if row["provider"] == "torch.nn"}
    ours = [row for row in gpu["rows"] if row["provider"].startswith("rnnfast") and row["status"] == "ok"]

    def slowest(row) -> float:
        theirs = {(t["how"], t["l2"]): t["p50"] for t in base[results.key(row)[0]]["timings"]}
        quotients = [theirs[t["how"], t["l2"]] / t["p50"] for t in row["timings"]]
        return min(*quotients, 1 / row["ratio"]["p50"])

    losses = [row for row in ours if slowest(row) < 1]
    assert 0 < len(losses) < len(ours)
    shown = [row for row in read.tables["Where it loses"] if row[0] != "case"]
    assert len(shown) == len(losses)
    assert [row[3].split()[0] for row in shown[:3]] == [facts.ratio(s) for s in sorted(map(slowest, losses))[:3]]
    assert len([row for row in read.tables["Where it wins"] if row[0] != "case"]) == len(ours) - len(losses)
    failed = [row for row in gpu["rows"] if row["status"] != "ok"]
    assert {row["status"] for row in failed} >= {"wrong", "unavailable", "out of memory"}
    assert sum(int(row[2]) for row in read.tables["Not timed"][1:]) == len(failed)
    for row in failed:
        assert row["note"] in read.text and row["note"] in markdown
    assert "31.0 times the error that is allowed" in read.text


def test_published(tmp_path):
    """What others have published stands apart from what was measured, with its source. No quotient is of two machines."""
    read, _, markdown = report(tmp_path, made_up_results.gpu(sets=("kernelbench", "lengths")))
    heading = "Published by others, not measured here"
    columns, *rows = read.tables[heading]
    assert columns[1:6] == ["published: who", "where", "published: ms a call", "here: torch.nn", "here: the others"]
    b200 = next(row for row in rows if "KernelBench 41" in row[0] and row[2].startswith("B200"))
    loaded = Facts(made_up_results.gpu(sets=("kernelbench", "lengths")))
    (case,) = (case for case in loaded.cases if case.model == "kb41" and case.mode == "inference")
    here = facts.figure(loaded.of[case, "torch.nn"].time.p50 / 1000)
    assert b200[1] == "cuDNN" and b200[3:5] == ["122", here] and "persistent" in b200[5]
    assert "github.com/ScalingIntelligence/KernelBench, commit 7dd9cfa" in b200[6] and "torch 2.5.0" in b200[6]
    (packed,) = (row for row in rows if "lengths" in row[0] and "1,000" in row[0] and "forward" in row[0])
    (case,) = (case for case in loaded.cases if case.model == "lengths" and case.T == 1000 and case.mode == "forward")
    times = [loaded.of[one, "torch.nn"].time.p50 for one in (case, dataclasses.replace(case, model=""))]
    assert packed[3:5] == ["95.8 times padded", f"{facts.figure(times[0] / times[1])} times padded"]
    assert "nobody measured them here" in read.text and "is no speed-up" in markdown
    assert "speed-up" not in " ".join(columns) and not any("▲" in text or "faster" in text for row in rows for text in row)
    assert heading not in report(tmp_path, made_up_results.cpu())[0].tables


def test_heat_map(gpu, told):
    read, _, _ = told
    case = Case("LSTM", 1024, 32, 768, 768)
    (row,) = (r for r in gpu["rows"] if results.key(r) == (case, "rnnfast-step"))
    rows = read.tables["LSTM float16 training, T = 1,024, I = H"]
    second = [at for at, one in enumerate(rows) if one[0] == "B \\ H"][2]  # after persistent, eager and in a CUDA graph
    column = rows[second].index("768")
    (line,) = (one for one in rows[second + 1 : second + 6] if one[0] == "32")
    assert line[column] == f"{facts.ratio(1 / row['ratio']['p50'])}\u202f▼"


def test_no_verdict(gpu, told, tmp_path):
    """None where the times vary too much, nor for torch.nn's own code. Neither counts as faster or slower."""
    content = copy.deepcopy(gpu)
    noisy, same = [row for row in content["rows"] if row["provider"] == "rnnfast-step" and row["status"] == "ok"][:2]
    noisy["ratio"] |= {"p20": 1 / 84.9, "p50": 1 / 15.8, "p80": 1 / 1.07}
    noisy["timings"] = noisy["timings"][:1]
    same["note"] = "chose torch: PyTorch's own layer"
    read, _, _ = report(tmp_path, content)
    found = {row[0].replace("\xa0", " "): row[2:4] for row in read.tables["Without a verdict"][1:]}
    assert found[facts.describe(results.key(noisy)[0])] == ["no verdict", "15.8 (1.07 to 84.9)"]
    assert found[facts.describe(results.key(same)[0])][0] == "torch.nn's code" and len(found) == 2
    before, _, _ = told
    columns, *_ = read.tables["Summary"]
    old, new = (next(row for row in one.tables["Summary"] if row[0] == "rnnfast-step") for one in (before, read))
    counts = [[int(row[columns.index(kind)]) for kind in ("faster", "within spread", "slower")] for row in (old, new)]
    assert (
        sum(counts[0]) == sum(counts[1]) + 2
        and [new[columns.index(kind)] for kind in ("no verdict", "torch.nn's code")] == ["1"] * 2
    )
    assert new[columns.index("best")] != "15.8" and "1 without a verdict, 1 on torch.nn's own code" in read.text


def test_on_a_cpu_rnnfast_is_torch_nn(tmp_path):
    """The row says so, and the report in place of a verdict."""
    case = Case("LSTM", 2, 1, 4, 4, dtype="float32", mode="inference")
    settings = {"device": "cpu", "seconds": 0.001, "threads": 1, "interpret": False}
    rows = [run.row_of(case, "quick", named_provider(name), settings) for name in ("torch.nn", "rnnfast-torch")]
    found = Facts({"environment": {}, "settings": {}, "ceilings": None, "rows": rows}).compared
    assert [entry.verdict(entry.main) for entry in found] == ["same"]
    read, _, _ = report(tmp_path, made_up_results.cpu())
    assert not read.tables.get("Where it wins") and not read.tables.get("Where it loses")
    assert {row[2] for row in read.tables["Without a verdict"][1:]} == {"torch.nn's code"}


def test_cpu_file_has_no_floor(tmp_path):
    read, source, _ = report(tmp_path, made_up_results.cpu())
    assert "No floor" in source and 'class="below"' not in source
    assert "rnnfast-torch" in read.text and "Floor of each case" not in read.text


def test_floor_is_drawn(gpu):
    loaded = Facts(copy.deepcopy(gpu))
    (group,) = (g for g in loaded.groups("H") if g.label.startswith("LSTM float16 inference, T = 1,024, B = 32"))
    chart = page._chart(loaded, group, "H", "time")
    assert chart.count('class="below"') == chart.count('class="floor"') == 1
    assert all(f">{term}</text>" in chart for term in ("FLOPs", "bytes", "exchange"))
    far = page._chart(loaded, next(g for g in loaded.groups("T") if len(g.cases) == 3), "T", "time")
    assert "floor far below" in far and 'class="below"' not in far


def test_before_and_after(gpu, tmp_path):
    """A slow-down beyond the spread is told from noise, the worst first, and what differs between the runs is said."""
    before = made_up_results.gpu(sets=("long",))
    after = made_up_results.gpu(1.3, sets=("long",))
    after["environment"]["torch"] = "2.99"
    dropped = after["rows"].pop()
    after["rows"][0] |= {"status": "error", "timings": [], "ratio": None, "note": "boom"}
    read, _, markdown = report(tmp_path, before, after)
    rows = read.tables["Before and after"]
    verdicts = {row[1]: set() for row in rows if row[0] != "case"}
    for row in rows:
        if row[0] != "case":
            verdicts[row[1]].add((row[3], row[4]))
    assert verdicts.pop("rnnfast-persistent") == {("slower", "+30.0%")}
    assert {one for found in verdicts.values() for one in found} == {("noise", "+0.0%")}
    assert rows[1][1] == "rnnfast-persistent"
    odd = read.tables["In one file only, or of another status"]
    assert ["before only" in row for row in odd].count(True) == 1 and dropped["provider"] in odd[-1]
    assert any("ok before, error after" in row[2] for row in odd)
    assert ["torch", "2.13.0", "2.99"] in read.tables["What differs between the runs"]
    assert "## Before and after" in markdown


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("{", "is damaged"),
        ('{"schema": 99}', "schema version 99"),
        ("[]", "no benchmark results"),
        ('{"schema": 2, "environment": {}}', "damaged"),
        (None, "No such file"),
    ],
)
def test_bad_file_is_one_line(tmp_path, capsys, content, says):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_hostile_text_stays_text(tmp_path):
    case = made_up_results.one_case()
    note = "<script>alert('1')</script> | a & b\nsecond line"
    rows = [new_row(case, "quick", "<b>haste</b>", "error", note=note)]
    content = {"schema": 2, "environment": {"cpu": "<i>"}, "settings": {}, "ceilings": None, "rows": rows}
    read, _, markdown = report(tmp_path, content)
    assert note in read.text and "<b>haste</b>" in read.text
    (line,) = (line for line in markdown.splitlines() if "script" in line)
    assert "\\| a & b second line |" in line


@pytest.mark.parametrize("rows", [[], [new_row(made_up_results.one_case(), "quick", "torch.nn", "unavailable", note="none")]])
def test_nothing_measured(tmp_path, rows):
    content = {"schema": 2, "environment": {"gpu": "NVIDIA H100"}, "settings": {}, "ceilings": None, "rows": rows}
    read, _, _ = report(tmp_path, content)
    assert "No two cases differ" in read.text


def test_spreads():
    assert Spread(1.1, 1.2, 1.3).verdict == "win" and Spread(0.7, 0.8, 0.9).verdict == "loss"
    assert Spread(0.9, 1.2, 1.3).verdict == "even"
    assert Spread(2, 3, 4).verdict == "win" and Spread(2, 3, 4.1).verdict == "unclear" == Spread(0.1, 0.3, 1.2).verdict
    assert Spread(1, 2, 4).inverse == Spread(0.25, 0.5, 1)
    assert Spread(1, 2, 4).over(Spread(2, 2, 2)) == Spread(0.5, 1, 2)
    numbers = (0.0123, 0.999, 9.994, 9.996, 123.4)
    assert [facts.ratio(n) for n in numbers] == ["0.01", "1.00", "9.99", "10.0", "123.4"]
    assert [facts.figure(n) for n in (0, 0.01234, 1.234, 12.34, 1234.5)] == ["0", "0.0123", "1.23", "12.3", "1234"]
    assert [charts.number(n) for n in (0.05, 5, 1024, 20000, 1e6)] == ["0.05", "5", "1024", "20k", "1M"]


def test_groups_follow_the_input_size():
    """Cases of growing H are one group where I = H, and where I is the same, but not together."""
    shapes = [(256, 256), (512, 512), (64, 256), (64, 512), (32, 512)]
    rows = [
        new_row(dataclasses.replace(made_up_results.one_case(), I=I, H=H), "s", "torch.nn", "unavailable") for I, H in shapes
    ]
    loaded = Facts({"environment": {}, "settings": {}, "ceilings": None, "rows": rows})
    assert [[(case.I, case.H) for case in group.cases] for group in loaded.groups("H")] == [shapes[:2], shapes[2:4]]
    assert ["I = H" in group.label for group in loaded.groups("H")] == [True, False]


def test_labels_do_not_touch():
    placed = charts._apart([(250.0, "a"), (251.0, "b"), (100.0, "c")], 13)
    ys = [y for y, _ in placed]
    assert all(b - a >= 13 for a, b in itertools.pairwise(ys)) and max(ys) <= charts.HEIGHT - charts.BOTTOM
    for values in ([1, 1], [0.001, 900], [5, 6.5], [3, 30]):
        axis = charts._Axis(values, 0, 300, 0.05)
        assert 3 <= len(axis.ticks()) <= 10 and all(0 <= axis.at(tick) <= 300 for tick in axis.ticks())
