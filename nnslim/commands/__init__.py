"""The commands of `nnslim`, a file each. Heavy imports stand inside the functions, so that --help is quick."""
