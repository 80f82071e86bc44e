"""Step optimizers as torch does, without what it does around that; Adam by one fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

FusedCall = tuple[dict[str, Any], list[Tensor], list[list[Tensor]], list[Tensor]]
"""A group of Adam's; its parameters; their gradients and averages, as the kernel takes them; their step counts."""


def _takes_several() -> bool:
    """Return whether autograd counts changes of several tensors in one call, as newer versions of torch do."""
    try:
        increment_version(())
    except TypeError:
        return False
    return True


_TAKES_SEVERAL = _takes_several()

ADAMS = (torch.optim.Adam, torch.optim.AdamW)


FUSED: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}
"""Where Adam's fused implementation is chosen: by device, for parameters of these types."""


def choose_fused(optimizer: Optimizer) -> None:
    """Make a new `Adam` or `AdamW` use its fused implementation, where it has one and nobody said otherwise.

    One kernel steps all parameters: the same mathematics, rounded in another order, in less than
    half the time. On the CPU no other optimizer that takes dense gradients alone has one worth it.
    Not chosen where `fused`, `foreach`, `capturable` or `differentiable` was given, an option is a
    tensor, or a parameter is of a kind, type, device or layout that the kernel cannot take.

    ``optimizer.defaults["fused"]`` stays as it is: True there is the user's own word.
    """
    if type(optimizer) not in ADAMS:
        return
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    if (
        not any(map(_is_chosen, groups))
        and len({parameter.device for parameter in parameters}) == 1
        and all(map(_fits_kernel, parameters))
    ):
        for group in groups:
            group["fused"] = True


def _is_chosen(group: dict[str, Any]) -> bool:
    """Return whether the user has decided how a group of Adam's parameters is stepped."""
    options = [*group["betas"], *(option for name, option in group.items() if name != "params")]
    return (
        group["fused"] is not None
        or group["foreach"] is not None
        or group["capturable"]
        or group["differentiable"]
        or any(isinstance(option, Tensor) for option in options)
    )


def _fits_kernel(parameter: Tensor) -> bool:
    """Return whether a fused kernel takes a parameter: plain, of a type it knows, without gaps in memory."""
    return (
        type(parameter) in (nn.Parameter, Tensor)
        and parameter.dtype in FUSED.get(parameter.device.type, ())
        and torch.empty_like(parameter).stride() == parameter.stride()
    )


try:  # private names: without them the optimizer's step is called as everybody calls it
    from torch.optim.optimizer import (
        _global_optimizer_post_hooks as _after_any,
    )
    from torch.optim.optimizer import (
        _global_optimizer_pre_hooks as _before_any,
    )

    _profiling: Callable[[], bool] | None = torch._C._autograd._profiler_enabled
    _torch_wrapper = Optimizer.profile_hook_step(lambda self: None).__code__
    _adam_step: Any = torch.optim.Adam.step
    if hasattr(_adam_step, "hooked"):  # wrapped when the first optimizer was made
        _adam_step = _adam_step.__wrapped__
    _fused_adam: Any = torch._fused_adam_
    _fused_adamw: Any = torch._fused_adamw_
    _add: Any = torch._foreach_add_
    _set_grad_enabled: Any = torch._C._set_grad_enabled
except (ImportError, AttributeError):  # pragma: no cover - a torch that has renamed them
    _profiling = None


def read_fused(optimizer: Optimizer) -> list[FusedCall] | None:
    """Read what a fused kernel steps, one call per group; None where torch's own step has to do it.

    Everything is read anew at each step, so whatever is added, loaded, frozen or replaced is seen.
    A group that nobody asked to be fused is stepped plainly from then on, where its kernel would be wrong.
    """
    # What the kernel requires: every list has one tensor for each parameter; all are strided, and those of one
    # parameter lie in the same order, as the kernel walks through their memory without a look at their strides.
    # Loops and map() with functions of C, no comprehensions: each of those is a call of a Python function, and there
    # were 20 of them for a group of four parameters.
    calls: list[FusedCall] | None = []
    for group in optimizer.param_groups:
        if not group["fused"]:
            calls = None  # torch's step does all groups, so one such group is enough
            continue
        params: list[Tensor] = []
        grads: list[Tensor] = []
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    return None  # torch's step says that it takes no such gradients
                params.append(parameter)
                grads.append(gradient)
        states = [*map(optimizer.state.__getitem__, params)]
        begun = all(states)  # else some have taken no step yet, and torch's step makes their averages
        columns = [grads]
        if begun:
            columns += [[*map(_exp_avg, states)], [*map(_exp_avg_sq, states)]]
            columns += [[*map(_max_exp_avg_sq, states)]] if group["amsgrad"] else []
            # as nearly always; else strides are compared, which takes three times as long
            in_order = all(map(Tensor.is_contiguous, chain(params, *columns))) or _lie_in_order(params, columns)
        else:
            in_order = all(map(_lies_in_order, params, grads, states))
        beta1, beta2 = group["betas"]
        if not in_order:
            calls = None
            if optimizer.defaults["fused"] is not True:
                group["fused"] = None
        elif (
            not begun
            or not all(map(_is_cpu, params))  # elsewhere torch's step sorts them by device first
            or isinstance(group["lr"], Tensor)  # and turns numbers into tensors, or tensors into numbers
            or isinstance(beta1, Tensor)
            or isinstance(beta2, Tensor)
        ):
            calls = None
        elif calls is not None and params:
            calls.append((group, params, columns if group["amsgrad"] else [*columns, []], [*map(_step, states)]))
    return calls


