"""All attention backends compute the same over packed segments; one that cannot run is refused before anything runs."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from src.errors import ConfigError
from src.model import attention
from src.model.cpu.attention import BlockAttention
from src.model.numerics import set_deterministic
from src.model.packing import Layout, Segment

CPU = torch.device("cpu")
# Pairs: short ones, long ones (several blocks of queries and tiles of keys each), short responses to a long prompt.
LAYOUT = Layout.from_segments(
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


def dense(query, key, value, scaling, window=None):
    """Return attention of every position to every other, with an explicit mask.

    A segment's sequence is its prefix and itself; the last `window` of its positions up to its own are attended to.
    """
    n = query.shape[2]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for number, segment in enumerate(LAYOUT.segments):
        for position in range(segment.start, segment.end):
            sequence = [*PREFIX.get(number, []), *range(segment.start, position + 1)]
            mask[position, sequence if window is None else sequence[-window:]] = True
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


# Parameters of torch.nn.attention.varlen.varlen_attn, recorded from the releases named; the kernel runs on GPUs only.
VARLEN_PARAMETERS = {
    "2.11": "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)",
    "2.12": "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),"
    " enable_gqa=False, seqused_k=None, block_table=None",
    "2.13": "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),"
    " enable_gqa=False, seqused_k=None, block_table=None, num_splits=None",
}


def varlen_of(release):
    """Return varlen_attn with that release's signature, so that an unknown argument is a TypeError as in torch."""
    names: dict = {"kernel": varlen_kernel}
    parameters = VARLEN_PARAMETERS[release]
    arguments = "scale, window_size" + (", enable_gqa" if "enable_gqa" in parameters else "")
    exec(
        f"def varlen_attn({parameters}):\n"
        f"    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, {arguments})",
        names,
    )
    return names["varlen_attn"]


def test_the_recorded_signature_is_that_of_the_installed_torch():
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in VARLEN_PARAMETERS:
        pytest.skip(f"no signature of torch {release} is recorded")
    parameters = inspect.signature(varlen.varlen_attn).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == f"({VARLEN_PARAMETERS[release]})"


def varlen_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_size, enable_gqa=None):
    """Compute what torch documents for varlen_attn in a loop over segments: causal, aligned to the bottom right."""
    assert window_size[1] == 0 and enable_gqa in (None, q.shape[1] != k.shape[1])
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    longest = [cu_seqlens.diff().max().item() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    assert longest == [max_seqlen_q, max_seqlen_k]
    out = []
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        queries, keys, values = q[rows].float(), k[columns].float(), v[columns].float()
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        offset, everything = keys.shape[0] - queries.shape[0], torch.ones(scores.shape[1:], dtype=torch.bool)
        masked = everything.triu(1 + offset)
        if window_size[0] >= 0:
            masked |= everything.tril(offset - window_size[0] - 1)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(masked, -torch.inf).softmax(-1), values))
    return torch.cat(out).to(q.dtype)


def outputs_and_gradients(attend, inputs):
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(1) / out.shape[1])]


@pytest.mark.parametrize("name", ["sdpa", "onednn"])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 6, 16), (6, 2, 10), (6, 1, 33), (100, 1, 8)])
@pytest.mark.parametrize("scale", [1, 8])  # of the scores; at 8 most probabilities are far below the largest
def test_backends_on_a_cpu_are_dense_attention_with_a_mask(name, heads, kv_heads, d, scale):
    inputs = tensors(heads, kv_heads, d=d)
    inputs[0] = (scale * inputs[0]).detach().requires_grad_()
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25), inputs)
    actual = outputs_and_gradients(lambda *x: attention.ATTENTION_BACKENDS[name](*x, 0.25, LAYOUT), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


# Far less than a block of queries, of which some windows begin in the prefix, and more than a prefix and a segment.
@pytest.mark.parametrize("window", [2, 100, 300])
@pytest.mark.parametrize("name", ["sdpa", "onednn", "varlen", "flash_attention_2"])
def test_a_window_is_of_positions_of_a_sequence_wherever_its_prefix_lies(name, window, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of("2.12"))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_kernel))
    inputs = tensors()
    backend, bf16 = attention.ATTENTION_BACKENDS[name], name not in ("sdpa", "onednn")
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25, window), inputs)
    actual = outputs_and_gradients(lambda *x: backend(*x, 0.25, LAYOUT, window), inputs)
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True)]
    assert max(errors) < (0.02 if bf16 else 1e-5)
    without = outputs_and_gradients(lambda *x: backend(*x, 0.25, LAYOUT), inputs)
    assert (without[0].float() - expected[0]).norm() / expected[0].norm() > 0.05, "the control"


def flash_kernel(q, k, v, *bounds, softmax_scale, causal, window_size, deterministic):
    """Compute what flash-attn documents: causal forbids later keys whatever the window says."""
    assert causal
    return varlen_kernel(q, k, v, *bounds, softmax_scale, (window_size[0], 0))


