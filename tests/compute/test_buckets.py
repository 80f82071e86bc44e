"""Which parameters are sent in one message."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn

from fluxloop.compute.buckets import KEPT, Bucket, BucketSizes, fill


def parameters(*kinds: tuple[int, torch.dtype]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(length, dtype=dtype)) for length, dtype in kinds]


def test_what_is_small_is_sent_at_once_the_last_parameters_first() -> None:
    own = parameters((100, torch.float32), (10, torch.float32), (1000, torch.float32))
    (bucket,) = fill(own, BucketSizes())
    assert [*map(id, bucket.parameters)] == [*map(id, reversed(own))]


def test_the_first_bucket_is_smaller_than_the_others() -> None:
    own = parameters(*[(10, torch.float32)] * 12)
    buckets = fill(own, BucketSizes(first=80, others=200, whole=100))
    assert [len(bucket.parameters) for bucket in buckets] == [2, 5, 5]
    assert [*map(id, chain.from_iterable(bucket.parameters for bucket in buckets))] == [*map(id, reversed(own))]


def test_each_type_has_buckets_of_its_own_and_the_last_one_can_count() -> None:
    own = parameters((4, torch.float32), (4, torch.bfloat16), (4, torch.complex64), (4, torch.bfloat16))
    buckets = fill(own, BucketSizes())
    assert [(bucket.dtype, len(bucket.parameters)) for bucket in buckets] == [
        (torch.bfloat16, 2),
        (torch.float32, 1),
        (torch.float32, 1),
    ]
    halves = fill(parameters((4, torch.bfloat16), (4, torch.float16)), BucketSizes())
    assert [(bucket.dtype, len(bucket.parameters)) for bucket in halves] == [
        (torch.float16, 1),
        (torch.bfloat16, 1),
        (torch.float32, 0),
    ]


def test_hooks_are_gone_once_a_bucket_is_forgotten() -> None:
    (own,) = parameters((4, torch.float32))
    (bucket,) = fill([own], BucketSizes())
    bucket.hook()
    assert len(own._post_accumulate_grad_hooks) == 1
    bucket.forget()
    assert not own._post_accumulate_grad_hooks


class Twice:
    """Adds up what two processes send that send the same."""

    def begin(self, tensor: torch.Tensor, *, waits: bool = True) -> Twice:
        tensor *= 2
        return self

    def wait(self) -> None:
        pass


def sent(bucket: Bucket, tail: list[torch.Tensor]) -> int:
    """Send what there is, and return where the sums lie."""
    bucket.collect()
    bucket.send(Twice(), tail)  # type: ignore[arg-type]  # what of it is called
    bucket.receive()
    place = bucket.flat.data_ptr()
    bucket.hand_out((), None)
    return place


@pytest.mark.parametrize("holder", ["nobody", "a gradient", "its numbers as NumPy's"])
def test_a_large_message_is_written_where_the_last_one_was_unless_somebody_holds_a_part_of_it(holder: str) -> None:
    own = parameters((KEPT // 8, torch.float32), (KEPT // 8, torch.float32))
    (bucket,) = fill(own, BucketSizes())
    tail = [torch.ones(3)]
    for parameter in own:
        parameter.grad = torch.full_like(parameter, 1.5)
    first = sent(bucket, tail)
    held = None if holder == "nobody" else own[1].grad
    seen = held.numpy()[-4:] if held is not None and holder == "its numbers as NumPy's" else held
    del held
    for _ in range(3):
        for number, parameter in enumerate(own):
            parameter.grad = torch.full_like(parameter, 10.0 + number)
        place = sent(bucket, tail)
        assert (place == first) is (holder == "nobody")
        assert [set(parameter.grad.tolist()) for parameter in own] == [{20.0}, {22.0}]  # type: ignore[union-attr]
    assert seen is None or set(seen.tolist()) == {3.0}
    assert tail[0].tolist() == [1, 1, 1]


def test_a_gradient_that_is_added_to_stays_in_the_sums_of_before() -> None:
    (own,) = parameters((KEPT // 4, torch.float32))
    (bucket,) = fill([own], BucketSizes())
    own.grad = torch.ones_like(own)
    sent(bucket, [torch.ones(1)])
    own.grad += 1
    sent(bucket, [torch.ones(1)])
    assert set(own.grad.tolist()) == {6.0}
