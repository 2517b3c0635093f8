"""The kernels over packed segments are one another's equals, and what cannot be had is said before anything runs."""

import re
import subprocess
import sys

import pytest
import torch

from src.errors import ConfigError
from src.model import attention
from src.model.cpu import kernels
from src.model.packing import Layout, Segment
from tests.support.commands import ROOT

CPU = torch.device("cpu")
# Pairs: short ones, long ones (several blocks of queries and tiles of keys each), short responses to a long prompt.
LAYOUT = Layout.of(
    [
        Segment(0, 9),
        Segment(9, 13, 0, 5),
        Segment(13, 413),
        Segment(413, 733, 13, 300),
        Segment(733, 1133),
        Segment(1133, 1149, 733, 1100),
        Segment(1149, 1150, 733, 989),
    ]
)
PREFIX = {1: range(5), 3: range(13, 300), 5: range(733, 1100), 6: range(733, 989)}


def tensors(heads=6, kv_heads=2, seed=0, d=16):
    generator = torch.Generator().manual_seed(seed)
    n = LAYOUT.segments[-1].end
    return [torch.randn(1, h, n, d, generator=generator).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def dense(query, key, value, scaling):
    """Every position against every other, with what may be seen written out."""
    n = query.shape[2]
    seen = torch.zeros(n, n, dtype=torch.bool)
    for number, segment in enumerate(LAYOUT.segments):
        for position in range(segment.start, segment.end):
            seen[position, segment.start : position + 1] = True
            seen[position, list(PREFIX.get(number, []))] = True
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


# Parameters of torch.nn.attention.varlen.varlen_attn, recorded from the releases named; the kernel runs on GPUs alone.
VARLEN_PARAMETERS = {
    "2.11": "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)",
    "2.12": "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),"
    " enable_gqa=False, seqused_k=None, block_table=None",
}


def varlen_of(release):
    """varlen_attn as that release of torch declares it: an argument it does not have is a TypeError, as there."""
    names: dict = {"kernel": varlen_kernel}
    parameters = VARLEN_PARAMETERS[release]
    given = "scale, window_size" + (", enable_gqa" if "enable_gqa" in parameters else "")
    exec(
        f"def varlen_attn({parameters}):\n"
        f"    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, {given})",
        names,
    )
    return names["varlen_attn"]


def varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_query, longest_key, scale, window_size, enable_gqa=None):
    """What torch documents of varlen_attn, as a loop: segments by cumulative starts, causal to the bottom right."""
    assert window_size == (-1, 0) and enable_gqa in (None, q.shape[1] != k.shape[1])
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = [starts.diff().max().item() for starts in (cu_seqlens_q, cu_seqlens_k)]
    assert lengths == [longest_query, longest_key]
    out = []
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        queries, keys, values = q[rows].float(), k[columns].float(), v[columns].float()
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + keys.shape[0] - queries.shape[0])
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


def outputs_and_gradients(kernel, inputs):
    out = kernel(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(1) / out.shape[1])]


@pytest.mark.parametrize("name", ["sdpa", "onednn"])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 6, 16), (6, 2, 10), (6, 1, 33), (100, 1, 8)])
@pytest.mark.parametrize("size", [1, 8])  # of the scores: most of the probabilities are far below the largest then
def test_kernels_on_a_cpu_are_dense_attention_with_everything_else_hidden(name, heads, kv_heads, d, size):
    inputs = tensors(heads, kv_heads, d=d)
    inputs[0] = (size * inputs[0]).detach().requires_grad_()
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25), inputs)
    found = outputs_and_gradients(lambda *x: attention.ATTENTION_BACKENDS[name](*x, 0.25, LAYOUT), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([[0, 40, 0, 0], [41, 64, 0, 0]], "cover the positions one after the other"),
        ([[0, 40, 0, 0]], "cover all positions"),
        ([[0, 65, 0, 0]], "cover all positions"),
        ([[0, 64, 0, 3]], "the first segment has a prefix"),
        ([[0, 40, 0, 0], [40, 64, 5, 20]], "a prefix is the beginning of the last segment"),
    ],
)
def test_what_the_compiled_kernel_cannot_express_it_refuses(table, reason):
    x = torch.ones(2, 64, 16)
    with pytest.raises(RuntimeError, match=reason):
        kernels.load().attention(x, x, x, torch.tensor(table), 1.0)
    with pytest.raises(RuntimeError, match="do not fit"):
        kernels.load().attention(torch.ones(3, 64, 16), x, x, torch.tensor([[0, 64, 0, 0]]), 1.0)


