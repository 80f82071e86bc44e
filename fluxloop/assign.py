"""Assignments to a learner or a callback: they take effect, or are refused with what to type."""

from __future__ import annotations

from fluxloop.errors import AssignmentError, did_you_mean

put = object.__setattr__
"""Set an attribute of a learner from inside, past the checks for its users: quickly."""

_AROUND = "for another stage of training make a learner around the same modules: Learner(learner.model, ...)"

_MODEL = (
    "the optimizers hold the parameters of the model that it has. Put a new part into that (learner.model.head = ...) "
    "and the part's parameters into an optimizer (learner.optimizer.add_param_group), take weights from a file "
    f"(learner.load_weights(path)), or, {_AROUND}"
)

FIXED = {
    "model": _MODEL,
    "models": _MODEL,
    "optimizer": "gradients, schedules, counts and checkpoints belong to the one that it has. Change an option of that "
    "(set_hyperparameter(learner, LearningRate, 0.1)), add parameters to it (learner.optimizer.add_param_group), or, "
    f"{_AROUND}",
    "accelerator": "models, optimizers and random streams were made for the one that it has; give another to a new "
    "learner: Learner(..., accelerator=Accelerator('cpu'))",
    "callbacks": "their order has to be proved first; type learner.set_callbacks([...]), add_callback, "
    "replace_callback or remove_callback",
    "seed": "the random numbers of the run follow from the one that it has; give another to a new learner: "
    "Learner(..., seed=1)",
    "params": "they are those of the models; change their values in place, in torch.no_grad(): parameter.copy_(...)",
    "weights": "it finds modules by name; give one of them new values: learner.weights['G'].load_state_dict(...)",
    "history": "callbacks record into the one that it has; a new learner begins with an empty one",
    "cbstate": "callbacks share the one that it has; set an entry of it: learner.cbstate.name = value",
    "batch_size": "it is the number of rows of the running step; give data with batches of another size: "
    "TensorBatches(xs, ys, batch_size=64)",
}
"""What of a learner cannot be replaced, and what to do instead."""


def check_known(learner: object, name: str, value: object) -> None:
    """Raise for an attribute of a learner that does not exist, or that cannot be replaced.

    Args:
        learner: A learner that has been made.
        name: The attribute's name, without an underscore in front.
        value: What was assigned to it.

    Raises:
        AssignmentError: Says what to type instead.
    """
    if name in FIXED:
        if value is not getattr(learner, name):
            raise AssignmentError(f"learner.{name} was assigned, which has no effect: {FIXED[name]}")
    elif not hasattr(learner, name):
        known = [known for known in dir(learner) if not known.startswith("_")]
        raise AssignmentError(
            f"learner.{name} was assigned, and a learner has no attribute {name!r}{did_you_mean(name, known)}\n"
            f"  to keep something of your own there, begin its name with an underscore (learner._{name} = ...), or "
            "write a subclass of Learner"
        )
