"""The speech encoder: padding, rates, positions, the 12.5 Hz features, windows of long recordings."""

import math

import pytest
import torch
from torch import Tensor

from stoker.model.mel import HOP_LENGTH
from stoker.model.speech_encoder import NEAR, ConformerBlock, Recognizer, SpeechEncoder
from stoker.model.transformer import valid_places

LENGTHS = torch.tensor([61, 1, 40, 9])


def encoder(downsample_time: int = 4, num_layers: int = 2, block: str = "convolution") -> SpeechEncoder:
    torch.manual_seed(0)
    made = SpeechEncoder(num_mels=20, d_model=32, num_heads=4, num_layers=num_layers, d_ff=64,
                         downsample_time=downsample_time, block=block).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # so that every part makes a difference
    return made


def batch() -> Tensor:
    mel = torch.randn(len(LENGTHS), 61, 20, generator=torch.Generator().manual_seed(1))
    return mel * valid_places(LENGTHS, 61)[..., None]


@pytest.mark.parametrize("downsample_time, block", [(2, "convolution"), (4, "conformer"), (8, "convolution"),
                                                    (4, "transformer")])
@torch.no_grad()
def test_padding_never_changes_what_counts(downsample_time: int, block: str) -> None:
    model, mel = encoder(downsample_time, block=block), batch()
    for states in (model.forward, model.features):
        together, lengths = states(mel, LENGTHS)
        for row, frames in enumerate(LENGTHS.tolist()):
            alone, (length,) = states(mel[row:row + 1, :frames], LENGTHS[row:row + 1])
            assert length == lengths[row] == alone.shape[1]
            assert torch.allclose(together[row, :length], alone[0], atol=1e-5), (downsample_time, frames)
            assert not together[row, length:].any()


@pytest.mark.parametrize("downsample_time, rate", [(2, 50), (4, 25), (8, 12.5)])
@torch.no_grad()
def test_the_rates(downsample_time: int, rate: float) -> None:
    model = encoder(downsample_time)
    mel, frames = torch.randn(1, 1000, 20), torch.tensor([1000])  # 10 s
    assert model(mel, frames)[0].shape == (1, 10 * rate, 32)
    features, lengths = model.features(mel, frames)
    assert features.shape == (1, 125, 32) and lengths.tolist() == [125]
    states, _ = model(mel, frames)
    assert torch.allclose(features[0, 3], states[0].reshape(125, -1, 32)[3].mean(0), atol=1e-6)
    assert Recognizer(5, model, 20).rate == rate and Recognizer(5, model, 20, 4).rate == 4 * rate
    logits, lengths = Recognizer(5, model, 20, 4)(mel, frames)
    assert logits.shape == (1, 40 * rate, 5) and lengths.tolist() == [40 * rate]


@torch.no_grad()
def test_a_feature_at_the_end_is_the_mean_of_what_is_there() -> None:
    model = encoder(2)
    states, lengths = model(torch.ones(1, 11, 20), torch.tensor([11]))  # 6 states: 4 and 2
    features, counted = model.features(torch.ones(1, 11, 20), torch.tensor([11]))
    assert lengths.tolist() == [6] and counted.tolist() == [2]
    assert torch.allclose(features[0, 1], states[0, 4:].mean(0), atol=1e-6)


@torch.no_grad()
def test_the_order_of_what_is_heard_matters() -> None:
    model, mel, frames = encoder(), torch.randn(1, 40, 20), torch.tensor([40])
    assert not torch.allclose(model(mel, frames)[0], model(mel.flip(1), frames)[0].flip(1), atol=1e-2)


@pytest.mark.parametrize("num_layers", [0, 1])
@torch.no_grad()
def test_it_forgets_in_training_alone(num_layers: int) -> None:
    """What comes out of the front end too."""
    model = SpeechEncoder(num_mels=20, d_model=32, num_heads=4, num_layers=num_layers, d_ff=64, downsample_time=4,
                          dropout=0.5)
    a, b, c, d = (model.train(training)(batch(), LENGTHS)[0] for training in (True, True, False, False))
    assert not torch.equal(a, b) and torch.equal(c, d)


