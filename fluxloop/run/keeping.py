"""Keep the state of a learner: in memory, in files, in a copy."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fluxloop.checkpoint.folder import read, write
from fluxloop.checkpoint.gathering import gather
from fluxloop.checkpoint.parts import made_whole
from fluxloop.checkpoint.restoring import restore
from fluxloop.errors import CheckpointError
from fluxloop.guard.given import as_path
from fluxloop.interfaces import RunLearner
from fluxloop.run.scope import place_of
from fluxloop.run.session import copy_at_rest

if TYPE_CHECKING:
    from fluxloop.checkpoint.manifest import Manifest

L = TypeVar("L", bound=RunLearner)


class KeepsState:
    """The methods of a learner that save and load its state, and copy it."""

    def place(self: RunLearner) -> dict[str, Any] | None:
        """Return where the running fit stands in phases and data, as plain data; None where none can be resumed.

        Raises:
            CheckpointError: In the middle of a step, or of an epoch that cannot be resumed there.
        """
        return place_of(self)

    def state_dict(self: RunLearner) -> dict[str, Any]:
        """Return the whole state as plain data and tensors, from which a run goes on to the bit.

        As with ``Module.state_dict()`` the tensors are those in use; ``copy.deepcopy`` makes a copy.

        Raises:
            CheckpointError: Something cannot be kept, or a step is under way.
        """
        return gather(self, self.place())

    def load_state_dict(self: RunLearner, state: dict[str, Any]) -> None:
        """Restore everything from what `state_dict` returned; an epoch that was under way is not continued.

        Raises:
            CheckpointError: It does not fit this learner; nothing is changed.
        """
        from fluxloop.checkpoint.misfits import check_fits

        check_fits(self, state)
        restore(self, state, begun=True)

    def save(self: RunLearner, path: str | PathLike[str], *, format: Literal["file", "distributed"] = "file") -> None:
        """Write `state_dict` to a file, which is either complete or not there.

        Of several processes all call this, and the first one writes: one file with whole tensors, which any number of
        processes can load.

        Raises:
            CheckpointError: It cannot be written, or something cannot be kept.
        """
        file = as_path("learner.save", "path", path, CheckpointError)
        if format not in ("file", "distributed"):
            raise CheckpointError(f"learner.save(format={format!r}) was given; expected 'file' or 'distributed'")
        if format == "distributed":
            from fluxloop.checkpoint.exchange import write_distributed

            write_distributed(self, file)
            return
        if file.is_dir():
            raise CheckpointError(f"learner.save({str(file)!r}) was given a folder; expected a file: 'weights.pt'")
        state, group = self.state_dict(), self.accelerator.group
        if group is None:
            write(file, state)
            return
        state = made_whole(state, keep=group.is_main)
        if group.is_main:
            write(file, state)
        group.wait()

    def load(self: RunLearner, path: str | PathLike[str]) -> None:
        """Go on from what `save` or a `Checkpointer` wrote: weights, optimizers, counts, callbacks, random streams.

        To continue an interrupted run use ``fit(epochs, resume=folder)``; for weights alone `load_weights`.

        Raises:
            CheckpointError: The file is damaged, or does not fit this learner; nothing is changed.
        """
        self.load_state_dict(read(as_path("learner.load", "path", path, CheckpointError)))

    def load_weights(
        self: RunLearner, path: str | PathLike[str], name: str = "model", *, strict: bool = True
    ) -> list[str]:
        """Load weights from a file, for a warm start: counts, schedules and optimizers stay as they are.

        Averages of those weights (`EMA`, `StochasticWeightAveraging`) begin with the loaded ones, and an
        optimizer with ``train()`` and ``eval()``, which keeps weights of its own, begins anew.

        Args:
            path: What `save` or a `Checkpointer` wrote, or ``torch.save(module.state_dict(), path)``, or a folder of
                ``torch.distributed.checkpoint``.
            name: The name of the weights, as in ``learner.weights[name]``; ``"model"`` stands for all models.
            strict: Whether all names and shapes have to agree; otherwise those that do are loaded.

        Returns:
            The names of tensors that were not loaded, those that are missing too.

        Raises:
            CheckpointError: The file is damaged or does not fit; nothing is changed.
        """
        from fluxloop.checkpoint.weights_file import load_weights

        file = as_path("learner.load_weights", "path", path, CheckpointError)
        if file.is_dir():
            from fluxloop.checkpoint.exchange import is_distributed, read_distributed

            state = read_distributed(file, self) if is_distributed(file) else read(file, weights_only=True)
        else:
            state = read(file, weights_only=True)
        not_loaded = load_weights(self, state, name, strict)
        self.weights.begin_anew(name)
        modules = list(self.models.values()) if name == "model" else [self.weights[name]]
        loaded = {parameter for module in modules for parameter in module.parameters()}
        for mode in self.updates.modes:
            if not loaded.isdisjoint(mode.parameters):
                mode.begin_anew()
        return not_loaded

    def checkpoint_manifest(self: RunLearner) -> Manifest:
        """List what a checkpoint keeps: path, owner, kind and size in bytes of each part; prints as a table.

        Raises:
            CheckpointError: Something cannot be kept.
        """
        from fluxloop.checkpoint.manifest import manifest

        return manifest(self)

    def __deepcopy__(self: L, memo: dict[int, Any]) -> L:
        """Copy everything; the copy trains to the same bits.

        What PyTorch leaves out where it copies is copied too: gradients that wait for an update, hooks of
        parameters and of optimizers. A phase goes on in the copy from where it is here. In the copy nothing is
        running, also where a fit of the original is.

        Raises:
            ModelError: A module keeps a tensor that torch does not copy, as the old ``spectral_norm`` does.
        """
        return copy_at_rest(self, memo)

    def __reduce_ex__(self: RunLearner, protocol: object) -> Any:
        """Raise: a learner has functions, open files and views that belong to its process.

        Raises:
            CheckpointError: Always; says what to do instead.
        """
        raise CheckpointError(
            "a learner cannot be pickled; write its state, learner.save('state.pt'), and in the other process make the "
            "learner anew and learner.load('state.pt'). A copy in this process: copy.deepcopy(learner)"
        )