_is_cpu = attrgetter("is_cpu")
_step, _exp_avg, _exp_avg_sq, _max_exp_avg_sq = map(itemgetter, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))


def _lie_in_order(params: list[Tensor], columns: list[list[Tensor]]) -> bool:
    """Return whether the tensors that belong to each parameter have their elements in its order in memory."""
    strides = [*map(Tensor.stride, params)]
    for column in columns:
        if [*map(Tensor.stride, column)] != strides:
            # the stride of a dimension with one element is of no consequence: what is contiguous lies in one order
            return all(map(Tensor.is_contiguous, chain(params, *columns)))
    return True


def _lies_in_order(parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> bool:
    """Tell the same of one parameter, which may have taken no step yet."""
    return _lie_in_order(
        [parameter], [[gradient], *([value] for value in state.values() if value.shape == parameter.shape)]
    )


def step_fused(calls: list[FusedCall]) -> None:
    """Step as Adam's fused implementation does, without building the lists of its arguments again."""
    enabled = torch.is_grad_enabled()
    _set_grad_enabled(False)  # ``with torch.no_grad()`` makes three objects
    try:
        for group, params, columns, steps in calls:
            beta1, beta2 = group["betas"]
            _add(steps, 1)
            kernel = _fused_adamw if group.get("decoupled_weight_decay") else _fused_adam
            kernel(
                params,
                *columns,
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
            )
            count_changes(params)
    finally:
        _set_grad_enabled(enabled)


def _count_one_by_one(params: Sequence[Tensor]) -> None:
    for parameter in params:
        increment_version(parameter)


count_changes: Callable[[Sequence[Tensor]], None] = increment_version if _TAKES_SEVERAL else _count_one_by_one
"""Count a change in place of parameters, as autograd does, which fused kernels leave out.

Without that a graph made before the step, and differentiated after it, would give wrong gradients in silence.
"""


def can_skip(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's step can be left out on the device, without the host knowing: Adam's fused one."""
    return type(optimizer) in ADAMS and all(group["fused"] for group in optimizer.param_groups)


@contextmanager
def skipping(optimizer: Optimizer, bad: Tensor | None) -> Iterator[None]:
    """Leave a step out on the device if `bad` is 1 there, in the way that torch's ``GradScaler`` does it."""
    if bad is None or not can_skip(optimizer) or "found_inf" in vars(optimizer):
        yield
        return
    optimizer.grad_scale, optimizer.found_inf = None, bad  # type: ignore[attr-defined]  # where a fused step looks
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]  # as above


def step_optimizer(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """Step an optimizer, without torch's wrapper for hooks and profiling while there is neither.

    The wrapper costs about 15 µs per step; what it wraps does the same arithmetic. With a hook
    registered, a profiler running, or ``step`` wrapped or replaced by anybody else (on the class,
    or on the instance as ``torch.optim.lr_scheduler`` does), ``optimizer.step()`` is called.
    """
    wrapper: Any = type(optimizer).step
    is_adam = type(optimizer) in ADAMS
    if closure is not None:
        optimizer.step(closure)
    else:
        # read even where torch's step is called then: it finds out which groups no kernel can take
        calls = read_fused(optimizer) if is_adam and "found_inf" not in vars(optimizer) else None
        if (
            _profiling is not None
            and getattr(wrapper, "__code__", None) is _torch_wrapper
            and "step" not in optimizer.__dict__
            and not _before_any
            and not _after_any
            and not optimizer._optimizer_step_pre_hooks
            and not optimizer._optimizer_step_post_hooks
            and not _profiling()
        ):
            if calls is not None and wrapper.__wrapped__ is _adam_step:
                step_fused(calls)
                return
            wrapper.__wrapped__(optimizer)
        else:
            optimizer.step()
    if is_adam:  # torch's own fused step counts no changes either
        for group in optimizer.param_groups:
            if group["fused"]:
                count_changes([parameter for parameter in group["params"] if parameter.grad is not None])
