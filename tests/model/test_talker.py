"""A talker with its codec and aligner: durations, streams, one text and several. test_codec.py has each network."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stoker.model import ctc
from stoker.model.codec import Codec, Encoder
from stoker.model.speaking import Drawn, Speaking, likeliest
from stoker.model.talker import LONGEST, Talker, places
from stoker.model.vocoder import SpectralVocoder

SYMBOLS, BOOKS, ENTRIES, BLANK = 12, 3, 8, 11


def talker(autoregressive: bool = True, voices: int = 2) -> Talker:
    torch.manual_seed(0)
    return Talker(num_symbols=SYMBOLS, num_books=BOOKS, book_size=ENTRIES, d_model=16, num_layers=2, num_voices=voices,
                  autoregressive=autoregressive, dropout=0.1).eval()


def speaking(autoregressive: bool = True) -> Speaking:
    torch.manual_seed(1)
    codec = Codec(num_mels=20, frame_rate=25.0, d_model=16, num_layers=1, latent=4, num_books=BOOKS, book_size=ENTRIES)
    return Speaking(20, codec, Encoder(20, 2, 16, 1, SYMBOLS), talker(autoregressive), BLANK).eval()


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Symbols (2, 7), how many count, voices."""
    symbols = torch.randint(0, SYMBOLS - 1, (2, 7), generator=torch.Generator().manual_seed(2))
    return symbols, torch.tensor([7, 5]), torch.tensor([0, 1])


DURATIONS = torch.tensor([[1.5, 2.0, 0.25, 3.0, 1.0, 0.75, 2.5], [2.0, 1.0, 1.5, 0.5, 2.0, 9.0, 9.0]])


@pytest.mark.parametrize("autoregressive", [True, False])
def test_another_letter_changes_the_logits_there_and_a_voice_everywhere(autoregressive: bool) -> None:
    model, (symbols, sizes, voices) = talker(autoregressive), texts()
    where = places(DURATIONS, sizes)
    codes = torch.zeros(2, 11, BOOKS, dtype=torch.long)
    before = model(symbols, sizes, voices, where, codes)
    other = symbols.clone()
    other[0, 3] = (other[0, 3] + 1) % (SYMBOLS - 1)
    here = where.symbols[0] == 3
    after = model(other, sizes, voices, where, codes)
    assert ((before - after)[0, here].abs().amax((1, 2)) > 1e-4).all() and torch.equal(before[1], after[1])
    assert ((before - model(symbols, sizes, 1 - voices, where, codes))[0].abs().amax((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("autoregressive", [True, False])
def test_a_text_alone_is_spoken_as_in_a_batch(autoregressive: bool) -> None:
    model, (symbols, sizes, voices) = speaking(autoregressive), texts()
    mel, frames, _ = model.speak(symbols, sizes, voices, likeliest)
    for row, size in enumerate(sizes.tolist()):
        alone, count, _ = model.speak(symbols[row:row + 1, :size], sizes[row:row + 1], voices[row:row + 1], likeliest)
        assert count == frames[row]
        torch.testing.assert_close(alone[0], mel[row, :count], rtol=1e-4, atol=1e-5)


def test_durations_are_those_of_the_likeliest_alignment_and_add_up() -> None:
    model, (symbols, sizes, _) = speaking(), texts()
    frames = torch.tensor([86, 51])
    mel = torch.randn(2, 86, 20, generator=torch.Generator().manual_seed(4))
    lengths = (frames + 3) // 4
    rows = [row[:size].tolist() for row, size in zip(symbols, sizes.tolist())]
    found = model.durations(mel, frames, rows, lengths)
    assert torch.equal(found.sum(1), lengths.float()) and (found >= 0).all()
    logits, counts = model.alignable(mel, frames)
    for row, text in enumerate(rows):
        spans = ctc.align(logits[row, :counts[row]].log_softmax(-1).detach().numpy(), text, blank=BLANK)
        starts = [0.0, *(max(0, span.start - 2) / 2 for span in spans[1:])]
        assert found[row, :len(text)].cumsum(0)[:-1].tolist() == pytest.approx(starts[1:])


def test_labels_without_frames_enough_are_evenly_spread() -> None:
    log_probs = np.log(np.full((2, 9, 4), 0.25, np.float32))
    enough, spread = ctc.starts(log_probs, [9, 3], [[0, 1], [1, 1, 1, 1]], blank=3)
    assert len(enough) == 2 and spread.tolist() == [0.0, 0.75, 1.5, 2.25]


def test_no_symbol_lasts_longer_than_the_bound() -> None:
    model, (symbols, sizes, voices) = speaking(), texts()
    with torch.no_grad():
        model.talker.duration.bias.fill_(1e4)
    _, frames, _ = model.speak(symbols, sizes, voices, likeliest)
    assert frames.tolist() == [7 * 100 * LONGEST, 5 * 100 * LONGEST]


def test_a_stream_is_the_whole() -> None:
    model, (symbols, _, voices) = speaking(), texts()
    generator = SpectralVocoder(20, 16, 2).eval()
    with torch.no_grad():
        blocks = [*model.stream(symbols[:1], voices[:1], likeliest, generator)]
        mel, frames, _ = model.speak(symbols[:1], torch.tensor([7]), voices[:1], likeliest)
        whole = generator(mel)
    assert len(blocks) == int(frames) // 4 + 1
    torch.testing.assert_close(torch.cat(blocks, 1), whole, rtol=0, atol=1e-5)


def test_temperature_and_seed() -> None:
    logits = torch.randn(2, 5, ENTRIES, generator=torch.Generator().manual_seed(5))
    one, again, other = (Drawn(1.0, torch.Generator().manual_seed(seed))(logits) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(Drawn(0.0, torch.Generator())(logits), logits.argmax(-1))
    many = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(1, 20000, 3)
    drawn = Drawn(1.0, torch.Generator().manual_seed(3))(many)
    assert torch.bincount(drawn[0], minlength=3).numpy() / 20000 == pytest.approx([0.7, 0.2, 0.1], abs=0.015)
