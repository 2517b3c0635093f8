"""What stands in the place of a kernel has the signature, outputs and dtypes of the kernel."""

import importlib.util
import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen

from src.planning.gpus import find_gpu
from src.rehearsal import substitutes
from src.rehearsal.substitutes import flash_attn_varlen_func
from src.rehearsal.work import WorkMeter, causal_pairs
from tests.support.torch_releases import torch_of, varlen_signatures


def test_the_recorded_signature_of_the_installed_torch_is_the_installed_one():
    release = ".".join(torch.__version__.split(".")[:2])
    recorded, installed = varlen_signatures()[release], inspect.signature(varlen.varlen_attn)
    for mine, theirs in zip(recorded.parameters.values(), installed.parameters.values(), strict=True):
        assert (mine.name, mine.kind, mine.default) == (theirs.name, theirs.kind, theirs.default)


def test_another_release_refuses_what_it_does_not_have_and_takes_what_it_has():
    with FakeTensorMode(), torch_of("2.11"):
        q = torch.empty(8, 4, 16, dtype=torch.bfloat16)
        k = torch.empty(8, 2, 16, dtype=torch.bfloat16)
        bounds = torch.empty(3, dtype=torch.int32)
        with pytest.raises(TypeError, match=r"varlen_attn\(\) got an unexpected keyword argument 'enable_gqa'"):
            varlen.varlen_attn(q, k, k, bounds, bounds, 4, 4, enable_gqa=True)
        assert varlen.varlen_attn(q, k, k, bounds, bounds, 4, 4, window_size=(-1, 0)).shape == q.shape


def test_attention_of_variable_length_keeps_a_log_sum_exp_and_returns_the_dtype_of_the_queries():
    """As flash-attn and torch's operator, whose schema this is, say themselves."""
    schema = str(torch.ops.torch_attn._varlen_attn.default._schema)
    assert schema.endswith("-> (Tensor, Tensor, Tensor)") and "Tensor query, Tensor key, Tensor value" in schema
    with FakeTensorMode():
        q = torch.empty(8, 4, 16, dtype=torch.bfloat16)
        k = torch.empty(10, 2, 16, dtype=torch.bfloat16)
        bounds = torch.empty(3, dtype=torch.int32)
        theirs = torch.ops.torch_attn._varlen_attn(q, k, k, bounds, bounds, 4, 5, True, None, [-1, 0], True)
        ours = substitutes.flash_attn_forward(q, k, k, bounds, bounds, 4, 5, [-1, -1])
        for mine, real in zip(ours, theirs, strict=False):
            assert (mine.shape, mine.dtype, mine.stride()) == (real.shape, real.dtype, real.stride())
        q.requires_grad_(), k.requires_grad_()
        flash_attn_varlen_func(q, k, k, bounds, bounds, 4, 5, causal=True).sum().backward()
        assert (q.grad.dtype, k.grad.shape) == (torch.bfloat16, k.shape)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_the_substitute_has_the_signature_of_flash_attn():
    import flash_attn

    real, mine = map(inspect.signature, (flash_attn.flash_attn_varlen_func, flash_attn_varlen_func))
    assert list(mine.parameters) == list(real.parameters)


def test_pairs_that_see_each_other_are_counted_as_a_mask_has_them():
    """Two segments: 3 queries of 3 keys, and 2 queries of 6 keys, causal and aligned to the bottom right."""
    masks = [torch.ones(3, 3).tril(0), torch.ones(2, 6).tril(4)]
    bounds = torch.tensor([0, 3, 5]), torch.tensor([0, 3, 9])
    assert causal_pairs(*bounds) == sum(mask.sum() for mask in masks) == 6 + 11
    for window in (1, 2, 4, 6, 7):
        seen = [mask.triu(mask.shape[1] - mask.shape[0] - window + 1) for mask in masks]
        assert causal_pairs(*bounds, window) == sum(mask.sum() for mask in seen)
    assert causal_pairs(*bounds, 2) == 5 + 4


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes():
    gpu = find_gpu("h100")
    meter = WorkMeter(gpu)

    def kernel(func, *args):
        out = func(*args)
        return meter.kernel(func, func._schema.name.split("::")[1], "forward", args, {}, list(args), [out], None)

    with FakeTensorMode():
        a = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cpu")
        product = kernel(torch.ops.aten.mm.default, a, a)
        assert (product.kind, product.flops) == ("products", 2 * 4096**3)
        assert product.seconds == product.flops / gpu.bf16
        view = kernel(torch.ops.aten.t.default, a)
        assert view is None, "a view launches no kernel"
    small = torch.empty(4, 4)
    assert (
        meter.kernel(
            torch.ops.aten.add.Tensor, "add", "forward", (small, small), {}, [small, small], [small], None
        ).seconds
        == gpu.least_kernel
    )
