"""The commands of `moe-cluster` that talk to a running front. Each is a parser and a `run(args) -> exit code`."""