@torch.no_grad()
def test_a_conformer_block_is_that_of_torchaudio() -> None:
    """But for what differs on purpose: GELU, no norm after the block, LayerNorm for batch norm, rotary places."""
    from torchaudio.models.conformer import ConformerLayer

    torch.manual_seed(0)
    ours, theirs = ConformerBlock(32, 4, 2 * 48, 0.0).eval(), ConformerLayer(32, 48, 4, NEAR).eval()
    x, lengths = torch.randn(2, 30, 32), torch.tensor([30, 17])
    valid = valid_places(lengths, 30)
    ours.convolution.norm = theirs.final_layer_norm = torch.nn.Identity()
    theirs.conv_module.sequential[3] = torch.nn.Identity()
    into, _, depthwise, _, _, out, _ = theirs.conv_module.sequential
    pairs = [(theirs.conv_module.layer_norm, ours.norm2), (depthwise, ours.convolution.depthwise),
             (theirs.self_attn_layer_norm, ours.norm1), (theirs.self_attn.out_proj, ours.attention.out)]
    for half, mlp, layer_norm in ((theirs.ffn1, ours.first_mlp, ours.norm0), (theirs.ffn2, ours.mlp, ours.norm3)):
        pairs += [(half.sequential[0], layer_norm), (half.sequential[1], mlp.up), (half.sequential[4], mlp.down)]
        half.sequential[2] = torch.nn.GELU()  # for SiLU
    for source, target in pairs:
        for weight in source.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        target.load_state_dict(source.state_dict())
    for conv, linear in ((into, ours.convolution.into), (out, ours.convolution.out)):
        linear.weight.copy_(conv.weight[..., 0])
        linear.bias.copy_(conv.bias)
    ours.attention.qkv.weight.copy_(theirs.self_attn.in_proj_weight)
    ours.attention.qkv.bias.copy_(theirs.self_attn.in_proj_bias)
    found = ours(x, valid, torch.zeros(30, 4))
    for row, length in enumerate(lengths.tolist()):
        expected = theirs(x[row, :length, None], None)[:, 0]
        assert torch.allclose(found[row, :length], expected, atol=1e-5)


# -- long recordings ------------------------------------------------------------------------------------------------


def recognizer(head_frames: int) -> Recognizer:
    """Without a transformer, what is heard at a place depends on what is near it."""
    model = Recognizer(5, encoder(num_layers=0), 20, head_frames).eval()
    model.mel.forward = lambda waveforms, lengths: (  # type: ignore[method-assign]  # no level of the whole utterance
        model.mel.log_powers(waveforms, lengths), lengths // HOP_LENGTH)
    return model


@pytest.mark.parametrize("samples", [0, 100, 160, 16000, 80001, 123456])
@pytest.mark.parametrize("head_frames", [1, 2])
def test_windows_of_a_long_recording_are_joined_without_a_seam(samples: int, head_frames: int) -> None:
    model, waveform = recognizer(head_frames), torch.randn(samples, generator=torch.Generator().manual_seed(2))
    whole = model.log_probs(waveform, window_seconds=1000, overlap_seconds=1)
    assert whole.shape == (head_frames * math.ceil(samples // 160 / 4), 5)
    for window, overlap in ((1.0, 0.4), (2.0, 1.0), (0.77, 0.3)):
        joined = model.log_probs(waveform, window_seconds=window, overlap_seconds=overlap)
        assert joined.shape == whole.shape and torch.allclose(joined, whole, atol=1e-4)


def test_windows_that_overlap_almost_whole_come_to_an_end() -> None:
    model, waveform = recognizer(1), torch.randn(32000, generator=torch.Generator().manual_seed(2))
    whole, read, count = model.log_probs(waveform, window_seconds=1000, overlap_seconds=1), model.mel.forward, [0]

    def counted(*given: Tensor) -> tuple[Tensor, Tensor]:
        count[0] += 1
        assert count[0] <= 50, "a window begins where the last one began"
        return read(*given)

    model.mel.forward = counted  # type: ignore[method-assign]
    assert torch.allclose(model.log_probs(waveform, window_seconds=1.04, overlap_seconds=1.03), whole, atol=1e-4)


def test_without_an_overlap_there_are_seams() -> None:
    """That the test above can fail."""
    model, waveform = recognizer(1), torch.randn(80000, generator=torch.Generator().manual_seed(2))
    whole = model.log_probs(waveform, window_seconds=1000, overlap_seconds=0)
    assert not torch.allclose(model.log_probs(waveform, window_seconds=1, overlap_seconds=0), whole, atol=1e-4)


def test_a_short_recording_is_one_window() -> None:
    model, waveform = Recognizer(5, encoder(), 20).eval(), torch.randn(16000)
    with torch.no_grad():
        logits, _ = model(*model.mel(waveform[None], torch.tensor([16000])))
    heard = model.log_probs(waveform, window_seconds=1, overlap_seconds=0.5)
    assert torch.equal(heard, logits[0].log_softmax(-1)) and torch.allclose(heard.exp().sum(-1), torch.ones(25))
