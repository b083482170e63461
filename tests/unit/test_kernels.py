"""A profile's kernels fall into the kinds that they are of, and the shares of a step's time add up."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from beats_ray.bench.kernels import FILTERBANK, OPTIMIZER, Kind, Span, covered_us, kind_of, shares, top_kernels
from beats_ray.bench.profile import device_spans, host_spans, profile_step
from beats_ray.config import BenchConfig
from beats_ray.models.spectral import POSITION_CONVOLUTION, SPECTRAL_CLIPS

pytestmark = pytest.mark.unit

NAMES: dict[str, Kind] = {
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>"
    ", false, false>(pytorch_flash::Flash_fwd_params)": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k64_seqaligned_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<cutlass>)"
    "": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "triton_tem_fused_flex_attention_backward_1": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::bmm": "attention",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT": "GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_"
    "cublas": "GEMM",
    "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nt": "GEMM",
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x3_tn_align4>(Params)": "GEMM",
    "void gemmSN_TN_kernel<float, 128, 16, 2, 4, 4, 4, true, cublasGemvTensorStridedBatched<float>>": "GEMM",
    "aten::addmm": "GEMM",
    "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_64x64_64x4_nhwc_align8>": (
        "convolution"
    ),
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>": "convolution",
    "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<1>": "convolution",
    "aten::mkldnn_convolution": "convolution",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
    "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>": "copies",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<OpaqueType<2u>>": "copies",
    "aten::copy_": "copies",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
    "FusedAdamMathFunctor<float, 4, (ADAM_MODE)1, false>>": "optimizer",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<__nv_bfloat16, float>": "other",
    "triton_poi_fused_add_gelu_native_layer_norm_3": "other",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(TensorIteratorBase&)>": "other",
    "void at::native::convert_indices_from_coo_to_csr_cuda_kernel<int>": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_known_by_its_name(name: str) -> None:
    assert kind_of(name) == NAMES[name]


def test_what_ran_under_an_annotation_counts_for_it() -> None:
    fft = "void regular_fft<512u, EPT<8u>, 64u, 4u, (padding_t)0, (twiddle_t)0, (loadstore_modifier_t)2, float>"
    assert kind_of(fft) == "other"
    assert kind_of(fft, ("ProfilerStep#1", FILTERBANK)) == "filterbank"
    assert kind_of("nvjet_hsh_128x256", (FILTERBANK,)) == "filterbank"
    assert kind_of("Memcpy DtoD (Device -> Device)", (OPTIMIZER,)) == "optimizer"


def test_shares_and_gaps_are_the_whole_step() -> None:
    spans = [
        Span("nvjet_hsh", 100.0, 140.0, 40.0),
        Span("Memcpy HtoD (Pinned -> Device)", 120.0, 140.0, 20.0),  # beside it, on another stream
        Span("triton_tem_fused_flex_attention_0", 160.0, 180.0, 20.0),
        Span("layer_norm", 190.0, 200.0, 10.0),
    ]
    assert covered_us(spans) == 70.0
    found = shares(spans)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["gaps"] == pytest.approx(0.3)
    assert found["GEMM"] == pytest.approx(0.7 * 40 / 90)
    assert found["attention"] == found["copies"] == pytest.approx(0.7 * 20 / 90)


def test_the_top_kernels_add_their_calls_up_and_keep_kinds_apart() -> None:
    spans = [
        Span("copy_kernel", 0.0, 10.0, 10.0),
        Span("nvjet_hsh", 10.0, 40.0, 30.0),
        Span("copy_kernel", 40.0, 60.0, 20.0, (OPTIMIZER,)),
        Span("nvjet_hsh", 60.0, 100.0, 40.0),
    ]
    top = top_kernels(spans, count=2)
    assert [(one.name, one.kind, one.calls, one.share) for one in top] == [
        ("nvjet_hsh", "GEMM", 2, pytest.approx(0.7)),
        ("copy_kernel", "optimizer", 1, pytest.approx(0.2)),
    ]


def event(name: str, start: float, end: float, **others: Any) -> SimpleNamespace:
    """As `torch.profiler` gives them."""
    given = {"device_type": DeviceType.CUDA, "is_user_annotation": False} | others
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), **given)


def test_device_kernels_are_under_the_annotations_drawn_over_them() -> None:
    spans = device_spans(
        [
            event("aten::mm", 0.0, 5.0, device_type=DeviceType.CPU),
            event(FILTERBANK, 10.0, 30.0, is_user_annotation=True),
            event("regular_fft", 10.0, 20.0),
            event("log_kernel", 25.0, 30.0),
            event("nvjet_hsh", 31.0, 40.0),
        ]
    )
    assert [(one.name, one.under, one.busy_us) for one in spans] == [
        ("regular_fft", (FILTERBANK,), 10.0),
        ("log_kernel", (FILTERBANK,), 5.0),
        ("nvjet_hsh", (), 9.0),
    ]


def test_host_operators_count_their_own_time_under_whoever_called_them() -> None:
    annotation = event(OPTIMIZER, 0.0, 50.0, is_user_annotation=True, cpu_parent=None)
    outer = event("aten::clone", 5.0, 30.0, cpu_parent=annotation, self_cpu_time_total=5.0)
    inner = event("aten::copy_", 10.0, 30.0, cpu_parent=outer, self_cpu_time_total=20.0)
    assert [(one.name, one.under, one.busy_us) for one in host_spans([annotation, outer, inner])] == [
        ("aten::clone", (OPTIMIZER,), 5.0),
        ("aten::copy_", (OPTIMIZER,), 20.0),
    ]


def test_what_runs_under_an_annotation_is_what_that_says() -> None:
    for annotation, kind in {
        FILTERBANK: "filterbank",
        OPTIMIZER: "optimizer",
        POSITION_CONVOLUTION: "convolution",
    }.items():
        assert kind_of("aten::bmm", ("somebody's own", annotation)) == kind
    assert kind_of("aten::bmm", ("somebody's own",)) == "attention"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clips", [1, SPECTRAL_CLIPS], ids=["convolution by taps", "by its spectrum"])
def test_a_real_step_has_every_kind_of_kernel(clips: int) -> None:
    config = BenchConfig(name="profile", preset="tiny", clips=clips, seconds=1.0, repetitions=2, warmup=1, threads=1)
    profile = profile_step(config)
    assert sum(profile.shares.values()) == pytest.approx(1.0)
    assert all(profile.shares[kind] > 0.0 for kind in ("attention", "GEMM", "convolution", "filterbank", "optimizer"))
    assert len(profile.kernels) == 10
    assert profile.kernels == sorted(profile.kernels, key=lambda kernel: -kernel.share)
