"""fluxloop: a training-loop framework for PyTorch, for people whose training step is the research."""

from fluxloop import callbacks, logging, phases
from fluxloop.lazy import all_but, lazily

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "": "augment errors events heads losses schedules testing",
        "compute.shard": "Shard",
        "run.accelerator": "Accelerator",
        "compute.recompute": "is_recomputing recompute_activations",
        "augment": "MultiCrop TwoViews ViewDataset",
        "callback": "Callback NoConflict RunFirst Unresolvable UnsafeCallback on resolve_conflict",
        "callbacks": all_but(callbacks, "default_callbacks"),
        "data.combined": "CombinedLoader",
        "data.loaders": "TensorBatches as_dataloader overfit split",
        "errors": (
            "AmbiguousHandlerError AssignmentError BatchError CallbackConflictError CallbackCycleError "
            "CallbackError CallbackTypeError CancelEpochException CancelFittingException CancelSignal "
            "CancelStepException "
            "CheckpointError CompileError DataError DuplicateCallbackError FluxloopError HandlerError "
            "LogExistsError LossError MetricError MissingEntryError MissingProducerError ModelError OptimizerError "
            "PhaseError ProcessError ReentrantFitError SanityCheckError StateAccessError"
        ),
        "events": (
            "BackwardBegin BackwardEnd CycleBegin CycleEnd EpochBegin EpochEnd Event FitBegin FitEnd LossBegin "
            "StepBegin StepEnd UpdateBegin UpdateEnd"
        ),
        "history": "Comparison Counts History",
        "hyperparameters": (
            "Attribute Betas HyperParameter LearningRate Momentum OptimizerOption WeightDecay get_hyperparameter "
            "set_hyperparameter"
        ),
        "learner": "Learner",
        "logging": all_but(logging, "Record"),
        "loop": "runepoch runstep",
        "losses": "MixedLoss MixedTargets",
        "run.batch_size_finder": "find_batch_size",
        "run.lr_finder": "LRSweep find_lr",
        "metrics": "Loss Metric SmoothLoss accuracy binary_accuracy mae mse rmse top_k",
        "compute.modes": "watching",
        "order.diagram": "Diagram",
        "phase": "AbstractTrainingPhase AbstractValidationPhase FittingPhase Phase ProbePhase",
        "phases": all_but(phases),
        "processes.batch_norm": "SynchronisedBatchNorm synchronise_batch_norm",
        "randomness": "seed_everything start_generators stream_seed",
        "schedules": (
            "constant cosine exponential inverse_sqrt linear one_cycle polynomial repeat sequence shift sine "
            "triangle warmup"
        ),
        "stopping": (
            "GL PQ InvalidValue Never NoImprovement NumberLimit NumberSinceBest Patience Threshold TimeLimit Warmup"
        ),
    },
)
