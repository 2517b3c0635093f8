"""What kernels do and what exchange hides: counted on fake tensors, and on streams whose waits are FSDP2's."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from src.planning.gpus import find_gpu
from src.rehearsal.streams import Streams
from src.rehearsal.work import WorkMeter, bytes_moved

H100 = find_gpu("h100")


def test_rows_that_are_written_into_a_tensor_count_and_not_their_index():
    with FakeTensorMode():
        table = torch.empty(1000, 64, dtype=torch.bfloat16, device="cuda")
        index = torch.empty(10, dtype=torch.int64, device="cuda")
        rows = torch.empty(10, 64, dtype=torch.bfloat16, device="cuda")
        size = 10 * 64 * 2
        assert bytes_moved("index_add_", (), [table, index, rows], [table]) == 3 * size
        assert bytes_moved("index_add", (), [table, index, rows], [table]) == 3 * size + 2 * table.numel() * 2
        assert bytes_moved("index_put_", (), [table, index, rows], [table]) == 3 * size


@pytest.mark.parametrize("is_causal", [True, False])
def test_half_of_the_pairs_see_each_other_only_where_the_argument_says_so(is_causal):
    """Another argument of the kernel, compute_log_sumexp, is true in both."""
    func = torch.ops.aten._scaled_dot_product_efficient_attention.default
    with FakeTensorMode():
        q = torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device="cuda")
        args = (q, q, q, None, True, 0.0, is_causal)
        kernel = WorkMeter(H100).kernel(
            func, "_scaled_dot_product_efficient_attention", "forward", args, {}, [q] * 3, [q], None
        )
    assert kernel.flops == 4 * 4 * 64 * 2 * 128 * 128 * (0.5 if is_causal else 1.0)


def seconds_of_layers(gather, compute, layers=4):
    """Return all and exposed seconds of a forward pass that gathers every layer while it computes the one before."""
    meter = WorkMeter(H100)
    streams, gathering = meter.streams, type(meter.streams.default)()
    copied_before = None
    for _ in range(layers):
        with streams.use(gathering):
            streams.exchange(gather)
            gathered = gathering.record_event()
        if copied_before is not None:
            gathering.wait_event(copied_before)
        streams.current.wait_event(gathered)
        copied_before = streams.event()
        copied_before.record()
        streams.launch(compute)
    return streams.default.clock, meter.exposed_exchange


def test_exchange_that_is_faster_than_a_layer_is_exposed_before_the_first_alone():
    total, exposed = seconds_of_layers(gather=1.0, compute=3.0)
    assert exposed == 1.0 and total == 1.0 + 4 * 3.0


def test_exchange_that_is_slower_than_a_layer_is_exposed_by_the_difference():
    total, exposed = seconds_of_layers(gather=5.0, compute=3.0)
    assert exposed == 5.0 + 3 * (5.0 - 3.0) and total == exposed + 4 * 3.0


def test_collectives_share_one_link_and_one_on_the_default_stream_is_exposed():
    streams = Streams()
    for _ in range(2):
        with streams.use(type(streams.default)()):
            streams.exchange(1.0)
    streams.exchange(1.0)
    assert streams.default.clock == streams.default.waited == 3.0


def test_what_another_stream_computes_takes_as_long_from_the_default_one():
    streams = Streams()
    with streams.use(type(streams.default)()) as other:
        streams.launch(2.0)
    streams.default.wait_stream(other)
    assert streams.default.clock == 2.0 and streams.default.waited == 0.0
