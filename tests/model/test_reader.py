"""The reader: against torch's own decoder, the caches, padding, and beam search against all texts there are."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from stoker.model.decoding import Written, beam_search, greedy
from stoker.model.line_encoder import LineEncoder, states_of
from stoker.model.reader import Memory, Reader, Seen, TextDecoder, begun
from stoker.model.transformer import sines

V, END = 5, 4
WIDTHS = torch.tensor([37, 8, 24, 1])
LENGTHS = torch.tensor([10, 2, 6, 1])  # states


def weighted(made: nn.Module) -> nn.Module:
    """With weights large enough that every part makes a difference."""
    torch.manual_seed(0)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.25)
    return made.eval()


@pytest.fixture
def encoder() -> LineEncoder:
    made = weighted(LineEncoder(image_height=32, stem_width=4, d_model=32, num_heads=4, num_layers=2, d_ff=64))
    assert isinstance(made, LineEncoder)
    return made


@pytest.fixture
def decoder() -> TextDecoder:
    made = weighted(TextDecoder(V, d_model=16, num_heads=2, num_layers=2, d_ff=40, dropout=0.5))
    assert isinstance(made, TextDecoder)
    return made


def states() -> Tensor:
    return torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(1))


def pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


# -- the encoder ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_never_changes_what_is_seen(encoder: LineEncoder) -> None:
    seen = pixels(4, 1, 32, 37)
    together, lengths = encoder(seen, WIDTHS)
    assert lengths.tolist() == LENGTHS.tolist() == [states_of(width) for width in WIDTHS.tolist()]
    for row, (width, length) in enumerate(zip(WIDTHS.tolist(), LENGTHS.tolist())):
        alone, _ = encoder(seen[row:row + 1, :, :, :width], WIDTHS[row:row + 1])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)
        assert not together[row, length:].any()


@torch.no_grad()
def test_light_and_contrast_change_little_and_what_is_written_much(encoder: LineEncoder) -> None:
    seen = pixels(1, 1, 32, 40)
    width = torch.tensor([40])
    plain, faint, other = (encoder(each, width)[0] for each in (seen, seen // 2 + 90, seen.flip(3)))
    assert (plain - faint).abs().mean() < 0.1 * (plain - other).abs().mean()


@torch.no_grad()
def test_states_of_equal_columns_differ(encoder: LineEncoder) -> None:
    """The same all along, but not the same states."""
    states, _ = encoder(pixels(1, 1, 32, 1).expand(1, 1, 32, 80), torch.tensor([80]))
    middle = states[0, 4:-4]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(middle, 2))


def test_lines_of_other_heights_have_states_too() -> None:
    made = LineEncoder(image_height=48, stem_width=4, d_model=32, num_heads=4, num_layers=1, d_ff=64)
    assert made(pixels(2, 1, 48, 20), torch.tensor([20, 9]))[0].shape == (2, 5, 32)


# -- the decoder ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_the_decoder_of_torch(decoder: TextDecoder) -> None:
    """torch.nn.TransformerDecoder, pre-norm, exact GELU, with the same weights."""
    layer = nn.TransformerDecoderLayer(16, 2, 40, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerDecoder(layer, 2, nn.LayerNorm(16)).eval()
    ours, weights = decoder.state_dict(), {}
    names = {"attention.qkv.weight": "self_attn.in_proj_weight", "attention.qkv.bias": "self_attn.in_proj_bias",
             "attention.out.": "self_attn.out_proj.", "cross_attention.out.": "multihead_attn.out_proj.",
             "mlp.up.": "linear1.", "mlp.down.": "linear2.", "final_norm.": "norm.", "blocks.": "layers."}
    for name, weight in ours.items():
        if "cross_attention.query" in name or "cross_attention.kv" in name or name.startswith("embedding"):
            continue
        for mine, other in names.items():
            if mine.startswith("attention") and "cross_attention" in name:
                continue
            name = name.replace(mine, other)
        weights[name] = weight
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [ours[f"blocks.{i}.cross_attention.{part}.{kind}"] for part in ("query", "kv")]
            weights[f"layers.{i}.multihead_attn.in_proj_{kind}"] = torch.cat(parts)
    theirs.load_state_dict(weights)

    tokens = torch.randint(V, (4, 7), generator=torch.Generator().manual_seed(3))
    embedded = decoder.embedding(tokens) * 4 + sines(torch.arange(7), 16)
    beyond = torch.arange(10) >= LENGTHS[:, None]
    expected = theirs(embedded, states(), tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
                      tgt_is_causal=True, memory_key_padding_mask=beyond)
    found = decoder(tokens, decoder.memory(states(), LENGTHS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_those_of_the_paper() -> None:
    """sin and cos of place / 10000^(2i / D), all sines before all cosines."""
    expected = [[math.sin(place / 10000**(2 * i / 8)) for i in range(4)]
                + [math.cos(place / 10000**(2 * i / 8)) for i in range(4)] for place in range(6)]
    torch.testing.assert_close(sines(torch.arange(6), 8), torch.tensor(expected))


@pytest.mark.parametrize("lengths", [[1] * 8, [8], [3, 1, 4]])
@torch.no_grad()
def test_the_caches_change_nothing(decoder: TextDecoder, lengths: list[int]) -> None:
    tokens = torch.randint(V, (4, 8), generator=torch.Generator().manual_seed(3))
    memory = decoder.memory(states(), LENGTHS, capacity=8)
    parts = [decoder(part, memory) for part in tokens.split(lengths, 1)]
    whole = decoder(tokens, decoder.memory(states(), LENGTHS))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert memory.length == 8


@torch.no_grad()
def test_what_is_beyond_a_line_and_later_in_a_text_does_not_matter(decoder: TextDecoder) -> None:
    tokens, seen = torch.randint(V, (4, 8)), states()
    changed, later = seen.clone(), tokens.clone()
    for row, length in enumerate(LENGTHS.tolist()):
        changed[row, length:] += 3
    later[:, 5:] = (tokens[:, 5:] + 1) % V
    a = decoder(tokens, decoder.memory(seen, LENGTHS))
    b = decoder(later, decoder.memory(changed, LENGTHS))
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=1e-5, atol=1e-5)
    assert (a[:, 5:] - b[:, 5:]).abs().amax() > 0.1


def test_units_that_have_begun_are_counted() -> None:
    """The mean over all alignments, each told unit by unit."""
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(5))
    odds, expected = logits.softmax(-1)[0], torch.zeros(4)
    for alignment in itertools.product(range(3), repeat=4):
        likely = math.prod(float(odds[place, unit]) for place, unit in enumerate(alignment))
        count = 0
        for place, unit in enumerate(alignment):
            count += unit != 1 and (not place or alignment[place - 1] != unit)
            expected[place] += likely * count
    torch.testing.assert_close(begun(logits, blank=1)[0], expected, rtol=1e-4, atol=1e-4)


# -- whole texts ----------------------------------------------------------------------------------------------------


def memory(decoder: TextDecoder, rows: slice = slice(None), capacity: int = 8) -> Memory:
    return decoder.memory(states()[rows], LENGTHS[rows], capacity)


@torch.no_grad()
def log_probs(decoder: TextDecoder, row: int, text: tuple[int, ...]) -> Tensor:
    """Without any cache: of each token of a text, and of the end, after those before."""
    tokens = torch.tensor([[END, *text]])
    hidden = decoder(tokens, decoder.memory(states()[row:row + 1], LENGTHS[row:row + 1]))
    table = decoder.logits(hidden)[0].log_softmax(-1)
    return table.gather(1, torch.tensor([*text, END])[:, None])[:, 0]


def same(a: Written, b: Written) -> bool:
    return a.tokens == b.tokens and a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


@pytest.mark.parametrize("row", range(4))
def test_a_wide_beam_finds_the_likeliest_of_all_texts(decoder: TextDecoder, row: int) -> None:
    """Of up to three units: 1 + 4 + 16 + 64, of which the longest are cut short and so have no end."""
    def likelihood(text: tuple[int, ...]) -> float:
        return float(log_probs(decoder, row, text)[:3].sum())

    every = [text for length in range(4) for text in itertools.product(range(V - 1), repeat=length)]
    best = max(every, key=likelihood)
    found, = beam_search(decoder, memory(decoder, slice(row, row + 1)), torch.tensor([3]), ends=END, width=85)
    assert tuple(found.tokens) == best and found.log_prob == pytest.approx(likelihood(best), abs=1e-4)


def test_the_likeliest_text_is_not_always_that_of_the_likeliest_tokens(decoder: TextDecoder) -> None:
    """So that the test above tells beam search from greedy search."""
    limits = torch.full((4,), 3)
    one = greedy(decoder, memory(decoder), limits, ends=END)
    many = beam_search(decoder, memory(decoder), limits, ends=END, width=85)
    assert any(a.tokens != b.tokens for a, b in zip(one, many))
    assert all(a.log_prob <= b.log_prob + 1e-5 for a, b in zip(one, many))


def test_a_beam_of_one_is_greedy(decoder: TextDecoder) -> None:
    limits = torch.tensor([8, 3, 5, 8])
    one = greedy(decoder, memory(decoder), limits, ends=END)
    beam = beam_search(decoder, memory(decoder), limits, ends=END, width=1)
    assert all(map(same, one, beam)) and len({len(each.tokens) for each in one}) > 1


def test_greedy_is_what_is_likeliest_without_a_cache(decoder: TextDecoder) -> None:
    for row, found in enumerate(greedy(decoder, memory(decoder), torch.full((4,), 8), ends=END)):
        text = tuple(found.tokens)
        costs = log_probs(decoder, row, text)[:8]
        assert found.log_probs == pytest.approx(costs.tolist(), abs=1e-4) and len(text) <= 8
        for place in range(len(costs)):
            others = [float(log_probs(decoder, row, (*text[:place], unit))[place]) for unit in range(V - 1)]
            assert float(costs[place]) >= max(others) - 1e-5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [2, 4])
def test_a_narrow_beam_keeps_what_it_should(decoder: TextDecoder, seed: int, width: int) -> None:
    """Against the same search text by text, without tensors and caches."""
    torch.manual_seed(seed)
    for weight in decoder.parameters():
        nn.init.normal_(weight, std=0.5)
    found = beam_search(decoder, memory(decoder), torch.full((4,), 6), ends=END, width=width)
    for row in range(4):
        beams = [((), 0.0, False)]
        for _ in range(6):
            grown = [each for each in beams if each[2]]
            for text, cost, _ in (each for each in beams if not each[2]):
                grown += [((*text, unit), cost + float(log_probs(decoder, row, (*text, unit))[len(text)]), False)
                          for unit in range(V - 1)]
                grown.append((text, cost + float(log_probs(decoder, row, text)[-1]), True))
            beams = sorted(grown, key=lambda each: -each[1])[:width]
        assert tuple(found[row].tokens) == beams[0][0] and found[row].log_prob == pytest.approx(beams[0][1], abs=1e-4)


@pytest.mark.parametrize("width", [0, 3])
def test_the_other_lines_of_a_batch_do_not_matter(decoder: TextDecoder, width: int) -> None:
    def read(rows: slice) -> list[Written]:
        limits = torch.tensor([8, 3, 5, 8])[rows]
        if width:
            return beam_search(decoder, memory(decoder, rows), limits, ends=END, width=width)
        return greedy(decoder, memory(decoder, rows), limits, ends=END)

    together = read(slice(None))
    assert all(same(together[row], read(slice(row, row + 1))[0]) for row in range(4))


def test_a_text_of_no_length_is_empty(decoder: TextDecoder) -> None:
    none = torch.zeros(4, dtype=torch.long)
    for found in (greedy(decoder, memory(decoder), none, ends=END),
                  beam_search(decoder, memory(decoder), none, ends=END, width=2)):
        assert [each.tokens for each in found] == [[]] * 4 and all(each.log_prob == 0 for each in found)


# -- both together --------------------------------------------------------------------------------------------------


@pytest.fixture
def reader() -> Reader:
    encoder = LineEncoder(image_height=32, stem_width=4, d_model=16, num_heads=2, num_layers=1, d_ff=32)
    made = weighted(Reader(encoder, TextDecoder(V, d_model=16, num_heads=2, num_layers=1, d_ff=32), END))
    assert isinstance(made, Reader)
    return made


@pytest.mark.parametrize("row", range(3))
@torch.no_grad()
def test_the_likeliest_text_is_that_of_decoder_and_ctc(reader: Reader, row: int) -> None:
    """Of all texts for which three states have room: the decoder's part without any cache, CTC's from torch's loss."""
    seen = reader(pixels(3, 1, 32, 12), torch.tensor([12, 9, 11]))
    alone = Seen(*(part[row:row + 1] for part in seen))
    texts = [text for length in range(4) for text in itertools.product(range(V - 1), repeat=length)]
    odds = {text: math.exp(-float(nn.functional.ctc_loss(
        alone.logits[0].log_softmax(-1), torch.tensor(text, dtype=torch.long), alone.lengths[0],
        torch.tensor(len(text)), END, reduction="sum"))) for text in texts}

    def following(text: tuple[int, ...]) -> Tensor:
        """(V,), of the unit that comes next."""
        hidden = reader.decoder(torch.tensor([[END, *text]]), reader.memory(alone))
        aligned = [sum(odds[each] for each in texts if each[:len(text) + 1] == (*text, unit)) for unit in range(V)]
        aligned[END] = odds[text]
        return (reader.decoder.logits(hidden)[0, -1].softmax(-1) * torch.tensor(aligned)).sqrt().log()

    def likelihood(text: tuple[int, ...]) -> float:
        return sum(float(following(text[:place]).log_softmax(-1)[unit]) for place, unit in enumerate((*text, END)))

    every = {text: likelihood(text) for text in texts if odds[text]}
    best, limits = max(every, key=lambda text: every[text]), torch.full((3,), 4)
    found = beam_search(reader, reader.memory(seen, 4), limits, ends=END, width=85)[row]
    assert tuple(found.tokens) == best and found.log_prob == pytest.approx(every[best], abs=1e-4)
    for each in (greedy(reader, reader.memory(seen, 4), limits, ends=END)[row],
                 beam_search(reader, reader.memory(seen, 4), limits, ends=END, width=3)[row]):
        assert each.log_prob == pytest.approx(every[tuple(each.tokens)], abs=1e-4)


