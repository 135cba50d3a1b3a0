"""Engines: who runs the workers. Each is a file with one `run`, see `Engine` in `nnslim.prediction.run_directory`."""
