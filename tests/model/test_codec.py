"""Codec, vocoder and talker: batch against single, streams against the whole, what sees what."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from stoker.model.codec import Codec
from stoker.model.talker import Stream, Talker, places
from stoker.model.vocoder import SpectralVocoder

SIZES: dict[str, Any] = dict(num_mels=20, d_model=32, num_layers=2, latent=8, num_books=3, book_size=16)


def codec(frame_rate: float = 25) -> Codec:
    torch.manual_seed(0)
    return Codec(frame_rate=frame_rate, **SIZES).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms (3, 103, 20), whatever in the padding, and their lengths."""
    torch.manual_seed(1)
    return torch.randn(3, 103, 20), torch.tensor([103, 50, 77])


@pytest.mark.parametrize("rate, frames", [(50, 52), (25, 26), (12.5, 13)])
def test_a_second_has_so_many_frames(rate: float, frames: int) -> None:
    coded = codec(rate)(*batch())
    assert coded.codes.shape == (3, frames, 3) and coded.mel.shape == (3, 103, 20)
    assert coded.lengths.tolist() == [-(-length * int(rate * 2) // 200) for length in (103, 50, 77)]


def test_a_recording_has_the_same_codes_in_a_batch_as_alone() -> None:
    model, (mel, frames) = codec(), batch()
    together = model(mel, frames)
    for row, length in enumerate(frames):
        alone = model(mel[row:row + 1, :length], frames[row:row + 1])
        count = int(alone.lengths)
        assert torch.equal(together.codes[row, :count], alone.codes[0])
        assert torch.allclose(together.mel[row, :length], alone.mel[0], atol=1e-5)
        assert not together.mel[row, length:].any()
        assert torch.equal(model.codes(mel, frames)[0][row, :count], alone.codes[0])


def test_what_is_decoded_is_what_training_sees() -> None:
    model, (mel, frames) = codec(), batch()
    coded = model(mel, frames)
    assert torch.equal(model.decode(coded.codes)[0, :103], coded.mel[0])
    few = model(mel, frames, torch.tensor([1, 3, 2]))
    assert torch.allclose(model.decode(coded.codes[..., :1])[0, :103], few.mel[0], atol=1e-6)


def test_the_first_layer_gets_a_gradient() -> None:
    model, (mel, frames) = codec(), batch()
    (model(mel, frames).mel - mel).abs().sum().backward()
    grad = model.encoder.into.weight.grad
    assert grad is not None and grad.abs().sum() > 0 and not any(book.entries.requires_grad
                                                                 for book in model.quantizer.books)


def test_the_decoder_is_causal_and_a_stream_of_it_is_the_whole() -> None:
    model, (mel, frames) = codec(), batch()
    vectors = model.quantizer.vectors(model(mel, frames).codes)
    whole = model.decoder(vectors)
    assert torch.allclose(model.decoder(vectors[:, :9]), whole[:, :36], atol=1e-5)
    state, parts = None, []
    for start, end in pairwise([0, 1, 2, 9, 20, 26]):
        part, state = model.decoder.stream(vectors[:, start:end], state)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


# -- vocoder --------------------------------------------------------------------------------------------------------


def vocoder() -> SpectralVocoder:
    torch.manual_seed(0)
    return SpectralVocoder(20, 32, 2).eval()


def test_a_stream_of_sound_is_the_whole() -> None:
    model, (mel, _) = vocoder(), batch()
    whole = model(mel)
    assert whole.shape == (3, 160 * 103)
    state, parts = None, []
    for start, end in pairwise([0, 2, 3, 10, 103]):
        part, state = model.stream(mel[:, start:end], state)
        parts.append(part)
    assert state is not None
    assert torch.allclose(torch.cat([*parts, model.end(state)], 1), whole, atol=1e-5)


def test_it_looks_ahead_no_more_than_20_ms() -> None:
    model, (mel, _) = vocoder(), batch()
    other = mel.clone()
    other[:, 50:] = 0
    differing = (model(mel) != model(other)).any(0).nonzero()
    assert 50 * 160 - 320 <= int(differing[0]) < 50 * 160


def test_a_spectrum_becomes_the_sum_of_its_windows() -> None:
    """Of constant magnitudes and phases: against torch's inverse transform."""
    model, count = vocoder(), 40
    torch.nn.init.zeros_(model.out.weight)
    with torch.no_grad():
        model.out.bias.copy_(torch.cat([torch.linspace(-3, 1, 321), torch.linspace(-2, 2, 321)]))
    spectrum = torch.polar(torch.linspace(-3, 1, 321).exp(), torch.linspace(-2, 2, 321))[None, :, None]
    window = torch.hann_window(640)
    wanted = torch.istft(spectrum.expand(-1, -1, count), 640, 160, window=window, center=True)
    found = model(torch.zeros(1, count, 20))[:, 640:-640]
    envelope = 1.5  # the sum of squared windows, by which torch divides
    assert torch.allclose(found / envelope, wanted[:, 640:640 + found.shape[1]], atol=1e-4)


# -- talker ---------------------------------------------------------------------------------------------------------


def talker(**options: Any) -> Talker:
    torch.manual_seed(0)
    return Talker(num_symbols=12, num_books=3, book_size=16, d_model=32, num_layers=2, **options).eval()


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randint(12, (2, 30)), torch.tensor([30, 17]), torch.zeros(2, dtype=torch.long)


def test_frames_are_where_their_middle_is() -> None:
    where = places(torch.tensor([[1.0, 2.0, 0.0, 0.4, 1.6], [0.2, 0.1, 9.0, 9.0, 9.0]]), torch.tensor([5, 2]))
    assert where.lengths.tolist() == [5, 1]
    assert where.symbols[0].tolist() == [0, 1, 1, 4, 4] and where.symbols[1, 0] == 1
    assert torch.allclose(where.within[0, :, 0], torch.tensor([0.5, 0.5, 1.5, 0.1, 1.1]), atol=1e-6)
    assert torch.allclose(where.within[0, :, 1], torch.tensor([0.5, 1.5, 0.5, 1.5, 0.5]), atol=1e-6)


@pytest.mark.parametrize("autoregressive", [True, False])
def test_what_is_spoken_frame_by_frame_is_what_is_computed_at_once(autoregressive: bool) -> None:
    model, (symbols, sizes, voices) = talker(autoregressive=autoregressive), text()
    where = places(model.durations(symbols, sizes, voices) * 3, sizes)
    said = model.spoken(model.frames(symbols, sizes, voices, where), where.lengths, lambda logits: logits.argmax(-1))
    at_once = model(symbols, sizes, voices, where, said).argmax(-1)
    for row, length in enumerate(where.lengths):
        assert torch.equal(said[row, :length], at_once[row, :length])


def test_a_frame_sees_no_code_of_its_own_that_comes_later_nor_later_frames() -> None:
    model, (symbols, sizes, voices) = talker(), text()
    where = places(torch.full((2, 30), 2.0), sizes)
    codes = torch.randint(16, (2, 60, 3))
    before = model(symbols, sizes, voices, where, codes)
    for book in range(3):
        changed = codes.clone()
        changed[:, 20, book:] = (changed[:, 20, book:] + 1) % 16
        changed[:, 21:] = 0
        after = model(symbols, sizes, voices, where, changed)
        assert torch.equal(before[:, :20], after[:, :20]) and torch.equal(before[:, 20, :book + 1],
                                                                         after[:, 20, :book + 1])
        assert not torch.equal(before[:, 21], after[:, 21])


def test_a_symbol_changes_what_is_near_and_nothing_else() -> None:
    """So what is far ahead need not be known yet."""
    model, (symbols, sizes, voices) = talker(), text()
    other = symbols.clone()
    other[:, 16] = (other[:, 16] + 1) % 12
    first, second = model.durations(symbols, sizes, voices), model.durations(other, sizes, voices)
    reach = model.timing.reach
    assert torch.equal(first[0, :16 - reach], second[0, :16 - reach]) and not torch.equal(first[0, 16], second[0, 16])
    where = places(torch.full((2, 30), 1.0), sizes)
    one, two = (model.frames(each, sizes, voices, where) for each in (symbols, other))
    changed = (one != two).any(-1)[0].nonzero()[:, 0]
    assert changed.min() == 16 - model.text.reach and changed.max() == 16 + model.text.reach


def test_a_text_is_spoken_the_same_in_a_batch_as_alone() -> None:
    model, (symbols, sizes, voices) = talker(), text()
    assert torch.allclose(model.durations(symbols, sizes, voices)[1, :17],
                          model.durations(symbols[1:, :17], sizes[1:], voices[1:])[0], atol=1e-5)
    where = places(torch.full((2, 30), 2.0), sizes)
    alone = places(torch.full((1, 17), 2.0), sizes[1:])
    assert torch.allclose(model.frames(symbols, sizes, voices, where)[1, :34],
                          model.frames(symbols[1:, :17], sizes[1:], voices[1:], alone)[0], atol=1e-5)


def test_a_stream_begins_without_a_frame_before() -> None:
    model, (symbols, sizes, voices) = talker(), text()
    where = places(torch.full((2, 30), 1.0), sizes)
    x = model.frames(symbols, sizes, voices, where)
    codes, stream = model.next_frame(x[:, :1], Stream(None, None), lambda logits: logits.argmax(-1))
    assert codes.shape == (2, 1, 3) and stream.codes is codes
