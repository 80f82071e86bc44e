"""Which parameters are sent in one message."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from fluxloop.compute.buckets import BucketSizes, fill


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