@torch.no_grad()
def test_a_head_that_was_not_trained_has_no_say(reader: Reader) -> None:
    seen, limits = reader(pixels(3, 1, 32, 12), torch.tensor([12, 9, 11])), torch.full((3,), 4)
    both = greedy(reader, reader.memory(seen, 4), limits, ends=END)
    reader.joint = False
    alone = greedy(reader, reader.memory(seen, 4), limits, ends=END)
    assert alone == greedy(reader.decoder, reader.memory(seen, 4), limits, ends=END) != both


@torch.no_grad()
def test_what_the_head_counts_reaches_the_decoder(reader: Reader) -> None:
    """And to whole units it is not rounded, in whatever precision the rest is."""
    seen = reader(pixels(3, 1, 32, 12), torch.tensor([12, 9, 11]))
    other = seen._replace(logits=10 * seen.logits.flip(2))
    tokens = torch.tensor([[END, 1, 2]] * 3)
    a, b = (reader.decoder(tokens, reader.memory(each)) for each in (seen, other))
    assert (a - b).abs().max() > 0.01
    long = 5 * torch.randn(1, 700, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = begun(long, blank=3)
    assert found.dtype == torch.float32 and found[0, -1] > 200
    torch.testing.assert_close(found, begun(long, blank=3))


@torch.no_grad()
def test_a_beam_of_more_texts_than_a_line_has_room_for(reader: Reader) -> None:
    """Beside a line that has room for them."""
    widths, limits = torch.tensor([4, 24]), torch.tensor([1, 6])
    seen = reader(pixels(2, 1, 32, 24), widths)
    together = beam_search(reader, reader.memory(seen, 6), limits + 1, ends=END, width=40)
    alone = reader(pixels(2, 1, 32, 24)[:1, :, :, :4], widths[:1])
    assert same(together[0], beam_search(reader, reader.memory(alone, 6), limits[:1] + 1, ends=END, width=40)[0])
    assert all(math.isfinite(each.log_prob) for each in together)
