"""The models on a CUDA device give what they give on the CPU; half precision stays finite. Run by `make test-gpu`."""

import pytest
import torch

from beats_ray.models import BeatsEncoder, build_encoder, compute_fbank, encoder_config, num_patches, sample_patch_mask
from beats_ray.models.released import load_released, save_released
from beats_ray.models.spectral import SPECTRAL_CLIPS
from beats_ray.models.transformer import PositionConv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def waves(clips: int = 3, samples: int = 80_000) -> tuple[torch.Tensor, torch.Tensor]:
    wave = 0.1 * torch.randn(clips, samples)
    lengths = torch.tensor([samples, samples // 2, 2800][:clips])
    for row, length in zip(wave, lengths.tolist(), strict=True):
        row[length:] = 0.0
    return wave, lengths


def test_the_filterbank_is_the_cpus() -> None:
    wave, lengths = waves()
    on_cpu, frames = compute_fbank(wave, lengths)
    on_gpu, frames_gpu = compute_fbank(wave.cuda(), lengths.cuda())
    assert torch.equal(frames, frames_gpu.cpu())
    assert (on_cpu - on_gpu.cpu()).abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "flex"])
@pytest.mark.parametrize("masked", [False, True])
def test_features_are_the_cpus(backend: str, masked: bool) -> None:
    encoder = build_encoder("small").eval()
    encoder.use(attention_backend=backend)  # type: ignore[arg-type]
    wave, lengths = waves()
    visible = None
    if masked:
        is_pad = torch.arange(num_patches(wave.shape[1])) >= num_patches(lengths)[:, None]
        visible = sample_patch_mask(is_pad, 0.5, torch.Generator().manual_seed(0)).visible_BM
    with torch.no_grad():
        on_cpu = encoder.features_from_waveform(wave, lengths, visible_BM=visible)
        encoder.cuda()
        on_gpu = encoder.features_from_waveform(
            wave.cuda(), lengths.cuda(), visible_BM=None if visible is None else visible.cuda()
        )
    assert torch.equal(on_cpu.is_pad_BN, on_gpu.is_pad_BN.cpu())
    assert (on_cpu.features_BND - on_gpu.features_BND.cpu()).abs().max() < 1e-3


def test_padding_that_is_left_out_of_the_layers_changes_neither_features_nor_gradients() -> None:
    wave, lengths = waves()
    results = []
    for num_real in (None, int(num_patches(lengths).sum())):
        torch.manual_seed(0)
        encoder = build_encoder("small").cuda().train()
        rows = []
        encoder.encoder.layers[0].fc1.register_forward_hook(lambda _self, inputs, _out, rows=rows: rows.append(inputs))
        features = encoder.features_from_waveform(wave.cuda(), lengths.cuda(), num_real=num_real).features_BND
        (features * torch.linspace(-1, 1, features.shape[-1], device="cuda")).sum().backward()
        assert rows[0][0].dim() == (3 if num_real is None else 2)
        results.append([features] + [one.grad for one in encoder.parameters() if one.grad is not None])
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-3 * float(padded.abs().max()) + 1e-5, rtol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_has_the_gradients_of_the_plain_formula(masked: bool) -> None:
    wave, lengths = waves()
    visible = torch.arange(0, 240, 4).expand(3, -1).cuda() if masked else None
    gradients = {}
    for backend in ("matmul", "flex"):
        torch.manual_seed(0)
        encoder = build_encoder("small").cuda().train()
        encoder.use(attention_backend=backend)  # type: ignore[arg-type]
        features = encoder.features_from_waveform(wave.cuda(), lengths.cuda(), visible_BM=visible).features_BND
        (features * torch.linspace(-1, 1, features.shape[-1], device="cuda")).sum().backward()
        gradients[backend] = [one.grad for one in encoder.parameters() if one.grad is not None]
    for mine, plain in zip(gradients["flex"], gradients["matmul"], strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-3 * float(plain.abs().max()) + 1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loudness", [0.0, 1e-6, 0.1, 1.0, 1e6])
def test_autocast_outputs_and_gradients_are_finite(dtype: torch.dtype, loudness: float) -> None:
    encoder = build_encoder("small").cuda().train()
    wave, lengths = waves()
    with torch.autocast("cuda", dtype):
        features = encoder.features_from_waveform((wave * loudness).cuda(), lengths.cuda()).features_BND
        loss = features.float().square().mean()
    loss.backward()
    assert torch.isfinite(features).all()
    assert all(torch.isfinite(one.grad).all() for one in encoder.parameters() if one.grad is not None)


def test_training_on_the_gpu_keeps_nothing_of_the_size_of_the_attention_weights() -> None:
    encoder = build_encoder("small").cuda().train()
    wave = 0.1 * torch.randn(8, 160_000, device="cuda")
    peaks = {}
    for recompute in (True, False):
        encoder.encoder.recompute = recompute
        encoder.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        encoder.features_from_waveform(wave).features_BND.square().mean().backward()
        peaks[recompute] = torch.cuda.max_memory_allocated()
    assert peaks[True] < peaks[False]


def test_a_model_written_from_the_gpu_loads_on_the_cpu(tmp_path) -> None:  # type: ignore[no-untyped-def]
    encoder = BeatsEncoder(encoder_config("tiny")).cuda()
    loaded = load_released(save_released(encoder, tmp_path / "model.pt"))
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_position_convolution_by_its_spectrum_is_the_cpus_tap_by_tap(autocast: bool) -> None:
    """Output and gradients, from as many clips on as it goes by its spectrum; in fp32 under autocast too."""
    inputs = torch.randn(SPECTRAL_CLIPS, 496, 768)
    results = []
    for device, spectral_clips in (("cpu", SPECTRAL_CLIPS + 1), ("cuda", SPECTRAL_CLIPS)):
        torch.manual_seed(0)
        convolution = PositionConv(768, 128, 16).to(device)
        convolution.spectral_clips = spectral_clips
        x_BND = inputs.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast and device == "cuda"):
            out_BND = convolution(x_BND)
        out_BND.float().square().sum().backward()
        results.append([out_BND, x_BND.grad, *(one.grad for one in convolution.parameters())])
    for mine, plain in zip(results[1], results[0], strict=True):
        assert mine is not None
        assert plain is not None
        torch.testing.assert_close(mine.float().cpu(), plain, atol=2e-3 * float(plain.abs().max()), rtol=2e-3)