@pytest.mark.parametrize("release", VARLEN_PARAMETERS)
def test_varlen_attn_is_called_with_the_signature_of_each_torch_release(monkeypatch, release):
    """Checks the arguments; the kernel itself runs on GPUs only."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of(release))
    inputs = tensors()
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25), inputs)
    actual = outputs_and_gradients(lambda *x: attention.varlen(*x, 0.25, LAYOUT), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert ((a.float() - b).norm() / b.norm()) < 0.02  # bf16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_backends_on_a_gpu(name):
    device = torch.device("cuda")
    attention.resolve_backend(name, device, "bf16")
    inputs = tensors()
    expected = outputs_and_gradients(lambda *x: dense(*x, 0.25), inputs)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    actual = outputs_and_gradients(lambda *x: attention.ATTENTION_BACKENDS[name](*x, 0.25, LAYOUT.to(device)), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert ((a.float().cpu() - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("deterministic", [True, False])
def test_flash_attention_sums_in_a_fixed_order_when_asked_only(deterministic, monkeypatch):
    given = []

    def flash_attn_varlen_func(q, *_, **options):
        given.append(options["deterministic"])
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    set_deterministic(deterministic)
    try:
        attention.flash_attention_2(*tensors(), 0.25, LAYOUT)
        assert given == [deterministic] == [torch.are_deterministic_algorithms_enabled()]  # torch's kernel asks it
    finally:
        set_deterministic(False)


def test_no_gradient_is_copied_into_zeros_on_its_way_from_the_kernel(monkeypatch):
    """An index (x[0]) would do so: zeros of the whole size, and a copy, for each of queries, keys and values."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of("2.12"))

    def operators_of_backward(attend):
        inputs = tensors()
        out = attend(*inputs)
        with torch.profiler.profile() as profile:
            out.sum().backward()
        return {event.name for event in profile.events()}

    assert "aten::select_backward" not in operators_of_backward(lambda *x: attention.varlen(*x, 0.25, LAYOUT))
    indexed = operators_of_backward(lambda *x: x[0][0].sum() + x[1][0].sum() + x[2][0].sum())
    assert "aten::select_backward" in indexed, "the control"


def test_neither_threads_nor_strides_change_results_on_a_cpu():
    def run(inputs, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return outputs_and_gradients(lambda *x: attention.onednn(*x, 0.25, LAYOUT), inputs)
        finally:
            torch.set_num_threads(before)

    inputs = tensors()
    expected = run(inputs, 1)
    # The strides of a projection's output: the heads of a position are adjacent in memory.
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, threads), expected, strict=True))


def test_nan_is_propagated_to_every_position_that_attends_to_it():
    """A diverged run must not look like a converged one."""
    query, key, value = (x.detach() for x in tensors())
    key[0, 0, 2] = torch.nan
    out = attention.onednn(query, key, value, 0.25, LAYOUT)[0]
    assert out[3, :3].isnan().all() and out[10, :3].isnan().all()  # later positions, and a response to this prompt
    assert not out[1].isnan().any() and not out[20:].isnan().any() and not out[:, 3:].isnan().any()


def test_short_segments_are_computed_by_sdpa(monkeypatch):
    monkeypatch.setattr(BlockAttention, "apply", lambda *_: pytest.fail("computed in blocks"))
    inputs = tensors()
    with pytest.raises(pytest.fail.Exception, match="computed in blocks"):
        attention.onednn(*inputs, 0.25, LAYOUT)
    short = Layout.from_segments([Segment(0, 9), Segment(9, 13, 0, 5)])
    inputs = [x[:, :, :13] for x in inputs]
    assert torch.equal(attention.onednn(*inputs, 0.25, short), attention.sdpa(*inputs, 0.25, short))


def test_a_torch_without_onednn_computes_attention_by_sdpa_and_gives_the_reason(monkeypatch):
    monkeypatch.setattr(attention, "ONEDNN", False)
    backend, reason = attention.resolve_backend("auto", CPU, "fp32")
    assert backend == "sdpa" and "no onednn: this torch is built without oneDNN" in reason
    with pytest.raises(ConfigError, match=r"model.attention=onednn: this torch is built without oneDNN; use"):
        attention.resolve_backend("onednn", CPU, "fp32")


def test_auto_takes_the_fastest_available_backend_and_gives_the_reason():
    backend, reason = attention.resolve_backend("auto", CPU, "bf16")
    assert backend == "sdpa" and "no varlen: CUDA only, device is cpu" in reason
    assert "no onednn: requires fp32, but engine.precision=bf16" in reason
    assert attention.resolve_backend("auto", CPU, "fp32")[0] == "onednn"


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_a_backend_that_cannot_run_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"model.attention={name}: CUDA only, device is cpu; use model.attention="):
        attention.resolve_backend(name, CPU, "bf16")