@pytest.mark.parametrize("release", VARLEN_PARAMETERS)
def test_variable_length_attention_is_called_as_each_release_of_torch_declares_it(monkeypatch, release):
    """Its arguments, against the documented meaning; the kernel itself runs on GPUs alone."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of(release))
    inputs = tensors()
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25), inputs)
    found = outputs_and_gradients(lambda *x: attention.varlen(*x, 0.25, LAYOUT), inputs)
    for a, b in zip(found, expected, strict=True):
        assert ((a.float() - b).norm() / b.norm()) < 0.02  # 16 bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on GPUs alone")
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_kernels_on_a_gpu(name):
    device = torch.device("cuda")
    wanted, _ = attention.resolve_backend(name, device, "bf16")
    inputs = tensors()
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25), inputs)
    there = [x.detach().to(device).requires_grad_() for x in inputs]
    found = outputs_and_gradients(lambda *x: attention.ATTENTION_BACKENDS[wanted](*x, 0.25, LAYOUT.to(device)), there)
    for a, b in zip(found, expected, strict=True):
        assert ((a.float().cpu() - b).norm() / b.norm()) < 0.02


def test_neither_threads_nor_strides_change_what_the_compiled_kernel_computes():
    def run(inputs, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return outputs_and_gradients(lambda *x: attention.onednn(*x, 0.25, LAYOUT), inputs)
        finally:
            torch.set_num_threads(before)

    inputs = tensors()
    expected = run(inputs, 1)
    # As a projection leaves them: a position's heads side by side.
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, threads), expected, strict=True))


def test_what_overflows_is_seen_to():
    """A diverged run must not look like a sound one."""
    query, key, value = (x.detach() for x in tensors())
    key[0, 0, 2] = torch.nan
    out = attention.onednn(query, key, value, 0.25, LAYOUT)[0]
    assert out[3, :3].isnan().all() and out[10, :3].isnan().all()  # after it, and a response to its prompt
    assert not out[1].isnan().any() and not out[20:].isnan().any() and not out[:, 3:].isnan().any()


def test_without_its_kernel_compiled_attention_is_torchs_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_BUILT", tmp_path / "none")
    monkeypatch.setattr(kernels, "load", kernels.load.__wrapped__)
    kernel, reason = attention.resolve_backend("auto", CPU, "fp32")
    assert kernel == "sdpa" and "no onednn: its kernel is not compiled: run python -m src.model.cpu.kernels" in reason
    with pytest.raises(ConfigError, match=r"model.attention=onednn: its kernel is not compiled: run python -m src"):
        attention.resolve_backend("onednn", CPU, "fp32")


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler -x", "no-such-compiler: No such file"), ("false -x", "false -x -std=c++20")],
)
def test_a_kernel_that_cannot_be_compiled_is_said_and_nothing_is_left_behind(compiler, said, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_BUILT", tmp_path)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(kernels.NotBuiltError, match=re.escape(said)):
        kernels.build()
    assert not list(tmp_path.iterdir())


def test_compiling_twice_at_once_leaves_one_kernel_that_runs(tmp_path):
    """As make calls it, in an environment of its own without one."""
    code = f"import pathlib, src.model.cpu.kernels as k; k._BUILT = pathlib.Path({str(tmp_path)!r}); import src.kernels.__main__"
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = {process.communicate(timeout=120)[0] for process in running}
    (built,) = tmp_path.iterdir()
    assert said == {f"compiled kernels: {built}\n"}
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.alignment_sweep.attention)"
    subprocess.run([sys.executable, "-c", code, str(built)], check=True)


def test_auto_takes_what_there_is_and_says_why():
    kernel, reason = attention.resolve_backend("auto", CPU, "bf16")
    assert kernel == "sdpa" and "no varlen: it needs CUDA, this is cpu" in reason
    assert "no onednn: it computes in float32, engine.precision is bf16" in reason
    assert attention.resolve_backend("auto", CPU, "fp32")[0] == "onednn"


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_a_kernel_that_cannot_be_had_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"model.attention={name}: it needs CUDA, this is cpu; use model.attention="):
        attention.resolve_backend(name, CPU, "bf16")
