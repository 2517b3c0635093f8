"""The head on devices other than a CPU (also its own, without the CPU patch): exactness, passes over logits, chunks."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from src.model import lm_head, logprobs
from src.model.cpu.lm_head import OneDNNHead
from src.model.lm_head import Head, next_token_kl, token_chunk
from src.model.logprobs import patch_model_, sequence_logps
from src.model.numerics import FLOAT32, NumericsConfig, cast_for_inference_
from src.model.packing import pack
from src.planning import fit
from tests.support.small_models import make_model, random_pairs, relative

BF16 = NumericsConfig("bf16")
TOKENS, WIDTH, VOCABULARY = 60, 256, 3000


def make_head(cls=Head, dtype=torch.bfloat16, bias=False):
    """Return a head whose logits have a standard deviation of 6, hidden states, targets and gradients of log-probs."""
    generator = torch.Generator().manual_seed(0)
    head = cls(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        head.weight.copy_(6 * torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return head.to(dtype), hidden.requires_grad_(), targets, torch.randn(TOKENS, generator=generator)


def exact(head, hidden, targets, grad):
    return run(lambda *x: plain_logps(*x), copy.deepcopy(head).double(), hidden.double(), targets, grad.double())


def plain_logps(head, hidden, targets):
    """Compute log-probs as transformers does: logits of a linear layer, then float32."""
    logits = F.linear(hidden, head.weight, head.bias)
    return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def run(compute, head, hidden, targets, grad, numerics=FLOAT32):
    hidden = hidden.detach().requires_grad_()
    with numerics.autocast(torch.device("cpu")):
        logps = compute(head, hidden, targets)
    return [logps.detach(), *torch.autograd.grad(logps, [hidden, *head.parameters()], grad)]


@pytest.mark.parametrize("cls", [Head, OneDNNHead])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_products_that_write_float32_errors_are_below_those_of_logits_rounded_to_bf16(cls, dtype, monkeypatch):
    """Of weights in bf16, and in float32 under autocast."""
    monkeypatch.setattr(fit, "_HEAD_ROWS", 25)  # several chunks
    head, *inputs = make_head(cls, dtype)
    head.weight.data = head.weight.data.bfloat16().to(dtype)  # only the computation differs
    expected = exact(head, *inputs)
    ours, plain = (run(f, head, *inputs, numerics=BF16) for f in (lambda h, *x: h(*x), plain_logps))
    errors = [[relative(a.double(), e) for a, e in zip(x, expected, strict=True)] for x in (ours, plain)]
    assert ours[0].dtype == torch.float32 and ours[2].dtype == dtype
    assert errors[0][0] < 0.6 * errors[1][0], "log-probs"
    assert all(a < 0.8 * b for a, b in zip(errors[0][1:], errors[1][1:], strict=True)), "gradients"


@pytest.mark.parametrize("bias", [False, True])
def test_without_the_cpu_patch_the_head_has_the_log_probs_and_gradients_of_cross_entropy(bias, monkeypatch):
    monkeypatch.setattr(fit, "_HEAD_ROWS", 25)
    head, *inputs = make_head(dtype=torch.float32, bias=bias)
    for actual, expected in zip(run(lambda h, *x: h(*x), head, *inputs), exact(head, *inputs), strict=True):
        assert relative(actual.double(), expected) < 1e-6
    frozen = head.requires_grad_(False)
    logps = frozen(inputs[0], inputs[1])
    assert torch.autograd.grad(logps.sum(), inputs[0])[0].isfinite().all(), "adapters train with a frozen head"


class Passes(TorchDispatchMode):
    """Lists operators, but for products, that read or write a tensor of the size of the logits."""

    NO_PASS = ("mm", "linear", "addmm", "t", "detach", "empty_like", "view", "transpose", "split", "alias")

    size = TOKENS * VOCABULARY

    def __init__(self):
        super().__init__()
        self.names = []
        self.within_product = False

    def one_kernel(self, product):
        """Return a function of a product that on a GPU is one kernel, however many it is here."""

        def compute(*args):
            self.within_product = True
            out = product(*args)
            self.within_product = False
            return out

        return compute

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, *(kwargs or {}).values(), out) if isinstance(x, torch.Tensor)]
        name = func.__name__.partition(".")[0]
        # A gather or a scatter of one number a row is no pass.
        is_pass = not self.within_product and name not in (*self.NO_PASS, "gather", "scatter_add_")
        if is_pass and any(x.numel() == self.size for x in tensors):
            self.names.append(name)
        return out


def test_the_logits_are_read_by_three_operators_and_never_cast(monkeypatch):
    head, *inputs = make_head()
    with Passes() as ours:
        for name in ("product_nt", "add_product"):
            monkeypatch.setattr(lm_head, name, ours.one_kernel(getattr(lm_head, name)))
        run(lambda h, *x: h(*x), head, *inputs, numerics=BF16)
    assert ours.names == ["_log_softmax", "_softmax", "mul"]
    with Passes() as plain:
        run(plain_logps, head, *inputs, numerics=BF16)
    assert len(plain.names) > 4, "the control"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kl_is_that_of_float64_to_the_error_of_the_operands(precision):
    (head, hidden, *_), other = make_head(dtype=torch.float32), make_head(dtype=torch.float32)[0]
    other.weight.data += 0.1 * torch.randn(other.weight.shape, generator=torch.Generator().manual_seed(1))
    log_p, log_q = (hidden.double() @ h.weight.double().t() for h in (head, other))
    log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    with NumericsConfig(precision).autocast(torch.device("cpu")):
        kl = next_token_kl(head, hidden, other, hidden)
    assert kl.dtype == torch.float32
    assert relative(kl.double(), expected) < (1e-5 if precision == "fp32" else 0.02)


def test_the_chunk_is_set_by_the_memory_of_the_card_alone(monkeypatch):
    rows = {}
    for total in (80, 40, 140, 1):
        properties = SimpleNamespace(total_memory=total << 30)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, card=properties: card)
        rows[total] = token_chunk(128_256, torch.device("cuda"))
    assert rows == {80: 2048, 40: 1024, 140: 3584, 1: 256}
    assert token_chunk(32_000, torch.device("cpu")) == token_chunk(128_256, torch.device("cpu")) == 1024


def gradient(model, logps):
    model.zero_grad()
    chosen, rejected = logps.view(-1, 2).unbind(1)
    F.softplus(-0.1 * (chosen - rejected)).mean().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_dpo_in_bf16_have_the_error_of_plain_autocast_over_float32_weights(tied, monkeypatch):
    """A Llama of 4 layers and width 256. Plain: float32 weights, transformers' head and cross-entropy in autocast."""
    monkeypatch.setattr(logprobs, "patch_for_cpu_", lambda model: None)  # the modules that a GPU has
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "initializer_range": 0.05}
    ratios = []
    for seed in range(4):
        model = make_model(seed=seed, patched=False, tie_word_embeddings=tied, vocab_size=2000, **sizes)
        batch = pack(random_pairs(12, seed), range(12))

        def of(model, numerics, batch=batch):
            return gradient(model, sequence_logps(model, batch, numerics)[0])

        expected = of(patch_model_(copy.deepcopy(model).double()), FLOAT32)
        ours = of(patch_model_(cast_for_inference_(copy.deepcopy(model), BF16)), BF16)
        plain = patch_model_(copy.deepcopy(model))
        monkeypatch.setattr(Head, "token_logps", lambda self, hidden, targets: plain_logps(self, hidden, targets))
        theirs = of(plain, BF16)
        monkeypatch.undo()
        monkeypatch.setattr(logprobs, "patch_for_cpu_", lambda model: None)
        ratios.append(relative(ours, expected) / relative(theirs, expected))
    assert sum(ratios) / len(ratios) < 1.2, ratios
