"""The built-in callbacks; each handles events as a user's callback would.

- Counting and measuring: ``recorder``, ``metrics``, ``traces``, ``probe`` (with ``probe_parts``, and
  ``features`` that several share), ``frechet``, ``feature_stats``, ``activation_stats``, ``profile``.
- Showing and logging: ``progress``, ``printer``, ``csv_logger``, ``log``, ``log_pictures``, ``stall_report``.
- Pictures after each epoch: ``sample_images``, ``embedding_map``, ``neighbor_images``, ``reconstructions`` and
  ``attention_maps`` (with ``pictures``, what these have in common, and ``drawing``).
- What a step uses: ``mixup`` (inputs), ``gradient_clip``, ``scheduler`` and ``lr_scheduler`` (with
  ``torch_schedulers``), ``unfreeze``, ``batch_limit``.
- Weights beside the live ones: ``ema``, ``swa``, ``keep_best``.
- The run: ``checkpointer``, ``early_stopping``, ``stop_on_nan_loss``, ``sanity_check``, ``garbage_collect``.
- Callbacks from other things: ``defaults``, ``custom``, ``conditional``; and ``set_epoch``, which is no longer needed.
"""

from fluxloop.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "activation_stats": "ActivationStats",
        "attention_maps": "AttentionMaps",
        "batch_limit": "BatchLimit",
        "checkpointer": "Checkpointer",
        "conditional": "ConditionalCallback throttle",
        "csv_logger": "CSVLogger",
        "custom": "CustomCallback",
        "defaults": "default_callbacks",
        "early_stopping": "EarlyStopping Timer",
        "ema": "EMA",
        "embedding_map": "EmbeddingMap",
        "feature_stats": "FeatureStats",
        "frechet": "FrechetDistance",
        "garbage_collect": "GarbageCollect",
        "gradient_clip": "GradientClip",
        "keep_best": "KeepBestModel",
        "log": "LogHyperParams LogMetrics LogTraces",
        "log_pictures": "LogHistograms LogImages LogVisualization",
        "lr_scheduler": "LRScheduler",
        "metrics": "Metrics",
        "mixup": "CutMix MixUp",
        "neighbor_images": "NeighborImages",
        "printer": "MetricsPrinter",
        "probe": "KNNProbe LinearProbe MetricSource",
        "profile": "Profile",
        "progress": "ProgressBar",
        "reconstructions": "ReconstructionImages",
        "recorder": "Recorder",
        "sample_images": "SampleImages",
        "sanity_check": "Check SanityCheck",
        "scheduler": "Scheduler",
        "set_epoch": "SetEpoch",
        "stop_on_nan_loss": "StopOnNaNLoss",
        "stall_report": "StallReport",
        "swa": "StochasticWeightAveraging",
        "traces": "Traces",
        "unfreeze": "Unfreeze",
    },
)
