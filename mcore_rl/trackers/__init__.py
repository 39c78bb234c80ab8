"""Services that show a run's metrics: W&B, TensorBoard, trackio, MLflow, by name in `run.trackers`.

metrics.jsonl stays the record of a run. A service is handed a copy of every step, from a thread of its own,
so that one that hangs or is away costs a run nothing but its own curves.
"""
