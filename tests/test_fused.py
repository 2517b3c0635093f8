"""Fused kernels: liger-kernel's, run in triton's interpreter and compiled for an H100 without one."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from src.errors import ConfigError
from src.model import fused_ops, loading
from src.model.fused import set_fused_
from src.model.logprobs import sequence_logps
from src.model.numerics import NumericsConfig
from src.model.packing import pack
from src.planning.content import ContentPath
from src.planning.identity import ModelInputs
from src.planning.resources import Resources
from tests.support.small_models import make_model, random_pairs

pytest.importorskip("liger_kernel", reason="needs the extra [fused]")
import triton
from liger_kernel.ops import fused_add_rms_norm, rms_norm, rope, swiglu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite")


@cache
def interpreted():
    command = [sys.executable, "-m", "tests.support.triton_interpreter", *FAMILIES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_kernels_have_the_error_of_plain_autocast(family):
    """Log-probs and gradients of a bf16 model against float64."""
    of = interpreted()[family]
    assert len(of["swapped"]) == (3 if family == "granite" else 4), "norms, MLPs, attention and layers"
    for number, what in enumerate(("log-probs", "gradients")):
        assert of["fused"][number] < 1.2 * of["autocast"][number], what
        assert 1e-9 < of["fused fp32"][number] < 1e-5, f"{what}: in float32 they compute the same"


@pytest.mark.slow
def test_fake_tensors_go_through_the_operators_with_the_dtypes_shapes_and_strides_of_real_ones():
    operators = interpreted()["operators"]
    assert len(operators) == 6
    for name, (real, fake) in operators.items():
        assert real == fake, name
    assert operators["rms_norm"][0][0][0] == "torch.bfloat16", "of a float32 residual stream"


@pytest.mark.slow
def test_activation_checkpointing_and_compilation_change_no_bit_of_fused_kernels():
    assert interpreted()["equal"] == [True, True]


BF16, F32, INT = "*bf16", "*fp32", "i32"
# Kernel, types of its arguments as src/model/fused_ops.py passes them (others are int32), and constants.
LAUNCHED = {
    "norm": (
        rms_norm._rms_norm_forward_kernel,
        {"Y_ptr": BF16, "X_ptr": F32, "W_ptr": BF16, "RSTD_ptr": F32, "eps": "fp32", "offset": "fp32"},
        {"casting_mode": 1, "elementwise_affine": True, "BLOCK_SIZE": 4096},
    ),
    "norm of a sum": (
        fused_add_rms_norm._fused_add_rms_norm_forward_kernel,
        {"Y_ptr": BF16, "S_ptr": F32, "X_ptr": BF16, "R_ptr": F32, "W_ptr": BF16, "RSTD_ptr": F32}
        | {"eps": "fp32", "offset": "fp32"},
        {"casting_mode": 1, "BLOCK_SIZE": 4096},
    ),
    "norm backward": (
        fused_add_rms_norm._fused_add_rms_norm_backward_kernel,
        {"dY_ptr": BF16, "dS_out_ptr": F32, "dX_ptr": F32, "X_ptr": F32, "W_ptr": BF16, "RSTD_ptr": F32}
        | {"dW_ptr": F32, "offset": "fp32"},
        {
            "X_dtype": triton.language.float32,
            "rows_per_program": 16,
            "casting_mode": 1,
            "BLOCK_SIZE": 4096,
            "has_dS_out": True,
            "COMPUTE_DW": True,
        },
    ),
    "rotary": (
        rope._triton_rope,
        {"q_ptr": BF16, "k_ptr": BF16, "cos": F32, "sin": F32},
        {"bs": 1, "cos_bs": 1, "n_qh": 24, "n_kh": 8, "hd": 128, "pad_n_qh": 32, "pad_n_kh": 8, "pad_hd": 128}
        | {"pad_rd": 128, "rd": 128, "BLOCK_SIZE": 32, "BACKWARD_PASS": False},
    ),
    "swiglu": (
        swiglu._swiglu_forward_kernel,
        {"a_ptr": BF16, "b_ptr": BF16, "c_ptr": BF16, "gate_multiplier": "fp32"},
        {"n_cols": 8192, "BLOCK_SIZE": 8192},
    ),
    "swiglu backward": (
        swiglu._swiglu_backward_kernel,
        {"dc_ptr": BF16, "a_ptr": BF16, "b_ptr": BF16, "gate_multiplier": "fp32"},
        {"n_cols": 8192, "BLOCK_SIZE": 8192},
    ),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_kernels_compile_for_an_h100_with_the_dtypes_they_are_given(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants = LAUNCHED[name]
    signature = {n: "constexpr" if n in constants else types.get(n, INT) for n in kernel.arg_names}
    assert types.keys() | constants.keys() <= set(kernel.arg_names)
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and ".target sm_90" in compiled.asm["ptx"]


def test_only_the_model_given_is_changed_and_it_can_be_changed_back():
    model, other = make_model(), make_model()
    before = [type(m) for m in model.modules()]
    names = set(model.state_dict())
    set_fused_(model, True)
    changed = {type(m).__name__ for m, cls in zip(model.modules(), before, strict=True) if type(m) is not cls}
    assert changed == {f"FusedLlama{kind}" for kind in ("RMSNorm", "MLP", "Attention", "DecoderLayer")}
    assert set(model.state_dict()) == names and [type(m) for m in other.modules()] == before
    batch = pack(random_pairs(3, 0), range(3))
    expected, _ = sequence_logps(other, batch)
    logps, _ = sequence_logps(model, batch, NumericsConfig())  # whose kernels are not fused
    assert torch.equal(logps, expected) and [type(m) for m in model.modules()] == before


def test_other_activations_and_architectures_keep_their_modules():
    model = make_model(hidden_act="gelu")
    set_fused_(model, True)
    assert not any("MLP" in type(m).__name__ and "Fused" in type(m).__name__ for m in model.modules())


def numerics(monkeypatch, device, **engine):
    monkeypatch.setattr(loading, "device_of", lambda name: torch.device(device))
    monkeypatch.setattr(loading.attention, "resolve_backend", lambda *_: ("sdpa", "in a test"))
    loading._numerics.cache_clear()
    inputs = ModelInputs(ContentPath("m", "0"), "plain", "bf16")
    return loading.numerics_of(inputs, Resources(**engine)).fused


def test_auto_fuses_on_cuda_where_liger_kernel_is_installed_and_nothing_is_compiled(monkeypatch):
    assert numerics(monkeypatch, "cuda") and not numerics(monkeypatch, "cpu")
    assert not numerics(monkeypatch, "cuda", compile=True) and numerics(monkeypatch, "cuda", compile=True, fused=True)
    assert not numerics(monkeypatch, "cuda", fused=False)
    with pytest.raises(ConfigError, match=r"engine\.fused=true: CUDA only, device is cpu; use engine.fused=auto"):
        numerics(monkeypatch, "cpu", fused=True)
    monkeypatch.setattr(fused_ops.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else name)
    assert not numerics(monkeypatch, "cuda")
    with pytest.raises(ConfigError, match="package liger-kernel is not installed"):
        numerics(monkeypatch, "cuda", fused=True)
    loading._numerics.cache_clear()


def test_a_release_of_liger_with_other_kernels_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(rms_norm._rms_norm_forward_kernel, "arg_names", ["Y_ptr"], raising=False)
    assert "other kernels than 0.8" in fused_ops.why_not_fused(torch.device("cuda"))
